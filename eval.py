"""Measure a checkpoint of CaBins as the paper does, and show what it sees.

python eval.py runs/toy/best.pt                     a row of the paper's table, beside the paper's
python eval.py runs/toy/best.pt --ablate            rows of the same network with the text silenced
python eval.py runs/toy/best.pt --explain 4         figures of bins, prompts and depth
python eval.py runs/toy/best.pt --images *.jpg      depth of your own pictures
"""

import argparse
import glob
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

import cabins
import data
from data import DepthDataset

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
    predict: Predict, dataset: DepthDataset, progress: bool = False
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
    rank, n_processes = data.rank_of()
    mine = range(rank, len(dataset), n_processes)
    hidden = None if progress and rank == 0 else True
    bar = tqdm(data.load(Subset(dataset, mine)), desc="evaluating", disable=hidden, leave=False)
    for i, sample in zip(mine, bar):
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
    predict: Predict, dataset: DepthDataset, window: str | None = None
) -> dict[str, float]:
    """Mean metrics in one test window, the paper's if none is named; see `evaluate_windows`."""
    windows = evaluate_windows(predict, dataset)
    if window is not None and window not in windows:
        raise ValueError(f"window is {window!r}; {dataset.name} has {', '.join(windows)}")
    return windows[window or next(iter(windows))]


def predictor(model: cabins.CaBins, flip: bool = True, amp: str = "off") -> Predict:
    """The function from images to depth that is measured, in a precision of data.PRECISIONS.

    With `flip`, it is the mean over the image and its mirror image. Each is clipped to the depth
    range, and the mean is taken at the decoder's size and then upsampled.
    """
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


def ablate(
    model: cabins.CaBins, predict: Predict, dataset: DepthDataset
) -> dict[str, dict[str, float]]:
    """Rows of the same network, not trained anew, whose decoder gets less from the text.

    They measure what the similarities s, and so the prompts, add to x4.
    """
    t, s = model.context_decoder, model.depth_decoder  # the modules that t and s go into
    changes = {
        "s = 0": (s, lambda _, inputs: (inputs[0], 0 * inputs[1])),
        "s of the classes in reverse": (s, lambda _, inputs: (inputs[0], inputs[1].flip(1))),
        "one text for all classes": (
            t,
            lambda _, inputs: (inputs[0][:, :1].expand_as(inputs[0]), *inputs[1:]),
        ),
    }
    rows = {}
    for name, (module, change) in changes.items():
        hook = module.register_forward_pre_hook(change)
        rows |= {
            f"{name}, {window}": row for window, row in evaluate_windows(predict, dataset).items()
        }
        hook.remove()
    return rows


def protocol(dataset: DepthDataset, window: str, flip: bool, amp: str = "off") -> str:
    """How a row was measured, in one line."""
    return (
        f"{dataset.name}: {len(dataset)} images ({dataset.n_left_out} without ground truth left out), "
        f"window {window}, {cabins.Config.min_depth} < depth < {dataset.recipe.max_depth} m, "
        f"flip averaging {'on' if flip else 'off'}, {'fp32' if amp == 'off' else amp}, "
        "mean of each image's mean"
    )


def keep_predictions(predict: Predict, dataset: DepthDataset, folder: Path) -> Predict:
    """`predict`, writing each depth as a 16-bit PNG in the data set's scale: 00000.png and so on.

    The files are of the test image's size, KITTI's therefore of the cropped frame's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = itertools.count()

    def predict_and_keep(image: Tensor) -> Tensor:
        depth = predict(image)
        path = folder / f"{next(numbers):05}.png"
        write_depth(path, depth[0, 0].cpu().numpy(), dataset.recipe.depth_scale)
        return depth

    return predict_and_keep


def write_depth(path: Path, depth: np.ndarray, scale: float, about: str = "") -> None:
    """A depth map (H, W) in metres as a 16-bit PNG of depth * scale."""
    values = (depth * scale).round().clip(0, 65535).astype(np.uint16)
    info = PngInfo()
    info.add_text("Description", f"depth in 1/{scale:g} m{about}")
    cabins.write_whole(path, lambda p: Image.fromarray(values).save(p, "png", pnginfo=info))


# ---- Figures -------------------------------------------------------------------------------------


class Explanation(NamedTuple):
    """How the depth of one image came about."""

    depth: np.ndarray  # (H, W) metres
    spread: np.ndarray  # (H, W) metres, the standard deviation of p
    edges: np.ndarray  # (n_bins + 1,) metres, of the bins
    cabins: np.ndarray  # (K,) metres
    texts: list[str]  # K prompts, without the learnt context
    similarity: np.ndarray  # (K, h, w)


@torch.inference_mode()
def explain(model: cabins.CaBins, image: Tensor, size: tuple[int, int]) -> Explanation:
    """What is behind the depth, at `size`, of one normalised image (1, 3, H, W)."""
    b, c, e, s, p = model.eval().distribution(image.to(next(model.parameters()).device))
    depth, spread = cabins.mean_and_spread(c, p, size)
    low, high = model.config.min_depth, model.config.max_depth
    edges = low + (high - low) * F.pad(b[0].cumsum(0), (1, 0))
    texts = [str(round(value, 4)) for value in e[0].tolist()]
    texts = cabins.SEMANTIC_BINS if model.config.distance_class == "semantic" else texts
    depth, spread, edges, e, s = (x.cpu().numpy() for x in (depth, spread, edges, e[0], s[0]))
    return Explanation(depth, spread, edges, e, texts, s)


def show(axis, title: str, values: np.ndarray, label="", low=0.0, high=1.0, cmap="viridis") -> None:
    """Colours (H, W, 3), or values (H, W) above a bar that says `label`."""
    axis.set_axis_off()
    axis.set_title(title, fontsize=10, parse_math=False)
    axis.set_anchor("N")  # so that maps with and without a bar stand side by side
    shown = axis.imshow(values, cmap=cmap, vmin=low, vmax=high)
    if label:
        bar = {"location": "bottom", "pad": 0.02, "panchor": False}
        axis.figure.colorbar(shown, ax=axis, label=label, **bar)


def show_depth(axes, image: np.ndarray, depth: np.ndarray, truth: np.ndarray | None, top) -> None:
    """Image, truth (0 is none) if known, prediction, error: a row of Figures 4 and 5."""
    maps = {"image": (image,), "prediction": (depth, "depth (m)", 0, top)}
    if truth is not None:
        truth = np.where(truth > 0, truth, np.nan)
        error = np.abs(depth - truth)
        maps = {"image": (image,), "ground truth": (truth, "depth (m)", 0, top)} | maps
        maps["error"] = (error, "|error| (m)", 0, top / 10, "magma")
    for axis, (title, values) in zip(axes, maps.items()):
        show(axis, title, *values)


def show_bins(axis, e: Explanation, truth: np.ndarray | None) -> None:
    """Histograms of depth over the edges of the bins, and the prompts where their distances are."""
    top = e.edges[-1]
    axis.hist(e.depth.ravel(), 128, range=(0, top), density=True, label="prediction")
    if truth is not None and truth.any():
        values = truth[truth > 0]
        how = {"range": (0, top), "density": True, "histtype": "step"}
        axis.hist(values, 128, **how, label="ground truth")
    bottom_line = axis.get_xaxis_transform()  # metres across, shares of the height upwards
    axis.vlines(e.edges, 0, 0.06, "black", linewidth=0.4, transform=bottom_line)
    for k, (distance, text) in enumerate(zip(e.cabins, e.texts)):
        axis.axvline(distance, color="black", linewidth=0.8, linestyle="--")
        place = {"xytext": ((k + 0.5) / len(e.cabins), 1.12), "textcoords": "axes fraction"}
        place |= {"xycoords": bottom_line, "ha": "center", "arrowprops": {"arrowstyle": "-"}}
        axis.annotate(f"“{text}”", (distance, 1.0), **place)
    axis.set(xlabel="depth (m)", ylabel="share of pixels per metre", xlim=(0, top))
    axis.set_title(f"{len(e.edges) - 1} bins (short ticks) and their prompts (dashed)", pad=38)
    axis.legend(loc="upper right")


def new_figure(*heights: float):
    """A figure of 13 inches' width, and its parts of these heights, from the top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, sum(heights)), layout="constrained")
    return figure, figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]


def save_figure(path: Path, figure) -> None:
    cabins.write_whole(path, lambda partial: figure.savefig(partial, dpi=100, format="png"))


def draw_explained(path: Path, image: np.ndarray, e: Explanation, truth=None) -> None:
    """The figure of one image: depth and its spread, the bins, and where each prompt matches."""
    n, k = 3 if truth is None else 5, len(e.cabins)
    shape = min(image.shape[0] / image.shape[1], 2.5)  # a picture taller than that gets margins
    figure, (maps, bins, texts) = new_figure(1 + 13 / n * shape, 3.3, 1 + 13 / k * shape)
    axes = maps.subplots(1, n)
    show_depth(axes, image, e.depth, truth, float((e.depth if truth is None else truth).max()))
    show(axes[-1], "spread of p", e.spread, "std (m)", 0, e.spread.max(), "magma")
    show_bins(bins.subplots(), e, truth)
    low, high = e.similarity.min(), e.similarity.max()
    for i, axis in enumerate(texts.subplots(1, k, squeeze=False)[0]):
        title = f"“{e.texts[i]}”, {e.cabins[i]:.2f} m"
        show(axis, title, e.similarity[i], "cosine", low, high, "cividis")
    save_figure(path, figure)


def draw_samples(
    out: Path, model: cabins.CaBins, dataset: DepthDataset, n: int, predict: Predict
) -> None:
    """Draw n samples from all over the data set, side by side and then each explained."""
    out.mkdir(parents=True, exist_ok=True)
    chosen = torch.linspace(0, len(dataset) - 1, min(n, len(dataset))).long().tolist()
    samples = [dataset[i] for i in chosen]
    top = max(float(sample["depth"].max()) for sample in samples)
    height, width = samples[0]["depth"].shape[1:]
    figure, rows = new_figure(*[1 + 13 / 4 * height / width] * len(samples))
    for i, row, sample in zip(chosen, rows, samples):
        truth = sample["depth"][0].numpy()
        image = data.denormalize(sample["image"]).permute(1, 2, 0).numpy()
        depth = predict(sample["image"][None])[0, 0].cpu().numpy()
        show_depth(row.subplots(1, 4), image, depth, truth, top)
        e = explain(model, sample["image"][None], truth.shape)
        draw_explained(out / f"explained_{i}.png", image, e, truth)
    save_figure(out / "comparison.png", figure)


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
            paths = [p for p in sorted(path.iterdir()) if p.suffix.lower() in PICTURES]
        if not paths:
            raise FileNotFoundError(f"{argument}: no picture there, nor any that the pattern fits")
        found += paths
    return found


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
    """Write the depth of each picture of `args.images` into `args.out`; return how many failed."""
    out, paths = Path(args.out or "runs/pictures"), find_pictures(args.images)
    if own := [path for path in paths if path.resolve().parent == out.resolve()]:
        raise ValueError(f"--out {out} is the folder of {own[0]}, which must stay: choose another")
    out.mkdir(parents=True, exist_ok=True)
    n_failed, names = 0, set()
    for path in tqdm(paths, unit="picture", disable=None):
        name = path.stem
        while name in names:  # of another folder, or with another suffix
            name += "_"
        names.add(name)
        try:
            picture = cabins.read_picture(path)
        except (OSError, SyntaxError, ValueError) as error:
            tqdm.write(f"{path} cannot be read as a picture: {error}", file=sys.stderr)
            n_failed += 1
            continue
        tqdm.write(f"{path}: {write_picture(out / name, model, picture, trained_on, args)}")
    print(f"{len(paths) - n_failed} of {len(paths)} pictures written to {out}")
    return n_failed


def write_picture(path: Path, model, picture: np.ndarray, trained_on, args) -> str:
    """Write the files of one picture, whose names begin as `path`; returns a line about its depth."""
    height, width = picture.shape[:2]
    with data.autocast(next(model.parameters()).device, args.amp):
        depth = cabins.infer(model, picture).depth
        if args.explain:
            e = explain(model, cabins.to_input(model, picture), (height, width))
            draw_explained(Path(f"{path}_explained.png"), picture, e)
    figure, (part,) = new_figure(1 + 13 * min(height / width, 2.5))
    show(part.subplots(), path.name, depth, "depth (m)", 0, float(depth.max()))
    save_figure(Path(f"{path}_depth.png"), figure)
    unit, scale = ("mm", 1000) if model.config.max_depth < 65.535 else ("cm", 100)
    about = f" ({unit}); CaBins, {args.checkpoint}"
    write_depth(Path(f"{path}_depth_{unit}.png"), depth, scale, about)
    line = f"{depth.min():.2f} to {depth.max():.2f} m, median {np.median(depth):.2f} m"
    if args.ply:
        like = (
            trained_on
            if trained_on in CAMERAS
            else "kitti"
            if model.config.max_depth > 10
            else "nyu"
        )
        pixels = args.focal or CAMERAS[like][1] * width / CAMERAS[like][0]
        if args.fov:
            pixels = width / 2 / np.tan(np.radians(args.fov) / 2)
        write_ply(Path(f"{path}.ply"), picture, depth, pixels)
        line += f"; point cloud with a focal length of {pixels:.1f} pixels"
    return line


# ---- Command line --------------------------------------------------------------------------------


def main() -> None:
    args, device = parse_args(), data.default_device()
    data.go_fast(False)  # what is measured as fp32 is fp32
    model, saved = load(args)
    model = model.to(device, memory_format=torch.channels_last)
    predict = predictor(model, args.flip, args.amp)
    name = args.data or saved.get("data")
    if args.images:
        sys.exit(1 if predict_pictures(model, name, args) else 0)
    if name is None:
        raise ValueError(f"{args.checkpoint} does not say what data it is for: give --data")
    known = saved if name == saved.get("data") else {}
    keys = ("root", "test_split", "depth_scale", "max_depth")
    root, split, scale, max_depth = (getattr(args, key) or known.get(key) for key in keys)
    dataset = DepthDataset(name, root, split, depth_scale=scale, max_depth=max_depth)
    top = dataset.recipe.max_depth
    if max_depth is None and model.config.max_depth != top:
        print(f"note: the network predicts to {model.config.max_depth} m, {name} goes to {top} m")
    if args.explain:
        out = Path(args.out or "runs/explained")
        draw_samples(out, model, dataset, args.explain, predict)
        print(f"{out} has comparison.png, and an explained_….png of each sample")
        return
    keep = keep_predictions(predict, dataset, Path(args.out) / "predictions") if args.out else None
    windows = evaluate_windows(keep or predict, dataset, progress=True)
    rows = {f"{Path(args.checkpoint).name}, {window}": row for window, row in windows.items()}
    if args.ablate:
        rows |= ablate(model, predict, dataset)
    for window in windows:
        print(protocol(dataset, window, args.flip, args.amp))
    print(format_table(name, rows))
    for label, row in rows.items() if args.out else ():
        how = protocol(dataset, label.split(", ")[-1], args.flip, args.amp)
        data.append_row(Path(args.out) / "results.csv", {"label": label, "protocol": how, **row})


def load(args: argparse.Namespace) -> tuple[cabins.CaBins, dict]:
    """The network of args.checkpoint, and the options that it was trained with, if it says so."""
    content = cabins.read_checkpoint(args.checkpoint)
    saved, is_ours = content.get("args"), "config" in content
    max_depth = args.max_depth
    if not is_ours and args.data:
        max_depth = max_depth or data.DATASETS[args.data].max_depth
    model = cabins.restore(content, args.checkpoint, max_depth)
    config = model.config
    print(
        f"{args.checkpoint} is {'train.py’s' if is_ours else 'the authors’'}: {config.backbone}, "
        f"{config.distance_class}, depths to {config.max_depth} m; "
        f"all of its {len(content['model'])} tensors are used"
    )
    return model, saved if isinstance(saved, dict) else {}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoint", help="train.py's or the authors'")
    add("--data", choices=data.DATASETS, help="default: what it was trained on")
    data.add_data_options(parser)
    add("--split", dest="test_split", metavar="FILE", help="the same as --test-split")
    add("--flip", action=argparse.BooleanOptionalAction, default=True)
    add(
        "--amp",
        choices=data.PRECISIONS,
        default="off",
        help="precision; default: off, which is float32",
    )
    add("--ablate", action="store_true", help="also rows with the text silenced")
    add("--out", metavar="DIR", help="keep results.csv and depth PNGs; for pictures: where to")
    about = "figures of N samples, or of the pictures"
    add("--explain", nargs="?", type=int, const=4, metavar="N", help=about)
    add("--images", nargs="+", metavar="PICTURE", help="files, folders or patterns of your own")
    add("--ply", action="store_true", help="write a point cloud of each picture")
    add("--focal", type=float, help="of the pictures' camera, in pixels; default: in training")
    add("--fov", type=float, help="in the place of --focal: degrees from left to right")
    args = parser.parse_args()
    for option, limit in (("explain", np.inf), ("focal", np.inf), ("fov", 180)):
        value = getattr(args, option)
        if value is not None and not 0 < value < limit:
            raise ValueError(f"--{option} is {value}; it must be above 0 and below {limit}")
    return args


if __name__ == "__main__":
    data.run_command(main)
