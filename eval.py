"""Measure a checkpoint of CaBins as the paper does: python eval.py runs/toy/best.pt

Prints the protocol, then one row in the columns of the paper's table beside the paper's own rows.
`evaluate` takes any function from an image to depth, so that anything can be measured by it.
"""

import argparse
import csv
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from cabins import (
    CLIP,
    SEMANTIC_BINS,
    CaBins,
    Config,
    cosine_similarity,
    depth_metrics,
    expected_depth,
    load_clip,
    read_checkpoint,
    resize,
    restore,
)
from clip_tokenizer import tokenize
from data import DATASETS, DepthDataset, add_data_options, evaluation_windows, run_command

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
    return "\n".join(f"{row[0]:{width}}" + "".join(f"{v:>9}" for v in row[1:]) for row in table)


# ---- Sec. 4.3  Evaluation ------------------------------------------------------------------------


@torch.no_grad()
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
        depth, target = predict(sample["image"]).cpu(), sample["depth"]
        depth = depth.nan_to_num(low, high, low).clamp(low, high)
        if depth.shape != target.shape:
            raise ValueError(f"predict gave {tuple(depth.shape)} for {tuple(target.shape)}")
        for window, (rows, columns) in evaluation_windows(
            dataset.name, *sample["size"][0].tolist()
        ).items():
            d, d_star = depth[..., rows, columns], target[..., rows, columns]
            mask = (d_star > low) & (d_star < high)
            if mask.any():
                metrics = depth_metrics(d[mask].double(), d_star[mask].double())
                found.setdefault(window, []).append(metrics)
    if not found:
        raise ValueError(f"none of the {len(dataset)} images has ground truth to measure against")
    for window, images in found.items():
        if missing := len(dataset) - len(images):
            print(
                f"{missing} of the images have no ground truth in window {window}: left out of it"
            )
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


def depthclip(clip: CLIP) -> Callable[[Tensor], Tensor]:
    """DepthCLIP, the zero-shot baseline of Table 1, for `evaluate`: CLIP compares, nothing learns.

    Each place in the image is likened to "This object is giant", … "unseen"; its depth is the mean
    of seven fixed distances (those for NYU), weighted by the softmax of the similarities.
    """
    phrases = [phrase for phrase in SEMANTIC_BINS if phrase != "farthest"]  # which CaBins added
    distances = torch.tensor([[1.0, 1.5, 2.0, 2.25, 2.5, 2.75, 3.0]])  # (1, 7) metres
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]  # CLIP's own
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    ours_mean, ours_std = (
        torch.tensor(v)[:, None, None] for v in (Config.image_mean, Config.image_std)
    )
    with torch.inference_mode():
        t = clip.eval().encode_text(tokenize([f"This object is {phrase}" for phrase in phrases]))

    @torch.inference_mode()
    def predict(image: Tensor) -> Tensor:
        image = ((image * ours_std + ours_mean - mean) / std).to(t.device)
        _, _, z = clip.visual(image)  # (1, D, h, w)
        s = cosine_similarity(z, t.expand(len(z), -1, -1))  # (1, 7, h, w)
        p = (clip.logit_scale.exp() * s).softmax(1)
        depth = expected_depth(distances.to(t.device).expand(len(z), -1), p)  # (1, 1, h, w)
        return resize(depth, image.shape[-2:])

    return predict


def protocol(dataset: DepthDataset, window: str, flip: bool) -> str:
    """How a row was measured, in one line."""
    return (
        f"{dataset.name}: {len(dataset)} images ({dataset.n_left_out} without ground truth left out), "
        f"window {window}, {Config.min_depth} < depth < {dataset.recipe.max_depth} m, "
        f"flip averaging {'on' if flip else 'off'}, mean of each image's mean"
    )


def keep_predictions(
    predict: Callable[[Tensor], Tensor], dataset: DepthDataset, folder: Path
) -> Callable[[Tensor], Tensor]:
    """`predict`, writing each depth as a 16-bit PNG in the data set's scale: 00000.png and so on.

    The files are of the test image's size, KITTI's therefore of the cropped frame's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scale = dataset.recipe.depth_scale if dataset.name != "toy" else 1000.0
    numbers = itertools.count()

    def predict_and_keep(image: Tensor) -> Tensor:
        depth = predict(image)
        values = (depth[0, 0].cpu().numpy() * scale).round().clip(0, 65535).astype(np.uint16)
        Image.fromarray(values).save(folder / f"{next(numbers):05}.png")
        return depth

    return predict_and_keep


def append_results(path: Path, protocols: list[str], rows: dict[str, dict[str, float]]) -> None:
    """Add a row for each window to a CSV file: label, protocol and metrics."""
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(["label", "protocol", *HEADINGS])
        for line, (label, row) in zip(protocols, rows.items()):
            writer.writerow([label, line, *(row[name] for name in HEADINGS)])


# ---- Figures -------------------------------------------------------------------------------------


def draw(path: str | Path, samples: list[dict], predict: Callable[[Tensor], Tensor]) -> None:
    """Rows of image, truth, prediction and error, as Figures 4 and 5, on one scale in metres."""
    from matplotlib.figure import Figure

    mean, std = (torch.tensor(v)[:, None, None] for v in (Config.image_mean, Config.image_std))
    truths = [sample["depth"][0].numpy() for sample in samples]
    depths = [predict(sample["image"][None])[0, 0].cpu().numpy() for sample in samples]
    errors = [np.where(truth > 0, np.abs(d - truth), np.nan) for d, truth in zip(depths, truths)]
    top = max(np.max(truth) for truth in truths)
    known = [error[np.isfinite(error)] for error in errors]
    worst = max(np.quantile(error, 0.98) if error.size else 0 for error in known)
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
    parser.add_argument(
        "checkpoint",
        help="a file of train.py's or the authors'; or depthclip, the zero-shot baseline",
    )
    parser.add_argument("--data", choices=DATASETS, help="default: what it was trained on")
    add_data_options(parser)
    parser.add_argument("--split", dest="test_split", help="the same as --test-split")
    parser.add_argument("--clip", default="RN50", help="depthclip only: a name or a file")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", metavar="DIR", help="keep results.csv and depth PNGs there")
    args = parser.parse_args()

    device, saved = default_device(), {}
    if args.checkpoint == "depthclip":
        args.data = args.data or "nyu"
        if args.data == "kitti":
            raise ValueError(
                "DepthCLIP's distances for KITTI are not known here: its row is quoted"
            )
        predict, flip = depthclip(load_clip(args.clip).to(device)), False
    else:
        content = read_checkpoint(args.checkpoint)
        saved = content.get("args") or {}
        max_depth = args.max_depth
        if "config" not in content and args.data:
            max_depth = max_depth or DATASETS[args.data].max_depth
        model = restore(content, args.checkpoint, max_depth).to(device)
        predict, flip = predictor(model, args.flip), args.flip
        origin = "train.py's" if "config" in content else "the authors'"
        print(
            f"{args.checkpoint} is {origin}: {model.config.backbone}, {model.config.distance_class}, "
            f"depths to {model.config.max_depth} m; all of its {len(content['model'])} tensors are used"
        )
    name = args.data or saved.get("data")
    if name is None:
        raise ValueError(f"{args.checkpoint} does not say what data it is for: give --data")
    known = saved if name == saved.get("data") else {}
    keys = ("root", "test_split", "depth_scale", "max_depth")
    root, split, scale, max_depth = (getattr(args, key) or known.get(key) for key in keys)
    dataset = DepthDataset(name, root, split, depth_scale=scale, max_depth=max_depth)
    if args.out:
        predict = keep_predictions(predict, dataset, Path(args.out) / "predictions")
    windows = evaluate_windows(predict, dataset, progress=True)
    protocols = [protocol(dataset, window, flip) for window in windows]
    rows = {f"{Path(args.checkpoint).name}, {window}": row for window, row in windows.items()}
    print("\n".join([*protocols, format_table(name, rows)]))
    if args.out:
        append_results(Path(args.out) / "results.csv", protocols, rows)


if __name__ == "__main__":
    run_command(main)
