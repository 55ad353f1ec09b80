"""Measure a network as the paper does (Sec. 4.3), and print the metrics above the paper's own row.

Run `python eval.py runs/toy/best.pt`. --csv keeps all digits, and --figures draws four samples.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import cabins
import data
from cabins import CaBins, InputError
from data import DepthDataset

Predict = Callable[[Tensor], Tensor | np.ndarray]  # image (1, 3, H, W) -> metres (1, 1, H, W)
METRICS = ["abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "d1", "d2", "d3"]
TITLES = ["AbsRel", "SqRel", "RMSE", "RMSElog", "log10", "d<1.25", "d<1.25^2", "d<1.25^3"]
HEADINGS = dict(zip(METRICS, TITLES))
COLUMNS = {"nyu": ["abs_rel", "rmse", "log10", "d1", "d2", "d3"]}  # Table 1; Table 2 has all
QUOTED = {  # "Ours" of Tables 1 and 2
    "nyu": "0.120 0.401 0.050 0.866 0.978 0.996",
    "kitti": "0.057 0.186 2.322 0.088 0.025 0.964 0.995 0.999",
}


class Measured(NamedTuple):
    """The result in one test window."""

    metrics: dict[str, float]  # means over the images
    protocol: str  # one line that says what was measured


def evaluate_windows(predict: Predict, dataset: DepthDataset, workers=None) -> dict[str, Measured]:
    """Measure a function in each of the data set's test windows, the paper's first, in one pass.

    Ground truth counts strictly inside the depth range, and predictions are clipped to it. Metrics
    are computed for each image, then averaged. Raises InputError if no ground truth counts.
    """
    data.use_tf32(False)  # what is called fp32 is measured in float32 on GPUs, too
    low = cabins.Config.min_depth
    high = dataset.recipe.max_depth
    images = {}  # for each window, the metrics of each image
    n_nan = 0
    for sample in tqdm(data.load(dataset, None, workers), "evaluating", leave=False, disable=None):
        depth = torch.as_tensor(predict(sample["image"])).to(sample["depth"])
        n_nan += int(depth.isnan().sum())
        both = torch.stack([depth.nan_to_num(low).clamp(low, high), sample["depth"]])
        windows = data.evaluation_windows(dataset.name, *sample["size"][0].tolist())
        for window, (rows, columns) in windows.items():
            d, d_star = both[..., rows, columns].flatten(1)
            valid = (d_star > low) & (d_star < high)
            found = images.setdefault(window, [])
            if valid.any():
                found.append(cabins.depth_metrics(d[valid].double(), d_star[valid].double()))
    result = {}
    for window, found in images.items():
        line = f"{dataset.name}, window {window}: {len(found)} of {len(dataset)} images have "
        line += f"ground truth ({dataset.n_left_out} more have no file), {low} < depth < {high} m"
        if not found:
            raise InputError(line)
        means = {name: sum(x[name].item() for x in found) / len(found) for name in METRICS}
        result[window] = Measured(means, f"{line}, mean over images; {n_nan} NaN pixels predicted")
    return result


def evaluate(predict: Predict | CaBins, dataset: DepthDataset, workers=None) -> dict[str, float]:
    """Mean metrics of a network, or of a function, in the paper's test window (Sec. 4.3)."""
    if isinstance(predict, CaBins):  # a copy is measured, so the network stays in its mode
        predict = predictor(copy.deepcopy(predict).eval())
    return next(iter(evaluate_windows(predict, dataset, workers).values())).metrics


def predictor(model: CaBins, flip: bool = True) -> Predict:
    """The function from images to depth that `evaluate_windows` measures.

    The network sees the images at the longer side that it was trained for. With `flip`, the depths
    of the image and of its mirror image are averaged at the decoder's size, H/2 x W/2.
    """
    if model.training:  # BatchNorm would learn from the test images
        raise InputError("the network is in training mode: call model.eval() first")

    @torch.inference_mode()
    def predict(image: Tensor) -> Tensor:
        seen = cabins.to_training_size(image.to(model.prompts.device), model.config.longer_side)
        seen = torch.cat([seen, seen.flip(-1)]) if flip else seen
        depth = model(seen.to(model.prompts.dtype), upsample=False).depth
        depth = depth.clamp(model.config.min_depth, model.config.max_depth)  # NaN stays
        if flip:
            depth = (depth[:1] + depth[1:].flip(-1)) / 2
        return cabins.resize(depth, image.shape[-2:])

    return predict


def format_table(dataset: DepthDataset, rows: dict[str, dict[str, float]]) -> str:
    """The paper's table: its columns, `rows`, and the paper's own row if the range is the same."""
    columns = COLUMNS.get(dataset.name, METRICS)
    table = [["", *(HEADINGS[c] for c in columns)]]
    table += [[label, *(f"{row[c]:.3f}" for c in columns)] for label, row in rows.items()]
    if dataset.name in QUOTED and dataset.recipe.max_depth == data.DATASETS[dataset.name].max_depth:
        table.append(["CaBins (quoted)", *QUOTED[dataset.name].split()])
    width = max(len(row[0]) for row in table)
    return "\n".join(f"{row[0]:{width}}" + "".join(f" {v:>8}" for v in row[1:]) for row in table)


# ---- Figures -------------------------------------------------------------------------------------
def show(axis, title: str, values: np.ndarray, low=0.0, high=1.0, cmap="viridis", bar=True):
    """Draw colours (H, W, 3), or values (H, W) from `low` to `high`, with a bar of their scale."""
    axis.set_axis_off()
    axis.set_title(title, fontsize=10)
    shown = axis.imshow(values, cmap, vmin=low, vmax=high)
    if bar and values.ndim == 2:
        extend = "max" if (values > high).any() else "neither"  # a mark where values are cut off
        axis.figure.colorbar(shown, axis.inset_axes([1.03, 0, 0.04, 1]), extend=extend)
    return shown


def draw_explained(path: str | Path, picture: np.ndarray, model: CaBins, truth=None) -> None:
    """Draw a picture (H, W, 3), its depth, truth (H, W), spread, bins, and s of each prompt."""
    from matplotlib.figure import Figure

    found = cabins.infer(model, picture)
    s = cabins.predict_picture(model, picture).similarity[0].cpu().numpy()
    depths = {"prediction": found.depth}
    errors = {"spread of p": found.std}  # its scale is also that of the error
    if truth is not None and truth.any():
        depths["ground truth"] = np.where(truth > 0, truth, np.nan)
        errors = {"error": np.abs(found.depth - depths["ground truth"]), **errors}
    deepest = np.nanmax([*depths.values()])
    maps = [("image", picture)]
    maps += [(f"{name} (m)", depth, 0, deepest) for name, depth in depths.items()]
    maps += [(f"{name} (m)", x, 0, found.std.max(), "magma") for name, x in errors.items()]
    shape = min(len(picture) / picture.shape[1], 2.5)  # taller ones get margins
    heights = [0.6 + 11 / len(maps) * shape, 3, 0.8 + 11 / len(s) * shape]  # inches
    figure = Figure(figsize=(13, sum(heights)), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=heights)
    for axis, shown in zip(top.subplots(1, len(maps)), maps):
        show(axis, *shown)
    axis = middle.subplots()
    edges = np.linspace(0, model.config.max_depth, 129)
    for name, depth in depths.items():
        axis.hist(depth[depth > 0], edges, density=True, histtype="step", label=name)
    across = axis.get_xaxis_transform()  # x in metres, y as a share of the height
    axis.vlines(found.centers, 0, 0.06, "black", lw=0.4, transform=across, label="bin centres")
    axis.vlines(found.distances, 0, 1, "black", "--", lw=0.8, transform=across, label="distances e")
    axis.set(xlabel="depth (m)", ylabel="share of pixels per metre", xmargin=0)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)

    texts = [str(round(e, 4)) for e in found.distances.tolist()]
    texts = cabins.SEMANTIC_BINS if model.config.distance_class == "semantic" else texts
    bottom.suptitle("cosine similarity of the image and each prompt", fontsize=10)
    for k, axis in enumerate(bottom.subplots(1, len(s), squeeze=False)[0]):
        show(axis, f"“{texts[k]}”", s[k], s.min(), s.max(), "cividis", bar=k == len(s) - 1)
    figure.savefig(path, bbox_inches="tight")


def draw_samples(out: Path, model: CaBins, dataset: DepthDataset) -> None:
    """Draw four samples, evenly spread over the data set, into the new folder `out`."""
    out.mkdir(parents=True)
    for i in torch.linspace(0, len(dataset) - 1, min(4, len(dataset))).long().tolist():
        sample = dataset[i]
        picture = (255 * data.denormalize(sample["image"])).round().byte().permute(1, 2, 0).numpy()
        draw_explained(out / f"explained_{i}.png", picture, model, sample["depth"][0].numpy())


# ---- The command ---------------------------------------------------------------------------------
def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which network is measured, on what and how."""
    add = parser.add_argument
    add("checkpoint", help="best.pt or last.pt of train.py")
    add("--data", choices=data.DATASETS, help="default: what the network was trained on")
    add("--split", dest="test_split", metavar="FILE", help="list of test pairs")
    data.add_options(parser)
    add("--no-flip", action="store_true", help="no averaging with the mirror image")


def open_checkpoint(args: argparse.Namespace) -> tuple[CaBins, DepthDataset]:
    """The network, and its test set. What the options leave open is as in training."""
    model = cabins.load_checkpoint(args.checkpoint, data.choose_device(args.device))
    trained_on = cabins.read_checkpoint(args.checkpoint).get("data", {"name": None})
    name = args.data or trained_on["name"]
    if name is None:
        raise InputError(f"{args.checkpoint} does not say what data it is for: give --data")
    options = {}
    if name == trained_on["name"]:
        run = Path(args.checkpoint).with_name("args.json")
        options = json.loads(run.read_text())["options"] if run.exists() else {}
        options |= trained_on
    if name in ("list", "toy", trained_on["name"]):  # NYU and KITTI have ranges of their own
        options["max_depth"] = model.config.max_depth
    options |= {option: value for option, value in vars(args).items() if value is not None}
    changes = {field: options.get(field) for field in ("depth_scale", "max_depth")}
    dataset = DepthDataset(name, options.get("root"), options.get("test_split"), **changes)
    print(f"{args.checkpoint}: {model.config}")
    print(f"testing on {name}: {data.describe(dataset)}")
    return model, dataset


def measure(args: argparse.Namespace, predict: Predict, dataset: DepthDataset, side: int) -> None:
    """Measure a network of that longer side. Print the rows, and add them to the file of --csv."""
    how = f"longer side {side} pixels, flip averaging {'off' if args.no_flip else 'on'}, fp32"
    rows = {}
    for window, (metrics, protocol) in evaluate_windows(predict, dataset, args.workers).items():
        row = {"checkpoint": args.checkpoint, "window": window, **metrics}
        if args.csv:
            data.append_row(args.csv, row | {"protocol": f"{protocol}; {how}"})
        rows[f"{Path(args.checkpoint).name}, {window}"] = metrics
        print(f"{protocol}; {how}")
    print(format_table(dataset, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--csv", metavar="FILE", help="add the rows, with all digits, to this file")
    parser.add_argument("--figures", metavar="DIR", help="draw 4 samples into this new folder")
    args = parser.parse_args()
    model, dataset = open_checkpoint(args)
    if args.csv and not Path(args.csv).resolve().parent.is_dir():
        raise InputError(f"--csv {args.csv} lies in a folder that does not exist: make it first")
    if args.figures:
        draw_samples(Path(args.figures), model, dataset)
    measure(args, predictor(model, not args.no_flip), dataset, model.config.longer_side)


if __name__ == "__main__":
    data.run_command(main)
