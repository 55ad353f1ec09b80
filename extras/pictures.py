"""Depth of your own pictures: python -m extras.pictures CKPT PICTURE … --out DIR

PICTURE is a file, a folder with all pictures below it, or a pattern such as 'photos/**/*.jpg'. DIR
is new. Below DIR, files lie as the pictures do below the folder that all of them share.
"""

import argparse
import glob
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import cabins
import data
from cabins import InputError
from eval import draw_explained, show

SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def find_pictures(arguments: list[str]) -> list[Path]:
    """The pictures that files, folders and patterns name. An argument that names none is kept."""
    pictures = []
    for argument in arguments:
        pattern = glob.escape(argument) if os.path.exists(argument) else argument
        pattern += "/**" if os.path.isdir(argument) else ""
        found = [p for p in glob.glob(pattern, recursive=True) if p.lower().endswith(SUFFIXES)]
        pictures += sorted(filter(os.path.isfile, found)) or [argument]  # whatever its suffix
    if not any(map(os.path.isfile, pictures)):
        raise InputError(f"there is no picture at {', '.join(arguments)}")
    return [*dict.fromkeys(map(Path, pictures))]


def names_below(paths: list[Path]) -> list[str]:
    """A name for each file: its path below the folder that all share, without the suffix.

    A name that is taken gets an underscore. Large and small letters count as the same.
    """
    paths = [os.path.abspath(path) for path in paths]
    shared = os.path.commonpath(map(os.path.dirname, paths))
    names = {}  # by what they are in small letters
    for path in paths:
        name = os.path.splitext(os.path.relpath(path, shared))[0]
        while name.lower() in names:
            name += "_"
        names[name.lower()] = name
    return [*names.values()]


def for_each_picture(args: argparse.Namespace, write: Callable[[cabins.CaBins, Path, str], str]):
    """Call `write` with the network, each picture, and how the names of its files begin.

    `write` returns a line to print. A picture that fails is reported, and the others are written.
    """
    data.use_tf32(False)  # GPUs, too, compute in float32
    model = cabins.load_checkpoint(args.checkpoint, data.choose_device(args.device))
    paths, n_failed = find_pictures(args.pictures), 0
    out = Path(args.out)
    out.mkdir(parents=True)
    for path, name in zip(tqdm(paths, unit="picture", disable=None), names_below(paths)):
        start = out / name
        try:
            start.parent.mkdir(parents=True, exist_ok=True)
            tqdm.write(f"{path}: {write(model, path, str(start))}")
        except InputError as error:
            tqdm.write(f"{path} is left out: {error}", file=sys.stderr)
            n_failed += 1
    if n_failed:
        raise InputError(f"{n_failed} of {len(paths)} pictures were left out")


def add_picture_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `for_each_picture` needs."""
    add = parser.add_argument
    add("checkpoint", help="best.pt or last.pt of train.py")
    add("pictures", nargs="+", metavar="PICTURE", help="files, folders or patterns")
    add("--out", metavar="DIR", required=True, help="a new folder to write to")
    add("--device", help="default: cuda where there is one, else cpu")


def write_depth(path: str, depth: np.ndarray, scale: float) -> None:
    """Write metres (H, W) as a 16-bit PNG in which 1 m is `scale`. Too large values saturate."""
    Image.fromarray((depth * scale).round().clip(0, 65535).astype(np.uint16)).save(path)


def write_picture(model: cabins.CaBins, path: Path, start: str, args: argparse.Namespace) -> str:
    """Write the files of a picture, whose names begin with `start`; return a line about them."""
    from matplotlib.figure import Figure

    picture = cabins.read_picture(path)
    depth, std = cabins.infer(model, picture)[:2]
    low, high = (0, args.range) if args.range else (depth.min(), depth.max())
    figure = Figure(figsize=(12, 12))  # margins are cut off
    shown = show(figure.subplots(), "depth (m)", depth, low, high)
    figure.savefig(f"{start}_depth.png", bbox_inches="tight")
    colours = shown.to_rgba(depth, bytes=True)[..., :3]
    Image.fromarray(np.ascontiguousarray(colours)).save(f"{start}_colour.png")
    unit, scale = ("mm", 1000) if model.config.max_depth <= 65 else ("cm", 100)  # fits 16 bits
    write_depth(f"{start}_depth_{unit}.png", depth, scale)
    write_depth(f"{start}_std_{unit}.png", std, scale)
    if args.npy:
        np.save(f"{start}_depth.npy", depth)
    if args.explain:
        draw_explained(f"{start}_explained.png", picture, model)
    return f"{depth.min():.2f} to {depth.max():.2f} m, in {start}_*"


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m extras.pictures", description=__doc__, formatter_class=raw
    )
    add_picture_options(parser)
    add = parser.add_argument
    add("--range", type=float, metavar="M", help="colours go from 0 to M metres in all pictures")
    add("--npy", action="store_true", help="also write depth in metres, as float32 in a .npy")
    add("--explain", action="store_true", help="also draw bins, prompts and spread of depth")
    args = parser.parse_args()
    if args.range is not None and not args.range > 0:
        parser.error(f"--range is {args.range:g}; it must be above 0")
    for_each_picture(args, lambda *picture: write_picture(*picture, args))


if __name__ == "__main__":
    data.run_command(main)
