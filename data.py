"""The data of CaBins (Sec. 4.2): NYU-Depth V2, KITTI's Eigen split, your own lists, toy rooms.

A sample is an RGB image with its depth in metres, where 0 means that nothing was measured. A
loader's worker decodes a pair and cuts the fixed crop out of it. `augment` does everything random,
on the whole batch and on the training device. The last part is what all scripts share.

`python data.py NAME --root DIR` checks a data set. `python -m extras.fetch` gets NYU and KITTI.
"""

import argparse
import contextlib
import csv
import functools
import math
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cabins import Config, download, normalize, open_picture, read_picture


class Recipe(NamedTuple):
    """What differs between data sets. NOTE(paper silent): crop to brightness are as released."""

    max_depth: float = 10.0  # metres; min_depth is 1e-3 for all
    depth_scale: float = 1000.0  # the value that stands for 1 m in a depth PNG
    crop: tuple[int, int] | None = None  # rows and columns of the random crop; None: see `augment`
    rotation: float = 2.5  # degrees, to either side
    brightness: float = 0.1  # the image is multiplied by a factor within 1 ± this
    folders: tuple[str, ...] = ("",)  # folders below the root in which a list's paths may begin


NYU_DIRS = ("", "sync", "train", "official_splits/test", "test")
KITTI_DEPTH = ("", "gts/", "gt_depth/", "data_depth_annotated/", "depth/", "depth_annotated/")
KITTI_DIRS = ("", "raw", "raw_data", "kitti_raw")  # of images; depth unzips into train/ and val/
KITTI_DIRS += tuple(top + part for top in KITTI_DEPTH for part in ("train", "val", "total", ""))
DATASETS = {
    "nyu": Recipe(crop=(416, 544), brightness=0.25, folders=NYU_DIRS),
    "kitti": Recipe(80.0, 256.0, (352, 704), rotation=1, folders=KITTI_DIRS),
    "toy": Recipe(crop=(96, 128), rotation=0),  # rooms drawn on the fly
    "list": Recipe(),  # your own pairs
}
LIST_URL = "https://raw.githubusercontent.com/EunjinSon1/CaBins/"
LIST_URL += "4e9c9a03d16da42e65c67f5bb7911397726ade6c/train_test_inputs/"
LIST_FILES = {"nyu": "nyudepthv2_{}_files_with_gt.txt", "kitti": "kitti_eigen_{}_files_with_gt.txt"}
LISTS = {  # SHA-256 and number of lines; 45 of KITTI's test lines have no ground truth
    "nyu_train": "66e2beb718a58c5c946c169f6e70cc6ae166ddd19f5618266fff52ff7443e0e9",  # 24,231
    "nyu_test": "e92c191d5835a22589b843c11b80cd7235d5bd0d4136e42a6debcea4511bf906",  # 654
    "kitti_train": "dd5e51c2df33d4c53c1d4dd01726326e7c3ac087cff165b1007738c5c8a06aca",  # 23,158
    "kitti_test": "1a631c1bc0d40f5580f8363bffe0ffcc9524e5ecdd56765aebfffc3dce162201",  # 697
}
NYU_MAT = "nyu_depth_v2_labeled.mat"
TOY_ROOMS = {"train": range(640), "test": range(1_000_000, 1_000_064)}


def fixed_crop(name: str, height: int, width: int, train: bool) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of the part of a frame that is used."""
    if name == "nyu" and train:
        return 45, 472, 43, 608  # without the white border
    if name == "kitti":  # the "KB" crop: the lower, middle part of the frame
        top, left = height - 352, (width - 1216) // 2
        return top, top + 352, left, left + 1216
    return 0, height, 0, width


def evaluation_windows(name: str, height: int, width: int) -> dict[str, tuple[slice, slice]]:
    """Measured rows and columns of a test sample, the paper's first, by the size of its frame."""
    if name == "nyu":
        return {"eigen": (slice(45, 471), slice(41, 601))}
    if name != "kitti":
        return {"whole": (slice(0, height), slice(0, width))}
    # NOTE(differs): the authors take Garg's fractions of the cropped 352 x 1216, BTS of the frame.
    top, _, left, _ = fixed_crop(name, height, width, train=False)
    rows = slice(int(0.40810811 * height) - top, int(0.99189189 * height) - top)
    columns = slice(int(0.03594771 * width) - left, int(0.96405229 * width) - left)
    return {"nested": (slice(143, 349), slice(43, 1172)), "full": (rows, columns)}


class DepthDataset(Dataset):
    """The pairs below the folder `root` that the file `split` lists. `name` is a key of DATASETS.

    Without `split`, the authors' list is downloaded. NYU's test pairs can also come from its .mat,
    in `root` or as `root`. `changes` replace fields of the recipe, such as max_depth, if not None.
    [i] is {"image": (3, h, w), "depth": (1, h, w) in metres, "path": str, "size": the frame's rows
    and columns}. The image is normalised, or uint8 with `train`. Raises ValueError or OSError.
    """

    def __init__(self, name: str, root=None, split=None, train: bool = False, **changes: float):
        if name not in DATASETS:
            raise ValueError(f"data is {name!r}; it must be one of {', '.join(DATASETS)}")
        changes = {field: value for field, value in changes.items() if value is not None}
        self.name, self.train, self.recipe = name, train, DATASETS[name]._replace(**changes)
        part = "train" if train else "test"
        if name == "toy":
            if root or split or "depth_scale" in changes:
                raise ValueError("toy takes no --root, list or --depth-scale; is --data missing?")
            lines = self.pairs = [("room", i) for i in TOY_ROOMS[part]]
        else:
            if root is None or not Path(root).exists():
                raise FileNotFoundError(f"data {name!r} needs a --root that exists, not {root}")
            lines = read_list(name, part, split)
            names = [fields[:2] for fields in lines if fields[1] != "None"]
            if not names:
                raise ValueError(f"the {part} list for --data {name} names no pair with depth")
            self.pairs = self.find_pairs(Path(root), names)
        self.n_left_out = len(lines) - len(self.pairs)  # without ground truth
        self.checksum = zlib.crc32(str(lines).encode())  # tells lists apart
        self.frame_size = (480, 640) if name == "nyu" else None  # None: of any size
        if name == "list" and train:
            self.frame_size = self.read(0)[1].shape

    def find_pairs(self, root: Path, names: list[list[str]]) -> list[tuple]:
        """Both files of each pair or, if any is missing, NYU's .mat and the pair's number in it."""
        find_image, find_depth = [Finder(root, self.recipe.folders) for _ in range(2)]
        pairs = [(find_image(image), find_depth(depth)) for image, depth in names]
        missing = [names[i][k] for i, pair in enumerate(pairs) for k in (0, 1) if not pair[k]]
        if not missing:
            return pairs
        mat = root if root.is_file() else root / NYU_MAT
        numbers = [re.sub(r"\D", "", Path(image).stem) for image, _ in names]  # they start at 0
        if self.name == "nyu" and not self.train and mat.is_file() and all(numbers):
            return [(mat, int(number)) for number in numbers]
        n = f"{len(missing)} of the {2 * len(names)} listed files"
        raise FileNotFoundError(f"{missing[0]} is not below {root} ({n} missing): see docs/data.md")

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Image (H, W, 3) uint8 and depth (H, W) in metres of the whole frame, and its path."""
        path, depth_path = self.pairs[i]
        if path == "room":
            return *draw_room(depth_path), f"room {depth_path}"
        if isinstance(depth_path, int):  # the pair's number in NYU's .mat
            return *read_labelled(path, depth_path), f"{path} {depth_path}"
        image, depth = read_picture(path), open_picture(depth_path, "a 16-bit grey PNG")
        if not depth.mode.startswith("I"):
            raise ValueError(f"{depth_path} has mode {depth.mode}; it must be a 16-bit grey PNG")
        depth = np.divide(np.asarray(depth), self.recipe.depth_scale, dtype=np.float32)
        if image.shape[:2] != depth.shape:
            raise ValueError(f"{path} is {image.shape[:2]} pixels, {depth_path} is {depth.shape}")
        return image, depth, path

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> dict:
        image, depth, path = self.read(i)
        size = depth.shape
        least = (352, 1216) if self.name == "kitti" else (64, 64)
        if size[0] < least[0] or size[1] < least[1]:
            raise ValueError(f"{path} has {size} rows and columns; it must have at least {least}")
        if size != (self.frame_size or size):
            raise ValueError(f"{path} has {size} rows and columns; all must have {self.frame_size}")
        top, bottom, left, right = fixed_crop(self.name, *size, self.train)
        image = torch.tensor(image[top:bottom, left:right]).permute(2, 0, 1)  # (3, h, w)
        depth = torch.tensor(depth[top:bottom, left:right])[None]  # (1, h, w)
        if self.name == "list":  # values above the range, such as 65535, often stand for none
            depth[depth > self.recipe.max_depth] = 0
        if not self.train:
            image = normalize(image / 255)
        return {"image": image, "depth": depth, "path": path, "size": torch.tensor(size)}


def read_list(name: str, part: str, split: str | Path | None) -> list[list[str]]:
    """The fields `image depth focal` of each line of `split`, or else of the authors' list."""
    if split is None:
        if name not in LIST_FILES:
            raise ValueError(f"data {name!r} needs --{part}-split, a list of its {part} pairs")
        file = LIST_FILES[name].format(part)
        split = download(LIST_URL + file, file, LISTS[f"{name}_{part}"])
    text = Path(split).read_text(encoding="utf-8-sig", errors="replace")
    lines = [line.split() for line in text.splitlines() if line.strip()]
    for line in map(" ".join, lines):
        if ".." in re.split("[ /]", line) or not re.fullmatch(r"\S+ \S+( \d+\.?\d*)?", line):
            raise ValueError(f"{split}: {line!r} is not 'image depth [focal]', paths below --root")
    return lines


class Finder:
    """Finds the files that lists name. The folder and suffix that served last are tried first."""

    def __init__(self, root: Path, folders: Iterable[str]):
        self.root = os.path.abspath(root)
        folders = [str(root / folder) for folder in folders if (root / folder).is_dir()]
        self.tries = [(f, suffix) for f in folders for suffix in ("", ".png", ".jpg", ".jpeg")]

    def __call__(self, name: str) -> str | None:
        stem, own_suffix = os.path.splitext(name.removeprefix(self.root).lstrip("/"))
        for i, (folder, suffix) in enumerate(self.tries):
            path = f"{folder}/{stem}{suffix or own_suffix}"
            if os.path.isfile(path):
                self.tries.insert(0, self.tries.pop(i))
                return path
        return None


def read_labelled(mat: Path, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (480, 640, 3) uint8 and depth (480, 640) in metres of one pair in NYU's .mat."""
    try:
        import h5py

        with h5py.File(mat) as file:  # its arrays are transposed
            image, depth = file["images"][number].T, file["rawDepths"][number].T
    except (ImportError, OSError, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"pair {number} of {mat} cannot be read: {error}") from None
    image[:7] = image[474:] = 0  # the authors' test images, too, have a black border
    image[:, :7] = image[:, 632:] = 0
    return image, depth


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
    """One line about the depth in eight of the pairs. It shows whether scale and range fit."""
    n, recipe, top = len(dataset), dataset.recipe, dataset.recipe.max_depth
    depth = np.concatenate([dataset.read(i)[1].ravel() for i in range(0, n, math.ceil(n / 8))])
    known = depth[depth > 0]
    if not ((known > Config.min_depth) & (known < top)).any():
        what = f"{dataset.read(0)[2]} and others have no depth below {top:g} m"
        raise ValueError(f"{what}: wrong --depth-scale or --max-depth?")
    share, median = len(known) / len(depth), np.median(known)
    odd = "" if 0.05 * top < median < 0.9 * top else "; wrong --depth-scale or --max-depth?"
    line = f"{n} pairs ({dataset.n_left_out} without ground truth left out); {share:.0%} of their "
    line += f"pixels have a depth, in units of 1/{recipe.depth_scale:g} m; median {median:.2f} m, "
    return line + f"deepest {known.max():.2f} m, {(known > top).mean():.1%} beyond {top:g} m{odd}"


def denormalize(image: Tensor) -> Tensor:
    """Normalised images (…, 3, H, W) as colours from 0 to 1."""
    std, mean = (torch.tensor(x)[:, None, None] for x in (Config.image_std, Config.image_mean))
    return image * std + mean


def augment(
    image: Tensor, depth: Tensor, recipe: Recipe | str, generator=None, share: tuple = (0, 1)
) -> tuple[Tensor, Tensor]:
    """Random rotation, crop, flip and colour of a batch, by a recipe or the name of a data set.

    image uint8 (B, 3, h, w), depth (B, 1, h, w) in metres -> image normalised (B, 3, H, W), depth
    (B, 1, H, W). H x W is the recipe's crop, or 7/8 of each side in multiples of 32, at least 64.
    The generator is on the CPU. `share` (i, k): the samples are i, i + k, … of a larger batch.
    """
    recipe = DATASETS[recipe] if isinstance(recipe, str) else recipe
    n, _, h, w = image.shape
    rows, columns = recipe.crop or [max(64, side * 7 // 8 // 32 * 32) for side in (h, w)]
    i, k = share
    draws = torch.rand(k * n, 10, generator=generator)[i::k]  # uniform on [0, 1)
    draws = draws.to(image.device, non_blocking=True)[..., None, None]  # (B, 10, 1, 1)
    angle, top, left, flip, recolour = draws[:, :5].unbind(1)  # (B, 1, 1) each

    # The location in the input of each output pixel: undo the flip, the crop, then the rotation.
    # NOTE(differs): the released code rotates with PIL, which truncates colours to 8 bits.
    # F.affine_grid is a matrix product, which TF32 on a GPU would round to 10 bits.
    x = torch.arange(columns, device=image.device)  # (W,)
    y = torch.arange(rows, device=image.device)[:, None]  # (H, 1)
    x = torch.where(flip < 0.5, columns - 1 - x, x)  # (B, 1, W)
    x = x + (left * (w - columns + 1)).floor() - (w - 1) / 2  # (B, 1, W), 0 at the centre
    y = y + (top * (h - rows + 1)).floor() - (h - 1) / 2  # (B, H, 1)
    angle = math.radians(recipe.rotation) * (2 * angle - 1)
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
def rank_of() -> tuple[int, int]:
    """The number of this process, and how many processes torchrun started."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def choose_device(name: str | None) -> torch.device:
    """The device of that name; without a name, CUDA's GPU if there is one, else the CPU."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if getattr(torch, name).device_count() == 0:
        raise ValueError(f"--device {name}: torch finds none on this machine")
    return torch.device(name)


def use_tf32(enabled: bool) -> None:
    """Let GPUs compute float32 in TF32, with the kernels that are fastest for one image size."""
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = enabled


def leave_process_group(worker: int) -> None:
    os.setpgrp()  # Ctrl-C stays with the run, which needs its workers to finish the step


def load(dataset: Dataset, device=None, workers: int | None = None, **options) -> DataLoader:
    """Batches of a data set for a device, read by `workers` processes; by default, up to 8."""
    if workers is None:
        n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of torchrun, on this machine
        workers = min(8, max((os.cpu_count() or 1) // n_processes - 1, 0))
    options |= {"num_workers": workers, "worker_init_fn": leave_process_group}
    options["pin_memory"] = device is not None and device.type == "cuda"
    return DataLoader(dataset, **options)


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, and rename it to `path` when it is complete."""
    partial = Path(f"{path}.partial")
    try:
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())  # or a power cut could leave the name without the content
        partial.replace(path)
    except RuntimeError as error:  # torch's own, when the disk is full
        free = shutil.disk_usage(partial.parent).free // 10**6
        raise OSError(f"{path} could not be written, and {free} MB are free there") from error
    finally:
        partial.unlink(missing_ok=True)


def append_row(path: Path, row: dict) -> None:
    """Add a row to a CSV file, which begins with the names of its columns."""
    with open(path, "a", newline="") as file:
        rows = [row.values()] if file.tell() else [row, row.values()]
        csv.writer(file, lineterminator="\n").writerows(rows)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)  # `run_command` prints one line and no usage


def number(kind: type, least: float, what: str, text: str) -> float:
    """Read a finite number of at least `least` from `text`. The argparse types below use this."""
    with contextlib.suppress(ValueError):
        if least <= kind(text) < math.inf:
            return kind(text)
    raise argparse.ArgumentTypeError(f"{text} is not {what}")


positive_float = functools.partial(number, float, sys.float_info.min, "a finite number above 0")
positive_int = functools.partial(number, int, 1, "a whole number above 0")
whole_number = functools.partial(number, int, 0, "a whole number of 0 or more")


def add_data_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options that say where a data set is and how it stores depth."""
    group = parser.add_argument_group("data", "Defaults are the data set's, or the network's.")
    add = group.add_argument
    add("--root", metavar="DIR", help="folder of the data set, or nyu_depth_v2_labeled.mat")
    add("--train-split", metavar="FILE", help="list of training pairs")
    add("--test-split", metavar="FILE", help="list of test pairs")
    add("--depth-scale", type=positive_float, metavar="X", help="value of 1 m in a depth PNG")
    add("--max-depth", type=positive_float, metavar="M", help="end of the depth range in metres")
    return group


def add_device_options(group: argparse._ArgumentGroup) -> None:
    """Add the options that say where a network runs, and how its data are loaded."""
    add = group.add_argument
    add("--device", choices=("cuda", "cpu", "mps"), help="default: cuda, else cpu; mps is untested")
    add("--workers", type=whole_number, metavar="N", help="loading processes; default: up to 8")


def refuse(args: argparse.Namespace, names: str, why: str) -> None:
    """Raise ValueError if one of these options is given, because it would do nothing."""
    for name in names.split():
        if getattr(args, name) not in (None, False):  # 0, too, counts as not given
            raise ValueError(f"--{name.replace('_', '-')} {why}")


def run_command(main: Callable[[], object]) -> None:
    """Run a script's `main`. An error in its input becomes one sentence on standard error."""
    try:
        main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        # A loader's worker puts its traceback before the sentence, and Python an error's number.
        before = r"(?s)^(Caught .*\n\w+Error: )?(\[Errno \d+\] )?"
        text = re.sub(before, "", str(error) or repr(error))
        text = text.strip().split("\n")[0].rstrip(".")
        if re.search("Bus error|shared memory|</torch_", text):
            text += "; in Docker, use --ipc=host or --shm-size=8g"
        elif "by peer" in text:
            text = "another process has ended: see its error"
        elif re.search("out of memory|MemoryError|allocate|ALLOC_FAILED|DataLoader worker", text):
            text += "; smaller batches or images, or fewer --workers, may fit in memory"
        elif not isinstance(error, (OSError, ValueError)):
            raise
        sys.exit(f"error: {text}")


def main() -> None:
    parser = Parser(description="Check a data set: its files, scale and range.")
    parser.add_argument("data", choices=DATASETS)
    add_data_options(parser)
    args = parser.parse_args()
    scale = {"depth_scale": args.depth_scale, "max_depth": args.max_depth}
    only_test = str(args.root).endswith(".mat") and not args.train_split
    for part in ("test",) if only_test else ("train", "test"):
        split = getattr(args, f"{part}_split")
        dataset = DepthDataset(args.data, args.root, split, part == "train", **scale)
        print(f"{part}: {describe(dataset)}")
        for i in range(0, len(dataset), math.ceil(len(dataset) / 1000)):
            dataset[i]  # raises what training would meet, perhaps only after hours


if __name__ == "__main__":
    run_command(main)
