"""Point clouds of your own pictures: python -m extras.pointcloud CKPT PICTURE … --out DIR

Writes NAME.ply for each picture: a coloured point for each pixel, in metres, with x to the right, y
down, z ahead and the camera at the origin. This needs plyfile (extras/requirements.txt).

The shape of the cloud depends on the focal length of the camera. It comes from --focal or --fov, or
from the picture's EXIF data. Without them it is NYU's camera's or, for a network trained on KITTI,
KITTI's. The printed line says which it was, and which field of view follows from it.
"""

import argparse
import importlib.util
import math
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

import cabins
import data
from eval import QUOTED, find_pictures, new_name, open_network

LEAST_FOV, GREATEST_FOV = 15, 120  # degrees; cameras outside of this range are rare


def field_of_view(focal: float, size: tuple[int, int]) -> tuple[float, float]:
    """Degrees from left to right and from top to bottom; `size` is (rows, columns) in pixels."""
    height, width = (math.degrees(2 * math.atan(side / 2 / focal)) for side in size)
    return width, height


def focal_length(image: Image.Image, size: tuple[int, int], config, args) -> tuple[float, str]:
    """The focal length in pixels, and where it comes from. `size` is (rows, columns)."""
    if args.focal:
        return args.focal, "--focal"
    if args.fov:
        return size[1] / 2 / math.tan(math.radians(args.fov) / 2), "--fov"
    exif = image.getexif().get_ifd(ExifTags.IFD.Exif)
    equivalent = exif.get(ExifTags.Base.FocalLengthIn35mmFilm)
    if isinstance(equivalent, int) and equivalent > 0:
        return equivalent * math.hypot(*size) / math.hypot(36, 24), "EXIF"
    if config.longer_side == 1216:  # KITTI's frames, as the network sees them
        return 721.54 * max(size) / 1216, "KITTI's camera"
    return 518.86 * max(size) / 640, "NYU's camera"


def write_ply(path: Path, picture: np.ndarray, depth: np.ndarray, focal: float) -> None:
    """Write the pixels (H, W, 3) with their depths (H, W) as a binary PLY file."""
    from plyfile import PlyData, PlyElement

    fields = [(axis, "<f4") for axis in ("x", "y", "z")]
    points = np.empty(depth.shape, fields + [(colour, "u1") for colour in ("red", "green", "blue")])
    v, u = np.indices(depth.shape)
    points["x"] = (u - u.max() / 2) * depth / focal
    points["y"] = (v - v.max() / 2) * depth / focal
    points["z"] = depth
    points["red"], points["green"], points["blue"] = np.moveaxis(picture, 2, 0)
    cloud = PlyData([PlyElement.describe(points.ravel(), "vertex")], byte_order="<")
    data.write_whole(path, lambda partial: cloud.write(str(partial)))


def write_cloud(path: Path, out: Path, model: cabins.CaBins, args: argparse.Namespace) -> str:
    """Write the point cloud of one picture to `out`; return a line about it."""
    image = cabins.open_picture(path)
    picture = cabins.read_picture(image)
    focal, source = focal_length(image, picture.shape[:2], model.config, args)
    width, height = field_of_view(focal, picture.shape[:2])
    view = f"view {width:.1f} x {height:.1f} degrees"
    line = f"focal length {focal:.1f} pixels, from {source}; {view}"
    if not (LEAST_FOV <= max(width, height) <= GREATEST_FOV or args.any_fov):
        remedy = "--focal is in pixels of the picture, not in millimetres: give --fov, or --any-fov"
        raise ValueError(f"{line}, but most cameras have {LEAST_FOV} to {GREATEST_FOV}; {remedy}")
    write_ply(out, picture, cabins.infer(model, picture).depth, focal)
    return f"{line}; {out}"


def main() -> None:
    options = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = data.Parser(prog="python -m extras.pointcloud", **options)
    add = parser.add_argument
    add("checkpoint", help="train.py's or the authors'")
    add("pictures", nargs="+", metavar="PICTURE", help="files, folders or patterns")
    add("--out", metavar="DIR", required=True, help="folder of the point clouds")
    camera = parser.add_mutually_exclusive_group().add_argument
    about = "focal length in pixels of the picture, not in millimetres: about 520 for a Kinect at "
    about += "640 x 480, about 3000 for a phone's main camera at 4000 x 3000"
    camera("--focal", type=data.positive_float, metavar="PX", help=about)
    about = "field of view from left to right: about 63 for a Kinect, about 67 for a phone"
    camera("--fov", type=data.positive_float, metavar="DEG", help=about)
    about = f"accept views below {LEAST_FOV} or above {GREATEST_FOV} degrees"
    add("--any-fov", action="store_true", help=about)
    add("--released", choices=QUOTED, help="which of the authors' checkpoints it is")
    about = "default: cuda where there is one, else cpu"
    add("--device", choices=("cuda", "cpu", "mps"), help=about)
    parser.set_defaults(data=None)  # `open_network` asks for it
    args = parser.parse_args()
    if args.fov and args.fov >= 180:
        raise ValueError(f"--fov is {args.fov:g}; a flat picture shows less than 180 degrees")
    if not importlib.util.find_spec("plyfile"):
        raise ValueError("plyfile is missing: pip install -r extras/requirements.txt")
    model, _ = open_network(args)
    paths, n_failed = find_pictures(args.pictures), 0
    out, taken = Path(args.out), set()
    out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", module="PIL")  # of odd EXIF blocks and very large pictures
    for path in paths:
        try:
            line = write_cloud(path, out / f"{new_name(path.stem, taken)}.ply", model, args)
            print(f"{path}: {line}")
        except (OSError, ValueError) as error:
            print(f"{path} is left out: {error}", file=sys.stderr)
            n_failed += 1
    sys.exit(1 if n_failed else 0)


if __name__ == "__main__":
    data.run_command(main)
