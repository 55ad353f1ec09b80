"""What the widgets of the companion page show: numbers of the demo's network, in docs/demo.json.

    python train.py                            trains the demo, in about two minutes
    python -m docs.demo runs/toy/last.pt       writes docs/demo.json

One room of the toy test set goes through the trained network. H x W = 96 x 128 is its size, and
H/2 x W/2 = 48 x 64 that of the decoder. Lengths are in metres unless a name says otherwise. Fields:

    about              one sentence: which network, trained on what
    room               number of the room in data.DepthDataset("toy")
    size               [H, W]
    min_depth, max_depth
    widths             b of Eq. 1, 256 numbers of sum 1
    centers            c(b) of Eq. 1, 256, increasing
    means              m_k of Eq. 2, 8
    cabins             e_k of Eq. 2, 8
    texts              e_k as the prompts have them, 8 strings
    tokens             their ids, 8 lists, from start to end token, without the padding
    similarity         s of Eq. 4: {"size": [h, w], "values": 8 lists of h w numbers}
    depth              d of Eq. 5 at H/2 x W/2: {"size", "unit", "data"}. "data" is base64 of little-
                       endian uint16, row by row, and value * unit is metres
    truth              ground truth at H x W, in the same form; 0 is none
    silenced           what s = 0 changes:
        difference     depth with s = 0, minus depth: {"size", "unit", "data"}, of int16
        mean_mm        mean and greatest absolute difference in this room, in millimetres
        max_mm
        all_mean_mm    the same over all rooms of the test set
        all_max_mm
        n_rooms        how many these are
        metrics        rows of `eval.evaluate` and `eval.ablate` over all of them: {row: {metric:
                       mean}}. The row "whole" is the network as it is
    p                  probabilities of the bins, at every second row and column of H/2 x W/2:
        size           [24, 32]
        step           2
        data           base64 of one byte q for each place and bin, row by row, bins innermost:
                       p_k = q_k² / Σ q². `quantise` says how q is chosen
        p_error        greatest error of such a p_k against the network's
        depth_error    greatest error of Eq. 5 with them, and of the spread (standard deviation)
        spread_error
    colors             nine colours from 0 to `shown_depth`, linear between (viridis' own)
    shown_depth        depth of the last colour: the greatest true depth, rounded up
    picture            PNG of the room, as a data URI
    depth_png          PNG of the predicted depth at H x W, in these colours
    truth_png          PNG of the true depth
"""

import argparse
import base64
import io
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import cabins
import data
from clip_tokenizer import number_tokens
from eval import ablate, evaluate_windows, predictor

ROOM = 22  # a near box before a far wall: its edge shows p with two hills
STEP = 2  # between the places whose p is stored
JSON = Path(__file__).with_name("demo.json")
COLORS = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c"]
COLORS += ["#28ae80", "#5ec962", "#addc30", "#fde725"]


def encode(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


def pack(values: Tensor, unit: float, dtype: str) -> dict:
    """A map (h, w) in metres as integers that count `unit` metres."""
    whole = (values.double() / unit).round().numpy().astype(dtype)
    return {"size": list(values.shape), "unit": unit, "data": encode(whole)}


def rounded(values: Tensor, decimals: int) -> list:
    """Nested lists of numbers with so many decimals."""
    return np.round(values.double().numpy(), decimals).tolist()


def quantise(p: np.ndarray) -> np.ndarray:
    """Bytes q (n, n_bins) whose squares, divided by their sum, are nearly p (n, n_bins).

    Square roots give the small probabilities more of the 256 steps. What rounding takes from a bin
    is carried to the next one, so that the sums Σ_{j<i} p_j stay true, and with them Eq. 5.
    """
    share = p / p.max(1, keepdims=True)
    q, carried = np.zeros(p.shape, np.uint8), np.zeros(len(p))
    for k in range(p.shape[1]):
        wanted = (share[:, k] + carried).clip(0, 1)
        q[:, k] = np.rint(255 * np.sqrt(wanted))
        carried += share[:, k] - (q[:, k] / 255.0) ** 2
    return q


def mean_and_std(c: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 5 and the standard deviation, (n,) metres each, of centres (n_bins,) under p (n, n_bins)."""
    mean = p @ c
    return mean, np.sqrt((p * (c - mean[:, None]) ** 2).sum(1))


def pack_probabilities(c: Tensor, p: Tensor) -> dict:
    """Every STEP-th row and column of p (n_bins, h, w), and how far its bytes are from it."""
    p = p[:, ::STEP, ::STEP]
    flat, c = p.flatten(1).T.double().numpy(), c.double().numpy()
    q = quantise(flat)
    found = q.astype(float) ** 2
    found /= found.sum(1, keepdims=True)
    depth, std = mean_and_std(c, flat)
    found_depth, found_std = mean_and_std(c, found)
    errors = found - flat, found_depth - depth, found_std - std
    errors = (float(f"{abs(error).max():.2g}") for error in errors)
    names = ("p_error", "depth_error", "spread_error")
    return {"size": list(p.shape[1:]), "step": STEP, "data": encode(q)} | dict(zip(names, errors))


def png(image: np.ndarray) -> str:
    """A data URI of uint8 colours (H, W, 3)."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def paint(depth: np.ndarray, top: float) -> np.ndarray:
    """Metres (H, W) from 0 to `top` in COLORS, as uint8 (H, W, 3)."""
    stops = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in COLORS])
    at = np.linspace(0, top, len(COLORS))
    painted = [np.interp(depth, at, stops[:, channel]) for channel in range(3)]
    return np.rint(np.stack(painted, axis=-1)).astype(np.uint8)


@torch.inference_mode()
def both_depths(model: cabins.CaBins, image: Tensor) -> tuple[Tensor, Tensor]:
    """Depth (H/2, W/2) of one image (3, H, W) as the network gives it, and with s = 0."""
    depths = []
    for factor in (1, 0):
        hook = model.depth_decoder.register_forward_pre_hook(
            lambda _, inputs, factor=factor: (inputs[0], factor * inputs[1])
        )
        depths.append(model(image[None], upsample=False).depth[0, 0])
        hook.remove()
    return depths[0], depths[1]


def silence(model: cabins.CaBins, dataset: data.DepthDataset) -> dict:
    """What s = 0 changes, in the room shown and over the whole test set, in millimetres."""
    differences = []
    for i in range(len(dataset)):
        depth, silenced = both_depths(model, dataset[i]["image"])
        differences.append((silenced - depth).double())
    predict = predictor(model)
    rows = {"whole": next(iter(evaluate_windows(predict, dataset).values()))}
    rows |= {name.rpartition(",")[0]: row for name, row in ablate(model, predict, dataset).items()}
    here, everywhere = differences[ROOM].abs(), torch.stack(differences).abs()
    unit = max(1e-5, float(f"{here.max().item() / 30_000:.1g}"))
    return {
        "difference": pack(differences[ROOM], unit, "<i2"),
        "mean_mm": round(1000 * here.mean().item(), 3),
        "max_mm": round(1000 * here.max().item(), 3),
        "all_mean_mm": round(1000 * everywhere.mean().item(), 3),
        "all_max_mm": round(1000 * everywhere.max().item(), 3),
        "n_rooms": len(dataset),
        "metrics": {
            name: {metric: round(value, 5) for metric, value in row.items()}
            for name, row in rows.items()
        },
    }


@torch.inference_mode()
def make(checkpoint: str | Path) -> dict:
    """All that demo.json holds, from a checkpoint of the demo. The module's docstring has the fields.

    Raises FileNotFoundError or ValueError for a file that is no such checkpoint.
    """
    model, dataset = cabins.load_checkpoint(checkpoint), data.DepthDataset("toy")
    sample, config = dataset[ROOM], model.config
    image, truth = sample["image"], sample["depth"][0]
    b, c, e, s, p = (x[0] for x in model.distribution(image[None]))
    depth = cabins.expected_depth(c[None], p[None])
    whole = cabins.resize(depth, truth.shape)[0, 0]
    ids = number_tokens(e, model.integer_digits)
    top = math.ceil(truth.max().item())
    unit = config.max_depth / 65_535
    picture = (255 * data.denormalize(image)).round().byte().permute(1, 2, 0).numpy()
    return {
        "about": f"A network of backbone {config.backbone!r}, from random weights, its text encoder "
        "too, trained by `python train.py` on 640 drawn rooms; room "
        f"{ROOM} of the {len(dataset)} it is tested on.",
        "room": ROOM,
        "size": list(truth.shape),
        "min_depth": config.min_depth,
        "max_depth": config.max_depth,
        "widths": rounded(b, 8),
        "centers": rounded(c, 6),
        "means": rounded(c.view(config.n_cabins, -1).mean(1), 6),
        "cabins": rounded(e, 6),
        "texts": [str(round(value, 4)) for value in e.tolist()],
        "tokens": [[i for i in row if i] for row in ids.tolist()],
        "similarity": {"size": list(s.shape[1:]), "values": rounded(s.flatten(1), 5)},
        "depth": pack(depth[0, 0], unit, "<u2"),
        "truth": pack(truth, unit, "<u2"),
        "silenced": silence(model, dataset),
        "p": pack_probabilities(c, p),
        "colors": COLORS,
        "shown_depth": top,
        "picture": png(picture),
        "depth_png": png(paint(whole.numpy(), top)),
        "truth_png": png(paint(truth.numpy(), top)),
    }


def write(demo: dict, path: Path = JSON) -> None:
    """A line for each field, so that a difference can be read."""
    lines = (f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in demo.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/demo.json from the demo's network.")
    parser.add_argument("checkpoint", help="of the demo: runs/toy/last.pt")
    demo = make(parser.parse_args().checkpoint)
    write(demo)
    print(f"{JSON.name}: {JSON.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    data.run_command(main)
