"""Measure a checkpoint of CaBins as the paper does, and show what it sees.

python eval.py runs/toy/best.pt                     a row of the paper's table, beside the paper's
python eval.py runs/toy/best.pt --ablate            rows of the same network with the text silenced
python eval.py runs/toy/best.pt --explain 4         figures of bins, prompts and depth
python eval.py runs/toy/best.pt --images *.jpg      depth of your own pictures
"""

import argparse
import datetime
import glob
import itertools
import math
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

import cabins
import data
from data import DepthDataset

Predict = Callable[[Tensor], Tensor]  # normalised images (B, 3, H, W) -> metres (B, 1, H, W)
HEADINGS = {"abs_rel": "AbsRel", "sq_rel": "SqRel", "rmse": "RMSE", "rmse_log": "RMSElog"}
HEADINGS |= {"log10": "log10", "d1": "d<1.25", "d2": "d<1.25²", "d3": "d<1.25³"}
COLUMNS = {"nyu": ["abs_rel", "rmse", "log10", "d1", "d2", "d3"]}  # of the others, all: Table 2
QUOTED = {
    "nyu": """
        Make3D         0.349 1.214 - 0.447 0.745 0.897
        DORN           0.115 0.509 0.051 0.828 0.965 0.992
        ASTransformer  0.103 0.374 0.044 0.902 0.985 0.997
        DepthFormer    0.096 0.339 0.041 0.921 0.989 0.998
        NeWCRFs        0.095 0.334 0.041 0.922 0.992 0.998
        DepthCLIP      0.388 1.167 0.156 0.394 0.683 0.851
        Hu et al.      0.347 1.049 0.140 0.428 0.732 0.898
        Auty†          0.324 0.961 0.127 0.473 0.779 0.921
        CaBins         0.120 0.401 0.050 0.866 0.978 0.996""",
    "kitti": """
        DORN           0.072 0.307 2.727 0.120 - 0.932 0.984 0.994
        ASTransformer  0.058 - 2.685 0.089 - 0.963 0.995 0.999
        DepthFormer    0.052 0.158 2.143 0.079 - 0.975 0.997 0.999
        NeWCRFs        0.052 0.155 2.129 0.079 - 0.974 0.997 0.999
        DepthCLIP      0.473 6.007 12.958 - 0.680 0.281 0.531 0.696
        Hu et al.      0.384 4.661 12.290 - 0.632 0.312 0.569 0.739
        Auty†          0.307 2.197 6.405 0.121 0.113 0.548 0.826 0.935
        CLIP2Depth     0.074 0.303 2.948 - 0.032 0.938 0.990 0.998
        CaBins         0.057 0.186 2.322 0.088 0.025 0.964 0.995 0.999""",
}


def format_table(name: str, rows: dict[str, dict[str, float]]) -> str:
    """Rows of metrics in the columns of the paper's table for data set `name`, then the quoted."""
    columns = COLUMNS.get(name, list(HEADINGS))
    table = [["", *(HEADINGS[c] for c in columns)]]
    table += [[label, *(f"{row[c]:.3f}" for c in columns)] for label, row in rows.items()]
    for line in QUOTED.get(name, "").strip().splitlines():
        label, *values = line.strip().rsplit(maxsplit=len(columns))
        table.append([f"{label} (quoted)", *values])
    width = max(len(row[0]) for row in table)
    return "\n".join(f"{row[0]:{width}}" + "".join(f" {v:>8}" for v in row[1:]) for row in table)


@torch.no_grad()
def evaluate_windows(predict: Predict, dataset: DepthDataset, progress=False) -> dict[str, dict]:
    """Mean metrics in each of the data set's test windows, from one pass.

    Ground truth counts strictly inside the range. A metric is the mean over images of their means.
    """
    low, high = cabins.Config.min_depth, dataset.recipe.max_depth
    found: dict[str, list[dict[str, float]]] = {}  # in each window, those of each image
    for sample in tqdm(data.load(dataset), "evaluating", leave=False, disable=not progress or None):
        depth, target = predict(sample["image"]).cpu(), sample["depth"]
        depth = depth.nan_to_num(low, high, low).clamp(low, high)
        if depth.shape != target.shape:
            raise ValueError(f"predict gave {tuple(depth.shape)} for {tuple(target.shape)}")
        windows = data.evaluation_windows(dataset.name, *sample["size"][0].tolist())
        for window, (rows, columns) in windows.items():
            d, d_star = depth[..., rows, columns], target[..., rows, columns]
            mask = (d_star > low) & (d_star < high)
            images = found.setdefault(window, [])
            if mask.any():
                metrics = cabins.depth_metrics(d[mask].double(), d_star[mask].double())
                images.append({k: v.item() for k, v in metrics.items()})
    means = {}
    for window, images in found.items():
        if images:
            means[window] = {k: sum(m[k] for m in images) / len(images) for k in images[0]}
            if n := len(dataset) - len(images):
                print(f"{n} of the images have no ground truth in window {window}: left out")
    if not means:
        raise ValueError(f"none of the {len(dataset)} images has ground truth to measure against")
    return means


def evaluate(predict: Predict | cabins.CaBins, dataset: DepthDataset) -> dict[str, float]:
    """Mean metrics in the paper's test window; a network is measured with flip averaging."""
    predict = predictor(predict) if isinstance(predict, cabins.CaBins) else predict
    return next(iter(evaluate_windows(predict, dataset).values()))


def predictor(model: cabins.CaBins, flip: bool = True, amp: str = "off") -> Predict:
    """The function that is measured; `flip`: the mean of the image's and its mirror image's."""
    low, high = model.config.min_depth, model.config.max_depth

    @torch.inference_mode()
    def predict(image: Tensor) -> Tensor:
        image = image.to(next(model.parameters()).device)
        both = torch.cat([image, image.flip(-1)]) if flip else image
        with data.autocast(image.device, amp):
            depth = model.eval()(both, upsample=False).depth
        depth = depth.nan_to_num(low, high, low).clamp(low, high)
        if flip:
            straight, mirrored = depth.chunk(2)
            depth = (straight + mirrored.flip(-1)) / 2
        return cabins.resize(depth, image.shape[-2:])

    return predict


def ablate(model: cabins.CaBins, predict: Predict, dataset: DepthDataset) -> dict[str, dict]:
    """Rows of the same network with less from the text: what do s, and so prompts, add to x4?"""
    decoder, texts = model.depth_decoder, model.context_decoder  # into which s and t go
    changes = {
        "s = 0": (decoder, lambda x, s: (x, 0 * s)),
        "s of the classes in reverse": (decoder, lambda x, s: (x, s.flip(1))),
        "one text for all classes": (texts, lambda t, *z: (t[:, :1].expand_as(t), *z)),
    }
    rows = {}
    for name, (module, change) in changes.items():
        hook = module.register_forward_pre_hook(lambda _, inputs, f=change: f(*inputs))
        windows = evaluate_windows(predict, dataset)
        hook.remove()
        rows |= {f"{name}, {window}": row for window, row in windows.items()}
    return rows


def protocol(dataset: DepthDataset, window: str, flip: bool, amp: str = "off") -> str:
    """How a row was measured, in one line."""
    images = f"{len(dataset)} images ({dataset.n_left_out} without ground truth left out)"
    valid = f"{cabins.Config.min_depth} < depth < {dataset.recipe.max_depth} m"
    how = f"flip averaging {'on' if flip else 'off'}, {'fp32' if amp == 'off' else amp}"
    return f"{dataset.name}: {images}, window {window}, {valid}, {how}, mean of each image's mean"


def write_depth(path: str, depth: np.ndarray, max_depth: float, scale: float, about="") -> str:
    """Write metres (H, W) as a 16-bit PNG of this scale, or of a coarser if too deep for it."""
    units = {1000: "_mm", 100: "_cm", 10: "_dm", 1: "_m"}
    finest = next(s for s in (scale, *units) if max_depth * s <= 65535)
    path = f"{path}{units.get(finest, '')}.png"
    image = Image.fromarray((depth * finest).round().clip(0, 65535).astype(np.uint16))
    info = PngImagePlugin.PngInfo()
    info.add_text("Description", f"{about}in 1/{finest:g} m")
    cabins.write_whole(path, lambda partial: image.save(partial, "png", pnginfo=info))
    return path


def keep_predictions(predict: Predict, dataset: DepthDataset, folder: Path) -> Predict:
    """`predict`, writing each depth in the data set's scale or a coarser: 00000.png, 00000_cm.png."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers, recipe = itertools.count(), dataset.recipe

    def predict_and_keep(image: Tensor) -> Tensor:
        depth, path = predict(image), f"{folder}/{next(numbers):05}"
        write_depth(path, depth[0, 0].cpu().numpy(), recipe.max_depth, recipe.depth_scale)
        return depth

    return predict_and_keep


# ---- Figures and your own pictures ---------------------------------------------------------------


def show(axis, title: str, values: np.ndarray, label="", low=0.0, high=1.0, cmap="viridis"):
    """Colours (H, W, 3), or values (H, W) above a bar that says `label`; returns what is shown."""
    axis.set_axis_off()
    axis.set_title(title, fontsize=10, parse_math=False)
    shown = axis.imshow(values, cmap=cmap, vmin=low, vmax=high)
    if label:
        how = {"location": "bottom", "pad": 0.02, "ticks": sorted({low, high}), "format": "%.3g"}
        bar = axis.figure.colorbar(shown, ax=axis, label=label, **how)
        for text, side in zip(bar.ax.get_xticklabels(), ("left", "right")):
            text.set_ha(side)  # so that numbers stay within their bar
    axis.set_anchor("N")  # so that maps with and without a bar stand side by side
    return shown


def show_bins(axis, found: cabins.Inference, texts: list[str], truth, top: float) -> None:
    """Histograms of depth over the bin centres, and the prompts where their distances are."""
    how = {"bins": 128, "range": (0, top), "density": True}
    axis.hist(found.depth.ravel(), **how, label="prediction")
    if truth is not None:
        axis.hist(truth[truth > 0], **how, histtype="step", label="ground truth")
    bottom_line = axis.get_xaxis_transform()  # metres across, shares of the height upwards
    axis.vlines(found.centers, 0, 0.06, "black", linewidth=0.4, transform=bottom_line)
    for k, (distance, text) in enumerate(zip(found.cabins, texts)):
        axis.axvline(distance, color="black", linewidth=0.8, linestyle="--")
        place = {"xytext": ((k + 0.5) / len(texts), 1.12), "textcoords": "axes fraction"}
        place |= {"xycoords": bottom_line, "ha": "center", "arrowprops": {"arrowstyle": "-"}}
        axis.annotate(f"“{text}”", (distance, 1.0), **place)
    axis.set(xlabel="depth (m)", ylabel="share of pixels per metre", xlim=(0, top))
    axis.set_title(f"{len(found.centers)} bin centres (ticks) and their prompts (dashed)", pad=38)
    axis.legend(loc="upper right")


def new_figure(*heights: float):
    """A figure of 13 inches' width, and its parts of these heights, from the top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, sum(heights)), layout="constrained")
    return figure, figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]


def save_figure(path: str | Path, figure) -> None:
    cabins.write_whole(path, lambda partial: figure.savefig(partial, dpi=100, format="png"))


def draw_explained(path: Path, image: np.ndarray, config, found, s, truth=None) -> None:
    """Draw depth and its spread, the bins, and where each prompt matches, from `cabins.look`."""
    depth, std = found.depth, found.std
    truth = np.where(truth > 0, truth, np.nan) if truth is not None and truth.any() else None
    known = depth if truth is None else np.stack([depth, truth])
    low, high = np.nanmin(known), np.nanmax(known)
    maps = [("image", image), ("prediction", depth, "depth (m)", low, high)]
    if truth is not None:
        maps.insert(1, ("ground truth", truth, "depth (m)", low, high))
        maps.append(("error", np.abs(depth - truth), "|error| (m)", 0, high / 10, "magma"))
    maps.append(("spread of p", std, "std (m)", 0, std.max(), "magma"))
    texts = [str(round(distance, 4)) for distance in found.cabins.tolist()]
    texts = cabins.SEMANTIC_BINS if config.distance_class == "semantic" else texts
    shape = min(image.shape[0] / image.shape[1], 2.5)  # a picture taller than that gets margins
    heights = (1 + 13 / len(maps) * shape, 3.3, 1 + 13 / len(s) * shape)
    figure, (depths, bins, prompts) = new_figure(*heights)
    for axis, shown in zip(depths.subplots(1, len(maps)), maps):
        show(axis, *shown)
    show_bins(bins.subplots(), found, texts, truth, config.max_depth)
    for i, axis in enumerate(prompts.subplots(1, len(s), squeeze=False)[0]):
        title = f"“{texts[i]}”, {found.cabins[i]:.2f} m"
        show(axis, title, s[i], "cosine", s.min(), s.max(), "cividis")
    save_figure(path, figure)


def draw_samples(out: Path, model: cabins.CaBins, dataset: DepthDataset, n: int) -> None:
    """Draw n samples from all over the data set, each explained."""
    out.mkdir(parents=True, exist_ok=True)
    for i in torch.linspace(0, len(dataset) - 1, min(n, len(dataset))).long().tolist():
        image, truth = dataset[i]["image"], dataset[i]["depth"][0].numpy()
        found, s = cabins.look(model, image[None], truth.shape)
        image = data.denormalize(image).permute(1, 2, 0).numpy()
        draw_explained(out / f"explained_{i}.png", image, model.config, found, s, truth)


def find_pictures(arguments: list[str]) -> list[Path]:
    """The files that paths, folders and patterns name. Raises FileNotFoundError."""
    suffixes = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp"}
    found = []
    for argument in arguments:
        path = Path(argument)
        paths = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(argument))]
        if path.is_dir():
            paths = [p for p in sorted(path.glob("[!.]*")) if p.suffix.lower() in suffixes]
        if not paths:
            raise FileNotFoundError(f"{argument}: no picture there, nor any that the pattern fits")
        found += paths
    return found


def focal_of(exif: Image.Exif, size: tuple[int, int], config, args) -> tuple[float, str]:
    """The focal length in pixels of a picture of this height and width, and what says so."""
    if args.focal:
        return args.focal, "--focal"
    if args.fov:
        return size[1] / 2 / math.tan(math.radians(args.fov) / 2), "--fov"
    equivalent = exif.get_ifd(0x8769).get(0xA405)  # FocalLengthIn35mmFilm
    if isinstance(equivalent, int) and equivalent > 0:
        return equivalent * math.hypot(*size) / math.hypot(36, 24), "EXIF"
    return config.focal * max(size) / config.image_width, "the training's camera"


def write_ply(path: Path, picture: np.ndarray, depth: np.ndarray, focal: float) -> None:
    """A coloured point cloud in metres: x right, y down, z ahead, the camera being the origin."""
    v, u = np.indices(depth.shape)
    x, y = (u - u.max() / 2) * depth / focal, (v - v.max() / 2) * depth / focal
    points = np.empty(depth.shape, [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    points["xyz"], points["rgb"] = np.stack([x, y, depth], axis=-1), picture
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {depth.size}"]
    lines += [f"property float {name}" for name in "xyz"]
    lines += [f"property uchar {name}" for name in ("red", "green", "blue")]
    content = "\n".join([*lines, "end_header", ""]).encode() + points.tobytes()
    cabins.write_whole(path, lambda partial: partial.write_bytes(content))


def predict_pictures(model: cabins.CaBins, args: argparse.Namespace) -> int:
    """Write the depth of each picture of `args.images` into `args.out`; return how many failed."""
    out, paths = Path(args.out or "runs/pictures"), find_pictures(args.images)
    if own := [path for path in paths if path.resolve().parent == out.resolve()]:
        raise ValueError(f"--out {out} is the folder of {own[0]}, which must stay: choose another")
    out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", module="PIL")  # odd EXIF blocks, and very large pictures
    n_failed, names = 0, set()
    for path in tqdm(paths, unit="picture", disable=None):
        name = path.stem
        while name in names:  # of another folder, or with another suffix
            name += "_"
        names.add(name)
        try:
            tqdm.write(f"{path}: {write_picture(path, out / name, model, args)}")
        except (OSError, ValueError) as error:
            tqdm.write(f"{path} is left out: {error}", file=sys.stderr)
            n_failed += 1
    print(f"{len(paths) - n_failed} of {len(paths)} pictures written to {out}")
    return n_failed


def write_picture(path: Path, out: Path, model: cabins.CaBins, args) -> str:
    """Write the files of one picture, whose names begin as `out`; returns a line about them."""
    image, config = cabins.open_picture(path), model.config
    picture = cabins.read_picture(image)
    with data.autocast(next(model.parameters()).device, args.amp):
        found, s = cabins.look(model, cabins.to_input(model, picture), picture.shape[:2])
    depth, files = found.depth, [f"{out}_depth.png", f"{out}_colour.png"]
    low, high = (0, args.range) if args.range else (float(depth.min()), float(depth.max()))
    figure, (part,) = new_figure(1 + 13 * min(depth.shape[0] / depth.shape[1], 2.5))
    shown = show(part.subplots(), "", depth, "depth (m)", low, high)
    save_figure(files[0], figure)
    colours = Image.fromarray(shown.to_rgba(depth, bytes=True)[..., :3])
    cabins.write_whole(files[1], lambda partial: colours.save(partial, "png"))
    for name, values in (("depth", depth), ("std", found.std)):
        about = f"{name} by CaBins, {args.checkpoint}, "
        files.append(write_depth(f"{out}_{name}", values, config.max_depth, 1000, about))
    line = f"{depth.min():.2f} to {depth.max():.2f} m, median {np.median(depth):.2f} m"
    if image.mode.startswith("I"):
        line += f"; its greatest grey value, {np.max(image)}, is white"
    if args.explain:
        files.append(f"{out}_explained.png")
        draw_explained(files[-1], picture, config, found, s)
    if args.ply:
        files.append(f"{out}.ply")
        focal, source = focal_of(image.getexif(), depth.shape, config, args)
        write_ply(files[-1], picture, depth, focal)
        line += f"; point cloud with a focal length of {focal:.1f} pixels, from {source}"
    return f"{line}; {', '.join(Path(file).name for file in files)}"


def main() -> None:
    args = parse_args()
    data.go_fast(False)  # what is measured as fp32 is fp32
    content = cabins.read_checkpoint(args.checkpoint)
    saved = content["args"] if isinstance(content.get("args"), dict) else {}
    max_depth = args.max_depth
    if "config" not in content and args.data:  # the authors', which do not say their range
        max_depth = max_depth or data.DATASETS[args.data].max_depth
    model = cabins.restore(content, args.checkpoint, max_depth)
    model, config = model.to(data.choose_device(args.device)), model.config
    print(f"{args.checkpoint}, all of its {len(content['model'])} tensors: {config}")
    if args.images:
        sys.exit(1 if predict_pictures(model, args) else 0)
    name = args.data or saved.get("data")
    if name is None:
        raise ValueError(f"{args.checkpoint} does not say what data it is for: give --data")
    known = saved if name == saved.get("data") else {}
    keys = ("root", "test_split", "depth_scale", "max_depth")
    root, split, scale, max_depth = (getattr(args, key) or known.get(key) for key in keys)
    dataset = DepthDataset(name, root, split, depth_scale=scale, max_depth=max_depth)
    flip, predict = not args.no_flip, predictor(model, not args.no_flip, args.amp)
    if args.explain:
        out = Path(args.out or "runs/explained")
        draw_samples(out, model, dataset, args.explain)
        print(f"{out} has an explained_….png of each sample")
        return
    source = {"checkpoint": str(Path(args.checkpoint).resolve()), "data": name}
    source["list"] = f"{split and Path(split).resolve()} ({dataset.checksum:08x})"
    keep, out = predict, Path(args.out or ".")
    if args.out:  # no two networks, lists or ways to measure share a folder of predictions
        key = str((source, vars(args), Path(args.checkpoint).stat().st_mtime_ns))
        source["predictions"] = f"predictions_{zlib.crc32(key.encode()):08x}"
        keep = keep_predictions(predict, dataset, out / source["predictions"])
    windows = evaluate_windows(keep, dataset, progress=True)
    rows = {f"{Path(args.checkpoint).name}, {window}": row for window, row in windows.items()}
    rows |= ablate(model, predict, dataset) if args.ablate else {}
    for window in windows:
        print(protocol(dataset, window, flip, args.amp))
    print(format_table(name, rows))
    for label, row in rows.items() if args.out else ():
        how = protocol(dataset, label.split(", ")[-1], flip, args.amp)
        source["date"] = f"{datetime.datetime.now():%Y-%m-%d %H:%M}"
        data.append_row(out / "results.csv", {"label": label, **source, "protocol": how, **row})


def parse_args() -> argparse.Namespace:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("checkpoint", help="train.py's or the authors'")
    group = data.add_data_options(parser)
    group.add_argument("--data", choices=data.DATASETS, help="default: what it was trained on")
    group.add_argument("--split", dest="test_split", metavar="FILE", help="same as --test-split")
    group = parser.add_argument_group("network")
    data.add_device_options(group, "off")
    add = group.add_argument
    add("--no-flip", action="store_true", help="without the mean with the mirror image's depth")
    add("--ablate", action="store_true", help="also rows with the text silenced")
    add = parser.add_argument_group("files and pictures").add_argument
    add("--out", metavar="DIR", help="default for pictures: runs/pictures, runs/explained")
    add("--explain", nargs="?", type=int, const=4, metavar="N", help="figures; default N: 4")
    add("--images", nargs="+", metavar="PICTURE", help="files, folders or patterns of your own")
    add("--range", type=float, metavar="M", help="colours of all pictures go from 0 to M metres")
    add("--ply", action="store_true", help="write a point cloud of each picture")
    add("--focal", type=float, help="of its camera, in pixels; default: EXIF's or training's")
    add("--fov", type=float, help="instead of --focal: degrees from left to right")
    args = parser.parse_args()
    if args.images:
        data.refuse(args, "no_flip ablate root test_split depth_scale", "is not for --images")
    else:
        data.refuse(args, "ply focal fov range", "is for --images")
    if not args.ply:
        data.refuse(args, "focal fov", "is for --ply")
    if args.focal:
        data.refuse(args, "fov", "or --focal: give one")
    if args.explain:
        data.refuse(args, "ablate", "or --explain: give one")
    data.refuse(args, "train_split", "is for training")
    for option, limit in (("explain", np.inf), ("focal", np.inf), ("fov", 180), ("range", np.inf)):
        value = getattr(args, option)
        if value is not None and not 0 < value < limit:
            raise ValueError(f"--{option} is {value}; it must be above 0 and below {limit}")
    return args


if __name__ == "__main__":
    data.run_command(main)
