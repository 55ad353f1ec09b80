"""The data of CaBins (Sec. 4.2): NYU-Depth V2, KITTI's Eigen split, your own lists, toy rooms.

A sample is an RGB image and its depth in metres; 0 means that nothing was measured. A worker only
decodes a pair and cuts its fixed crop. `augment` then rotates, crops, flips and recolours the whole
batch on the training device. Nothing random happens in a worker, so that a run can be resumed.

`python data.py nyu --root DIR --fetch` gets what is missing of a data set and checks it. The last part is what every script shares.
"""

import argparse
import csv
import math
import os
import re
import shutil
import sys
import threading
import urllib.request
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.utils import calculate_md5
from torchvision.transforms.v2.functional import normalize
from torchvision.utils import save_image
from tqdm import tqdm

from cabins import Config, download, write_whole

# ---- The recipe (Sec. 4.1 and 4.2; what the paper leaves open is the released code's) ------------


class Recipe(NamedTuple):
    """All that sets one data set apart from another."""

    max_depth: float = 10.0  # metres; min_depth is 1e-3 throughout
    depth_scale: float = 1000.0  # value in a depth PNG of 1 m
    crop: tuple[int, int] | None = None  # rows and columns of the random crop; None: 7/8 of them
    rotation: float = 2.5  # degrees, to either side
    brightness: float = 0.1  # factors from 1 - this to 1 + this; likewise gamma and colour
    gamma: float = 0.1
    colour: float = 0.1
    image_folders: tuple[str, ...] = ("",)  # where, below the root, a list's paths may begin
    depth_folders: tuple[str, ...] = ("",)


NYU_FOLDERS = ("", "sync", "train", "official_splits/test", "test")
KITTI_IMAGES = ("", "raw", "raw_data", "kitti_raw")
KITTI_DEPTHS = tuple(  # the ground truth unzips into train/ and val/
    f"{folder}/{part}".strip("/")
    for folder in ("", "gts", "gt_depth", "data_depth_annotated", "depth", "depth_annotated")
    for part in ("", "train", "val", "total")
)
DATASETS = {
    "nyu": Recipe(
        10.0, 1000.0, (416, 544), 2.5, 0.25, image_folders=NYU_FOLDERS, depth_folders=NYU_FOLDERS
    ),
    "kitti": Recipe(
        80.0, 256.0, (352, 704), 1.0, 0.1, image_folders=KITTI_IMAGES, depth_folders=KITTI_DEPTHS
    ),
    "toy": Recipe(crop=(96, 128), rotation=0.0),  # rooms drawn on the fly
    "list": Recipe(),  # your own
}
LIST_URL = (
    "https://raw.githubusercontent.com/EunjinSon1/CaBins/"
    "4e9c9a03d16da42e65c67f5bb7911397726ade6c/train_test_inputs/"
)
LIST_FILES = {"nyu": "nyudepthv2_{}_files_with_gt.txt", "kitti": "kitti_eigen_{}_files_with_gt.txt"}
LISTS = {  # number of lines, SHA-256; 45 of KITTI's test lines have no ground truth
    "nyu_train": (24231, "66e2beb718a58c5c946c169f6e70cc6ae166ddd19f5618266fff52ff7443e0e9"),
    "nyu_test": (654, "e92c191d5835a22589b843c11b80cd7235d5bd0d4136e42a6debcea4511bf906"),
    "kitti_train": (23158, "dd5e51c2df33d4c53c1d4dd01726326e7c3ac087cff165b1007738c5c8a06aca"),
    "kitti_test": (697, "1a631c1bc0d40f5580f8363bffe0ffcc9524e5ecdd56765aebfffc3dce162201"),
}
TOY_ROOMS = {"train": range(640), "test": range(1_000_000, 1_000_064)}


def fixed_crop(name: str, height: int, width: int, train: bool) -> tuple[int, int, int, int]:
    """Rows from, to and columns from, to that are kept of every frame, before anything else.

    Raises ValueError for a frame of a size that the data set does not have.
    """
    if name == "nyu":
        if (height, width) != (480, 640):
            raise ValueError(f"{height} x {width} pixels; NYU's images have 480 x 640")
        return (45, 472, 43, 608) if train else (0, 480, 0, 640)  # without the white frame
    if name == "kitti":  # "KB": what lies below the sky
        if height < 352 or width < 1216:
            raise ValueError(f"{height} x {width} pixels; KITTI's images have at least 352 x 1216")
        top, left = height - 352, (width - 1216) // 2
        return top, top + 352, left, left + 1216
    return 0, height, 0, width


def evaluation_windows(name: str, height: int, width: int) -> dict[str, tuple[slice, slice]]:
    """Rows and columns of a test image in which depth is measured, by the window's name.

    The first is the paper's. `height` and `width` are the whole frame's. KITTI's fractions (Garg)
    are taken of the cropped frame ("nested", as the authors do) or of the whole one ("full").
    """
    if name == "nyu":
        return {"eigen": (slice(45, 471), slice(41, 601))}
    if name == "kitti":
        top, _, left, _ = fixed_crop(name, height, width, train=False)
        nested, full = garg(352, 1216), garg(height, width)
        full = [slice(s.start - o, s.stop - o) for s, o in zip(full, (top, left))]
        return {"nested": nested, "full": tuple(full)}
    return {"whole": (slice(0, height), slice(0, width))}


def garg(height: int, width: int) -> tuple[slice, slice]:
    """Garg's rows and columns of a frame."""
    rows = slice(int(0.40810811 * height), int(0.99189189 * height))
    return rows, slice(int(0.03594771 * width), int(0.96405229 * width))


# ---- Samples -------------------------------------------------------------------------------------


class DepthDataset(Dataset):
    """Pairs of `name`, a key of DATASETS, below the folder `root`.

    `split` is a list file with a line `image depth focal` for each pair; without it the authors'
    own list is fetched once. NYU's test pairs are also read from nyu_depth_v2_labeled.mat, in
    `root` or as `root`. `depth_scale` and `max_depth` take the place of the recipe's.

    [i] gives {"image": (3, h, w), "depth": (1, h, w) in metres, 0 being none, "path": str, "size":
    (2,) rows and columns of the whole frame}; the image is normalised, or uint8 with `train`, for
    `augment`. Pairs without ground truth are left out; `n_left_out` counts them. Raises
    FileNotFoundError or ValueError, naming what is missing, at construction.
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
        given = {"max_depth": max_depth, "depth_scale": depth_scale}
        given = {k: v for k, v in given.items() if v is not None}
        for option, value in given.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{option} is {value}; it must be positive")
        self.recipe = DATASETS[name]._replace(**given)
        self.name, self.train, self.n_left_out, self.size_to_train = name, train, 0, None
        part = "train" if train else "test"
        if name == "toy":
            self.pairs = [("room", i) for i in TOY_ROOMS[part]]
            return
        if root is None:
            raise ValueError(f"data {name!r} needs --root, the folder that holds it")
        root = Path(root)
        is_mat = root.suffix == ".mat"
        if not (root.is_file() if is_mat else root.is_dir()):
            raise FileNotFoundError(f"{root}: no such folder; --root must be where {name} lies")
        if is_mat and (name != "nyu" or train):
            raise ValueError(f"{root} can only be NYU's test set; {name} {part} needs a folder")
        self.pairs = self.find_pairs(root, Path(split or fetch_list(name, part)))
        if self.recipe.crop is None and train:
            self.size_to_train = read_image(self.pairs[0][0]).shape[:2]
            crop = tuple(side * 7 // 8 // 32 * 32 for side in self.size_to_train)
            self.recipe = self.recipe._replace(crop=crop)

    def find_pairs(self, root: Path, split: Path) -> list[tuple]:
        """Image and depth of each line of `split` that has ground truth: paths, or .mat and index."""
        pairs, missing = [], []
        mat = root if root.is_file() else root / NYU_MAT
        has_mat = self.name == "nyu" and not self.train and mat.is_file()
        for number, fields in read_list(split, root):
            if fields[1] == "None":
                self.n_left_out += 1
                continue
            image = find(root, self.recipe.image_folders, fields[0], (".png", ".jpg", ".jpeg"))
            depth = find(root, self.recipe.depth_folders, fields[1], (".png",))
            if has_mat and not (image and depth):  # digits in a file's name count pairs from 0
                if not (digits := re.sub(r"\D", "", Path(fields[0]).stem)):
                    raise ValueError(f"{split}, line {number}: {fields[0]} has no number to go by")
                image, depth = mat, int(digits)
            missing += [field for field, path in zip(fields, (image, depth)) if path is None]
            pairs.append((image, depth))
        if not pairs:
            raise ValueError(f"{split} names no pair of image and depth")
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of the {2 * len(pairs)} files that {split} names are not below "
                f"{root}: {', '.join(missing[:3])}, …; {self.why_missing(root, missing[-1])}"
            )
        return pairs

    def why_missing(self, root: Path, name: str) -> str:
        """The likely reason that a file is not there; docs/data.md has them all."""
        if self.name == "nyu" and self.train and (root / "official_splits/train").is_dir():
            return "official_splits/train has the 795 labelled pairs, not the 24,231 to train on"
        raw = name.replace("groundtruth", "velodyne_raw")
        if raw != name and find(root, self.recipe.depth_folders, raw, (".png",)):
            return "velodyne_raw is raw LiDAR: the ground truth is in data_depth_annotated.zip"
        if raw != name:
            return "KITTI's ground truth has two parts, train/ and val/, and both are needed"
        return "docs/data.md shows where files may lie; for nyu and kitti, --fetch gets what is missing"

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> dict:
        path, depth_path = self.pairs[i]
        scale = 1.0
        if self.name == "toy":
            image, depth = draw_room(depth_path)
        elif isinstance(depth_path, int):
            image, depth = read_labelled(path, depth_path)
        else:
            image, depth = read_image(path), read_depth(depth_path)
            scale = self.recipe.depth_scale
        if image.shape[:2] != depth.shape:
            raise ValueError(f"{path} has {image.shape[:2]} pixels, {depth_path} {depth.shape}")
        height, width = depth.shape
        if self.size_to_train not in (None, (height, width)):
            first = f"the first of the list {self.size_to_train[0]} x {self.size_to_train[1]}"
            raise ValueError(
                f"{path} has {height} x {width} pixels, but {first}: train on one size"
            )
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
            image = normalize(image / 255, Config.image_mean, Config.image_std)
        name = str(path) if isinstance(depth_path, str) else f"{path} {depth_path}"
        size = torch.tensor([height, width])
        return {"image": image, "depth": depth, "path": name, "size": size}


def fetch_list(name: str, part: str) -> Path:
    """The authors' list of `name`'s train or test pairs. It has no licence: fetched, not shipped."""
    if name not in LIST_FILES:
        raise ValueError(f"data {name!r} needs --{part}-split, a list of its {part} pairs")
    file = LIST_FILES[name].format(part)
    return download(LIST_URL + file, file, LISTS[f"{name}_{part}"][1])


def read_list(split: Path, root: Path) -> list[tuple[int, list[str]]]:
    """Number and fields of each line `image depth focal`; all must lie below `root`."""
    if not split.is_file():
        raise FileNotFoundError(f"{split}: no such split list")
    try:
        lines = split.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{split} is no text in UTF-8: {error}") from None
    lines = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
    for number, fields in lines:
        where = f"{split}, line {number}: {' '.join(fields)!r}"
        if len(fields) not in (2, 3):
            raise ValueError(f"{where} is not 'image depth focal'; paths may hold no spaces")
        if any(".." in Path(field).parts for field in fields):
            raise ValueError(f"{where} leads out of {root} by '..'; all must lie below it")
    return lines


def find(root: Path, folders: tuple[str, ...], name: str, suffixes: tuple[str, ...]) -> str | None:
    """The file `name` in one of the folders below root, with its own suffix or another."""
    for folder in folders:
        path = root / folder / name.lstrip("/")
        for candidate in (path, *(path.with_suffix(suffix) for suffix in suffixes)):
            if candidate.is_file():
                return str(candidate)
    return None


def read_file(path: str | Path, what: str) -> Image.Image:
    """An image file, decoded."""
    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as {what}: {error}") from None
    return image


def read_image(path: str | Path) -> np.ndarray:
    """(H, W, 3) uint8."""
    return np.asarray(read_file(path, "an image").convert("RGB"))


def read_depth(path: str | Path) -> np.ndarray:
    """(H, W), 16-bit, in the file's own units."""
    image = read_file(path, "a depth map")
    if not image.mode.startswith("I"):
        raise ValueError(f"{path} is no depth map: its mode is {image.mode}, not 16-bit grey")
    return np.asarray(image)


def read_labelled(path: Path, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (480, 640, 3) and depth (480, 640) in metres of a pair of nyu_depth_v2_labeled.mat."""
    try:
        import h5py
    except ImportError:
        raise ValueError(f"reading {path} needs h5py: pip install h5py") from None
    try:
        with h5py.File(path) as file:  # its arrays are transposed
            image, depth = file["images"][index].T, file["rawDepths"][index].T
    except (OSError, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path} has no pair {index}: {error}") from None
    framed = np.zeros_like(image)  # the recipe's test images have a black frame
    framed[7:474, 7:632] = image[7:474, 7:632]
    return framed, depth


# ---- Fetching what is not there yet --------------------------------------------------------------

SOURCES = {  # "virutal" is theirs
    "nyu_train": "https://virutalbuy-public.oss-cn-hangzhou.aliyuncs.com/share/newcrfs/datasets/nyu/sync.zip",
    "nyu_test": "https://horatio.cs.nyu.edu/mit/silberman/nyu_depth_v2/nyu_depth_v2_labeled.mat",
    "kitti_raw": "https://s3.eu-central-1.amazonaws.com/avg-kitti/raw_data/{drive}/{drive}_sync.zip",
    "kitti_depth": "https://s3.eu-central-1.amazonaws.com/avg-kitti/data_depth_annotated.zip",
}
NYU_MAT, NYU_MAT_MD5 = "nyu_depth_v2_labeled.mat", "520609c519fba3ba5ac58c8fefcc3530"
DRIVE = "https://drive.google.com/file/d/1AysroWpfISmm-yRFGBgFTrLy6FjQwvwP/view"
BY_HAND = {  # and licences
    "nyu": (f"{DRIVE} as sync.zip, and {NYU_MAT}", "NYU-Depth V2 states no licence"),
    "kitti": ("the archives of cvlibs.net/datasets/kitti", "KITTI is under CC BY-NC-SA 3.0"),
}


def fetch(name: str, root: str | Path, train_split=None, test_split=None) -> None:
    """Get what the lists of "nyu" or "kitti" name and `root` has not yet, and no more.

    Single files are read out of the archives of SOURCES over HTTP ranges, or out of archives of the
    same names in `root`. A file gets its name when it is whole, so that the next call goes on.
    Raises ValueError, saying how to get the files by hand.
    """
    if name not in BY_HAND or root is None:
        raise ValueError(f"{name} cannot be fetched: only nyu and kitti can, into --root DIR")
    root, (by_hand, licence) = Path(root), BY_HAND[name]
    root.mkdir(parents=True, exist_ok=True)
    wanted = wanted_files(name, root, {"train": train_split, "test": test_split})
    mat = wanted.pop(SOURCES["nyu_test"], None) and root / NYU_MAT
    pool, stop = ThreadPoolExecutor(8), threading.Event()
    try:
        jobs = []
        for url, found in zip(
            wanted, pool.map(lambda u: thrice(look_up, root, u, wanted[u]), wanted)
        ):
            jobs += [(url, found[i : i + 500]) for i in range(0, len(found), 500)]
        sizes = [info.compress_size for _, members in jobs for info, _ in members]
        hosts = ", ".join(sorted({url.split("/")[2] for url in wanted})) or "nowhere"
        print(f"{len(sizes)} files, {sum(sizes) / 1e9:.2f} GB, from {hosts}; {licence}")
        if mat and not mat.exists():
            print(f"{mat.name}, 2.97 GB, from {SOURCES['nyu_test']}")
            fetch_whole(SOURCES["nyu_test"], mat, NYU_MAT_MD5)
        with tqdm(total=sum(sizes), unit="B", unit_scale=True, disable=None) as bar:
            list(pool.map(lambda job: thrice(extract, root, *job, bar, stop), jobs))
    except Exception as error:  # of many kinds: zipfile's, urllib's, remotezip's
        what = str(error) or type(error).__name__
        remedy = (
            f"what came stays; start again to go on, or first get {by_hand} by hand into {root}"
        )
        raise ValueError(f"{what}; {remedy}") from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def wanted_files(name: str, root: Path, splits: dict) -> dict[str, dict[str, Path]]:
    """By URL of an archive: how the paths of the files to get end in it, and where they go."""
    recipe, wanted = DATASETS[name], {}
    for part, split in splits.items():
        for _, (image, depth, *_) in read_list(Path(split or fetch_list(name, part)), root):
            if depth == "None":
                continue
            files = {image: (f"nyu_{part}", "sync"), depth: (f"nyu_{part}", "sync")}
            if name == "kitti":
                files = {
                    image: ("kitti_raw", "raw"),
                    depth: ("kitti_depth", "data_depth_annotated"),
                }
            for field, (source, folder) in files.items():
                folders = recipe.image_folders if field == image else recipe.depth_folders
                if find(root, folders, field, (".png", ".jpg", ".jpeg")) is None:
                    drive = re.sub(r".*?([^/]+)_sync/.*", r"\1", field)
                    field = field.lstrip("/")
                    url = SOURCES[source].format(drive=drive)
                    wanted.setdefault(url, {})[field] = root / folder / field
    return wanted


def open_archive(root: Path, url: str) -> zipfile.ZipFile:
    """The archive in `root`, if the user has it, or at `url`, of which only parts are read."""
    local = root / url.rsplit("/", 1)[1]
    if local.exists():
        if not zipfile.is_zipfile(local):
            with open(local, "rb") as file:
                is_page = file.read(1) == b"<"
            what = "a web page, such as Drive sends over its quota" if is_page else "damaged"
            raise ValueError(f"{local} is no archive but {what}: delete it")
        return zipfile.ZipFile(local)
    try:
        from remotezip import RemoteZip
    except ImportError:
        raise ValueError("fetching needs remotezip: pip install remotezip") from None
    return RemoteZip(url, timeout=60)


def look_up(root: Path, url: str, wanted: dict[str, Path]) -> list[tuple[zipfile.ZipInfo, Path]]:
    """The members of an archive that are wanted, and where they go, with the members' suffixes."""
    try:
        with open_archive(root, url) as archive:
            infos = archive.infolist()
    except Exception as error:
        raise ValueError(f"{url} cannot be read: {error or type(error).__name__}") from error
    ends = {}  # a member may lie up to two folders deeper than the list says
    for info in infos:
        parts = info.filename.rsplit(".", 1)[0].split("/")
        if ".." not in parts:  # which would lead out of `root`
            ends |= {"/".join(parts[i:]): info for i in range(3)}
    found = {path: ends.get(name.rsplit(".", 1)[0]) for name, path in wanted.items()}
    if missing := [path.name for path, info in found.items() if info is None]:
        raise ValueError(f"{url} has {len(missing)} of {len(found)} files not: {missing[0]}, …")
    return [(info, path.with_suffix(Path(info.filename).suffix)) for path, info in found.items()]


def extract(root: Path, url: str, members: list, bar: tqdm, stop: threading.Event) -> None:
    """Write members of an archive, each whole and with the right sum, unless they are there."""
    with open_archive(root, url) as archive:
        for info, path in members:
            if path.exists() or stop.is_set():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                content = archive.read(info.filename)  # which checks the sum
            except Exception as error:
                raise ValueError(f"{url} broke off: {error or type(error).__name__}") from error
            write_whole(path, lambda partial, c=content: partial.write_bytes(c))
            bar.update(info.compress_size)


def thrice(action: Callable, *args):
    """What `action` returns, in up to three tries, as connections break."""
    for tries_left in (2, 1, 0):
        try:
            return action(*args)
        except ValueError:
            if not tries_left:
                raise


def fetch_whole(url: str, path: Path, md5: str) -> None:
    """Download one file, going on where an earlier call stopped; it gets its name when it is right."""
    partial = Path(f"{path}.partial")
    done = partial.stat().st_size if partial.exists() else 0
    if not (done and calculate_md5(partial) == md5):
        request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
        with urllib.request.urlopen(request, timeout=60) as response:
            done = done if response.status == 206 else 0  # or the whole file comes again
            size = done + int(response.headers["Content-Length"])
            with open(partial, "ab" if done else "wb") as file:
                bar = {"total": size, "initial": done, "disable": None, "unit_scale": True}
                with tqdm.wrapattr(response, "read", unit="B", **bar) as content:
                    shutil.copyfileobj(content, file)
        if partial.stat().st_size < size:
            raise ValueError(f"{url} broke off after {partial.stat().st_size} of {size} bytes")
        if calculate_md5(partial) != md5:
            partial.unlink()
            raise ValueError(f"{url} gave a file with another MD5, which is deleted")
    partial.replace(path)


# ---- Augmentation, on the batch ------------------------------------------------------------------


def mean_and_std(image: Tensor) -> Tensor:
    """Of images in training, (2, 3, 1, 1), on the device of `image`, without waiting for it."""
    statistics = torch.tensor([Config.image_mean, Config.image_std])[..., None, None]
    return statistics.to(image.device, non_blocking=True)


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
    (B, 1, H, W), on the inputs' device. `generator` is on the CPU and decides everything. `share`
    (i, k) says that these are the images i, i + k, i + 2k, … of a larger batch.
    """
    recipe = DATASETS[recipe] if isinstance(recipe, str) else recipe
    n, _, h, w = image.shape
    rows, columns = recipe.crop
    if rows > h or columns > w:
        raise ValueError(f"images of {h} x {w} pixels are too small to crop to {rows} x {columns}")
    i, k = share
    draws = torch.rand(k * n, 10, generator=generator)[i::k]  # from 0 to 1
    draws = draws.to(image.device, non_blocking=True)[..., None, None]  # (B, 10, 1, 1)
    angle, top, left, flip, recolour, gamma, brightness = draws[:, :7].unbind(1)  # (B, 1, 1) each
    colour = draws[:, 7:]  # (B, 3, 1, 1): red, green and blue each have their own

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

    def factor(draw: Tensor, spread: float) -> Tensor:  # from 1 - spread to 1 + spread
        return 1 + spread * (2 * draw - 1)

    coloured = image ** factor(gamma, recipe.gamma)[:, None]
    coloured = coloured * factor(brightness, recipe.brightness)[:, None]
    coloured = (coloured * factor(colour, recipe.colour)).clamp(0, 1)
    image = torch.where(recolour[:, None] < 0.5, coloured, image)
    mean, std = mean_and_std(image)  # torchvision's normalize would wait for the device
    return (image - mean) / std, depth


# ---- Toy rooms: a data set that needs no download ------------------------------------------------

TOY_SIZE, TOY_FOCAL = (96, 128), 100.0  # pixels; about 65 degrees from left to right


def draw_room(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A furnished room: (96, 128, 3) uint8 and its exact depth (96, 128) in metres.

    The ray through each pixel meets the walls from inside and the furniture, boxes too, from
    outside; the nearest hit is tiled and lit. A ray has length 1 along the optical axis, so that
    its multiple at the hit is the depth. Axes: x right, y down, z ahead; the camera is at 0.
    """
    rng = np.random.default_rng(seed)
    height, width = TOY_SIZE
    y, x = np.mgrid[:height, :width].reshape(2, -1).astype(np.float32)
    x, y, z = (x - width / 2 + 0.5) / TOY_FOCAL, (y - height / 2 + 0.5) / TOY_FOCAL, np.ones_like(x)
    pitch, yaw = rng.uniform(-0.05, 0.25), rng.uniform(-0.5, 0.5)
    y, z = np.cos(pitch) * y + np.sin(pitch) * z, np.cos(pitch) * z - np.sin(pitch) * y
    rays = np.stack([np.cos(yaw) * x + np.sin(yaw) * z, y, np.cos(yaw) * z - np.sin(yaw) * x])

    size = rng.uniform((3, 2.4, 3.5), (6, 3.0, 8.5))
    floor = rng.uniform(1.2, 1.7)  # below the camera
    low = np.array([-rng.uniform(0.25, 0.75) * size[0], floor - size[1], -0.15 * size[2]])
    boxes = [(low, low + size)]  # the room, then the furniture
    for _ in range(rng.integers(3, 8)):
        side = rng.uniform((0.3, 0.3, 0.3), (1.2, 1.6, 1.2))
        corner = rng.uniform(low, low + size - side)
        corner[1:] = floor - side[1], max(corner[2], 1.0)  # on the floor, in front of the camera
        boxes.append((corner, corner + side))

    depth, colour, normal = np.inf, 0.0, 0.0
    for i, (low, high) in enumerate(boxes):
        entry, leave = np.sort(np.stack([low[:, None] / rays, high[:, None] / rays]), axis=0)
        axis = entry.argmax(0) if i else leave.argmin(0)  # which of x, y, z the hit face is across
        hit_at = entry.max(0) if i else leave.min(0)
        is_hit = (hit_at < depth) & (hit_at <= leave.min(0)) & (hit_at > 0.3)
        is_across = np.arange(3)[:, None] == axis  # (3, HW)
        tiles = np.floor((rays * hit_at - low[:, None]) / (0.25 if i else 0.5))
        tiles = 1 - 0.3 * (np.where(is_across, 0, tiles).sum(0) % 2)
        colour = np.where(is_hit, rng.uniform(0.2, 1, (3, 3))[:, axis] * tiles, colour)
        normal = np.where(is_hit, -np.sign(rays) * is_across, normal)
        depth = np.where(is_hit, hit_at, depth)

    (low, high), hit = boxes[0], rays * depth
    lamp = np.array([(low[0] + high[0]) / 2, low[1] + 0.3, (low[2] + high[2]) / 2])
    light = lamp[:, None] - hit
    distance = np.sqrt((light**2).sum(0))
    lit = np.maximum((normal * light).sum(0) / distance, 0) / (1 + 0.05 * distance**2)
    image = colour * (0.35 + 0.75 * lit) + rng.normal(0, 0.01, colour.shape)
    image = (255 * image.clip(0, 1)).astype(np.uint8).T.reshape(height, width, 3)
    return image, depth.astype(np.float32).reshape(height, width)


# ---- What every script shares --------------------------------------------------------------------

PRECISIONS = ("off", "bf16")  # of --amp


def rank_of() -> tuple[int, int]:
    """This process's number, and of how many that torchrun started."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_amp() -> str:
    """bf16 on GPUs that have it; off on CPUs, many of which would be slower."""
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(False) else "off"


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Convolutions and products of matrices in bfloat16, or "off"."""
    return torch.autocast(device.type, torch.bfloat16, amp == "bf16")


def go_fast(fast: bool = True) -> None:
    """On GPUs: TF32 in what is float32, and the fastest kernels for images of one size; or neither."""
    torch.set_float32_matmul_precision("high" if fast else "highest")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = fast


def stand_apart(worker: int) -> None:
    """In a loader's worker: Ctrl-C is for the run, whose last step still needs data."""
    os.setpgrp()


def load(dataset: Dataset, **how) -> DataLoader:
    """Batches of a data set, read by as many workers as the machine has cores to spare."""
    n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of torchrun, on this machine
    workers = min(8, max(os.cpu_count() // n_processes - 1, 0))
    how |= {"num_workers": workers, "pin_memory": torch.cuda.is_available()}
    return DataLoader(dataset, worker_init_fn=stand_apart, **how)


def append_row(path: Path, row: dict) -> None:
    """Add a row to a CSV file, which begins with the names of its columns."""
    is_new = not path.exists() or path.stat().st_size == 0
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """The options that say where a data set is."""
    add = parser.add_argument
    add("--root", metavar="DIR", help="folder of the data set, or nyu_depth_v2_labeled.mat")
    add("--train-split", metavar="FILE", help="list of training pairs; default: the authors'")
    add("--test-split", metavar="FILE", help="list of test pairs; default: the authors'")
    add("--depth-scale", type=float, help="value in a depth PNG of 1 m; default: the data set's")
    add("--max-depth", type=float, help="metres; default: the data set's")


def run_command(main) -> None:
    """Run a script's `main`; what is wrong with its input is one sentence on standard error."""
    try:
        main()
    except (OSError, ValueError) as error:
        # of an error in a loader's worker, what follows its traceback
        sys.exit("error: " + re.sub(r"(?s)^Caught .*\n\w+Error: ", "", str(error)).strip())
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: {str(error).splitlines()[0]} Smaller batches or images may fit")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


# ---- Command line: is the data set whole? --------------------------------------------------------


def check(dataset: DepthDataset, n_expected: int | None) -> list[Tensor]:
    """Print what was found, open eight pairs, and return their images, then their depths.

    Raises ValueError if their median depth cannot be right.
    """
    part = "train" if dataset.train else "test"
    of = f", of {n_expected} lines expected" if n_expected else ""
    none = f"{dataset.n_left_out} lines without ground truth"
    none += " (45 of KITTI's 697 test images have none)" if dataset.name == "kitti" else ""
    print(f"{part}: {len(dataset)} pairs, {none}{of}")
    chosen = torch.linspace(0, len(dataset) - 1, 8).long().unique().tolist()
    samples = [dataset[i] for i in chosen]
    depth = torch.cat([sample["depth"].flatten() for sample in samples])
    valid = depth[depth > 0]
    if not len(valid):
        raise ValueError(f"{part}: there is no depth at all in {samples[0]['path']} and others")
    median, top = valid.median().item(), dataset.recipe.max_depth
    print(
        f"{part}: {len(samples)} opened, {tuple(samples[0]['image'].shape[1:])} pixels, "
        f"{len(valid) / len(depth):.0%} with depth, median {median:.2f} m"
    )
    if dataset.name == "kitti" and len(valid) < 0.08 * len(depth):
        print(f"{part}: so few depths are those of raw LiDAR, not of the annotated ground truth")
    if not 0.05 * top < median < 0.9 * top:
        raise ValueError(
            f"{part}: a median of {median:.2f} m cannot be right for depths to {top} m: "
            f"wrong --depth-scale ({dataset.recipe.depth_scale})?"
        )
    depths = [sample["depth"].expand(3, -1, -1) / top for sample in samples]
    return [denormalize(sample["image"]) for sample in samples] + depths


def main() -> None:
    parser = argparse.ArgumentParser(description="Check a data set, and show eight of its pairs.")
    parser.add_argument("data", choices=DATASETS)
    add_data_options(parser)
    parser.add_argument(
        "--fetch", action="store_true", help="first get what is missing; nyu, kitti"
    )
    args = parser.parse_args()
    if args.fetch:
        fetch(args.data, args.root, args.train_split, args.test_split)
    for part in ("test",) if str(args.root).endswith(".mat") else ("train", "test"):
        split = args.train_split if part == "train" else args.test_split
        scale = {"depth_scale": args.depth_scale, "max_depth": args.max_depth}
        dataset = DepthDataset(args.data, args.root, split, part == "train", **scale)
        n_expected, _ = LISTS.get(f"{args.data}_{part}", (None, None))
        cells = check(dataset, None if split else n_expected)
    cells = [F.interpolate(cell[None], (192, 256))[0].clamp(0, 1) for cell in cells]
    path = Path("runs") / f"check_{args.data}.png"
    path.parent.mkdir(exist_ok=True)
    n = len(cells) // 2
    save_image(cells, path, nrow=n)
    print(f"{path} shows {n} test images above their depths: do they belong together?")


if __name__ == "__main__":
    run_command(main)
