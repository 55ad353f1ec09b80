"""Measure a checkpoint of CaBins as the paper does, and show what the network predicts.

python eval.py runs/toy/best.pt                     a row of the paper's table, beside the paper's
python eval.py runs/toy/best.pt --explain 4         figures of bins, prompts and depth
python eval.py runs/toy/best.pt --images *.jpg      depth of your own pictures
"""

import argparse
import glob
import os
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
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

Predict = Callable[[Tensor], Tensor | np.ndarray]  # images (B, 3, H, W) -> metres (B, 1, H, W)
HEADINGS = {"abs_rel": "AbsRel", "sq_rel": "SqRel", "rmse": "RMSE", "rmse_log": "RMSElog"}
HEADINGS |= {"log10": "log10", "d1": "d<1.25", "d2": "d<1.25²", "d3": "d<1.25³"}
COLUMNS = {"nyu": ["abs_rel", "rmse", "log10", "d1", "d2", "d3"]}  # the others have all: Table 2
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
PICTURES = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp"}
PICTURES |= {".avif", ".heic", ".heif"}


def format_table(name: str, rows: dict[str, dict[str, float]]) -> str:
    """The paper's table for data set `name`: its columns, then `rows`, then the paper's own rows."""
    columns = COLUMNS.get(name, list(HEADINGS))
    table = [["", *(HEADINGS[c] for c in columns)]]
    table += [[label, *(f"{row[c]:.3f}" for c in columns)] for label, row in rows.items()]
    for line in QUOTED.get(name, "").strip().splitlines():
        label, *values = line.strip().rsplit(maxsplit=len(columns))
        table.append([f"{label} (quoted)", *values])
    width = max(len(row[0]) for row in table)
    return "\n".join(f"{row[0]:{width}}" + "".join(f" {v:>8}" for v in row[1:]) for row in table)


@torch.no_grad()
def evaluate_windows(
    predict: Predict, dataset: DepthDataset, workers=None, progress=False, keep=None
) -> dict[str, dict[str, float]]:
    """Mean metrics in each of the data set's test windows, from one pass.

    Ground truth counts where it lies strictly inside the depth range. Predictions are clipped to
    the range. Each metric is computed for each image and averaged over the images. `keep`, if
    given, is called with the path and the clipped prediction of each image.
    """
    low, high = cabins.Config.min_depth, dataset.recipe.max_depth
    samples = data.load(dataset, workers=workers)
    if progress:
        samples = tqdm(samples, "evaluating", leave=False, disable=None)  # only in a terminal
    found: dict[str, list[dict[str, float]]] = {}  # for each window, the metrics of each image
    for sample in samples:
        depth, target = torch.as_tensor(predict(sample["image"])).cpu(), sample["depth"]
        depth = depth.nan_to_num(low, high, low).clamp(low, high)
        if depth.shape != target.shape:
            raise ValueError(f"predict gave {tuple(depth.shape)} for {tuple(target.shape)}")
        if keep:
            keep(sample["path"][0], depth)
        windows = data.evaluation_windows(dataset.name, *sample["size"][0].tolist())
        for window, (rows, columns) in windows.items():
            d, d_star = depth[..., rows, columns], target[..., rows, columns]
            mask = (d_star > low) & (d_star < high)
            images = found.setdefault(window, [])
            if mask.any():
                metrics = cabins.depth_metrics(d[mask].double(), d_star[mask].double())
                images.append({k: v.item() for k, v in metrics.items()})
    for window, images in found.items():
        if n := len(dataset) - len(images):
            print(f"{n} images have no ground truth in window {window} and are left out")
    if not any(found.values()):
        raise ValueError(f"none of the {len(dataset)} images has ground truth below {high} m")
    return {
        window: {k: sum(m[k] for m in images) / len(images) for k in HEADINGS}
        for window, images in found.items()
        if images
    }


def evaluate(predict: Predict | cabins.CaBins, dataset: DepthDataset) -> dict[str, float]:
    """Mean metrics in the paper's test window. A network is measured with flip averaging."""
    if isinstance(predict, cabins.CaBins):
        predict = predictor(predict, longer_side=side_for(predict, dataset))
    return next(iter(evaluate_windows(predict, dataset).values()))


def side_for(model: cabins.CaBins, dataset: DepthDataset) -> int | None:
    """The longer side to which the images of own lists are resized. Others keep their size."""
    return model.config.longer_side if dataset.name == "list" else None


def predictor(model: cabins.CaBins, flip=True, amp="off", longer_side=None) -> Predict:
    """The function from images to depth that is measured, for `evaluate_windows`.

    With `flip`, the depths of the image and of its mirror image are averaged, at the decoder's
    size. With `longer_side`, the network sees the image at that size, as it does in `cabins.infer`.
    """
    low, high = model.config.min_depth, model.config.max_depth

    @torch.inference_mode()
    def predict(image: Tensor) -> Tensor:
        size, image = image.shape[-2:], image.to(next(model.parameters()).device)
        if longer_side:
            image = cabins.to_training_size(image, longer_side)
        both = torch.cat([image, image.flip(-1)]) if flip else image
        with cabins.eval_mode(model), data.autocast(image.device, amp):
            depth = model(both, upsample=False).depth
        depth = depth.nan_to_num(low, high, low).clamp(low, high)
        if flip:
            straight, mirrored = depth.chunk(2)
            depth = (straight + mirrored.flip(-1)) / 2
        return cabins.resize(depth, size)

    return predict


def protocol(dataset: DepthDataset, window: str, flip: bool, amp="off", longer_side=None) -> str:
    """One line that says how a row was measured."""
    images = f"{len(dataset)} images ({dataset.n_left_out} without ground truth left out)"
    images += f" at {longer_side} pixels" if longer_side else ""
    valid = f"{cabins.Config.min_depth} < depth < {dataset.recipe.max_depth} m"
    network = f"flip averaging {'on' if flip else 'off'}, {'fp32' if amp == 'off' else amp}"
    return f"{dataset.name}: {images}, window {window}, {valid}, {network}, mean over images"


def open_folder(folder: str | Path) -> Path:
    """Make a folder. If it takes no files, OSError comes now and not after the work."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
    except OSError as error:
        raise OSError(f"{folder} takes no files: {error.strerror}; choose another --out") from None
    return Path(folder)


def name_for(checkpoint: str, *settings) -> str:
    """The name of a folder for results. It is another for another network or other `settings`."""
    path = Path(checkpoint).resolve()
    key = zlib.crc32(str((path, path.stat().st_mtime_ns, *settings)).encode())
    return f"{path.stem}_{key:08x}"


def new_name(path: str, taken: set[str]) -> str:
    """A file name for the results of the image `path`. It is not in `taken`, and is added to it."""
    stem, suffix = os.path.splitext(path)
    name = stem if suffix.lower() in PICTURES else path
    name = name.replace(f"..{os.sep}", "").replace(os.sep, "_")
    while name.lower() in taken:
        name += "_"
    taken.add(name.lower())
    return name


def write_depth(path: str, depth: np.ndarray, max_depth: float, scale: float, about="") -> str:
    """Write metres (H, W) as a 16-bit PNG; return its name, which is `path` and the unit.

    The value of 1 m is `scale`, or the first of 1000, 100, 10 and 1 with which `max_depth` fits.
    """
    units = {1000: "_mm", 100: "_cm", 10: "_dm", 1: "_m"}
    scale = next((s for s in (scale, *units) if max_depth * s <= 65535), 1)
    path, info = f"{path}{units.get(scale, '')}.png", PngImagePlugin.PngInfo()
    info.add_text("Description", f"{about}in 1/{scale:g} m")
    image = Image.fromarray((depth * scale).round().clip(0, 65535).astype(np.uint16))
    cabins.write_whole(path, lambda partial: image.save(partial, "png", pnginfo=info))
    return path


def save_figure(path: str | Path, figure) -> None:
    options = {"dpi": 100, "format": "png", "bbox_inches": "tight"}
    cabins.write_whole(path, lambda partial: figure.savefig(partial, **options))


def show(axis, title: str, values: np.ndarray, low=0.0, high=1.0, cmap="viridis", bar=True):
    """Draw colours (H, W, 3), or values (H, W) from `low` to `high`, with a bar of their scale."""
    axis.set_axis_off()
    axis.set_anchor("N")
    axis.set_title(title, fontsize=10, parse_math=False)
    shown = axis.imshow(values, cmap=cmap, vmin=low, vmax=high)
    if bar and values.ndim == 2:
        width = 0.03 * max(1, len(values) / values.shape[1])  # of the bar, in widths of the picture
        beside = axis.inset_axes([1 + width, 0, width, 1])  # as high as the picture
        extend = "max" if np.nanmax(values) > high else "neither"  # a mark where values are cut off
        ticks = sorted({low, (low + high) / 2, high})
        axis.figure.colorbar(shown, beside, ticks=ticks, format="%.3g", extend=extend)
    return shown


def show_bins(axis, found: cabins.Inference, texts: list[str], truth, top: float) -> None:
    """Draw histograms of depth over the bin centres, with each prompt at its distance."""
    options = {"bins": 128, "range": (0, top), "density": True}
    axis.hist(found.depth.ravel(), **options, label="prediction")
    if truth is not None:
        axis.hist(truth[truth > 0], **options, histtype="step", label="ground truth")
    across = axis.get_xaxis_transform()  # x in metres, y as a share of the height
    axis.vlines(found.centers, 0, 0.06, "black", linewidth=0.4, transform=across)
    for k, (distance, text) in enumerate(zip(found.cabins, texts)):
        axis.axvline(distance, color="black", linewidth=0.8, linestyle="--")
        above = {"xytext": ((k + 0.5) / len(texts), 1.12), "textcoords": "axes fraction"}
        line = {"xycoords": across, "arrowprops": {"arrowstyle": "-"}}
        axis.annotate(f"“{text}”", (distance, 1.0), **above, **line, ha="center")
    axis.set(xlabel="depth (m)", ylabel="share of pixels per metre", xlim=(0, top))
    title = f"{len(found.centers)} bin centres (ticks) and the prompts (dashed)"
    axis.set_title(title, fontsize=10, pad=38)
    axis.legend(loc="upper right")


def draw_explained(path: str | Path, image: np.ndarray, config, found, s, truth=None) -> None:
    """Draw what `cabins.predict_one` gives: depth, its spread, the bins, and s of each prompt."""
    from matplotlib.figure import Figure

    truth = np.where(truth > 0, truth, np.nan) if truth is not None and truth.any() else None
    known = found.depth if truth is None else np.stack([found.depth, truth])
    low, high = np.nanmin(known), np.nanmax(known)
    maps = [("image", image), ("prediction (m)", found.depth, low, high)]
    if truth is not None:
        maps.insert(1, ("ground truth (m)", truth, low, high))
        maps.append(("error (m)", np.abs(found.depth - truth), 0, high / 10, "magma"))
    maps.append(("spread of p (m)", found.std, 0, found.std.max(), "magma"))
    texts = [str(round(distance, 4)) for distance in found.cabins.tolist()]
    texts = cabins.SEMANTIC_BINS if config.distance_class == "semantic" else texts
    n, shape = len(maps), min(len(image) / image.shape[1], 2.5)  # taller pictures get margins
    heights = [0.6 + (13.6 / n - 0.75) * shape, 3.2, 0.8 + 12 / len(s) * shape]  # inches
    figure = Figure(figsize=(13, sum(heights)), layout="constrained")
    depths, bins, prompts = figure.subfigures(3, 1, height_ratios=heights)
    for axis, shown in zip(depths.subplots(1, n), maps):
        show(axis, *shown)
    show_bins(bins.subplots(), found, texts, truth, config.max_depth)
    prompts.suptitle("cosine similarity of the image and each prompt", fontsize=10)
    for k, axis in enumerate(prompts.subplots(1, len(s), squeeze=False)[0]):
        is_last = k == len(s) - 1  # one bar is enough, as all have the same scale
        show(axis, f"“{texts[k]}”", s[k], s.min(), s.max(), "cividis", is_last)
    save_figure(path, figure)


def draw_samples(out: Path, model: cabins.CaBins, dataset: DepthDataset, n: int) -> None:
    """Draw n samples from all over the data set into the folder `out`."""
    side = side_for(model, dataset)
    for i in torch.linspace(0, len(dataset) - 1, min(n, len(dataset))).long().tolist():
        image, truth = dataset[i]["image"][None], dataset[i]["depth"][0].numpy()
        seen = cabins.to_training_size(image, side) if side else image
        found, s = cabins.predict_one(model, seen, truth.shape)
        colours = data.denormalize(image)[0].permute(1, 2, 0).numpy()
        draw_explained(out / f"explained_{i}.png", colours, model.config, found, s, truth)


# ---- Your own pictures ---------------------------------------------------------------------------


def find_pictures(arguments: list[str]) -> tuple[list[Path], int]:
    """The pictures that files, folders and patterns name, and how many arguments name none."""
    pictures, without = [], []
    for argument in arguments:
        path, left_out = Path(argument), Counter()
        found = path.glob("*") if path.is_dir() else map(Path, glob.iglob(argument, recursive=True))
        chosen = [path] if path.is_file() else []
        for path in [] if chosen else sorted(found):
            kind = "folder" if path.is_dir() else path.suffix.lower() or "without suffix"
            kind = "hidden" if path.name.startswith(".") else kind
            if kind in PICTURES:
                chosen.append(path)
            else:
                left_out[kind] += 1
        if left_out:
            kinds = ", ".join(f"{n} {kind}" for kind, n in left_out.items())
            print(f"{argument}: {left_out.total()} are left out, as they are no pictures: {kinds}")
        pictures += chosen
        without += [] if chosen else [f"{argument}: no picture there"]
    if not pictures:
        raise FileNotFoundError("; ".join(without))
    for line in without:
        print(line, file=sys.stderr)
    return [*dict.fromkeys(pictures)], len(without)


def predict_pictures(model: cabins.CaBins, args: argparse.Namespace) -> int:
    """Write the depth of each picture that `args.images` names; return how many could not be."""
    paths, n_without = find_pictures(args.images)
    out = Path(args.out or f"runs/pictures/{name_for(args.checkpoint)}")
    if own := [path for path in paths if path.resolve().parent == out.resolve()]:
        raise ValueError(f"--out {out} is the folder of {own[0]}, which must stay: choose another")
    open_folder(out)
    warnings.filterwarnings("ignore", module="PIL")  # of odd EXIF blocks and very large pictures
    taken, n_done = set(), 0
    for path in tqdm(paths, unit="picture", disable=None):
        try:
            line = write_picture(path, out / new_name(path.name, taken), model, args)
            tqdm.write(f"{path}: {line}")
            n_done += 1
        except (OSError, ValueError) as error:
            tqdm.write(f"{path} is not complete: {error}", file=sys.stderr)
    print(f"{n_done} of {len(paths)} pictures are complete in {out}")
    return n_without + len(paths) - n_done


def write_picture(path: Path, start: Path, model: cabins.CaBins, args) -> str:
    """Write the files of a picture, whose names begin with `start`; return a line about it."""
    from matplotlib.figure import Figure

    with cabins.open_picture(path) as image:  # it closes files of several frames
        picture, n_frames = cabins.read_picture(image), getattr(image, "n_frames", 1)
    with data.autocast(next(model.parameters()).device, args.amp):
        found, s = cabins.predict_one(model, cabins.to_input(model, picture), picture.shape[:2])
    depth, files = found.depth, [f"{start}_depth.png", f"{start}_colour.png"]
    low, high = (0, args.range) if args.range else (float(depth.min()), float(depth.max()))
    height, width = (max(1, 10 * side / max(depth.shape)) for side in depth.shape)  # inches
    figure = Figure(figsize=(width + 1, height + 0.3), layout="constrained")
    shown = show(figure.subplots(), "depth (m)", depth, low, high)
    save_figure(files[0], figure)
    colours = Image.fromarray(shown.to_rgba(depth, bytes=True)[..., :3])
    cabins.write_whole(files[1], lambda partial: colours.save(partial, "png"))
    for name, values in (("depth", depth), ("std", found.std)):
        about = f"{name} by CaBins, {args.checkpoint}, "
        files.append(write_depth(f"{start}_{name}", values, model.config.max_depth, 1000, about))
    if args.explain is not None:
        files.append(f"{start}_explained.png")
        draw_explained(files[-1], picture, model.config, found, s)
    line = f"{depth.min():.2f} to {depth.max():.2f} m, median {np.median(depth):.2f} m"
    if image.mode.startswith("I"):
        line += f"; its greatest grey value, {np.max(image)}, is white"
    if n_frames > 1:
        line += f"; only the first of its {n_frames} frames or pages is read"
    return f"{line}; {', '.join(Path(file).name for file in files)}"


# ---- The command ---------------------------------------------------------------------------------


def open_network(args: argparse.Namespace) -> tuple[cabins.CaBins, dict]:
    """The network of `args.checkpoint` on its device, and the options of its training, if known."""
    content, path, max_depth = cabins.read_checkpoint(args.checkpoint), args.checkpoint, None
    if "config" in content:
        data.refuse(args, "released", f"is for the authors' checkpoints, and {path} is not theirs")
    else:  # the authors' do not say their depth range
        which = args.released or vars(args).get("data")
        if which not in QUOTED:
            raise ValueError(f"{path} is the authors': say with --released which, nyu or kitti")
        max_depth = data.DATASETS[which].max_depth
    model = cabins.restore(content, path, max_depth).to(data.choose_device(args.device))
    print(f"{path}, all of its {len(content['model'])} tensors: {model.config}")
    return model, content["args"] if isinstance(content.get("args"), dict) else {}


def open_data_set(args: argparse.Namespace, model: cabins.CaBins, saved: dict) -> DepthDataset:
    """The test set. Options that are not given are those of the training, `saved`.

    Depth is measured over the data set's range, but over the network's for own lists and toy rooms.
    """
    args.data = args.data or saved.get("data")
    if args.data is None:
        raise ValueError(f"{args.checkpoint} does not say what data it is for: give --data")
    is_known, max_depth = args.data == saved.get("data"), args.max_depth
    for option in ("root", "test_split", "depth_scale") if is_known else ():
        setattr(args, option, getattr(args, option) or saved.get(option))
    if is_known or args.data in ("list", "toy"):
        max_depth = max_depth or model.config.max_depth
    return DepthDataset(args.data, args.root, args.test_split, False, args.depth_scale, max_depth)


def measure(model: cabins.CaBins, dataset: DepthDataset, args: argparse.Namespace) -> None:
    """Print a row for each window. With --out, keep it in results.csv, and the predictions too."""
    flip, side, split = not args.no_flip, side_for(model, dataset), args.test_split
    source, keep = {"checkpoint": str(Path(args.checkpoint).resolve()), "data": args.data}, None
    source["list"] = f"{split and Path(split).resolve()} ({dataset.checksum:08x})"
    if args.out:
        key = name_for(args.checkpoint, source, {**vars(args), "workers": None})
        source["predictions"] = f"predictions_{key}"
        results, taken, recipe = open_folder(args.out) / "results.csv", set(), dataset.recipe
        data.check_columns(results, ("label", *source, "date", "protocol", *HEADINGS))
        folder = open_folder(results.with_name(source["predictions"]))

        def keep(path: str, depth: Tensor) -> None:
            name = f"{folder}/{new_name(os.path.relpath(path, args.root or '.'), taken)}"
            write_depth(name, depth[0, 0].numpy(), recipe.max_depth, recipe.depth_scale)

    predict = predictor(model, flip, args.amp, side)
    windows = evaluate_windows(predict, dataset, args.workers, progress=True, keep=keep)
    rows = {f"{Path(args.checkpoint).name}, {window}": row for window, row in windows.items()}
    lines = [protocol(dataset, window, flip, args.amp, side) for window in windows]
    print(*lines, format_table(args.data, rows), sep="\n")
    for (label, row), line in zip(rows.items(), lines) if args.out else ():
        about = source | {"date": time.strftime("%Y-%m-%d %H:%M"), "protocol": line}
        data.append_row(results, {"label": label} | about | row)


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which network is measured, on what and how."""
    parser.add_argument("checkpoint", help="train.py's or the authors'")
    add = data.add_data_options(parser).add_argument
    add("--data", choices=data.DATASETS, help="default: what the network was trained on")
    add("--split", dest="test_split", metavar="FILE", help="same as --test-split")
    group = parser.add_argument_group("network")
    data.add_device_options(group, "off")
    add = group.add_argument
    add("--released", choices=QUOTED, help="which of the authors' two checkpoints this is")
    add("--no-flip", action="store_true", help="without the mean with the mirror image's depth")


def parse_args() -> argparse.Namespace:
    parser = data.Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_network_options(parser)
    add = parser.add_argument_group("files and pictures").add_argument
    add("--out", metavar="DIR", help="default for figures: a folder of the network's in runs/")
    number = {"nargs": "?", "type": data.positive_int, "const": 0, "metavar": "N"}
    add("--explain", **number, help="figures, of N samples of a data set; default: 4")
    add("--images", nargs="+", metavar="PICTURE", help="files, folders or patterns of your own")
    number = {"type": data.positive_float, "metavar": "M"}
    add("--range", **number, help="colours of all pictures go from 0 to M metres")
    args = parser.parse_args()
    data.refuse(args, "train_split", "is for training")
    if args.images:
        options = "data root test_split depth_scale max_depth workers no_flip"
        data.refuse(args, options, "would do nothing with --images")
        data.refuse(args, "explain", "takes no number with --images")
    else:
        data.refuse(args, "range", "is for --images")
    if args.explain is not None:
        data.refuse(args, "max_depth workers no_flip", "would do nothing with --explain")
    return args


def main() -> None:
    args = parse_args()
    data.use_tf32(False)  # what is called fp32 is measured in float32 on GPUs, too
    model, saved = open_network(args)
    if args.images:
        sys.exit(1 if predict_pictures(model, args) else 0)
    dataset = open_data_set(args, model, saved)
    if args.explain is None:
        measure(model, dataset, args)
    else:
        out = open_folder(args.out or f"runs/explained/{name_for(args.checkpoint)}")
        with data.autocast(next(model.parameters()).device, args.amp):
            draw_samples(out, model, dataset, args.explain or 4)
        print(f"{out} has a file explained_….png for each sample")


if __name__ == "__main__":
    data.run_command(main)
