"""Measure a checkpoint of CaBins as the paper does, and show what it sees.

python eval.py runs/toy/best.pt                     a row of the paper's table, beside the paper's
python eval.py runs/toy/best.pt --explain 4         figures of bins, prompts and depth
python eval.py runs/toy/best.pt --images *.jpg      depth of your own pictures
python eval.py runs/toy/best.pt --bench             what a pass costs
"""

import argparse
import contextlib
import copy
import csv
import glob
import itertools
import os
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2.functional import normalize
from tqdm import tqdm

import cabins
import data
from clip_tokenizer import tokenize

# ---- Tables 1 and 2 of the paper -----------------------------------------------------------------

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
    return "\n".join(f"{row[0]:{width}}" + "".join(f"{v:>9}" for v in row[1:]) for row in table)


# ---- Sec. 4.3  Evaluation ------------------------------------------------------------------------


@torch.no_grad()
def evaluate_windows(
    predict: Predict, dataset: data.DepthDataset, progress: bool = False
) -> dict[str, dict[str, float]]:
    """Mean metrics in each of the data set's test windows, from one pass.

    `predict` takes normalised images (1, 3, H, W) to depth (1, 1, H, W) in metres, which is clipped
    to the data set's range; NaN counts as its minimum. Ground truth counts strictly inside the
    range. A metric is the mean over images of its mean over an image's pixels; images without a
    pixel of ground truth in a window are left out of that window's mean. Processes that torchrun
    started share the images out, and all return the same.
    """
    low, high = cabins.Config.min_depth, dataset.recipe.max_depth
    found: dict[int, dict[str, dict[str, float]]] = {}  # by number of the image, and window
    rank, n_processes = rank_of()
    mine = range(rank, len(dataset), n_processes)
    how = {"num_workers": default_workers(), "worker_init_fn": data.stand_apart}
    loader = DataLoader(Subset(dataset, mine), **how)
    hidden = None if progress and rank == 0 else True
    for i, sample in zip(mine, tqdm(loader, desc="evaluating", disable=hidden, leave=False)):
        depth, target = predict(sample["image"]).cpu(), sample["depth"]
        depth = depth.nan_to_num(low, high, low).clamp(low, high)
        if depth.shape != target.shape:
            raise ValueError(f"predict gave {tuple(depth.shape)} for {tuple(target.shape)}")
        windows = data.evaluation_windows(dataset.name, *sample["size"][0].tolist())
        found[i] = dict.fromkeys(windows)
        for window, (rows, columns) in windows.items():
            d, d_star = depth[..., rows, columns], target[..., rows, columns]
            mask = (d_star > low) & (d_star < high)
            if mask.any():
                metrics = cabins.depth_metrics(d[mask].double(), d_star[mask].double())
                found[i][window] = {k: v.item() for k, v in metrics.items()}
    if n_processes > 1:
        parts = [None] * n_processes
        dist.all_gather_object(parts, found)
        found = dict(sorted(item for part in parts for item in part.items()))
    means = {}
    for window in found[0]:
        images = [windows[window] for windows in found.values() if windows[window]]
        if images:
            means[window] = {k: statistics.fmean(m[k] for m in images) for k in images[0]}
            if len(images) < len(found) and rank == 0:
                missing = f"{len(found) - len(images)} of the images have no ground truth"
                print(f"{missing} in window {window}: left out")
    if not means:
        raise ValueError(f"none of the {len(dataset)} images has ground truth to measure against")
    return means


def evaluate(
    predict: Predict, dataset: data.DepthDataset, window: str | None = None
) -> dict[str, float]:
    """Mean metrics in one test window, the paper's if none is named; see `evaluate_windows`."""
    windows = evaluate_windows(predict, dataset)
    if window is not None and window not in windows:
        raise ValueError(f"window is {window!r}; {dataset.name} has {', '.join(windows)}")
    return windows[window or next(iter(windows))]


def predictor(model: cabins.CaBins, flip: bool = True, amp: str = "off") -> Predict:
    """The function from images to depth that is measured, in a precision of AMP.

    With `flip`, the mean over the image and its mirror image, each clipped to the depth range, is
    taken at the decoder's size and then upsampled.
    """
    low, high = model.config.min_depth, model.config.max_depth

    @torch.inference_mode()
    def predict(image: Tensor) -> Tensor:
        image = image.to(next(model.parameters()).device)
        both = torch.cat([image, image.flip(-1)]) if flip else image
        with autocast(image.device, amp):
            depth = model.eval()(both, upsample=False).depth
        depth = depth.nan_to_num(low, high, low).clamp(low, high)
        if flip:
            straight, mirrored = depth.chunk(2)
            depth = (straight + mirrored.flip(-1)) / 2
        return cabins.resize(depth, image.shape[-2:])

    return predict


def depthclip(clip: cabins.CLIP) -> Predict:
    """DepthCLIP, the zero-shot baseline of Table 1, for `evaluate`: CLIP compares, nothing learns.

    Each place in the image is likened to "This object is giant", … "unseen"; its depth is the mean
    of seven fixed distances (those for NYU), weighted by the softmax of the similarities.
    """
    # its seven phrases, to which CaBins added one
    texts = [f"This object is {p}" for p in cabins.SEMANTIC_BINS if p != "farthest"]
    distances = torch.tensor([[1.0, 1.5, 2.0, 2.25, 2.5, 2.75, 3.0]])  # (1, 7) metres
    clip_mean, clip_std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    with torch.inference_mode():
        t = clip.eval().encode_text(tokenize(texts))  # (7, D)

    @torch.inference_mode()
    def predict(image: Tensor) -> Tensor:
        image = normalize(data.denormalize(image), clip_mean, clip_std).to(t.device)
        _, _, z = clip.visual(image)  # (1, D, h, w)
        s = cabins.cosine_similarity(z, t.expand(len(z), -1, -1))  # (1, 7, h, w)
        p = (clip.logit_scale.exp() * s).softmax(1)
        depth = cabins.expected_depth(distances.to(t.device).expand(len(z), -1), p)  # (1, 1, h, w)
        return cabins.resize(depth, image.shape[-2:])

    return predict


def protocol(dataset: data.DepthDataset, window: str, flip: bool, amp: str = "off") -> str:
    """How a row was measured, in one line."""
    return (
        f"{dataset.name}: {len(dataset)} images ({dataset.n_left_out} without ground truth left out), "
        f"window {window}, {cabins.Config.min_depth} < depth < {dataset.recipe.max_depth} m, "
        f"flip averaging {'on' if flip else 'off'}, {'fp32' if amp == 'off' else amp}, "
        "mean of each image's mean"
    )


def keep_predictions(predict: Predict, dataset: data.DepthDataset, folder: Path) -> Predict:
    """`predict`, writing each depth as a 16-bit PNG in the data set's scale: 00000.png and so on.

    The files are of the test image's size, KITTI's therefore of the cropped frame's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = itertools.count()

    def predict_and_keep(image: Tensor) -> Tensor:
        depth = predict(image)
        values = (depth[0, 0].cpu().numpy() * dataset.recipe.depth_scale).round()
        picture = Image.fromarray(values.clip(0, 65535).astype(np.uint16))
        path = folder / f"{next(numbers):05}.png"
        cabins.write_whole(path, lambda partial: picture.save(partial, "png"))
        return depth

    return predict_and_keep


def append_row(path: Path, row: dict) -> None:
    """Add a row to a CSV file, which begins with the names of its columns."""
    is_new = not path.exists() or path.stat().st_size == 0
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


# ---- Figures -------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """One map of a figure: colours (H, W, 3), or values (H, W) under a bar that says `label`."""

    title: str
    values: np.ndarray
    label: str = ""
    low: float = 0.0
    high: float = 1.0
    cmap: str = "viridis"  # which, like magma and cividis, the colour-blind can read


class Bins(NamedTuple):
    """What the network made of one image beside its depth, for `--explain`."""

    edges: np.ndarray  # (n_bins + 1,) metres
    cabins: np.ndarray  # (K,) metres
    texts: list[str]  # K prompts, without the learnt context
    similarity: np.ndarray  # (K, h, w)
    depths: dict[str, np.ndarray]  # what the histogram shows, by its name


def draw_grid(figure, rows: list[list[Panel]]) -> None:
    """Panels in rows and columns, and under each column a bar for its values."""
    ratios = [1.0] * len(rows) + [0.05]
    *axes, bars = figure.subplots(len(rows) + 1, len(rows[0]), squeeze=False, height_ratios=ratios)
    for row_of_axes, row in zip(axes, rows):
        for axis, bar, panel in zip(row_of_axes, bars, row):
            axis.set_axis_off()
            axis.set_title(panel.title, fontsize=10, parse_math=False)
            scale = {"cmap": panel.cmap, "vmin": panel.low, "vmax": panel.high}
            shown = axis.imshow(panel.values, **scale)
            bar.clear()
            if panel.label:
                figure.colorbar(shown, cax=bar, orientation="horizontal", label=panel.label)
            else:
                bar.set_axis_off()


def draw_bins(axis, bins: Bins) -> None:
    """Histograms of depth over the edges of the bins, and the prompts where their distances are."""
    top = bins.edges[-1]
    for (name, depth), style in zip(bins.depths.items(), ("stepfilled", "step")):
        axis.hist(depth, 128, range=(0, top), histtype=style, density=True, label=name)
    bottom_line = axis.get_xaxis_transform()  # metres across, shares of the height upwards
    axis.vlines(bins.edges, 0, 0.06, "black", linewidth=0.4, transform=bottom_line)
    for k, (e, text) in enumerate(zip(bins.cabins, bins.texts)):
        axis.axvline(e, color="black", linewidth=0.8, linestyle="--")
        place = {"xytext": ((k + 0.5) / len(bins.cabins), 1.12), "textcoords": "axes fraction"}
        place |= {"xycoords": bottom_line, "ha": "center", "arrowprops": {"arrowstyle": "-"}}
        axis.annotate(f"“{text}”", (e, 1.0), **place)
    axis.set(xlabel="depth (m)", ylabel="share of pixels per metre", xlim=(0, top))
    axis.set_title(f"{len(bins.edges) - 1} bins (short ticks) and their prompts (dashed)", pad=38)
    axis.legend(loc="upper right")


def draw(path: str | Path, rows: list[list[Panel]], bins: Bins | None = None) -> None:
    """A grid of panels; below it, if given, what the bins and the prompts do."""
    from matplotlib.figure import Figure

    height, width = rows[0][0].values.shape[:2]
    shape = min(height / width, 2.5)  # a picture taller than that gets margins
    inches = [0.9 + len(rows) * (0.25 + 13 / len(rows[0]) * shape)]
    if bins is not None:
        inches += [3.3, 0.9 + 13 / len(bins.cabins) * shape]
    figure = Figure(figsize=(13, sum(inches)), layout="constrained")
    parts = figure.subfigures(len(inches), 1, squeeze=False, height_ratios=inches)[:, 0]
    draw_grid(parts[0], rows)
    if bins is not None:
        draw_bins(parts[1].subplots(), bins)
        cosine = ("cosine", bins.similarity.min(), bins.similarity.max(), "cividis")
        maps = zip(bins.texts, bins.cabins, bins.similarity)
        draw_grid(parts[2], [[Panel(f"“{t}”, {e:.2f} m", s, *cosine) for t, e, s in maps]])
    cabins.write_whole(path, lambda partial: figure.savefig(partial, dpi=100, format="png"))


def comparison(samples: list[dict], predict: Predict) -> list[list[Panel]]:
    """Rows of image, truth, prediction and error on one scale, as Figures 4 and 5, for `draw`."""
    truths = [sample["depth"][0].numpy() for sample in samples]
    depths = [predict(sample["image"][None])[0, 0].cpu().numpy() for sample in samples]
    truths = [np.where(truth > 0, truth, np.nan) for truth in truths]
    errors = [np.abs(depth - truth) for depth, truth in zip(depths, truths)]
    top = max(float(np.nan_to_num(truth).max()) for truth in truths)
    top = top or max(float(depth.max()) for depth in depths)
    known = np.concatenate([error[np.isfinite(error)] for error in errors])
    worst = float(np.quantile(known, 0.98)) if known.size else 1.0
    images = [
        data.denormalize(sample["image"]).permute(1, 2, 0).cpu().numpy() for sample in samples
    ]
    columns = [
        [Panel("image", image) for image in images],
        [Panel("ground truth", truth, "depth (m)", 0, top) for truth in truths],
        [Panel("prediction", depth, "depth (m)", 0, top) for depth in depths],
        [Panel("error", error, "|error| (m)", 0, worst, "magma") for error in errors],
    ]
    return list(map(list, zip(*columns)))


def explain(
    model: cabins.CaBins, image: Tensor, truth: np.ndarray | None = None
) -> tuple[list[list[Panel]], Bins]:
    """What `draw` needs to show how the depth of one image (1, 3, H, W) came about."""
    outputs = {}
    modules = (model.bins, model.depth_decoder)  # whose outputs b and p `forward` does not return
    hooks = [m.register_forward_hook(lambda m, _, out: outputs.update({m: out})) for m in modules]
    with torch.inference_mode():
        prediction = model.eval()(image.to(next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    b, p = (outputs[module] for module in modules)
    config, c = model.config, prediction.centers
    mean, mean_square = cabins.expected_depth(c, p), cabins.expected_depth(c.square(), p)
    spread = (mean_square - mean.square()).clamp(min=0).sqrt()
    spread = cabins.resize(spread, image.shape[-2:])[0, 0].cpu().numpy()
    depth, e, s = (x[0].cpu().numpy() for x in (prediction.depth[0], *prediction[2:]))
    edges = np.append(0, b[0].cumsum(0).cpu())  # as shares of the range
    edges = config.min_depth + (config.max_depth - config.min_depth) * edges
    texts = [str(round(float(v), 4)) for v in e]
    if config.distance_class == "semantic":
        texts = cabins.SEMANTIC_BINS
    depths = {"prediction": depth.ravel()}
    sample = {"image": image[0], "depth": torch.zeros(1, *depth.shape)}
    if truth is not None and truth.max() > 0:
        sample["depth"] = torch.from_numpy(truth)[None]
        depths["ground truth"] = truth[truth > 0]
    row = comparison([sample], lambda _: prediction.depth)[0]
    if len(depths) == 1:
        row = [row[0], row[2]]
    scale = ("standard deviation (m)", 0, float(spread.max()), "magma")
    return [[*row, Panel("spread of p", spread, *scale)]], Bins(edges, e, texts, s, depths)


def draw_samples(
    out: Path, model: cabins.CaBins, dataset: data.DepthDataset, n: int, predict: Predict
) -> None:
    """Draw n samples from all over the data set, side by side and then each explained."""
    out.mkdir(parents=True, exist_ok=True)
    chosen = torch.linspace(0, len(dataset) - 1, min(n, len(dataset))).long().tolist()
    samples = [dataset[i] for i in chosen]
    draw(out / "comparison.png", comparison(samples, predict))
    for i, sample in zip(chosen, samples):
        picture = explain(model, sample["image"][None], sample["depth"][0].numpy())
        draw(out / f"explained_{i}.png", *picture)


# ---- Speed ---------------------------------------------------------------------------------------

SIZES = [(480, 640), (352, 1216)]  # of NYU's and KITTI's test images
AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Run = Callable[[Callable[[], None]], object]  # calls its argument before, between and after phases


def default_amp() -> str:
    """bf16 on GPUs that have it; off on CPUs, many of which would be slower."""
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(False) else "off"


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Convolutions and products of matrices in the precision `amp`, a key of AMP."""
    return torch.autocast(device.type, None if amp == "off" else AMP[amp], amp != "off")


def go_fast(fast: bool = True) -> None:
    """On GPUs: TF32 in what is float32, and the fastest kernels for images of one size; or neither."""
    torch.set_float32_matmul_precision("high" if fast else "highest")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = fast


class PeakMemory(TorchDispatchMode):
    """The most bytes that the tensors made within it took at one time: an estimate of a GPU's."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.storages = weakref.WeakSet()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(result) if torch.is_tensor(x)):
            if storage not in self.storages:
                self.storages.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, n: int) -> None:
        self.now += n
        self.peak = max(self.peak, self.now)


def time_phases(run: Run, device: torch.device) -> list[float]:
    """Milliseconds of each phase of a run, on the device's own clock."""
    marks = []
    if device.type == "cpu":
        run(lambda: marks.append(1000 * time.perf_counter()))
        return [end - start for start, end in itertools.pairwise(marks)]

    def mark() -> None:
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()

    run(lambda: None)  # so that the host is ahead of the device, as it is in training
    run(mark)
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(marks)]


def print_bench_header(phases: tuple[str, ...]) -> None:
    memory = "peak GB" if default_device().type == "cuda" else "peak GB (estimate)"
    columns = ["", *(f"{p} ms" for p in phases), "all ms", "against plain", "images/s", memory]
    columns += ["GFLOP", "TFLOP/s", "of a matrix product's"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))


def bench(
    title: str,
    settings: dict[str, tuple[str, Callable[[], Run]]],
    batch_size: int,
    device: torch.device,
    n_rounds: int,
) -> None:
    """Print a Markdown row of each setting; `settings` has its precision, and what makes its run.

    Settings take turns, so that a machine that slows down slows all of them; times are medians,
    ± half of what lies between the quartiles. The first setting is what others are compared with.
    """
    runs, peak, times = {}, {}, {name: [] for name in settings}
    counter, is_gpu = FlopCounterMode(display=False), device.type == "cuda"
    for name, (_, make) in settings.items():
        go_fast(bool(runs))  # for all but the first
        before = torch.cuda.memory_allocated() if is_gpu else 0
        with contextlib.ExitStack() as modes:
            if not runs:  # the first is not compiled; the others take as many FLOP
                modes.enter_context(counter)
            memory = None if is_gpu else modes.enter_context(PeakMemory())
            runs[name] = make()
            runs[name](lambda: None)  # chooses kernels, and makes gradients and moments
            if is_gpu:
                torch.cuda.reset_peak_memory_stats()
            runs[name](lambda: None)
        peak[name] = torch.cuda.max_memory_allocated() - before if is_gpu else memory.peak
        runs[name](lambda: None)  # outside of the modes, under which nothing is compiled
    rates = {name: [] for name in settings}  # of large products
    for _ in range(n_rounds):
        for i, (name, run) in enumerate(runs.items()):
            go_fast(i > 0)
            times[name].append(time_phases(run, device))
            rates[name].append(matmul_rate(device, AMP[settings[name][0]]))
    flop, plain = counter.get_total_flops() / 2, None
    for name in settings:
        cells = [f"{title}, {name}"]
        for values in [*zip(*times[name]), [sum(phases) for phases in times[name]]]:
            low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
            cells.append(f"{middle:.4g} ± {(high - low) / 2:.2g}")
        total = middle  # of all phases, the last
        plain, rate = plain or total, flop / total / 1e9
        cells += [f"{plain / total:.2f}", f"{1000 * batch_size / total:.3g}"]
        cells += [f"{peak[name] / 1e9:.1f}", f"{flop / 1e9:.0f}", f"{rate:.3g}"]
        cells.append(f"{rate / statistics.median(rates[name]):.0%}")
        print("| " + " | ".join(cells) + " |", flush=True)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large product of matrices."""
    n = 2048 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device).to(dtype)
    times = [time_phases(lambda mark: (mark(), a @ a, mark()), device)[0] for _ in range(5)]
    return 2 * n**3 / statistics.median(times) / 1e9


def bench_inference(model: cabins.CaBins, device: torch.device, n_rounds: int) -> None:
    """Print what one pass over images of NYU's and KITTI's size costs; memory is without weights.

    `model` is in channels_last already, as `main` has it.
    """
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)

    def setting(network: cabins.CaBins, amp: str, image: Tensor) -> tuple[str, Callable[[], Run]]:
        @torch.no_grad()  # not inference_mode, under which nothing is counted
        def run(mark: Callable[[], None]) -> None:
            mark()
            with autocast(device, amp):
                network(image)
            mark()

        return amp, lambda: run

    print_bench_header(("forward",))
    for height, width in SIZES:
        for n in (1, 8):
            image = torch.randn(n, 3, height, width, device=device)
            settings = {
                "plain fp32": setting(plain, "off", image),
                "fp32, channels_last": setting(model, "off", image),
                "bf16, channels_last": setting(model, "bf16", image),
            }
            title = f"{model.config.backbone}, {height}x{width}, batch {n}"
            bench(title, settings, n, device, n_rounds)


# ---- Your own pictures ---------------------------------------------------------------------------

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
# width of an image and focal length, in pixels, of the training sets' cameras
CAMERAS = {"nyu": (640, 518.86), "kitti": (1242, 721.54), "toy": (128, 100.0)}


def find_pictures(arguments: list[str]) -> list[Path]:
    """The files that paths, folders and patterns name. Raises FileNotFoundError for one that is none."""
    found = []
    for argument in arguments:
        path = Path(argument)
        paths = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(argument))]
        if path.is_dir():
            found_there = [p for p in sorted(path.iterdir()) if p.suffix.lower() in PICTURES]
            paths = [p for p in found_there if p.is_file()]
        if not paths:
            raise FileNotFoundError(f"{argument}: no picture there, nor any that the pattern fits")
        found += paths
    return found


def read_picture(path: Path) -> np.ndarray:
    """(H, W, 3) uint8, upright, of a picture of any mode."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("its values are floating-point numbers; save it in 8 or 16 bits")
        if image.mode.startswith("I"):  # 16-bit grey
            values = np.asarray(image)
            image = Image.fromarray((values >> (8 if values.max() > 255 else 0)).astype(np.uint8))
        return np.asarray(image.convert("RGB"))


def write_ply(path: Path, picture: np.ndarray, depth: np.ndarray, focal: float) -> None:
    """A coloured point cloud in metres: x right, y down, z ahead, the camera being the origin."""
    height, width = depth.shape
    v, u = np.mgrid[:height, :width]
    fields = [(name, "<f4") for name in "xyz"] + [(name, "u1") for name in ("red", "green", "blue")]
    x, y = (u - (width - 1) / 2) * depth / focal, (v - (height - 1) / 2) * depth / focal
    columns = [*np.stack([x, y, depth]).reshape(3, -1), *picture.reshape(-1, 3).T]
    points = np.rec.fromarrays(columns, dtype=fields)
    types = {"<f4": "float", "u1": "uchar"}
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {depth.size}"]
    lines += [f"property {types[t]} {name}" for name, t in fields] + ["end_header", ""]
    content = "\n".join(lines).encode() + points.tobytes()
    cabins.write_whole(path, lambda partial: partial.write_bytes(content))


def predict_pictures(model: cabins.CaBins, trained_on: str | None, args: argparse.Namespace) -> int:
    """Write the depth of each picture of `args.images` into `args.out`; return how many failed.

    Pictures go through the network at the width of the images that it was trained on.
    """
    out, predict = Path(args.out or "runs/pictures"), predictor(model, args.flip, args.amp)
    paths = find_pictures(args.images)
    if own := [path for path in paths if path.resolve().parent == out.resolve()]:
        raise ValueError(f"--out {out} is the folder of {own[0]}, which must stay: choose another")
    out.mkdir(parents=True, exist_ok=True)
    like = "kitti" if model.config.max_depth > 10 else "nyu"
    width, focal = CAMERAS.get(trained_on, CAMERAS[like])
    unit, scale = ("mm", 1000) if model.config.max_depth < 65.535 else ("cm", 100)
    failed, names = [], set()

    def read(path: Path) -> tuple[Path, np.ndarray, Tensor] | None:
        try:
            picture = read_picture(path)
        except (OSError, SyntaxError, ValueError) as error:
            tqdm.write(f"{path} cannot be read as a picture: {error}", file=sys.stderr)
            failed.append(path)
            return None
        image = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255  # (1, 3, H, W)
        factor = width / max(picture.shape[:2])
        size = [max(64, round(side * factor)) for side in picture.shape[:2]]
        image = F.interpolate(image, size, mode="bilinear", antialias=True)
        return path, picture, normalize(image, cabins.Config.image_mean, cabins.Config.image_std)

    def write(path: Path, picture: np.ndarray, image: Tensor, depth: Tensor) -> None:
        name = path.stem
        while name in names:  # of another folder, or with another suffix
            name += "_"
        names.add(name)
        depth = cabins.resize(depth[None], picture.shape[:2])[0, 0].cpu().numpy()
        draw(out / f"{name}_depth.png", [[Panel(name, depth, "depth (m)", 0, float(depth.max()))]])
        about = PngInfo()
        about.add_text("Description", f"depth in 1/{scale} m ({unit}); CaBins, {args.checkpoint}")
        values = Image.fromarray((depth * scale).round().astype(np.uint16))
        path_of_values = out / f"{name}_depth_{unit}.png"
        cabins.write_whole(path_of_values, lambda p: values.save(p, "png", pnginfo=about))
        line = f"{path}: {depth.min():.2f} to {depth.max():.2f} m, median {np.median(depth):.2f} m"
        if args.ply:
            pixels = args.focal or focal * picture.shape[1] / width
            if args.fov:
                pixels = picture.shape[1] / 2 / np.tan(np.radians(args.fov) / 2)
            write_ply(out / f"{name}.ply", picture, depth, pixels)
            line += f"; point cloud with a focal length of {pixels:.1f} pixels"
        if args.explain:
            draw(out / f"{name}_explained.png", *explain(model, image))
        tqdm.write(line)

    read_pictures = filter(None, map(read, tqdm(paths, unit="picture", disable=None)))
    for _, group in itertools.groupby(read_pictures, lambda item: item[2].shape):
        while batch := list(itertools.islice(group, 8)):
            depths = predict(torch.cat([image for _, _, image in batch]))
            for item, depth in zip(batch, depths):
                write(*item, depth)
    print(f"{len(paths) - len(failed)} of {len(paths)} pictures written to {out}")
    return len(failed)


# ---- Command line --------------------------------------------------------------------------------


def rank_of() -> tuple[int, int]:
    """This process's number, and of how many that torchrun started."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_workers() -> int:
    """Of each process's data loader."""
    n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine
    return min(8, max(os.cpu_count() // n_processes - 1, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoint", help="train.py's or the authors'; or depthclip, the zero-shot baseline")
    add("--data", choices=data.DATASETS, help="default: what it was trained on")
    data.add_data_options(parser)
    add("--split", dest="test_split", metavar="FILE", help="the same as --test-split")
    add("--clip", default="RN50", help="depthclip only: a name or a file")
    add("--flip", action=argparse.BooleanOptionalAction, default=True)
    add("--amp", choices=AMP, default="off", help="precision; bf16 is faster where it is at home")
    add("--out", metavar="DIR", help="keep results.csv and depth PNGs; for pictures: where to")
    about = "figures of N samples, or of the pictures"
    add("--explain", nargs="?", type=int, const=4, metavar="N", help=about)
    add("--images", nargs="+", metavar="PICTURE", help="files, folders or patterns of your own")
    add("--ply", action="store_true", help="write a point cloud of each picture")
    add("--focal", type=float, help="of the pictures' camera, in pixels; default: in training")
    add("--fov", type=float, help="in the place of --focal: degrees from left to right")
    add("--bench", nargs="?", type=int, const=5, metavar="N", help="only measure speed, N times")
    args = parser.parse_args()
    for option, limit in (("bench", np.inf), ("explain", np.inf), ("focal", np.inf), ("fov", 180)):
        value = getattr(args, option)
        if value is not None and not 0 < value < limit:
            raise ValueError(f"--{option} is {value}; it must be above 0 and below {limit}")

    device, saved, model_depth = default_device(), {}, None
    go_fast(False)  # what is measured as fp32 is fp32
    if args.checkpoint == "depthclip":
        args.data = args.data or "nyu"
        if args.data == "kitti" or args.images or args.explain or args.bench or args.amp != "off":
            raise ValueError("depthclip is only measured, in fp32, with its distances for NYU")
        predict, flip = depthclip(cabins.load_clip(args.clip).to(device)), False
    else:
        content = cabins.read_checkpoint(args.checkpoint)
        if isinstance(content.get("args"), dict):
            saved = content["args"]
        max_depth = args.max_depth
        if "config" not in content and args.data:
            max_depth = max_depth or data.DATASETS[args.data].max_depth
        model = cabins.restore(content, args.checkpoint, max_depth)
        model = model.to(device, memory_format=torch.channels_last)
        predict, flip = predictor(model, args.flip, args.amp), args.flip
        model_depth = model.config.max_depth
        origin = "train.py's" if "config" in content else "the authors'"
        print(
            f"{args.checkpoint} is {origin}: {model.config.backbone}, {model.config.distance_class}, "
            f"depths to {model.config.max_depth} m; all of its {len(content['model'])} tensors are used"
        )
    if args.bench:
        bench_inference(model, device, args.bench)
        return
    name = args.data or saved.get("data")
    if args.images:
        sys.exit(1 if predict_pictures(model, name, args) else 0)
    if name is None:
        raise ValueError(f"{args.checkpoint} does not say what data it is for: give --data")
    known = saved if name == saved.get("data") else {}
    keys = ("root", "test_split", "depth_scale", "max_depth")
    root, split, scale, max_depth = (getattr(args, key) or known.get(key) for key in keys)
    dataset = data.DepthDataset(name, root, split, depth_scale=scale, max_depth=max_depth)
    if max_depth is None and model_depth not in (None, dataset.recipe.max_depth):
        print(
            f"note: the network predicts to {model_depth} m, {name} goes to {dataset.recipe.max_depth} m"
        )
    if args.explain:
        out = Path(args.out or "runs/explained")
        draw_samples(out, model, dataset, args.explain, predict)
        print(f"{out} has comparison.png, and an explained_….png of each sample")
        return
    if args.out:
        predict = keep_predictions(predict, dataset, Path(args.out) / "predictions")
    windows = evaluate_windows(predict, dataset, progress=True)
    protocols = [protocol(dataset, window, flip, args.amp) for window in windows]
    rows = {f"{Path(args.checkpoint).name}, {window}": row for window, row in windows.items()}
    print("\n".join([*protocols, format_table(name, rows)]))
    if args.out:
        for line, (label, row) in zip(protocols, rows.items()):
            append_row(Path(args.out) / "results.csv", {"label": label, "protocol": line, **row})


if __name__ == "__main__":
    data.run_command(main)
