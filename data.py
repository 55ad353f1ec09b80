"""The data of CaBins (Sec. 4.2): NYU-Depth V2, KITTI's Eigen split, your own lists, toy rooms.

A sample is an RGB image and its depth in metres; 0 means that nothing was measured. A worker only
decodes a pair and cuts its fixed crop; what is random, `augment` does to the whole batch on the
training device, so that a run can be resumed. This script checks a data set and can fetch it.
"""

import argparse
import csv
import math
import os
import re
import sys
import threading
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.utils import calculate_md5
from torchvision.utils import save_image
from tqdm import tqdm

from cabins import download, mean_and_std, open_picture, write_whole


class Recipe(NamedTuple):
    """What sets a data set apart (Sec. 4.1 and 4.2); the paper's gaps are the released code's."""

    max_depth: float = 10.0  # metres; min_depth is 1e-3 throughout
    depth_scale: float = 1000.0  # value in a depth PNG of 1 m
    crop: tuple[int, int] | None = None  # rows and columns of the random crop; None: 7/8 of them
    rotation: float = 2.5  # degrees, to either side
    brightness: float = 0.1  # factors from 1 - this to 1 + this; likewise gamma and colour
    gamma: float = 0.1
    colour: float = 0.1
    focal: float = 518.86  # of the camera, in pixels of the images; the default is NYU's
    folders: tuple[str, ...] = ("",)  # where, below the root, a list's paths may begin


NYU_FOLDERS = ("", "sync", "train", "official_splits/test", "test")
KITTI_FOLDERS = ("", "raw", "raw_data", "kitti_raw") + tuple(
    f"{folder}/{part}"  # the ground truth unzips into train/ and val/
    for folder in (".", "gts", "gt_depth", "data_depth_annotated", "depth", "depth_annotated")
    for part in ("train", "val", "total", "")
)
DATASETS = {
    "nyu": Recipe(10.0, 1000.0, (416, 544), 2.5, 0.25, folders=NYU_FOLDERS),
    "kitti": Recipe(80.0, 256.0, (352, 704), 1.0, focal=721.54, folders=KITTI_FOLDERS),
    "toy": Recipe(crop=(96, 128), rotation=0.0, focal=100.0),  # rooms drawn on the fly
    "list": Recipe(),  # your own
}
LIST_URL = "https://raw.githubusercontent.com/EunjinSon1/CaBins/"
LIST_URL += "4e9c9a03d16da42e65c67f5bb7911397726ade6c/train_test_inputs/"
LIST_FILES = {"nyu": "nyudepthv2_{}_files_with_gt.txt", "kitti": "kitti_eigen_{}_files_with_gt.txt"}
LISTS = {  # number of lines, SHA-256; 45 of KITTI's test lines have no ground truth
    "nyu_train": (24231, "66e2beb718a58c5c946c169f6e70cc6ae166ddd19f5618266fff52ff7443e0e9"),
    "nyu_test": (654, "e92c191d5835a22589b843c11b80cd7235d5bd0d4136e42a6debcea4511bf906"),
    "kitti_train": (23158, "dd5e51c2df33d4c53c1d4dd01726326e7c3ac087cff165b1007738c5c8a06aca"),
    "kitti_test": (697, "1a631c1bc0d40f5580f8363bffe0ffcc9524e5ecdd56765aebfffc3dce162201"),
}
NYU_MAT, NYU_MAT_MD5 = "nyu_depth_v2_labeled.mat", "520609c519fba3ba5ac58c8fefcc3530"
TOY_ROOMS = {"train": range(640), "test": range(1_000_000, 1_000_064)}


def fixed_crop(name: str, height: int, width: int, train: bool) -> tuple[int, int, int, int]:
    """Rows from, to and columns from, to that are kept of a frame; ValueError for a wrong size."""
    if name == "nyu":
        if (height, width) != (480, 640):
            raise ValueError(f"{height} x {width} pixels; NYU's images have 480 x 640")
        return (45, 472, 43, 608) if train else (0, 480, 0, 640)  # without the white frame
    if name == "kitti":  # "KB": what lies below the sky
        if height < 352 or width < 1216:
            raise ValueError(f"{height} x {width} pixels; KITTI's images have at least 352 x 1216")
        top, left = height - 352, (width - 1216) // 2
        return top, top + 352, left, left + 1216
    if min(height, width) < 64:
        raise ValueError(f"{height} x {width} pixels; the network needs at least 64 x 64")
    return 0, height, 0, width


def evaluation_windows(name: str, height: int, width: int) -> dict[str, tuple[slice, slice]]:
    """Where depth is measured in a test image of a whole frame's size; the paper's window first."""
    if name == "nyu":
        return {"eigen": (slice(45, 471), slice(41, 601))}
    if name != "kitti":
        return {"whole": (slice(0, height), slice(0, width))}
    top, _, left, _ = fixed_crop(name, height, width, train=False)
    windows = {}  # Garg's fractions of the cropped frame, as the authors do, or of the whole one
    for key, h, w, y, x in (("nested", 352, 1216, 0, 0), ("full", height, width, top, left)):
        rows = slice(int(0.40810811 * h) - y, int(0.99189189 * h) - y)
        windows[key] = rows, slice(int(0.03594771 * w) - x, int(0.96405229 * w) - x)
    return windows


class DepthDataset(Dataset):
    """Pairs of `name`, a key of DATASETS, below the folder `root`, as the file `split` lists them.

    It has lines `image depth focal`; without one the authors' own list is fetched. NYU's test
    pairs are also read from nyu_depth_v2_labeled.mat, in `root` or as `root`. [i] gives {"image":
    (3, h, w), "depth": (1, h, w) in metres, 0 being none, "path": str, "size": (2,) rows, columns
    of the whole frame}; the image is normalised, or uint8 with `train`, for `augment`. `n_left_out`
    counts the lines without ground truth, `checksum` tells lists apart.
    """

    def __init__(
        self,
        name: str,
        root: str | Path | None = None,
        split: str | Path | None = None,
        train: bool = False,
        depth_scale: float | None = None,
        max_depth: float | None = None,
    ):
        if name not in DATASETS:
            raise ValueError(f"data is {name!r}; it must be one of {', '.join(DATASETS)}")
        self.recipe, self.name, self.train, self.n_left_out = DATASETS[name], name, train, 0
        for field, value in (("max_depth", max_depth), ("depth_scale", depth_scale)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{field} is {value}; it must be positive")
            if value is not None:
                self.recipe = self.recipe._replace(**{field: value})
        part, self.size_to_train = "train" if train else "test", None
        if name == "toy":
            if root or split or depth_scale:
                raise ValueError("toy rooms take no --root, list or --depth-scale: add --data")
            self.pairs = [("room", i) for i in TOY_ROOMS[part]]
            self.checksum = zlib.crc32(str(self.pairs).encode())
            return
        if root is None:
            raise ValueError(f"data {name!r} needs --root, the folder that holds it")
        root, is_mat = Path(root), str(root).endswith(".mat")
        if not (root.is_file() if is_mat else root.is_dir()):
            raise FileNotFoundError(f"{root}: no such folder; --root must be where {name} lies")
        if is_mat and (name != "nyu" or train):
            raise ValueError(f"{root} can only be NYU's test set; {name} {part} needs a folder")
        lines = read_list(name, part, split)
        self.checksum = zlib.crc32(str(lines).encode())
        self.pairs = self.find_pairs(root, lines)
        if name == "list" and train:
            size = self.size_to_train = read_image(self.pairs[0][0]).shape[:2]
            crop = tuple(max(64, side * 7 // 8 // 32 * 32) for side in size)
            _, _, *focal = lines[0]  # without a focal length there, NYU's in proportion
            focal = float(focal[0]) if focal else self.recipe.focal * max(size) / 640
            self.recipe = self.recipe._replace(crop=crop, focal=focal)

    def find_pairs(self, root: Path, lines: list[list[str]]) -> list[tuple]:
        """Image and depth of each line that has ground truth: paths, or .mat and index."""
        pairs, missing, folders = [], [], self.recipe.folders
        mat = root if root.is_file() else root / NYU_MAT
        has_mat = self.name == "nyu" and not self.train and mat.is_file()
        names = [fields[:2] for fields in lines if fields[1] != "None"]
        self.n_left_out = len(lines) - len(names)
        if not names:
            raise ValueError(f"the list for --data {self.name} names no pair of image and depth")
        for image, depth in names:
            pair = find(root, folders, image), find(root, folders, depth)
            digits = re.sub(r"\D", "", Path(image).stem)  # they count the .mat's pairs from 0
            if has_mat and digits and None in pair:
                pair = mat, int(digits)
            missing += [name for name, path in zip((image, depth), pair) if path is None]
            pairs.append(pair)
        if missing:
            n = f"{len(missing)} of the {2 * len(pairs)} files that the list names"
            remedy = "docs/data.md has folders and known traps; --fetch gets NYU's and KITTI's"
            raise FileNotFoundError(f"{n} are not below {root}: {missing[0]}, …; {remedy}")
        return pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> dict:
        path, depth_path = self.pairs[i]
        if self.name == "toy":
            (image, depth), scale = draw_room(depth_path), 1.0
        elif isinstance(depth_path, int):
            (image, depth), scale = read_labelled(path, depth_path), 1.0
        else:
            image, depth, scale = read_image(path), read_depth(depth_path), self.recipe.depth_scale
        if image.shape[:2] != depth.shape:
            raise ValueError(f"{path} has {image.shape[:2]} pixels, {depth_path} {depth.shape}")
        height, width = depth.shape
        if self.size_to_train not in (None, (height, width)):
            first = "but the first of the list {} x {}".format(*self.size_to_train)
            raise ValueError(f"{path} has {height} x {width} pixels, {first}: train on one size")
        try:
            top, bottom, left, right = fixed_crop(self.name, height, width, self.train)
        except ValueError as error:
            raise ValueError(f"{path} has {error}") from None
        image = torch.from_numpy(image[top:bottom, left:right].copy()).permute(2, 0, 1)  # (3, h, w)
        depth = np.divide(depth[top:bottom, left:right], scale, dtype=np.float32)
        depth = torch.from_numpy(depth)[None]  # (1, h, w)
        if self.name == "list":  # 65535, say, may stand for none
            depth[depth > self.recipe.max_depth] = 0
        if not self.train:
            mean, std = mean_and_std(image)
            image = (image / 255 - mean) / std
        name = path if isinstance(depth_path, str) else f"{path} {depth_path}"
        return {"image": image, "depth": depth, "path": name, "size": torch.tensor([height, width])}


def read_list(name: str, part: str, split: str | Path | None) -> list[list[str]]:
    """The fields of each line of a list; without `split`, of the authors' own, which is fetched."""
    if split is None:
        if name not in LIST_FILES:
            raise ValueError(f"data {name!r} needs --{part}-split, a list of its {part} pairs")
        file = LIST_FILES[name].format(part)
        split = download(LIST_URL + file, file, LISTS[f"{name}_{part}"][1])
    try:
        text = Path(split).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{split} is no list of pairs, a text in UTF-8: {error}") from None
    lines = [line.split() for line in text.splitlines() if line.strip()]
    for fields in lines:
        is_focal = len(fields) == 2 or fields[-1].replace(".", "", 1).isdigit()
        if len(fields) not in (2, 3) or not is_focal or any(".." in f.split("/") for f in fields):
            must = "it must be 'image depth focal', paths below --root and without spaces"
            raise ValueError(f"{split} has the line {' '.join(fields)!r}; {must}")
    return lines


def find(root: Path, folders: tuple[str, ...], name: str) -> str | None:
    """The file `name` in one of the folders below root, with its own suffix or another."""
    for folder in folders:
        path = root / folder / name.lstrip("/")
        for candidate in (path, *map(path.with_suffix, (".png", ".jpg", ".jpeg"))):
            if candidate.is_file():
                return str(candidate)
    return None


def read_image(path: str | Path) -> np.ndarray:
    """(H, W, 3) uint8."""
    image = open_picture(path, "an image")
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{path} is no image but perhaps a depth map: its mode is {image.mode}")
    return np.asarray(image.convert("RGB"))


def read_depth(path: str | Path) -> np.ndarray:
    """(H, W), 16-bit, in the file's own units."""
    image = open_picture(path, "a depth map")
    if not image.mode.startswith("I"):
        raise ValueError(f"{path} is no depth map: its mode is {image.mode}, not 16-bit grey")
    return np.asarray(image)


def read_labelled(path: Path, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (480, 640, 3) and depth (480, 640) in metres of a pair of nyu_depth_v2_labeled.mat."""
    try:
        import h5py

        with h5py.File(path) as file:  # its arrays are transposed
            image, depth = file["images"][index].T, file["rawDepths"][index].T
    except (ImportError, OSError, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path} has no pair {index}, or h5py is missing: {error}") from None
    framed = np.zeros_like(image)  # the recipe's test images have a black frame
    framed[7:474, 7:632] = image[7:474, 7:632]
    return framed, depth


# ---- Augmentation, on the batch ------------------------------------------------------------------


def denormalize(image: Tensor) -> Tensor:
    """Normalised images (…, 3, H, W) as colours from 0 to 1."""
    mean, std = mean_and_std(image)
    return (image * std + mean).clamp(0, 1)


def augment(
    image: Tensor,
    depth: Tensor,
    recipe: Recipe | str,
    generator: torch.Generator | None = None,
    share: tuple[int, int] = (0, 1),
) -> tuple[Tensor, Tensor]:
    """Random rotation, crop, flip and colour of a batch, by a Recipe or the name of one.

    image uint8 (B, 3, h, w), depth (B, 1, h, w) in metres -> image normalised (B, 3, H, W), depth
    (B, 1, H, W). `generator`: on the CPU. `share` (i, k): these are i, i + k, … of a larger batch.
    """
    recipe = DATASETS[recipe] if isinstance(recipe, str) else recipe
    n, _, h, w = image.shape
    rows, columns = recipe.crop
    if rows > h or columns > w:
        raise ValueError(f"images of {h} x {w} pixels are too small to crop to {rows} x {columns}")
    i, k = share
    draws = torch.rand(k * n, 10, generator=generator)[i::k]  # from 0 to 1
    draws = draws.to(image.device, non_blocking=True)[..., None, None]  # (B, 10, 1, 1)
    angle, top, left, flip, recolour = draws[:, :5].unbind(1)  # (B, 1, 1) each

    # where each output pixel comes from: unflip, uncrop, rotate about the centre of the input
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
    coloured = image ** (1 + recipe.gamma * gamma) * (1 + recipe.brightness * brightness)
    coloured = (coloured * (1 + recipe.colour * colour)).clamp(0, 1)
    image = torch.where(recolour[:, None] < 0.5, coloured, image)
    mean, std = mean_and_std(image)
    return (image - mean) / std, depth


def draw_room(seed: int, height: int = 96, width: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """A furnished room: (96, 128, 3) uint8 and its exact depth (96, 128) in metres.

    Each ray meets the walls from inside and boxes from outside; the nearest hit counts. A ray has
    length 1 along z, the optical axis (x is right, y down): its multiple at the hit is the depth.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].reshape(2, -1).astype(np.float32)
    focal = DATASETS["toy"].focal
    x, y, z = (x - width / 2 + 0.5) / focal, (y - height / 2 + 0.5) / focal, np.ones_like(x)
    pitch, yaw = rng.uniform(-0.05, 0.25), rng.uniform(-0.5, 0.5)
    y, z = np.cos(pitch) * y + np.sin(pitch) * z, np.cos(pitch) * z - np.sin(pitch) * y
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
    for i, (low, high) in enumerate(boxes):
        entry, leave = np.sort(np.stack([low[:, None] / rays, high[:, None] / rays]), axis=0)
        axis = entry.argmax(0) if i else leave.argmin(0)  # which of x, y, z the hit face is across
        hit_at = entry.max(0) if i else leave.min(0)
        is_hit = (hit_at < depth) & (hit_at <= leave.min(0)) & (hit_at > 0.3)
        tiles = np.floor((rays * hit_at - low[:, None]) / (0.25 if i else 0.5))
        tiles = 1 - 0.3 * (np.where(np.arange(3)[:, None] == axis, 0, tiles).sum(0) % 2)
        colour = np.where(is_hit, rng.uniform(0.2, 1, (3, 3))[:, axis] * tiles, colour)
        depth = np.where(is_hit, hit_at, depth)
    distance = np.sqrt(((lamp[:, None] - rays * depth) ** 2).sum(0))
    image = colour * (0.35 + 0.75 / (1 + 0.05 * distance**2)) + rng.normal(0, 0.01, colour.shape)
    image = (255 * image.clip(0, 1)).astype(np.uint8).T.reshape(height, width, 3)
    return image, depth.astype(np.float32).reshape(height, width)


# ---- What every script shares --------------------------------------------------------------------


def rank_of() -> tuple[int, int]:
    """This process's number, and of how many that torchrun started."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def choose_device(name: str | None) -> torch.device:
    """The device of that name; without a name CUDA's GPU where there is one, or the CPU."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = name or ("cuda" if has["cuda"] else "cpu")
    if not has[name]:
        raise ValueError(f"--device {name}: torch finds none on this machine")
    return torch.device(name)


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """With amp "bf16", convolutions and matrix products run in bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, amp == "bf16")


def go_fast(fast: bool = True) -> None:
    """On GPUs: TF32 in what is float32, and the fastest kernels for images of one size."""
    torch.set_float32_matmul_precision("high" if fast else "highest")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = fast


def stand_apart(worker: int) -> None:
    """In a loader's worker: Ctrl-C is for the run, whose last step still needs data."""
    os.setpgrp()


def load(dataset: Dataset, **how) -> DataLoader:
    """Batches of a data set, read by all cores but one, at most 8, of this process's share."""
    n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of torchrun, on this machine
    how["num_workers"] = min(8, max(os.cpu_count() // n_processes - 1, 0))
    how["pin_memory"] = torch.cuda.is_available()
    return DataLoader(dataset, worker_init_fn=stand_apart, **how)


def append_row(path: Path, row: dict) -> None:
    """Add a row to a CSV file, which begins with the names of its columns."""
    is_new = not path.exists() or path.stat().st_size == 0
    if not is_new and path.read_text().split("\n")[0] != ",".join(row):
        raise ValueError(f"{path} has other columns: move it away")
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def add_data_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The options that say where a data set is."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--root", metavar="DIR", help="folder of the data set, or nyu_depth_v2_labeled.mat")
    add("--train-split", metavar="FILE", help="list of training pairs; default: the authors'")
    add("--test-split", metavar="FILE", help="list of test pairs; default: the authors'")
    add("--depth-scale", type=float, help="value in a depth PNG of 1 m; default: the data set's")
    add("--max-depth", type=float, help="metres; default: the data set's")
    return group


def add_device_options(group: argparse._ArgumentGroup, amp: str) -> None:
    """Where and in which precision a network runs."""
    about = "default: cuda where there is one, or cpu; mps has not been tried"
    group.add_argument("--device", choices=("cuda", "cpu", "mps"), help=about)
    how = {"choices": ("off", "bf16"), "default": "off" if amp == "off" else None}
    group.add_argument("--amp", **how, help=f"bf16, or off: float32; default: {amp}")


def refuse(args: argparse.Namespace, names: str, why: str) -> None:
    """Raise ValueError if an option does not apply, which otherwise would do nothing."""
    for name in names.split():
        if getattr(args, name) not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')} {why}")


def run_command(main) -> None:
    """Run a script's `main`; what is wrong with its input is one sentence on standard error."""
    try:
        main()
    except (FileExistsError, NotADirectoryError) as error:
        sys.exit(f"error: {error.filename} must be a folder, but a file is there")
    except (OSError, ValueError) as error:
        # of an error in a loader's worker, what follows its traceback
        sys.exit("error: " + re.sub(r"(?s)^Caught .*\n\w+Error: ", "", str(error)).strip())
    except RuntimeError as error:
        if not re.search("out of memory|DataLoader worker", str(error)):
            raise
        sys.exit(f"error: {str(error).splitlines()[0]} Smaller batches or images may fit in memory")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


# ---- Fetching and checking a data set ------------------------------------------------------------

SOURCES = {  # "virutal" is theirs
    "nyu_train": "https://virutalbuy-public.oss-cn-hangzhou.aliyuncs.com/share/newcrfs/datasets/nyu/sync.zip",
    "nyu_test": "https://horatio.cs.nyu.edu/mit/silberman/nyu_depth_v2/nyu_depth_v2_labeled.mat",
    "kitti_raw": "https://s3.eu-central-1.amazonaws.com/avg-kitti/raw_data/{drive}/{drive}_sync.zip",
    "kitti_depth": "https://s3.eu-central-1.amazonaws.com/avg-kitti/data_depth_annotated.zip",
}
TARGETS = {"nyu_train": "sync", "kitti_raw": "raw", "kitti_depth": "data_depth_annotated"}
LICENCES = {"nyu": "NYU-Depth V2 states no licence", "kitti": "KITTI is under CC BY-NC-SA 3.0"}


def fetch(name: str, root: str | Path, train_split=None, test_split=None) -> None:
    """Get what the lists of "nyu" or "kitti" name and `root` lacks; ValueError where that fails."""
    if name not in LICENCES or str(root or ".mat").endswith(".mat"):
        raise ValueError(f"{name} cannot be fetched: only nyu and kitti can, into --root DIR")
    root, wanted = Path(root), {}  # by URL of an archive: how paths end in it, where they go
    root.mkdir(parents=True, exist_ok=True)
    for part, split in (("train", train_split), ("test", test_split)):
        kinds = ("kitti_raw", "kitti_depth") if name == "kitti" else (f"nyu_{part}",) * 2
        for image, depth, *_ in read_list(name, part, split):
            for field, kind in zip((image, depth), kinds):
                if depth != "None" and find(root, DATASETS[name].folders, field) is None:
                    drive, end = re.sub(r".*?([^/]+)_sync/.*", r"\1", field), field.lstrip("/")
                    files = wanted.setdefault(SOURCES[kind].format(drive=drive), {})
                    files[end] = root / TARGETS.get(kind, "") / end
    mat = wanted.pop(SOURCES["nyu_test"], None) and root / NYU_MAT
    hosts = ", ".join(sorted({url.split("/")[2] for url in wanted})) or "nowhere"
    also = f" and {NYU_MAT}, 2.97 GB, from horatio.cs.nyu.edu" if mat and not mat.exists() else ""
    print(f"{sum(map(len, wanted.values()))} files from {hosts}{also}; {LICENCES[name]}")
    pool, parts, stop = ThreadPoolExecutor(8), [], threading.Event()
    for url, files in wanted.items():  # in parts, each for one of eight connections
        pairs = list(files.items())
        parts += [(root, url, dict(pairs[i : i + 500]), stop) for i in range(0, len(pairs), 500)]
    try:
        if mat and not mat.exists():
            partial = Path(f"{mat}.partial")
            torch.hub.download_url_to_file(SOURCES["nyu_test"], str(partial))
            if calculate_md5(partial) != NYU_MAT_MD5:
                partial.unlink()
                raise ValueError(f"{SOURCES['nyu_test']} gave a file of bad MD5, which is deleted")
            partial.replace(mat)
        list(tqdm(pool.map(lambda part: extract(*part), parts), "parts", len(parts)))
    except (OSError, ValueError) as error:
        remedy = "what came stays; start again to go on, or see docs/data.md, By hand"
        raise ValueError(f"{error}; {remedy}") from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def extract(root: Path, url: str, files: dict[str, Path], stop: threading.Event) -> None:
    """Write files of the archive in `root` or at `url`, each whole. What breaks is tried 3 times."""
    local = root / url.rsplit("/", 1)[1]
    for tries_left in (2, 1, 0):
        try:
            if not local.exists():
                from remotezip import RemoteZip  # which reads only the parts that are needed
            archive = zipfile.ZipFile(local) if local.exists() else RemoteZip(url, timeout=60)
            with archive:
                members = {}  # one may lie up to two folders deeper than the list says
                for name in archive.namelist():
                    folders = name.rsplit(".", 1)[0].split("/")
                    if ".." not in folders:  # which would lead out of `root`
                        members |= {"/".join(folders[i:]): name for i in range(3)}
                for end, path in files.items():
                    if (member := members.get(end.rsplit(".", 1)[0])) is None:
                        raise ValueError(f"it has no {end}")
                    path = path.with_suffix(Path(member).suffix)
                    if not (path.exists() or stop.is_set()):
                        content = archive.read(member)  # which checks the sum
                        path.parent.mkdir(parents=True, exist_ok=True)
                        write_whole(path, lambda p, content=content: p.write_bytes(content))
            return
        except Exception as error:  # of many kinds: zipfile's, zlib's, remotezip's
            if not tries_left:
                raise ValueError(f"{url}: {error or type(error).__name__}") from error


def check(dataset: DepthDataset, n_expected: int | None) -> list[Tensor]:
    """Print what is found, or raise ValueError; return eight images, then depths from 0 to 1."""
    part, n, recipe = "train" if dataset.train else "test", len(dataset), dataset.recipe
    of = f", of {n_expected} lines expected" if n_expected else ""
    print(f"{part}: {n} pairs, {dataset.n_left_out} lines without ground truth{of}")
    chosen = torch.linspace(0, n - 1, 8).long().unique().tolist()
    if dataset.name == "list":
        for i in range(n) if n <= 1000 and not dataset.train else chosen:
            dataset[i]  # raises what evaluation would meet
        highest = max(read_depth(dataset.pairs[i][1]).max() for i in chosen) / recipe.depth_scale
        if highest > recipe.max_depth:
            print(f"{part}: depths go to {highest:.2f} m; above {recipe.max_depth} m they are none")
    samples = [dataset[i] for i in chosen]
    depth = torch.cat([sample["depth"].flatten() for sample in samples])
    valid, top = depth[depth > 0], recipe.max_depth
    if not len(valid):
        raise ValueError(f"{part}: there is no depth at all in {samples[0]['path']} and others")
    median, share = valid.median().item(), len(valid) / len(depth)
    size = "{} x {}".format(*samples[0]["depth"].shape[1:])
    print(f"{part}: {size} pixels, {share:.0%} with depth, median {median:.2f} m")
    if dataset.name == "kitti" and share < 0.08:
        print(f"{part}: so few depths are those of raw LiDAR, not of the annotated ground truth")
    if not 0.05 * top < median < 0.9 * top:
        print(f"{part}: the median is odd for depths to {top} m: wrong --depth-scale, --max-depth?")
    images = [s["image"] / 255 if dataset.train else denormalize(s["image"]) for s in samples]
    return images + [sample["depth"].expand(3, -1, -1) / top for sample in samples]


def main() -> None:
    parser = argparse.ArgumentParser(description="Check a data set, and show eight test pairs.")
    parser.add_argument("data", choices=DATASETS)
    add = add_data_options(parser).add_argument
    add("--fetch", action="store_true", help="first get what is missing of nyu or kitti")
    add("--out", metavar="DIR", default="runs", help="where check_DATA_….png goes; default: runs")
    args = parser.parse_args()
    if args.fetch:
        fetch(args.data, args.root, args.train_split, args.test_split)
    for part in ("test",) if str(args.root).endswith(".mat") else ("train", "test"):
        split, scale = getattr(args, f"{part}_split"), (args.depth_scale, args.max_depth)
        dataset = DepthDataset(args.data, args.root, split, part == "train", *scale)
        n_expected, _ = LISTS.get(f"{args.data}_{part}", (None, None))
        cells = check(dataset, None if split else n_expected)
    cells = [F.interpolate(cell[None], (192, 256))[0] for cell in cells]
    n, top = len(cells) // 2, dataset.recipe.max_depth
    path = Path(args.out) / f"check_{args.data}_0_to_{top:g}_m.png"  # from black to white
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: save_image(cells, partial, nrow=n, format="png"))
    print(f"{path} shows {n} test images above their depths: do they belong together?")


if __name__ == "__main__":
    run_command(main)
