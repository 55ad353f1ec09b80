"""Measure a checkpoint of CaBins as the paper does (Sec. 4.3), and show what it predicts.

python eval.py runs/toy/best.pt                     the paper's metrics, above the paper's own row
python eval.py runs/toy/best.pt --explain 4         figures of bins, prompts and depth
python eval.py runs/toy/best.pt --images *.jpg      depth of your own pictures
"""

import argparse
import glob
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import cabins
import data
from data import DepthDataset

Predict = Callable[[Tensor], Tensor | np.ndarray]  # images (B, 3, H, W) -> metres (B, 1, H, W)
HEADINGS = {"abs_rel": "AbsRel", "sq_rel": "SqRel", "rmse": "RMSE", "rmse_log": "RMSElog"}
HEADINGS |= {"log10": "log10", "d1": "d<1.25", "d2": "d<1.25²", "d3": "d<1.25³"}
COLUMNS = {"nyu": ["abs_rel", "rmse", "log10", "d1", "d2", "d3"]}  # Table 1; Table 2 has all
QUOTED = {  # "Ours" of Tables 1 and 2
    "nyu": "0.120 0.401 0.050 0.866 0.978 0.996",
    "kitti": "0.057 0.186 2.322 0.088 0.025 0.964 0.995 0.999",
}
SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def format_table(name: str, rows: dict[str, dict[str, float]]) -> str:
    """The paper's table for data set `name`: its columns, then `rows`, then the paper's own row."""
    columns = COLUMNS.get(name, list(HEADINGS))
    table = [["", *(HEADINGS[c] for c in columns)]]
    table += [[label, *(f"{row[c]:.3f}" for c in columns)] for label, row in rows.items()]
    if name in QUOTED:
        table.append(["CaBins (quoted)", *QUOTED[name].split()])
    width = max(len(row[0]) for row in table)
    return "\n".join(f"{row[0]:{width}}" + "".join(f" {v:>8}" for v in row[1:]) for row in table)


@torch.no_grad()
def evaluate_windows(predict: Predict, dataset: DepthDataset, workers=None) -> dict[str, dict]:
    """Mean metrics in each of the data set's test windows, the paper's first, from one pass.

    Ground truth counts where it lies strictly inside the depth range. Predictions are clipped to
    the range. Each metric is computed for each image and averaged over the images.
    """
    low, high = cabins.Config.min_depth, dataset.recipe.max_depth
    found = defaultdict(list)  # for each window, the metrics of each image
    bar = {"leave": False, "disable": None}  # shown in a terminal only
    for sample in tqdm(data.load(dataset, workers=workers), "evaluating", **bar):
        depth, target = torch.as_tensor(predict(sample["image"])).cpu(), sample["depth"]
        if depth.shape != target.shape:
            raise ValueError(f"predict gave {tuple(depth.shape)} for {tuple(target.shape)}")
        depth = depth.nan_to_num(low, high, low).clamp(low, high)
        windows = data.evaluation_windows(dataset.name, *sample["size"][0].tolist())
        for window, (rows, columns) in windows.items():
            d, d_star = depth[..., rows, columns], target[..., rows, columns]
            mask = (d_star > low) & (d_star < high)
            images = found[window]  # of every window, to keep the paper's first
            if mask.any():
                metrics = cabins.depth_metrics(d[mask].double(), d_star[mask].double())
                images.append({name: value.item() for name, value in metrics.items()})
    if not any(found.values()):
        raise ValueError(f"none of the {len(dataset)} images has depth from {low} to {high} m")
    return {
        window: {name: sum(row[name] for row in images) / len(images) for name in HEADINGS}
        for window, images in found.items()
        if images
    }


def evaluate(predict: Predict, dataset: DepthDataset, workers=None) -> dict[str, float]:
    """Mean metrics in the paper's test window. `predictor` makes `predict` out of a network."""
    return next(iter(evaluate_windows(predict, dataset, workers).values()))


def side_for(model: cabins.CaBins, dataset: DepthDataset) -> int | None:
    """The longer side to which images are resized: training's for own lists, None for the rest."""
    return model.config.longer_side if dataset.name == "list" else None


def predictor(model: cabins.CaBins, flip=True, longer_side=None) -> Predict:
    """The function from images to depth that `evaluate_windows` measures.

    With `flip`, it averages the depths of the image and of its mirror image at the decoder's size,
    H/2 x W/2. With `longer_side`, it resizes the images as `cabins.infer` does.
    """
    low, high = model.config.min_depth, model.config.max_depth

    @torch.inference_mode()
    def predict(image: Tensor) -> Tensor:
        size, image = image.shape[-2:], image.to(next(model.parameters()).device)
        if longer_side:
            image = cabins.to_training_size(image, longer_side)
        both = torch.cat([image, image.flip(-1)]) if flip else image
        with cabins.eval_mode(model):
            depth = model(both, upsample=False).depth
        depth = depth.nan_to_num(low, high, low).clamp(low, high)
        if flip:
            straight, mirrored = depth.chunk(2)
            depth = (straight + mirrored.flip(-1)) / 2
        return cabins.resize(depth, size)

    return predict


def protocol(dataset: DepthDataset, window: str, flip: bool, longer_side=None) -> str:
    """One line that says how a row was measured."""
    images = f"{len(dataset)} images ({dataset.n_left_out} without ground truth left out)"
    images += f" at {longer_side} pixels" if longer_side else ""
    valid = f"{cabins.Config.min_depth} < depth < {dataset.recipe.max_depth} m"
    network = f"flip averaging {'on' if flip else 'off'}, fp32"
    return f"{dataset.name}: {images}, window {window}, {valid}, {network}, mean over images"


def new_name(name: str, taken: set[str]) -> str:
    """`name`, with underscores after it until it is new to `taken`, to which it is added."""
    while name.lower() in taken:
        name += "_"
    taken.add(name.lower())
    return name


def write_depth(path: str, depth: np.ndarray, scale: float) -> None:
    """Write metres (H, W) as a 16-bit PNG in which 1 m is `scale`."""
    image = Image.fromarray((depth * scale).round().clip(0, 65535).astype(np.uint16))
    data.write_whole(path, lambda partial: image.save(partial, "png"))


def save_figure(path: str | Path, figure) -> None:
    data.write_whole(path, lambda file: figure.savefig(file, format="png", bbox_inches="tight"))


def show(axis, title: str, values: np.ndarray, low=0.0, high=1.0, cmap="viridis", bar=True):
    """Draw colours (H, W, 3), or values (H, W) from `low` to `high`, with a bar of their scale."""
    axis.set_axis_off()
    axis.set_title(title, fontsize=10)
    shown = axis.imshow(values, cmap, vmin=low, vmax=high)
    if bar and values.ndim == 2:
        beside = axis.inset_axes([1.03, 0, 0.04, 1])  # as high as the map
        extend = "max" if np.nanmax(values) > high else "neither"  # a mark where values are cut off
        axis.figure.colorbar(shown, beside, extend=extend)
    return shown


def draw_explained(path: str | Path, image: np.ndarray, config, found, s, truth=None) -> None:
    """Draw the depth of an `Inference`, its spread, the bins, and s of each prompt."""
    from matplotlib.figure import Figure

    depths = {"prediction": found.depth}
    if truth is not None and truth.any():
        depths["ground truth"] = np.where(truth > 0, truth, np.nan)
    low, high = np.nanmin([*depths.values()]), np.nanmax([*depths.values()])
    maps = [("image", image)]
    maps += [(f"{name} (m)", depth, low, high) for name, depth in depths.items()]
    if len(depths) > 1:
        error = np.abs(found.depth - depths["ground truth"])
        maps.append(("error (m)", error, 0, high / 10, "magma"))
    maps.append(("spread of p (m)", found.std, 0, found.std.max(), "magma"))
    n, shape = len(maps), min(len(image) / image.shape[1], 2.5)  # taller pictures get margins
    heights = [0.6 + 11 / n * shape, 3, 0.8 + 11 / len(s) * shape]  # inches
    figure = Figure(figsize=(13, sum(heights)), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=heights)
    for axis, shown in zip(top.subplots(1, n), maps):
        show(axis, *shown)

    axis, edges = middle.subplots(), np.linspace(0, config.max_depth, 129)
    known = [depth[depth > 0] for depth in depths.values()]
    axis.hist(known, edges, density=True, histtype="step", label=[*depths])
    across = axis.get_xaxis_transform()  # x in metres, y as a share of the height
    axis.vlines(found.centers, 0, 0.06, "black", linewidth=0.4, transform=across)
    axis.vlines(found.cabins, 0, 1, "black", "--", linewidth=0.8, transform=across)
    title = f"{len(found.centers)} bin centres (ticks) and {len(s)} distances e (dashed)"
    axis.set(xlabel="depth (m)", ylabel="share of pixels per metre", title=title, xmargin=0)
    axis.legend(loc="upper right")

    texts = [str(round(e, 4)) for e in found.cabins.tolist()]
    texts = cabins.SEMANTIC_BINS if config.distance_class == "semantic" else texts
    bottom.suptitle("cosine similarity of the image and each prompt", fontsize=10)
    for k, axis in enumerate(bottom.subplots(1, len(s), squeeze=False)[0]):
        bar = k == len(s) - 1  # one is enough, as all have the same scale
        show(axis, f"“{texts[k]}”", s[k], s.min(), s.max(), "cividis", bar)
    save_figure(path, figure)


def draw_samples(out: Path, model: cabins.CaBins, dataset: DepthDataset, n: int) -> None:
    """Draw n samples, evenly spread over the data set, into the folder `out`."""
    for i in torch.linspace(0, len(dataset) - 1, min(n, len(dataset))).long().tolist():
        sample = dataset[i]
        picture = (255 * data.denormalize(sample["image"])).round().byte().permute(1, 2, 0).numpy()
        found, s = cabins.infer_with_similarity(model, picture)
        path, truth = out / f"explained_{i}.png", sample["depth"][0].numpy()
        draw_explained(path, picture, model.config, found, s, truth)


# ---- Your own pictures ---------------------------------------------------------------------------
def find_pictures(arguments: list[str]) -> list[Path]:
    """The pictures that files, folders and patterns name. An argument that names none is kept."""
    pictures = []
    for argument in arguments:
        pattern = glob.escape(argument) if os.path.exists(argument) else argument
        pattern += "/*" if os.path.isdir(argument) else ""
        found = [p for p in glob.glob(pattern, recursive=True) if p.lower().endswith(SUFFIXES)]
        pictures += sorted(filter(os.path.isfile, found)) or [argument]  # whatever its suffix
    if not any(map(os.path.isfile, pictures)):
        raise FileNotFoundError(f"there is no picture at {', '.join(arguments)}")
    return [*dict.fromkeys(map(Path, pictures))]


def predict_pictures(model: cabins.CaBins, args: argparse.Namespace) -> int:
    """Write the depth of each picture that `args.images` names; return how many failed."""
    paths = find_pictures(args.images)
    out = Path(args.out or f"{os.path.splitext(args.checkpoint)[0]}_pictures")
    out.mkdir(parents=True, exist_ok=True)
    if own := [path for path in paths if path.resolve().parent == out.resolve()]:
        raise ValueError(f"--out {out} is the folder of {own[0]}, which must stay: choose another")
    taken, n_failed = set(), 0
    for path in tqdm(paths, unit="picture", disable=None):
        try:
            start = f"{out}/{new_name(path.stem, taken)}"
            tqdm.write(f"{path}: {write_picture(path, start, model, args)}")
        except (OSError, ValueError) as error:
            tqdm.write(f"{path} failed: {error}", file=sys.stderr)
            n_failed += 1
    return n_failed


def write_picture(path: Path, start: str, model: cabins.CaBins, args: argparse.Namespace) -> str:
    """Write the files of a picture, whose names begin with `start`; return a line about it."""
    from matplotlib.figure import Figure

    picture = cabins.read_picture(path)
    found, s = cabins.infer_with_similarity(model, picture)
    low, high = (0, args.range) if args.range else (found.depth.min(), found.depth.max())
    figure = Figure(figsize=(12, 12))  # `save_figure` cuts its margins off
    shown = show(figure.subplots(), "depth (m)", found.depth, low, high)
    save_figure(f"{start}_depth.png", figure)
    colours = Image.fromarray(shown.to_rgba(found.depth, bytes=True)[..., :3])
    data.write_whole(f"{start}_colour.png", lambda partial: colours.save(partial, "png"))
    unit, scale = ("mm", 1000) if model.config.max_depth <= 65 else ("cm", 100)  # fits 16 bits
    write_depth(f"{start}_depth_{unit}.png", found.depth, scale)
    write_depth(f"{start}_std_{unit}.png", found.std, scale)
    if args.explain is not None:
        draw_explained(f"{start}_explained.png", picture, model.config, found, s)
    return f"{found.depth.min():.2f} to {found.depth.max():.2f} m, in {start}_….png"


# ---- The command ---------------------------------------------------------------------------------
def open_network(args: argparse.Namespace) -> tuple[cabins.CaBins, dict]:
    """The network of `args.checkpoint` on its device, and the options of its training, if known."""
    content, path = cabins.read_checkpoint(args.checkpoint), args.checkpoint
    max_depth, name = None, args.released or args.data
    if "config" in content:
        data.refuse(args, "released", f"is for the authors' checkpoints, and {path} is not theirs")
    elif name in QUOTED:  # nyu or kitti
        max_depth = data.DATASETS[name].max_depth
    else:  # the authors' checkpoints do not say their depth range
        raise ValueError(f"{path} is the authors': give --released nyu or --released kitti")
    model = cabins.restore(content, path, max_depth).to(data.choose_device(args.device))
    print(f"{path}, all of its {len(content['model'])} tensors: {model.config}")
    return model, content["args"] if isinstance(content.get("args"), dict) else {}


def open_data_set(args: argparse.Namespace, model: cabins.CaBins, saved: dict) -> DepthDataset:
    """The test set. Options that are missing come from `saved`, if that run had the same data."""
    data.refuse(args, "train_split", "is for training")
    known = saved if args.data in (None, saved.get("data")) else {}
    for option in ("data", "root", "test_split", "depth_scale"):
        setattr(args, option, getattr(args, option) or known.get(option))
    if args.data is None:
        raise ValueError(f"{args.checkpoint} does not say what data it is for: give --data")
    if known or args.data in ("list", "toy"):  # the others have a depth range of their own
        args.max_depth = args.max_depth or model.config.max_depth
    scale = {"depth_scale": args.depth_scale, "max_depth": args.max_depth}
    return DepthDataset(args.data, args.root, args.test_split, **scale)


def measure(model: cabins.CaBins, dataset: DepthDataset, args: argparse.Namespace) -> None:
    """Measure the network. Print the protocol, and a table with a row for each window."""
    flip, side = not args.no_flip, side_for(model, dataset)
    predict = predictor(model, flip, side)
    windows = evaluate_windows(predict, dataset, args.workers)
    for window in windows:
        print(protocol(dataset, window, flip, side))
    rows = {f"{Path(args.checkpoint).name}, {window}": row for window, row in windows.items()}
    print(format_table(args.data, rows))


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which network is measured, on what and how."""
    parser.add_argument("checkpoint", help="train.py's or the authors'")
    add = data.add_data_options(parser).add_argument
    add("--data", choices=data.DATASETS, help="default: what the network was trained on")
    add("--split", dest="test_split", metavar="FILE", help="same as --test-split")
    group = parser.add_argument_group("network")
    data.add_device_options(group)
    group.add_argument("--released", choices=QUOTED, help="which of the authors' checkpoints it is")
    group.add_argument("--no-flip", action="store_true", help="no averaging with the mirror image")


def parse_args() -> argparse.Namespace:
    parser = data.Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_network_options(parser)
    add = parser.add_argument_group("files and pictures").add_argument
    add("--out", metavar="DIR", help="of figures and pictures; default: beside the checkpoint")
    about = "draw figures, of N samples of a data set; default: 4"
    add("--explain", nargs="?", type=data.positive_int, const=0, metavar="N", help=about)
    add("--images", nargs="+", metavar="PICTURE", help="your files, folders or patterns")
    add("--range", type=data.positive_float, metavar="M", help="colours go from 0 to M metres")
    args = parser.parse_args()
    if args.images:
        options = "data root train_split test_split depth_scale max_depth workers no_flip"
        data.refuse(args, options, "would do nothing with --images")
        data.refuse(args, "explain", "takes no number with --images")
    elif args.explain is not None:
        data.refuse(args, "range max_depth workers no_flip", "would do nothing with --explain")
    else:
        data.refuse(args, "range", "is for --images")
        data.refuse(args, "out", "is for --explain and --images; extras.predictions writes depths")
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
        out = Path(args.out or f"{os.path.splitext(args.checkpoint)[0]}_explained")
        out.mkdir(parents=True, exist_ok=True)
        draw_samples(out, model, dataset, args.explain or 4)
        print(f"{out} has a file explained_….png for each sample")


if __name__ == "__main__":
    data.run_command(main)
