"""The data of CaBins (Sec. 4.2): NYU-Depth V2, KITTI's Eigen split, your own lists, toy rooms.

A sample is an RGB image with its depth in metres, where 0 means that nothing was measured. A
loader's worker decodes a pair and cuts the fixed crop out of it. `augment` does everything random,
on the whole batch and on the training device. `python data.py NAME --root DIR` checks a data set.
`python -m extras.fetch` gets NYU and KITTI.
"""

import argparse
import csv
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cabins import Config, InputError, download, normalize, open_picture, read_picture


class Recipe(NamedTuple):
    """What differs between data sets."""

    max_depth: float = 10.0  # metres; min_depth is 1e-3 for all
    depth_scale: float = 1000.0  # the value that stands for 1 m in a depth PNG
    crop: tuple[int, int] | None = None  # rows and columns of the random crop; None: 7/8 of each
    rotation: float = 2.5  # degrees, to either side
    brightness: float = 0.1  # the image is multiplied by a factor within 1 ± this
    longer_side: int | None = None  # longer side of the frames, pixels; None: the first pair's
    folders: tuple[str, ...] = ("",)  # below the root, in which the paths of a list may begin


NYU_FOLDERS = ("", "sync", "official_splits/test")
ANNOTATED = "data_depth_annotated"  # KITTI's depth
KITTI_FOLDERS = ("", "raw", f"{ANNOTATED}/train", f"{ANNOTATED}/val", "gts", "gt_depth")
DATASETS = {  # NOTE(paper silent): crop, rotation and brightness are the released code's
    "nyu": Recipe(crop=(416, 544), brightness=0.25, longer_side=640, folders=NYU_FOLDERS),
    "kitti": Recipe(80.0, 256.0, (352, 704), 1.0, longer_side=1216, folders=KITTI_FOLDERS),
    "toy": Recipe(crop=(96, 128), rotation=0.0, longer_side=128),  # rooms drawn on the fly
    "list": Recipe(),  # your own pairs
}
RELEASED = "https://raw.githubusercontent.com/EunjinSon1/CaBins"  # the authors' code
LIST_URL = f"{RELEASED}/4e9c9a03d16da42e65c67f5bb7911397726ade6c/train_test_inputs/"
LIST_FILES = {"nyu": "nyudepthv2_{}_files_with_gt.txt", "kitti": "kitti_eigen_{}_files_with_gt.txt"}
LIST_SHA256 = {  # the comments give the lines; 45 of KITTI's test lines have no ground truth
    "nyu_train": "66e2beb718a58c5c946c169f6e70cc6ae166ddd19f5618266fff52ff7443e0e9",  # 24,231
    "nyu_test": "e92c191d5835a22589b843c11b80cd7235d5bd0d4136e42a6debcea4511bf906",  # 654
    "kitti_train": "dd5e51c2df33d4c53c1d4dd01726326e7c3ac087cff165b1007738c5c8a06aca",  # 23,158
    "kitti_test": "1a631c1bc0d40f5580f8363bffe0ffcc9524e5ecdd56765aebfffc3dce162201",  # 697
}
NYU_MAT = "nyu_depth_v2_labeled.mat"
TOY_ROOMS = {"train": range(640), "test": range(1_000_000, 1_000_064)}
SUFFIXES = (".png", ".jpg", ".jpeg")  # KITTI's lists say .jpg, and KITTI's images are .png


def fixed_crop(name: str, height: int, width: int, train: bool) -> tuple[slice, slice]:
    """Rows and columns of a frame that are used."""
    if name == "nyu" and train:
        return np.s_[45:472, 43:608]  # without the white border
    if name == "kitti":  # the "KB" crop: the lower, middle part of the frame
        return np.s_[height - 352 : height, (width - 1216) // 2 : (width + 1216) // 2]
    return np.s_[0:height, 0:width]


def evaluation_windows(name: str, height: int, width: int) -> dict[str, tuple[slice, slice]]:
    """Measured rows and columns of a test sample, the paper's first, by the size of its frame."""
    if name != "kitti":
        eigen = {"eigen": np.s_[45:471, 41:601]}
        return eigen if name == "nyu" else {"whole": np.s_[0:height, 0:width]}
    # NOTE(differs): the authors take Garg's fractions of the cropped 352 x 1216, BTS of the frame.
    top, left = (part.start for part in fixed_crop(name, height, width, train=False))
    rows = slice(int(0.40810811 * height) - top, int(0.99189189 * height) - top)
    columns = slice(int(0.03594771 * width) - left, int(0.96405229 * width) - left)
    return {"nested": np.s_[143:349, 43:1172], "full": (rows, columns)}


class DepthDataset(Dataset):
    """The pairs below the folder `root` that the file `split`, or else the authors' list, names.

    NYU's test pairs can also come from its .mat, in or as `root`. `changes` replace fields of the
    recipe, if not None. [i] is {"image": (3, h, w), normalised or, with `train`, uint8, "depth":
    (1, h, w) in metres, "path": str, "size": the frame's rows and columns}. Raises InputError.
    """

    def __init__(self, name: str, root=None, split=None, train: bool = False, **changes: float):
        self.name = name
        self.train = train
        self.recipe = DATASETS[name]._replace(**{k: v for k, v in changes.items() if v is not None})
        part = "train" if train else "test"
        if name == "toy":
            if root or split:
                raise InputError("toy rooms have no --root and no list; is --data missing?")
            lines = self.pairs = [("room", i) for i in TOY_ROOMS[part]]
        else:
            if not os.path.exists(root or ""):
                raise InputError(f"--root is {root}; it must be the folder of {name}'s data")
            lines = read_list(name, part, split)
            self.pairs = self.find_pairs(Path(root), [x[:2] for x in lines if x[1] != "None"])
        self.n_left_out = len(lines) - len(self.pairs)  # without ground truth
        self.frame_size = self.read(0)[1].shape if name == "list" and train else None

    def find_pairs(self, root: Path, names: list[list[str]]) -> list[tuple]:
        """Both files of each pair or, if any is missing, NYU's .mat and the pair's number in it."""
        folders = [root / folder for folder in self.recipe.folders]
        pairs = [(find(image, folders, SUFFIXES), find(depth, folders)) for image, depth in names]
        missing = [listed for listed, found in zip(names, pairs) if None in found]
        if not missing:
            return pairs
        mat = root if root.is_file() else root / NYU_MAT
        if self.name == "nyu" and not self.train and mat.is_file():
            return [(mat, int(re.sub(r"\D", "", Path(x).stem))) for x, _ in names]  # from 0
        n = f"{len(missing)} of the {len(names)} listed pairs"
        raise InputError(f"{' or '.join(missing[0])} is not below {root} ({n}); see docs/data.md")

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Image (H, W, 3) uint8 and depth (H, W) in metres of the whole frame, and its path."""
        path, depth_path = self.pairs[i]
        if isinstance(depth_path, int):  # a toy room, or a pair in NYU's .mat
            pair = draw_room(depth_path) if path == "room" else read_labelled(path, depth_path)
            return *pair, f"{path} {depth_path}"
        image, depth = open_picture(path), open_picture(depth_path, "a 16-bit grey PNG")
        turned = any(x.getexif().get(0x0112, 1) not in (0, 1) for x in (image, depth))  # EXIF
        if turned or image.size != depth.size or image.mode[0] in "IF" or depth.mode[0] != "I":
            found = f"{image.mode} {image.size[::-1]} and {depth.mode} {depth.size[::-1]}"
            need = "a picture without EXIF rotation and a 16-bit grey PNG of its size"
            raise InputError(f"{path}, {depth_path} are {found}; needed: {need}, see docs/data.md")
        return read_picture(image), np.asarray(depth, np.float32) / self.recipe.depth_scale, path

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> dict:
        image, depth, path = self.read(i)
        size = depth.shape
        least = (352, 1216) if self.name == "kitti" else (64, 64)
        if size[0] < least[0] or size[1] < least[1]:
            raise InputError(f"{path} has {size} rows and columns; it must have at least {least}")
        if size != (self.frame_size or size):
            raise InputError(f"{path} has {size} rows and columns; resize it to {self.frame_size}")
        used = fixed_crop(self.name, *size, self.train)
        image = torch.tensor(image[used]).permute(2, 0, 1)  # (3, h, w)
        depth = torch.tensor(depth[used])[None]  # (1, h, w)
        if self.name == "list":  # values above the range, and 65535, often stand for none
            depth[depth > min(self.recipe.max_depth, 65534 / self.recipe.depth_scale)] = 0
        image = image if self.train else normalize(image / 255)
        return {"image": image, "depth": depth, "path": path, "size": torch.tensor(size)}


def read_list(name: str, part: str, split: str | Path | None) -> list[list[str]]:
    """The fields `image depth [focal]` of each line of `split`, or else of the authors' list."""
    if split is None and name != "list":
        file = LIST_FILES[name].format(part)
        split = download(LIST_URL + file, file, LIST_SHA256[f"{name}_{part}"])
    if not os.path.isfile(split or ""):
        raise InputError(f"--{part}-split is {split}; it must be a list of the {part} pairs")
    text = Path(split).read_text(encoding="utf-8-sig", errors="replace")
    lines = [line.strip() for line in text.splitlines() if not line.lstrip().startswith("#")]
    # Where a line has a tab, only tabs separate its fields, so that names may hold spaces.
    fields = [re.split(r"\s*\t\s*" if "\t" in line else r"\s+", line) for line in lines if line]
    wrong = [found for found in fields if len(found) not in (2, 3)]
    if wrong or all(found[1] == "None" for found in fields):
        found = f"the {part} list {split} has {wrong[0] if wrong else 'no pair with depth'}"
        raise InputError(f"{found}; a line is 'image depth [focal]': see docs/data.md")
    return fields


def find(name: str, folders: list[Path], suffixes: tuple[str, ...] = ()) -> str | None:
    """The file of that name, absolute or below a folder, or else one with another suffix."""
    names = [name, *(os.path.splitext(name)[0] + suffix for suffix in suffixes)]
    names = [x for name in names for x in (name, name.lstrip("/"))]  # NYU's list has /a/b.jpg
    paths = (os.path.join(folder, x) for x in names for folder in folders)  # x if it is absolute
    return next(filter(os.path.isfile, paths), None)


def read_labelled(mat: Path, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (480, 640, 3) uint8 and depth (480, 640) in metres of one pair in NYU's .mat."""
    try:
        import h5py

        with h5py.File(mat) as file:  # its arrays are transposed
            image, depth = file["images"][number].T, file["rawDepths"][number].T
    except (ImportError, OSError, KeyError, IndexError, ValueError) as error:
        raise InputError(f"pair {number} of {mat} cannot be read: {error}") from error
    return np.pad(image[7:474, 7:632], ((7, 6), (7, 8), (0, 0))), depth  # black border, as theirs


def draw_room(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A furnished room: image (96, 128, 3) uint8 and its exact depth (96, 128) in metres."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-47.5:48, -63.5:64].reshape(2, -1).astype(np.float32) / 100  # the focal length
    pitch, yaw = rng.uniform(-0.05, 0.25), rng.uniform(-0.5, 0.5)  # turn the rays (x, y, 1)
    y, z = np.cos(pitch) * y + np.sin(pitch), np.cos(pitch) - np.sin(pitch) * y
    rays = np.stack([np.cos(yaw) * x + np.sin(yaw) * z, y, np.cos(yaw) * z - np.sin(yaw) * x])

    size = rng.uniform((3, 2.4, 3.5), (6, 3.0, 8.5))
    floor = rng.uniform(1.2, 1.7)  # below the camera
    low = np.array([-rng.uniform(0.25, 0.75) * size[0], floor - size[1], -0.15 * size[2]])
    lamp = low + size * (0.5, 0.1, 0.5)
    boxes = [(low, low + size)]  # the room, then the furniture
    for _ in range(rng.integers(3, 8)):
        side = rng.uniform((0.3, 0.3, 0.3), (1.2, 1.6, 1.2))
        corner = rng.uniform(low, low + size - side)
        corner[1:] = floor - side[1], max(corner[2], 1.0)  # on the floor, in front of the camera
        boxes.append((corner, corner + side))

    depth, colour = np.inf, 0.0
    for i, (low, high) in enumerate(boxes):  # rays hit the room from inside, boxes from outside
        entry, leave = np.sort(np.stack([low[:, None] / rays, high[:, None] / rays]), axis=0)
        axis = entry.argmax(0) if i else leave.argmin(0)  # normal to the face that is hit
        hit_at = entry.max(0) if i else leave.min(0)  # in multiples of the ray: metres ahead
        is_hit = (hit_at < depth) & (hit_at <= leave.min(0)) & (hit_at > 0.3)
        tiles = np.floor((rays * hit_at - low[:, None]) / (0.25 if i else 0.5))
        tiles = 1 - 0.3 * (np.where(np.arange(3)[:, None] == axis, 0, tiles).sum(0) % 2)
        colour = np.where(is_hit, rng.uniform(0.2, 1, (3, 3))[:, axis] * tiles, colour)
        depth = np.where(is_hit, hit_at, depth)
    distance = np.sqrt(((lamp[:, None] - rays * depth) ** 2).sum(0))
    image = colour * (0.35 + 0.75 / (1 + 0.05 * distance**2)) + rng.normal(0, 0.01, colour.shape)
    image = (255 * image.clip(0, 1)).astype(np.uint8).T.reshape(96, 128, 3)
    return image, depth.astype(np.float32).reshape(96, 128)


def describe(dataset: DepthDataset) -> str:
    """One line about the depth in up to eight pairs. It shows whether scale and range fit."""
    n = len(dataset)
    scale = dataset.recipe.depth_scale
    top = dataset.recipe.max_depth
    depth = np.concatenate([dataset.read(i)[1].ravel() for i in range(0, n, 1 + n // 8)])
    known = depth[(depth > Config.min_depth) & (depth < 65535 / scale)]  # 65535: often no depth
    doubt = "wrong --depth-scale or --max-depth?"
    if not (known < top).any():
        raise InputError(f"{dataset.read(0)[2]} and others have no depth below {top:g} m: {doubt}")
    median = np.median(known)
    doubt = "" if 0.05 * top < median < 0.9 * top else f"; {doubt}"
    return (
        f"{n} pairs ({dataset.n_left_out} without ground truth left out); "
        f"{len(known) / len(depth):.0%} of their pixels have a depth, in units of 1/{scale:g} m; "
        f"median {median:.2f} m, deepest {known.max():.2f} m, {(known > top).mean():.1%} beyond "
        f"{top:g} m{doubt}"
    )


def denormalize(image: Tensor) -> Tensor:
    """Normalised images (…, 3, H, W) as colours from 0 to 1."""
    mean, std = torch.tensor([Config.image_mean, Config.image_std], device=image.device)
    return image * std[:, None, None] + mean[:, None, None]


def augment(
    image: Tensor, depth: Tensor, recipe: Recipe | str, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Random rotation, crop, flip and colour of a batch, by a recipe or the name of a data set.

    image uint8 (B, 3, h, w), depth (B, 1, h, w) in metres -> image normalised (B, 3, H, W), depth
    (B, 1, H, W). H x W is the recipe's crop, or 7/8 of each side in multiples of 32, at least 64.
    """
    recipe = DATASETS[recipe] if isinstance(recipe, str) else recipe
    n, _, h, w = image.shape
    rows, columns = recipe.crop or [max(64, side * 7 // 8 // 32 * 32) for side in (h, w)]
    draws = torch.rand(n, 10, 1, 1, generator=generator).to(image.device)  # [0, 1), made on the CPU
    angle, top, left, flip, recolour = draws[:, :5].unbind(1)  # (B, 1, 1) each

    # The location in the input of each output pixel: undo the flip, the crop, then the rotation.
    # NOTE(differs): the released code rotates with PIL, which truncates colours to 8 bits.
    # F.affine_grid is a matrix product, which TF32 on a GPU would round to 10 bits.
    x = torch.arange(columns, device=image.device)  # (W,)
    y = torch.arange(rows, device=image.device)[:, None]  # (H, 1)
    x = torch.where(flip < 0.5, columns - 1 - x, x)  # (B, 1, W)
    x = x + (left * (w - columns + 1)).floor() - (w - 1) / 2  # (B, 1, W), 0 at the centre
    y = y + (top * (h - rows + 1)).floor() - (h - 1) / 2  # (B, H, 1)
    angle = recipe.rotation * (torch.pi / 180) * (2 * angle - 1)  # radians
    source_x = angle.cos() * x - angle.sin() * y  # (B, H, W)
    source_y = angle.sin() * x + angle.cos() * y
    grid = torch.stack([source_x * 2 / (w - 1), source_y * 2 / (h - 1)], dim=-1)  # (B, H, W, 2)
    image = F.grid_sample(image / 255, grid, "bilinear", align_corners=True)  # zeros outside
    depth = F.grid_sample(depth, grid, "nearest", align_corners=True)

    gamma, brightness, colour = (2 * draws[:, 5:] - 1).split((1, 1, 3), 1)  # (B, 1 or 3, 1, 1)
    coloured = image ** (1 + 0.1 * gamma) * (1 + recipe.brightness * brightness)
    coloured = (coloured * (1 + 0.1 * colour)).clamp(0, 1)
    return normalize(torch.where(recolour[:, None] < 0.5, coloured, image)), depth


# ---- What all scripts share ----------------------------------------------------------------------
def choose_device(name: str | None = None) -> torch.device:
    """The device of that name; without a name, CUDA's GPU if there is one, else the CPU."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def use_tf32(enabled: bool) -> None:
    """Let GPUs compute float32 in TF32, with the kernels that are fastest for one image size."""
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    torch.backends.cudnn.allow_tf32 = enabled
    torch.backends.cudnn.benchmark = enabled


def load(dataset: Dataset, device=None, workers: int | None = None, **options) -> DataLoader:
    """Batches of a data set for a device, read by `workers` processes; by default, up to 8."""
    if workers is None:  # one core, of those that we may use, is left for training
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of torchrun, on this machine
        workers = min(8, max(cores // n_processes - 1, 0))
    return DataLoader(dataset, num_workers=workers, pin_memory="cuda" in str(device), **options)


def append_row(path: str | Path, row: dict) -> None:
    """Add a row to a CSV file, which begins with the names of its columns."""
    with open(path, "a", newline="") as file:
        rows = [row.values()] if file.tell() else [row, row.values()]
        csv.writer(file, lineterminator="\n").writerows(rows)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where a data set is, how it is read, and where a network runs."""
    add = parser.add_argument
    add("--root", type=os.path.abspath, metavar="DIR", help=f"folder of the data set, or {NYU_MAT}")
    add("--depth-scale", type=float, metavar="X", help="value of 1 m in a depth PNG")
    add("--max-depth", type=float, metavar="M", help="end of the depth range in metres")
    add("--device", help="cuda, cpu or mps (untested); default: cuda where there is one, else cpu")
    add("--workers", type=int, metavar="N", help="loading processes; default: up to 8")


def run_command(main: Callable[[], object]) -> None:
    """Run a script's `main`. A wrong file or setting becomes one sentence, with exit status 1."""
    try:
        main()
    except FileExistsError as error:  # by mkdir: a folder to write to must be new
        raise SystemExit(f"error: {error.filename} exists: choose another folder") from None
    except InputError as error:  # a loader's worker puts its traceback before the sentence
        raise SystemExit(f"error: {str(error).rpartition('InputError: ')[2].strip()}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description="Check a data set: its files, scale and range.")
    parser.add_argument("data", choices=DATASETS)
    parser.add_argument("--train-split", metavar="FILE", help="list of training pairs")
    parser.add_argument("--test-split", metavar="FILE", help="list of test pairs")
    add_options(parser)
    args = parser.parse_args()
    scale = {"depth_scale": args.depth_scale, "max_depth": args.max_depth}
    for part in ("test",) if str(args.root).endswith(".mat") else ("train", "test"):
        split = getattr(args, f"{part}_split")
        dataset = DepthDataset(args.data, args.root, split, part == "train", **scale)
        print(f"{part}: {describe(dataset)}")
        for _ in tqdm(load(dataset, None, args.workers, batch_size=None), part, disable=None):
            pass  # a bad pair raises here, and not after hours of training


if __name__ == "__main__":
    run_command(main)
