"""The data of CaBins (Sec. 4.2): NYU-Depth V2, KITTI's Eigen split, and rooms drawn here.

A sample is an RGB image and its depth in metres, 0 where nothing was measured. Training reads
are cheap: a worker only decodes a pair and cuts its fixed crop; `augment` then turns, cuts, flips
and recolours the whole batch on the training device. Nothing random happens in a worker.
"""

import argparse
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import normalize
from torchvision.utils import save_image
from tqdm import tqdm

from cabins import Config, download

# ---- The recipe (Sec. 4.1 and 4.2; what the paper leaves open is the released code's) ------------


class Recipe(NamedTuple):
    """All that sets one data set apart from another."""

    max_depth: float  # metres; min_depth is 1e-3 throughout
    depth_scale: float  # value in a depth PNG of 1 m
    crop: tuple[int, int] | None  # rows and columns of the random crop
    rotation: float  # degrees, to either side
    brightness: float  # factors from 1 - this to 1 + this; likewise gamma and colour
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
    "nyu": Recipe(10.0, 1000.0, (416, 544), 2.5, 0.25, 0.1, 0.1, NYU_FOLDERS, NYU_FOLDERS),
    "kitti": Recipe(80.0, 256.0, (352, 704), 1.0, 0.1, 0.1, 0.1, KITTI_IMAGES, KITTI_DEPTHS),
    "toy": Recipe(10.0, 1000.0, (96, 128), 0.0, 0.1),
    "list": Recipe(10.0, 1000.0, None, 2.5, 0.1),  # your own; the crop is 7/8 of the images
}
LIST_URL = (
    "https://raw.githubusercontent.com/EunjinSon1/CaBins/"
    "4e9c9a03d16da42e65c67f5bb7911397726ade6c/train_test_inputs/"
)
LISTS = {  # file, number of lines, SHA-256
    ("nyu", "train"): (
        "nyudepthv2_train_files_with_gt.txt",
        24_231,
        "66e2beb718a58c5c946c169f6e70cc6ae166ddd19f5618266fff52ff7443e0e9",
    ),
    ("nyu", "test"): (
        "nyudepthv2_test_files_with_gt.txt",
        654,
        "e92c191d5835a22589b843c11b80cd7235d5bd0d4136e42a6debcea4511bf906",
    ),
    ("kitti", "train"): (
        "kitti_eigen_train_files_with_gt.txt",
        23_158,
        "dd5e51c2df33d4c53c1d4dd01726326e7c3ac087cff165b1007738c5c8a06aca",
    ),
    ("kitti", "test"): (
        "kitti_eigen_test_files_with_gt.txt",
        697,  # 45 of them without ground truth
        "1a631c1bc0d40f5580f8363bffe0ffcc9524e5ecdd56765aebfffc3dce162201",
    ),
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


def stand_apart(worker: int) -> None:
    """In a loader's worker: Ctrl-C is for the run, whose last step still needs data."""
    os.setpgrp()


class DepthDataset(Dataset):
    """Pairs of `name`, a key of DATASETS, below the folder `root`.

    `split` is a list file with a line `image depth focal` for each pair; without it the authors'
    own list is fetched once. NYU's test pairs can also be read from nyu_depth_v2_labeled.mat as
    `root`. `depth_scale` and `max_depth` take the place of the recipe's.

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
        self.name, self.train, self.n_left_out = name, train, 0
        self.labelled, self.size_to_train = False, None
        part = "train" if train else "test"
        if name == "toy":
            self.pairs = [("room", i) for i in TOY_ROOMS[part]]
            return
        if root is None:
            raise ValueError(f"data {name!r} needs --root, the folder that holds it")
        root = Path(root)
        self.labelled = root.suffix == ".mat"
        if not (root.is_file() if self.labelled else root.is_dir()):
            raise FileNotFoundError(f"{root}: no such folder; --root must be where {name} lies")
        if self.labelled and (name != "nyu" or train):
            raise ValueError(f"{root} can only be NYU's test set; {name} {part} needs a folder")
        if split is None:
            if (name, part) not in LISTS:
                raise ValueError(f"data {name!r} needs --{part}-split, a list of its {part} pairs")
            # the authors' list has no licence, so it is not shipped but fetched
            file, _, sha256 = LISTS[name, part]
            split = download(LIST_URL + file, file, sha256)
        self.pairs = self.find_pairs(root, Path(split))
        if self.recipe.crop is None and train:
            self.size_to_train = read_image(self.pairs[0][0]).shape[:2]
            crop = tuple(side * 7 // 8 // 32 * 32 for side in self.size_to_train)
            self.recipe = self.recipe._replace(crop=crop)

    def find_pairs(self, root: Path, split: Path) -> list[tuple]:
        """Image and depth of each line of `split` that has ground truth: paths, or .mat indices."""
        if not split.is_file():
            raise FileNotFoundError(f"{split}: no such split list")
        pairs, missing = [], []
        try:
            lines = split.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{split} is no text in UTF-8: {error}") from None
        for number, line in enumerate(lines, 1):
            if not (fields := line.split()):
                continue
            if len(fields) not in (2, 3):
                raise ValueError(
                    f"{split}, line {number}: {line!r} is not 'image depth focal', "
                    "of which the paths hold no spaces"
                )
            if any(".." in Path(field).parts for field in fields):
                raise ValueError(
                    f"{split}, line {number}: {line!r} leads out of {root} by '..'; all must lie below"
                )
            if fields[1] == "None":
                self.n_left_out += 1
            elif self.labelled:  # the digits in the file's name count the pairs from 0
                if not (digits := re.sub(r"\D", "", Path(fields[0]).stem)):
                    raise ValueError(f"{split}, line {number}: {fields[0]} has no number to go by")
                pairs.append((root, int(digits)))
            else:
                image = find(root, self.recipe.image_folders, fields[0], (".png", ".jpg", ".jpeg"))
                depth = find(root, self.recipe.depth_folders, fields[1], (".png",))
                for field, path in zip(fields, (image, depth)):
                    missing += [f"{field} (line {number})"] if path is None else []
                pairs.append((image, depth))
        if not pairs:
            raise ValueError(f"{split} names no pair of image and depth")
        if missing:
            remedy = f"{root} has {', '.join(sorted(p.name for p in root.iterdir())[:5])}, …"
            if len(missing) < len(pairs) and self.name == "kitti":
                remedy = "KITTI's ground truth has two parts, train/ and val/: both are needed"
            raise FileNotFoundError(
                f"{len(missing)} of the {2 * len(pairs)} files that {split} names are not below "
                f"{root}, the first being {', '.join(missing[:3])}; {remedy}; "
                "the README shows the folders that are searched"
            )
        return pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> dict:
        path, depth_path = self.pairs[i]
        scale = 1.0
        if self.name == "toy":
            image, depth = draw_room(depth_path)
        elif self.labelled:
            image, depth = read_labelled(path, depth_path)
        else:
            image, depth = read_image(path), read_depth(depth_path)
            scale = self.recipe.depth_scale
        if image.shape[:2] != depth.shape:
            raise ValueError(f"{path} has {image.shape[:2]} pixels, {depth_path} {depth.shape}")
        height, width = depth.shape
        if self.size_to_train not in (None, (height, width)):
            raise ValueError(
                f"{path} has {height} x {width} pixels; to be trained on, all images of a list must "
                f"have as many as the first, {self.size_to_train[0]} x {self.size_to_train[1]}"
            )
        try:
            top, bottom, left, right = fixed_crop(self.name, height, width, self.train)
        except ValueError as error:
            raise ValueError(f"{path} has {error}") from None
        image = torch.from_numpy(image[top:bottom, left:right].copy()).permute(2, 0, 1)  # (3, h, w)
        depth = np.divide(depth[top:bottom, left:right], scale, dtype=np.float32)
        depth = torch.from_numpy(depth)[None]  # (1, h, w)
        if not self.train:
            image = normalize(image / 255, Config.image_mean, Config.image_std)
        name = str(path) if isinstance(depth_path, str) else f"{path} {depth_path}"
        size = torch.tensor([height, width])
        return {"image": image, "depth": depth, "path": name, "size": size}


def find(root: Path, folders: tuple[str, ...], name: str, suffixes: tuple[str, ...]) -> str | None:
    """The file `name` in one of the folders below root, with its own suffix or another."""
    relative = Path(name.lstrip("/"))
    for folder in folders:
        path = root / folder / relative
        for candidate in (path, *(path.with_suffix(suffix) for suffix in suffixes)):
            if candidate.is_file():
                return str(candidate)
    return None


def read_image(path: str | Path) -> np.ndarray:
    """(H, W, 3) uint8."""
    try:
        with Image.open(path) as image:
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from None


def read_depth(path: str | Path) -> np.ndarray:
    """(H, W), 16-bit, in the file's own units."""
    try:
        with Image.open(path) as image:
            mode, depth = image.mode, np.asarray(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a depth map: {error}") from None
    if not mode.startswith("I"):
        raise ValueError(f"{path} is no depth map: its mode is {mode}, not 16-bit grey")
    return depth


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


# ---- Augmentation, on the batch ------------------------------------------------------------------


def mean_and_std(image: Tensor) -> Tensor:
    """Those of images in training, (2, 3, 1, 1), on the device of `image`, which is not waited for."""
    statistics = torch.tensor([Config.image_mean, Config.image_std])[..., None, None]
    return statistics.to(image.device, non_blocking=True)


def denormalize(image: Tensor) -> Tensor:
    """Normalised images (…, 3, H, W) as colours from 0 to 1."""
    mean, std = mean_and_std(image)
    return (image * std + mean).clamp(0, 1)


def augment(
    image: Tensor,
    depth: Tensor,
    dataset: str | DepthDataset,
    generator: torch.Generator | None = None,
    share: tuple[int, int] = (0, 1),
) -> tuple[Tensor, Tensor]:
    """Random rotation, crop, flip and colour of a batch, by the recipe of `dataset`.

    image uint8 (B, 3, h, w), depth (B, 1, h, w) in metres -> image normalised (B, 3, H, W), depth
    (B, 1, H, W), on the inputs' device. `generator` is on the CPU and decides everything. `share`
    (i, k) says that these are the images i, i + k, i + 2k, … of a larger batch.
    """
    recipe = DATASETS[dataset] if isinstance(dataset, str) else dataset.recipe
    n, _, h, w = image.shape
    rows, columns = recipe.crop
    if rows > h or columns > w:
        raise ValueError(f"images of {h} x {w} pixels are too small to crop to {rows} x {columns}")
    i, k = share
    u = torch.rand(k * n, 10, generator=generator)[i::k]  # (B, 10)
    # factors from 1 - spread to 1 + spread; of red, green and blue each their own
    spread = torch.tensor([recipe.gamma, recipe.brightness, *[recipe.colour] * 3])
    u[:, 5:] = 1 + spread * (2 * u[:, 5:] - 1)
    u = u.to(image.device, non_blocking=True)
    angle, top, left, flip, recolour = u[:, :5].unbind(1)  # (B,) each

    # where each output pixel comes from, in input pixels: unflip, uncrop, turn about the centre
    x = torch.arange(columns, device=image.device) - (columns - 1) / 2
    y = torch.arange(rows, device=image.device) - (rows - 1) / 2
    x = torch.where(flip < 0.5, -1, 1)[:, None] * x + (columns - 1) / 2  # (B, W)
    x = x + (left * (w - columns + 1)).floor()[:, None] - (w - 1) / 2
    y = y + (rows - 1) / 2 + (top * (h - rows + 1)).floor()[:, None] - (h - 1) / 2  # (B, H)
    x, y = x[:, None, :], y[:, :, None]  # (B, 1, W), (B, H, 1)
    angle = math.radians(recipe.rotation) * (2 * angle - 1)[:, None, None]
    source_x = angle.cos() * x - angle.sin() * y  # (B, H, W), from the centre
    source_y = angle.sin() * x + angle.cos() * y
    grid = torch.stack([source_x * 2 / (w - 1), source_y * 2 / (h - 1)], dim=-1)  # (B, H, W, 2)
    image = F.grid_sample(image / 255, grid, "bilinear", align_corners=True)  # zeros outside
    depth = F.grid_sample(depth, grid, "nearest", align_corners=True)

    factor = u[:, 5:, None, None]  # (B, 5, 1, 1)
    coloured = (image ** factor[:, :1] * factor[:, 1:2] * factor[:, 2:]).clamp(0, 1)
    image = torch.where(recolour[:, None, None, None] < 0.5, coloured, image)
    mean, std = mean_and_std(image)  # torchvision's normalize would wait for the device
    return (image - mean) / std, depth


# ---- Toy rooms: a data set that needs no download ------------------------------------------------

TOY_SIZE, TOY_FOCAL = (96, 128), 100.0  # pixels; about 65 degrees from left to right


def draw_room(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A furnished room: (96, 128, 3) uint8 and its exact depth (96, 128) in metres.

    One ray through each pixel is cut with the walls from inside, and with boxes and spheres from
    outside; the nearest hit is textured and lit. A ray's direction has length 1 along the optical
    axis, so the ray's parameter at the hit is the depth. Axes: x right, y down, z ahead.
    """
    rng = np.random.default_rng(seed)
    height, width = TOY_SIZE
    v, u = np.mgrid[:height, :width].reshape(2, -1).astype(np.float32)
    rays = np.stack([(u - width / 2 + 0.5), (v - height / 2 + 0.5), np.full_like(u, TOY_FOCAL)])
    rays = turn(rays / TOY_FOCAL, 1, 2, rng.uniform(-0.05, 0.25))
    rays = turn(rays, 0, 2, rng.uniform(-0.5, 0.5))

    # the room: its corners as seen from the camera, at the origin
    floor, size = rng.uniform(1.2, 1.7), rng.uniform((3, 2.4, 3.5), (6, 3.0, 8.5))
    side, behind = rng.uniform(0.25, 0.75) * size[0], rng.uniform(0.05, 0.2) * size[2]
    low = np.array([-side, floor - size[1], -behind], np.float32)[:, None]
    high = low + size[:, None].astype(np.float32)
    walls = np.where(rays > 0, high, low) / rays  # (3, HW)
    axis = walls.argmin(0)
    depth = walls.min(0)
    hit = rays * depth
    colours = rng.uniform(0.35, 0.95, (3, 2, 3))  # of each pair of opposite walls
    positive = (np.take_along_axis(rays, axis[None], 0)[0] > 0).astype(int)
    colour = colours[axis, positive].T * tiles(hit - low, axis, 0.5)  # (3, HW)
    normal = np.where(np.arange(3)[:, None] == axis, -np.sign(rays), 0)

    for _ in range(rng.integers(2, 6)):  # furniture
        radius = rng.uniform(0.2, 0.6)
        place = rng.uniform(low[:, 0] + radius, high[:, 0] - radius)
        place[2] = rng.uniform(1.2, max(high[2, 0] - radius, 1.3))
        if rng.random() < 0.5:  # a box on the floor, turned about the vertical
            half = np.array([radius, rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.6)])[:, None]
            place[1] = floor - half[1, 0]
            angle = rng.uniform(0, np.pi)
            origin, local = turn(-place[:, None], 0, 2, angle), turn(rays, 0, 2, angle)
            faces = np.sort(np.stack([(-half - origin) / local, (half - origin) / local]), axis=0)
            axis, near, far = faces[0].argmax(0), faces[0].max(0), faces[1].min(0)
            found = (near < far) & (near > 0.3)
            face = np.where(np.arange(3)[:, None] == axis, -np.sign(local), 0)
            texture, face = tiles(origin + local * near, axis, 0.25), turn(face, 0, 2, -angle)
        else:  # a ball, on the floor or in the air
            a, b = (rays**2).sum(0), place @ rays
            root = b**2 - a * (place @ place - radius**2)
            near = (b - np.sqrt(np.maximum(root, 0))) / a
            found = (root > 0) & (near > 0.3)
            face = (rays * near - place[:, None]) / radius
            texture = 1 - 0.3 * (np.sin(12 * face[1]) > 0)
        found &= near < depth
        depth = np.where(found, near, depth)
        colour = np.where(found, rng.uniform(0.2, 1, (3, 1)) * texture, colour)
        normal = np.where(found, face, normal)

    lamp = (low + high) / 2 * [[1], [0], [1]] + [[0], [low[1, 0] + 0.3], [0]]
    light = lamp - rays * depth
    distance = np.sqrt((light**2).sum(0))
    lit = np.maximum((normal * light).sum(0) / distance, 0) / (1 + 0.05 * distance**2)
    image = colour * (0.35 + 0.75 * lit) + rng.normal(0, 0.01, colour.shape)
    image = (255 * image.clip(0, 1)).astype(np.uint8).T.reshape(height, width, 3)
    return image, depth.astype(np.float32).reshape(height, width)


def turn(vectors: np.ndarray, i: int, j: int, angle: float) -> np.ndarray:
    """Vectors (3, …) turned in the plane of the axes i and j."""
    turned = np.array(vectors)
    turned[i] = np.cos(angle) * vectors[i] + np.sin(angle) * vectors[j]
    turned[j] = np.cos(angle) * vectors[j] - np.sin(angle) * vectors[i]
    return turned


def tiles(points: np.ndarray, axis: np.ndarray, size: float) -> np.ndarray:
    """Brightness (HW,) of a chequered surface, at points (3, HW) on a plane across `axis`."""
    squares = np.floor(points / size)
    squares[axis, np.arange(points.shape[1])] = 0
    return 1 - 0.3 * (squares.sum(0) % 2)


# ---- Command line: is the data set whole? ---------------------------------------------------------


def check(dataset: DepthDataset, n_expected: int | None) -> tuple[list[Tensor], list[Tensor]]:
    """Print what was found, open eight pairs, and return their images and depths.

    Raises ValueError if their median depth cannot be right.
    """
    part = "train" if dataset.train else "test"
    of = f", of {n_expected} lines expected" if n_expected else ""
    print(f"{part}: {len(dataset)} pairs, {dataset.n_left_out} lines without ground truth{of}")
    chosen = torch.linspace(0, len(dataset) - 1, 8).long().unique().tolist()
    samples = [dataset[i] for i in tqdm(chosen, desc="opening", leave=False, disable=None)]
    depth = torch.cat([sample["depth"].flatten() for sample in samples])
    valid = depth[depth > 0]
    if not len(valid):
        raise ValueError(f"{part}: there is no depth at all in {samples[0]['path']} and others")
    median, top = valid.median().item(), dataset.recipe.max_depth
    print(
        f"{part}: {len(samples)} opened, {tuple(samples[0]['image'].shape[1:])} pixels, "
        f"{len(valid) / len(depth):.0%} with depth, median {median:.2f} m"
    )
    if not 0.05 * top < median < 0.9 * top:
        raise ValueError(
            f"{part}: a median of {median:.2f} m cannot be right for depths to {top} m: "
            f"wrong --depth-scale ({dataset.recipe.depth_scale})?"
        )
    return [sample["image"] for sample in samples], [sample["depth"] / top for sample in samples]


def main() -> None:
    parser = argparse.ArgumentParser(description="Check a data set, and show eight of its pairs.")
    parser.add_argument("data", choices=DATASETS)
    add_data_options(parser)
    args = parser.parse_args()
    for part in ("test",) if str(args.root).endswith(".mat") else ("train", "test"):
        split = args.train_split if part == "train" else args.test_split
        scale = {"depth_scale": args.depth_scale, "max_depth": args.max_depth}
        dataset = DepthDataset(args.data, args.root, split, part == "train", **scale)
        n_expected = None if split else LISTS.get((args.data, part), [None] * 2)[1]
        images, depths = check(dataset, n_expected)
    cells = [denormalize(image) for image in images] + [d.expand(3, -1, -1) for d in depths]
    cells = [F.interpolate(cell[None], (192, 256))[0].clamp(0, 1) for cell in cells]
    path = Path("runs") / f"check_{args.data}.png"
    path.parent.mkdir(exist_ok=True)
    save_image(cells, path, nrow=len(images))
    print(f"{path} shows {len(images)} test images above their depths: do they belong together?")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """The options that say where a data set is; the same for every script."""
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


if __name__ == "__main__":
    run_command(main)
