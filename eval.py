"""Measure a checkpoint of CaBins as the paper does (Sec. 4.3), and show what it predicts.

python eval.py runs/toy/best.pt                     the paper's metrics, above the paper's own row
python eval.py runs/toy/best.pt --csv rows.csv      also adds the row, with all digits, to a file
python eval.py runs/toy/best.pt --figures DIR       also draws bins, prompts and depth of 4 samples
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import cabins
import data
from cabins import InputError
from data import DepthDataset

Predict = Callable[[Tensor], Tensor | np.ndarray]  # images (B, 3, H, W) -> metres (B, 1, H, W)
HEADINGS = {
    "abs_rel": "AbsRel",
    "sq_rel": "SqRel",
    "rmse": "RMSE",
    "rmse_log": "RMSElog",
    "log10": "log10",
    "d1": "d<1.25",
    "d2": "d<1.25^2",
    "d3": "d<1.25^3",
}
COLUMNS = {"nyu": ["abs_rel", "rmse", "log10", "d1", "d2", "d3"]}  # Table 1; Table 2 has all
QUOTED = {  # "Ours" of Tables 1 and 2
    "nyu": "0.120 0.401 0.050 0.866 0.978 0.996",
    "kitti": "0.057 0.186 2.322 0.088 0.025 0.964 0.995 0.999",
}


class Measured(NamedTuple):
    """The result in one test window."""

    metrics: dict[str, float]  # means over the images
    n_images: int  # that have ground truth in the window
    n_nan: int  # predicted pixels that are NaN, in the whole images


def evaluate_windows(
    predict: Predict | cabins.CaBins, dataset: DepthDataset, workers: int | None = None
) -> dict[str, Measured]:
    """Measure a network, or a function, in each of the data set's test windows, in one pass.

    The paper's window comes first. Ground truth counts where it lies strictly inside the depth
    range. Predictions are clipped to the range. Each metric is computed for each image and averaged
    over the images. A network is put in eval mode, and afterwards back in the mode that it had.
    Raises InputError if the paper's window has no ground truth.
    """
    if not isinstance(dataset, DepthDataset):
        raise InputError(f"dataset is a {type(dataset).__name__}; shorten a DepthDataset's `pairs`")
    if isinstance(predict, cabins.CaBins):
        modes = {module: module.training for module in predict.modules()}
        try:
            return evaluate_windows(predictor(predict.eval()), dataset, workers)
        finally:
            for module, is_training in modes.items():
                module.training = is_training
    low, high = cabins.Config.min_depth, dataset.recipe.max_depth
    images = defaultdict(list)  # for each window, the metrics of each image
    n_nan = 0
    windows = {}
    for sample in tqdm(data.load(dataset, None, workers), "evaluating", leave=False, disable=None):
        depth, target = torch.as_tensor(predict(sample["image"])).cpu(), sample["depth"]
        if depth.shape != target.shape:
            raise ValueError(f"predict gave {tuple(depth.shape)} for {tuple(target.shape)}")
        n_nan += int(depth.isnan().sum())
        depth = depth.nan_to_num(low, high, low).clamp(low, high)
        windows = data.evaluation_windows(dataset.name, *sample["size"][0].tolist())
        for window, (rows, columns) in windows.items():
            d, d_star = depth[..., rows, columns], target[..., rows, columns]
            mask = (d_star > low) & (d_star < high)
            if mask.any():
                metrics = cabins.depth_metrics(d[mask].double(), d_star[mask].double())
                images[window].append({name: value.item() for name, value in metrics.items()})
    first = next(iter(windows), "of no image")
    if not images[first]:
        raise InputError(f"no image has depth from {low} to {high} m in the window {first}")
    found = {}
    for window in filter(images.get, windows):
        n = len(images[window])
        means = {name: sum(row[name] for row in images[window]) / n for name in HEADINGS}
        found[window] = Measured(means, n, n_nan)
    return found


def evaluate(
    predict: Predict | cabins.CaBins, dataset: DepthDataset, workers: int | None = None
) -> dict[str, float]:
    """Mean metrics in the paper's test window. See `evaluate_windows`."""
    return next(iter(evaluate_windows(predict, dataset, workers).values())).metrics


def predictor(model: cabins.CaBins, flip: bool = True) -> Predict:
    """The function from images to depth that `evaluate_windows` measures.

    The network sees the images at the longer side that it was trained for. With `flip`, the depths
    of the image and of its mirror image are averaged at the decoder's size, H/2 x W/2.
    """
    config = model.config

    @torch.inference_mode()
    def predict(image: Tensor) -> Tensor:
        size = image.shape[-2:]
        image = cabins.to_training_size(image.to(model.prompts.device), config.longer_side)
        both = torch.cat([image, image.flip(-1)]) if flip else image
        depth = model(both.to(model.prompts.dtype), upsample=False).depth
        depth = depth.clamp(config.min_depth, config.max_depth)  # NaN stays, and is counted
        if flip:
            straight, mirrored = depth.chunk(2)
            depth = (straight + mirrored.flip(-1)) / 2
        return cabins.resize(depth, size)

    if model.training:  # BatchNorm would learn from the test images
        raise InputError("the network is in training mode: call model.eval() first")
    return predict


def protocol(dataset: DepthDataset, window: str, measured: Measured, how: str) -> str:
    """One line that says how a row was measured. `how` tells what the method did."""
    low, high = cabins.Config.min_depth, dataset.recipe.max_depth
    images = f"{measured.n_images} of {len(dataset)} images have ground truth"
    images += f" ({dataset.n_left_out} more without a file of it)" if dataset.n_left_out else ""
    line = f"{dataset.name}: {images} in the window {window}, {low} < depth < {high} m, {how}, "
    nan = f"; {measured.n_nan} predicted pixels are NaN" if measured.n_nan else ""
    return f"{line}mean over images{nan}"


def format_table(dataset: DepthDataset, rows: dict[str, dict[str, float]]) -> str:
    """The paper's table: its columns, `rows`, and the paper's own row if the range is the same."""
    name = dataset.name
    columns = COLUMNS.get(name, list(HEADINGS))
    table = [["", *(HEADINGS[c] for c in columns)]]
    table += [[label, *(f"{row[c]:.3f}" for c in columns)] for label, row in rows.items()]
    if name in QUOTED and dataset.recipe.max_depth == data.DATASETS[name].max_depth:
        table.append(["CaBins (quoted)", *QUOTED[name].split()])
    width = max(len(row[0]) for row in table)
    return "\n".join(f"{row[0]:{width}}" + "".join(f" {v:>8}" for v in row[1:]) for row in table)


# ---- Figures -------------------------------------------------------------------------------------
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


def draw_explained(path: str | Path, picture: np.ndarray, model: cabins.CaBins, truth=None) -> None:
    """Draw the depth of a picture (H, W, 3), its spread, the bins, and s of each prompt."""
    from matplotlib.figure import Figure

    found = cabins.infer(model, picture)
    s = cabins.predict_picture(model, picture).similarity[0].cpu().numpy()
    depths = {"prediction": found.depth}
    if truth is not None and truth.any():
        depths["ground truth"] = np.where(truth > 0, truth, np.nan)
    low, high = np.nanmin([*depths.values()]), np.nanmax([*depths.values()])
    maps = [("image", picture)]
    maps += [(f"{name} (m)", depth, low, high) for name, depth in depths.items()]
    if len(depths) > 1:
        error = np.abs(found.depth - depths["ground truth"])
        maps.append(("error (m)", error, 0, high / 10, "magma"))
    maps.append(("spread of p (m)", found.std, 0, found.std.max(), "magma"))
    shape = min(len(picture) / picture.shape[1], 2.5)  # taller ones get margins
    heights = [0.6 + 11 / len(maps) * shape, 3, 0.8 + 11 / len(s) * shape]  # inches
    figure = Figure(figsize=(13, sum(heights)), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=heights)
    for axis, shown in zip(top.subplots(1, len(maps)), maps):
        show(axis, *shown)
    draw_bins(middle.subplots(), found, depths, model.config.max_depth)

    texts = [str(round(e, 4)) for e in found.distances.tolist()]
    texts = cabins.SEMANTIC_BINS if model.config.distance_class == "semantic" else texts
    bottom.suptitle("cosine similarity of the image and each prompt", fontsize=10)
    for k, axis in enumerate(bottom.subplots(1, len(s), squeeze=False)[0]):
        bar = k == len(s) - 1  # one is enough, as all have the same scale
        show(axis, f"“{texts[k]}”", s[k], s.min(), s.max(), "cividis", bar)
    figure.savefig(path, bbox_inches="tight")


def draw_bins(axis, found: cabins.Inference, depths: dict[str, np.ndarray], top: float) -> None:
    """Draw a histogram of each map of depth, the bin centres and the distances e."""
    known = [depth[depth > 0] for depth in depths.values()]
    edges = np.linspace(0, top, 129)
    axis.hist(known, edges, density=True, histtype="step", label=[*depths])
    across = axis.get_xaxis_transform()  # x in metres, y as a share of the height
    axis.vlines(found.centers, 0, 0.06, "black", linewidth=0.4, transform=across)
    axis.vlines(found.distances, 0, 1, "black", "--", linewidth=0.8, transform=across)
    counts = len(found.centers), len(found.distances)
    title = "{} bin centres (ticks) and {} distances e (dashed)".format(*counts)
    axis.set(xlabel="depth (m)", ylabel="share of pixels per metre", title=title, xmargin=0)
    axis.legend(loc="upper right")


def draw_samples(out: Path, model: cabins.CaBins, dataset: DepthDataset, n: int) -> None:
    """Draw n samples, evenly spread over the data set, into the folder `out`."""
    for i in torch.linspace(0, len(dataset) - 1, min(n, len(dataset))).long().tolist():
        sample = dataset[i]
        picture = (255 * data.denormalize(sample["image"])).round().byte().permute(1, 2, 0).numpy()
        draw_explained(out / f"explained_{i}.png", picture, model, sample["depth"][0].numpy())


# ---- The command ---------------------------------------------------------------------------------
def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which network is measured, on what and how."""
    add = parser.add_argument
    add("checkpoint", help="best.pt or last.pt of train.py")
    add("--data", choices=data.DATASETS, help="default: what the network was trained on")
    add("--split", metavar="FILE", help="list of test pairs")
    data.add_data_options(parser)
    data.add_device_options(parser)
    add("--no-flip", action="store_true", help="no averaging with the mirror image")


def open_checkpoint(args: argparse.Namespace) -> tuple[cabins.CaBins, DepthDataset]:
    """The network, and its test set. What the options leave open is as in training."""
    data.use_tf32(False)  # what is called fp32 is measured in float32 on GPUs, too
    model = cabins.load_checkpoint(args.checkpoint, data.choose_device(args.device))
    trained_on = cabins.read_checkpoint(args.checkpoint).get("data", {})
    name = args.data or trained_on.get("name")
    if name is None:
        raise InputError(f"{args.checkpoint} does not say what data it is for: give --data")
    saved = {}
    if name == trained_on.get("name"):
        run = Path(args.checkpoint).with_name("args.json")
        saved = json.loads(run.read_text())["options"] if run.exists() else {}
        saved |= trained_on
    elif name in ("list", "toy"):  # the others have a depth range of their own
        saved = {"max_depth": model.config.max_depth}
    dataset = DepthDataset(
        name,
        args.root or saved.get("root"),
        args.split or saved.get("test_split"),
        depth_scale=args.depth_scale or saved.get("depth_scale"),
        max_depth=args.max_depth or saved.get("max_depth"),
    )
    print(f"{args.checkpoint}: {model.config}")
    print(f"testing on {name}: {data.describe(dataset)}")
    return model, dataset


def measure(args: argparse.Namespace, predict: Predict, dataset: DepthDataset, side: int) -> None:
    """Measure a network of that longer side. Print the rows, and add them to the file of --csv."""
    flip = "off" if args.no_flip else "on"
    how = f"longer side {side} pixels, flip averaging {flip}, fp32"
    rows = {}
    lines = []
    for window, found in evaluate_windows(predict, dataset, args.workers).items():
        line = protocol(dataset, window, found, how)
        row = {"checkpoint": args.checkpoint, "window": window, **found.metrics, "protocol": line}
        if args.csv:
            data.append_row(args.csv, row)
        rows[f"{Path(args.checkpoint).name}, {window}"] = found.metrics
        lines.append(line)
    print(*lines, format_table(dataset, rows), sep="\n")


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add_options(parser)
    parser.add_argument("--csv", metavar="FILE", help="add the rows to this file")
    parser.add_argument("--figures", metavar="DIR", help="draw 4 samples into this new folder")
    args = parser.parse_args()
    model, dataset = open_checkpoint(args)
    out = data.new_folder(args.figures) if args.figures else None
    if args.csv and not Path(args.csv).resolve().parent.is_dir():
        raise InputError(f"--csv {args.csv} lies in a folder that does not exist: make it first")
    measure(args, predictor(model, not args.no_flip), dataset, model.config.longer_side)
    if out:
        draw_samples(out, model, dataset, 4)


if __name__ == "__main__":
    data.run_command(main)
