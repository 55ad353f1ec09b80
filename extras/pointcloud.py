"""Point clouds of your own pictures: python -m extras.pointcloud CKPT PICTURE … --out DIR

Writes NAME.ply for each picture: a coloured point for each pixel, in metres, with x to the right, y
down, z ahead and the camera at the origin. Pictures and DIR are as in extras.pictures. This needs
plyfile (extras/requirements.txt).

The shape of the cloud depends on the focal length of the camera. It comes from --focal or --fov, or
from the picture's EXIF data. Without them it is NYU's camera's or, for a network trained on KITTI,
KITTI's. The printed line says which it was, and which field of view follows from it.
"""

import argparse
import importlib.util
import math
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

import cabins
import data
from cabins import InputError
from extras.pictures import add_picture_options, for_each_picture

LEAST_FOV, GREATEST_FOV = 15, 120  # degrees; cameras outside of this range are rare


def field_of_view(focal: float, size: tuple[int, int]) -> tuple[float, float]:
    """Degrees from left to right and from top to bottom; `size` is (rows, columns) in pixels."""
    height, width = (math.degrees(2 * math.atan2(side / 2, focal)) for side in size)
    return width, height


def focal_length(image: Image.Image, size: tuple[int, int], config, args) -> tuple[float, str]:
    """The focal length in pixels, and where it comes from. `size` is (rows, columns)."""
    if args.focal is not None:
        return args.focal, "--focal"
    if args.fov is not None:
        return size[1] / 2 / math.tan(math.radians(args.fov) / 2), "--fov"
    exif = image.getexif().get_ifd(ExifTags.IFD.Exif)
    equivalent = exif.get(ExifTags.Base.FocalLengthIn35mmFilm)
    if isinstance(equivalent, int) and equivalent > 0:
        return equivalent * math.hypot(*size) / math.hypot(36, 24), "EXIF"
    if config.longer_side == 1216:  # KITTI's frames, as the network sees them
        return 721.54 * max(size) / 1216, "KITTI's camera"
    return 518.86 * max(size) / 640, "NYU's camera"


def write_ply(path: str, picture: np.ndarray, depth: np.ndarray, focal: float) -> None:
    """Write the pixels (H, W, 3) with their depths (H, W) as a binary PLY file."""
    from plyfile import PlyData, PlyElement

    fields = [(axis, "<f4") for axis in ("x", "y", "z")]
    points = np.empty(depth.shape, fields + [(colour, "u1") for colour in ("red", "green", "blue")])
    v, u = np.indices(depth.shape)
    points["x"] = (u - u.max() / 2) * depth / focal
    points["y"] = (v - v.max() / 2) * depth / focal
    points["z"] = depth
    points["red"], points["green"], points["blue"] = np.moveaxis(picture, 2, 0)
    PlyData([PlyElement.describe(points.ravel(), "vertex")], byte_order="<").write(path)


def write_cloud(model: cabins.CaBins, path: Path, start: str, args: argparse.Namespace) -> str:
    """Write the point cloud of one picture; return a line about it."""
    image = cabins.open_picture(path)
    picture = cabins.read_picture(image)
    focal, source = focal_length(image, picture.shape[:2], model.config, args)
    width, height = field_of_view(focal, picture.shape[:2])
    view = f"view {width:.1f} x {height:.1f} degrees"
    line = f"focal length {focal:.1f} pixels, from {source}; {view}"
    if source == "--focal" and not LEAST_FOV <= max(width, height) <= GREATEST_FOV:
        remedy = "--focal is in pixels of the picture, not in millimetres; --fov takes any angle"
        raise InputError(f"{line}, but most cameras have {LEAST_FOV} to {GREATEST_FOV}: {remedy}")
    write_ply(f"{start}.ply", picture, cabins.infer(model, picture).depth, focal)
    return f"{line}; {start}.ply"


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m extras.pointcloud", description=__doc__, formatter_class=raw
    )
    add_picture_options(parser)
    camera = parser.add_mutually_exclusive_group().add_argument
    about = "focal length in pixels of the picture, not in millimetres: about 520 for a Kinect at "
    about += "640 x 480, about 3000 for a phone's main camera at 4000 x 3000"
    camera("--focal", type=float, metavar="PX", help=about)
    about = "field of view from left to right: about 63 for a Kinect, about 67 for a phone"
    camera("--fov", type=float, metavar="DEG", help=about)
    args = parser.parse_args()
    if args.fov is not None and not 0 < args.fov < 180:
        parser.error(f"--fov is {args.fov:g}; a flat picture shows more than 0 and less than 180")
    if not importlib.util.find_spec("plyfile"):
        raise InputError("plyfile is missing: pip install -r extras/requirements.txt")
    for_each_picture(args, lambda *picture: write_cloud(*picture, args))


if __name__ == "__main__":
    data.run_command(main)
