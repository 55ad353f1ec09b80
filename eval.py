"""Measure a checkpoint of CaBins as the paper does: python eval.py runs/toy/best.pt

Prints the protocol, then one row in the columns of the paper's table beside the paper's own rows.
`evaluate` takes any function from an image to depth, so that anything can be measured by it.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from cabins import CaBins, Config, depth_metrics, read_checkpoint, resize, restore
from data import DATASETS, DepthDataset, run_command, test_windows

# ---- Tables 1 and 2 of the paper -----------------------------------------------------------------

HEADINGS = {
    "abs_rel": "AbsRel",
    "sq_rel": "SqRel",
    "rmse": "RMSE",
    "rmse_log": "RMSElog",
    "log10": "log10",
    "d1": "d<1.25",
    "d2": "d<1.25²",
    "d3": "d<1.25³",
}
COLUMNS = {"nyu": ["abs_rel", "rmse", "log10", "d1", "d2", "d3"]}  # of the others, all: Table 2
QUOTED = {
    "nyu": """
        DORN           0.115 0.509 0.051 0.828 0.965 0.992
        ASTransformer  0.103 0.374 0.044 0.902 0.985 0.997
        DepthFormer    0.096 0.339 0.041 0.921 0.989 0.998
        NeWCRFs        0.095 0.334 0.041 0.922 0.992 0.998
        DepthCLIP      0.388 1.167 0.156 0.394 0.683 0.851
        Hu et al.      0.347 1.049 0.140 0.428 0.732 0.898
        Auty           0.324 0.961 0.127 0.473 0.779 0.921
        CaBins         0.120 0.401 0.050 0.866 0.978 0.996""",
    "kitti": """
        DORN           0.072 0.307 2.727 0.120 - 0.932 0.984 0.994
        ASTransformer  0.058 - 2.685 0.089 - 0.963 0.995 0.999
        DepthFormer    0.052 0.158 2.143 0.079 - 0.975 0.997 0.999
        NeWCRFs        0.052 0.155 2.129 0.079 - 0.974 0.997 0.999
        DepthCLIP      0.473 6.007 12.958 - 0.680 0.281 0.531 0.696
        Hu et al.      0.384 4.661 12.290 - 0.632 0.312 0.569 0.739
        Auty           0.307 2.197 6.405 0.121 0.113 0.548 0.826 0.935
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
    return "\n".join(f"{row[0]:{width}}" + "".join(f"{v:>9}" for v in row[1:]) for row in table)


# ---- Sec. 4.3  Evaluation ------------------------------------------------------------------------


def evaluate_windows(
    predict: Callable[[Tensor], Tensor], dataset: DepthDataset, progress: bool = False
) -> dict[str, dict[str, float]]:
    """Mean metrics in each of the data set's test windows, from one pass.

    `predict` takes normalised images (1, 3, H, W) to depth (1, 1, H, W) in metres, which is clipped
    to the data set's range; NaN counts as its minimum. Ground truth counts strictly inside the
    range. A metric is the mean over images of its mean over an image's pixels; images without a
    pixel of ground truth in a window are left out of that window's mean.
    """
    low, high = Config.min_depth, dataset.recipe.max_depth
    found: dict[str, list[dict[str, Tensor]]] = {}
    loader = DataLoader(dataset, num_workers=default_workers())
    for sample in tqdm(loader, desc="evaluating", disable=None if progress else True, leave=False):
        depth = predict(sample["image"]).nan_to_num(low, high, low).clamp(low, high)
        target = sample["depth"].to(depth.device)
        if depth.shape != target.shape:
            raise ValueError(f"predict gave {tuple(depth.shape)} for {tuple(target.shape)}")
        for window, (rows, columns) in test_windows(
            dataset.name, *sample["size"][0].tolist()
        ).items():
            d, d_star = depth[..., rows, columns], target[..., rows, columns]
            mask = (d_star > low) & (d_star < high)
            if mask.any():
                metrics = depth_metrics(d[mask].double(), d_star[mask].double())
                found.setdefault(window, []).append(metrics)
    if not found:
        raise ValueError(f"none of the {len(dataset)} images has ground truth to measure against")
    return {
        window: {k: float(torch.stack([m[k] for m in images]).mean()) for k in images[0]}
        for window, images in found.items()
    }


def evaluate(
    predict: Callable[[Tensor], Tensor], dataset: DepthDataset, window: str | None = None
) -> dict[str, float]:
    """Mean metrics in one test window, the paper's if none is named; see `evaluate_windows`."""
    windows = evaluate_windows(predict, dataset)
    if window is not None and window not in windows:
        raise ValueError(f"window is {window!r}; {dataset.name} has {', '.join(windows)}")
    return windows[window or next(iter(windows))]


def predictor(model: CaBins, flip: bool = True) -> Callable[[Tensor], Tensor]:
    """The function from normalised images (B, 3, H, W) to depth (B, 1, H, W) that is measured.

    With `flip`, the mean over the image and its mirror image, each clipped to the depth range, is
    taken at the decoder's size and then upsampled.
    """
    low, high = model.config.min_depth, model.config.max_depth

    @torch.inference_mode()
    def predict(image: Tensor) -> Tensor:
        image = image.to(next(model.parameters()).device)
        both = torch.cat([image, image.flip(-1)]) if flip else image
        depth = model.eval()(both, upsample=False).depth.nan_to_num(low, high, low).clamp(low, high)
        if flip:
            straight, mirrored = depth.chunk(2)
            depth = (straight + mirrored.flip(-1)) / 2
        return resize(depth, image.shape[-2:])

    return predict


def protocol(dataset: DepthDataset, window: str, flip: bool) -> str:
    """How a row was measured, in one line."""
    return (
        f"{dataset.name}: {len(dataset)} images ({dataset.n_left_out} without ground truth left out), "
        f"window {window}, {Config.min_depth} < depth < {dataset.recipe.max_depth} m, "
        f"flip averaging {'on' if flip else 'off'}, mean of each image's mean"
    )


# ---- Figures -------------------------------------------------------------------------------------


def draw(path: str | Path, samples: list[dict], predict: Callable[[Tensor], Tensor]) -> None:
    """Rows of image, truth, prediction and error, as Figures 4 and 5, on one scale in metres."""
    from matplotlib.figure import Figure

    mean, std = (torch.tensor(v)[:, None, None] for v in (Config.image_mean, Config.image_std))
    truths = [sample["depth"][0].numpy() for sample in samples]
    depths = [predict(sample["image"][None])[0, 0].cpu().numpy() for sample in samples]
    errors = [np.where(truth > 0, np.abs(d - truth), np.nan) for d, truth in zip(depths, truths)]
    top = max(np.max(truth) for truth in truths)
    worst = max(np.nanquantile(error, 0.98) for error in errors)
    height, width = truths[0].shape
    figure = Figure(figsize=(12, 0.9 + len(samples) * 3 * height / width), layout="constrained")
    axes = figure.subplots(len(samples), 4, squeeze=False)
    for row, sample, truth, depth, error in zip(axes, samples, truths, depths, errors):
        row[0].imshow((sample["image"] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy())
        metres = {"cmap": "viridis", "vmin": 0, "vmax": top}
        row[1].imshow(np.where(truth > 0, truth, np.nan), **metres)
        shown_depth = row[2].imshow(depth, **metres)
        shown_error = row[3].imshow(error, cmap="magma", vmin=0, vmax=worst)
    for axis in axes.flat:
        axis.axis("off")
    for axis, title in zip(axes[0], ("image", "ground truth", "prediction", "error")):
        axis.set_title(title)
    bar = {"location": "bottom", "shrink": 0.8, "aspect": 40, "pad": 0.02}
    figure.colorbar(shown_depth, ax=list(axes[:, 1:3].flat), label="depth (m)", **bar)
    figure.colorbar(shown_error, ax=list(axes[:, 3]), label="|error| (m)", **bar | {"aspect": 20})
    figure.savefig(path, dpi=100)


# ---- Command line --------------------------------------------------------------------------------


def default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_workers() -> int:
    return min(8, os.cpu_count() - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a file that train.py wrote, or one of the authors'")
    parser.add_argument("--data", choices=DATASETS, help="default: what it was trained on")
    parser.add_argument("--root", help="folder of the data set; default: as in training")
    parser.add_argument("--split", help="list of test pairs; default: as in training")
    parser.add_argument("--max-depth", type=float, help="metres; only the authors' files need it")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()

    content = read_checkpoint(args.checkpoint)
    model = restore(content, args.checkpoint, args.max_depth).to(default_device())
    trained_on = content.get("args", {})
    name = args.data or trained_on.get("data")
    if name is None:
        raise ValueError(f"{args.checkpoint} does not say what data it is for: give --data")
    known = trained_on if name == trained_on.get("data") else {}
    root, split = args.root or known.get("root"), args.split or known.get("test_split")
    dataset = DepthDataset(name, root, split)
    rows = evaluate_windows(predictor(model, args.flip), dataset, progress=True)
    for window in rows:
        print(protocol(dataset, window, args.flip))
    print(format_table(name, {f"this checkpoint, {w}": row for w, row in rows.items()}))


if __name__ == "__main__":
    run_command(main)
