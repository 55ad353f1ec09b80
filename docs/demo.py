"""The values that the companion page shows: one drawn room in the demo's network.

    python train.py                            trains the demo, in about two minutes
    python -m docs.demo runs/toy/last.pt       writes docs/demo.json

The room is one of the 64 toy test rooms. It is H x W = 96 x 128, so x4 and z are 3 x 4, and the
decoder works at 48 x 64. Lengths are in metres. These values are those of one network. What the
page says of the demo in general comes from docs/findings.json, which has three.

    room, n_rooms      number of the room in data.DepthDataset("toy"), and how many there are
    n_training         how many rooms the network was trained on
    min_depth, max_depth, shown_depth     shown_depth is where the colours of the maps end
    widths, centers    b and c(b) of Eq. 1, 256 each
    cabins             e_k of Eq. 2, 8
    texts, tokens      e_k as the prompts have them, and their ids from start to end token
    t, v_post, gamma   of Eq. 3: t (8, D) before the image is looked at, v_post (8, D), and γ (D,)
    similarity         s of Eq. 4: {"size": [h, w], "values": (8, hw)}
    p                  p at every second row and column, {"size", "data"}: one byte q for each
                       location and bin, bins innermost, and p_k = q_k² / Σ q²; `quantise` says how
                       q is chosen. depth_error: the greatest error of Eq. 5 with them
    truth              true depth in mm at these locations
    pixel, edge        row and column of p at which the page starts, and of a box's edge
    digits             angles in rad by which t turns when a distance grows, at 64 distances
    loss               Eq. 6 and 7 in this room, and the mean and variance of g
    pictures           PNGs as data URIs: the image, its true and predicted depth, and the two maps
                       that Eq. 5 compares, computed from the bytes of p
"""

import argparse
import base64
import io
import json
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

import cabins
import data
from clip_tokenizer import number_tokens
from extras.ablate import N_DISTANCES, STEPS, angle

ROOM, PIXEL, EDGE = 32, (12, 24), (6, 16)
STEP = 2  # between the rows and the columns whose p is stored
JSON = Path(__file__).with_name("demo.json")


def rounded(values: Tensor, decimals: int) -> list:
    return np.round(values.double().numpy(), decimals).tolist()


def png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def quantise(p: np.ndarray) -> np.ndarray:
    """Bytes q (n, n_bins) whose squares, divided by their sum, are nearly p (n, n_bins).

    Square roots give the small probabilities more of the 256 steps. The error of a bin is carried
    to the next one, so that the cumulative sums stay true, and Eq. 5 with them.
    """
    share = p / p.max(1, keepdims=True)
    q, carried = np.zeros(p.shape, np.uint8), np.zeros(len(p))
    for k in range(p.shape[1]):
        wanted = (share[:, k] + carried).clip(0, 1)
        q[:, k] = np.rint(255 * np.sqrt(wanted))
        carried += share[:, k] - (q[:, k] / 255.0) ** 2
    return q


def digit_angles(model: cabins.CaBins, step: float) -> Tensor:
    """What `extras.ablate.digit_angle` is the mean of."""
    low, high = model.config.min_depth, model.config.max_depth
    e = torch.linspace(low, max(high - step, low), N_DISTANCES, dtype=torch.float64)
    e = (e * 1e4).round() / 1e4
    return angle(*model.encode_distances(torch.stack([e, e + step])))


@torch.inference_mode()
def make(model: cabins.CaBins, dataset: data.DepthDataset) -> dict:
    """All that demo.json holds. The computation follows `cabins.CaBins.forward`."""
    config, sample = model.config, dataset[ROOM]
    image, target = sample["image"][None], sample["depth"][None]
    pyramid, z_bar, z = model.clip.visual(image)
    b = model.bins(z_bar)
    c = cabins.bin_centers(b, config.min_depth, config.max_depth)
    e = cabins.distance_classes(c, config.n_cabins)
    t = model.encode_distances(e)
    after, gamma = model.trans_decoder(t, z_bar, z), model.trans_decoder.gamma
    s = cabins.cosine_similarity(z, after)
    p = model.depth_decoder(pyramid, s)
    d = cabins.expected_depth(c, p)
    mask, whole = target > config.min_depth, cabins.resize(d, target.shape[-2:])
    g = (whole.log() - target.log())[mask].double()

    shown_depth = math.ceil(target.max().item())
    coarse = p[0, :, ::STEP, ::STEP]
    flat = coarse.flatten(1).T.double().numpy()  # (n, n_bins)
    q, centers = quantise(flat), c[0].double().numpy()
    stored = q.astype(float) ** 2
    stored /= stored.sum(1, keepdims=True)
    size = list(coarse.shape[1:])
    # Location i of h at H/2 is pixel i (H - 1) / (h - 1) of H: corners are aligned.
    rows, columns = (
        np.rint(STEP * np.arange(n) * (whole - 1) / (half - 1)).astype(int)
        for n, whole, half in zip(size, target.shape[-2:], p.shape[-2:])
    )
    truth = target[0, 0].numpy()[np.ix_(rows, columns)]

    def painted(depth: np.ndarray) -> str:
        colors = colormaps["viridis"](depth.reshape(-1, depth.shape[-1]) / shown_depth)
        return png((255 * colors[..., :3]).round().astype(np.uint8))

    picture = (255 * data.denormalize(image[0])).round().byte().permute(1, 2, 0).numpy()
    return {
        "room": ROOM,
        "n_rooms": len(dataset),
        "n_training": len(data.TOY_ROOMS["train"]),
        "min_depth": config.min_depth,
        "max_depth": config.max_depth,
        "shown_depth": shown_depth,
        "widths": rounded(b[0], 7),
        "centers": rounded(c[0], 6),
        "cabins": rounded(e[0], 6),
        "texts": [str(round(value, 4)) for value in e[0].tolist()],
        "tokens": [[i for i in row if i] for row in number_tokens(e[0], 2).tolist()],
        "t": rounded(t[0], 4),
        "v_post": rounded((after - t)[0] / gamma, 4),
        "gamma": rounded(gamma, 7),
        "similarity": {"size": list(s.shape[2:]), "values": rounded(s[0].flatten(1), 4)},
        "p": {
            "size": size,
            "data": base64.b64encode(q.tobytes()).decode(),
            "depth_error": round(abs((stored - flat) @ centers).max(), 5),
        },
        "truth": (1000 * truth).round().astype(int).ravel().tolist(),
        "pixel": list(PIXEL),
        "edge": list(EDGE),
        "digits": {name: rounded(digit_angles(model, step), 4) for name, step in STEPS.items()},
        "loss": {
            "pixel": round(cabins.silog_loss(whole, target, mask).item(), 4),
            "bins": round(cabins.chamfer_loss(c, target, mask).item(), 4),
            "mean_g": round(g.mean().item(), 5),
            "var_g": round(g.var(unbiased=False).item(), 5),
        },
        "pictures": {
            "image": png(picture),
            "depth": painted(d[0, 0].numpy()),
            "truth": painted(target[0, 0].numpy()),
            "coarse truth": painted(truth),
            "mean": painted((stored @ centers).reshape(size)),
            "likeliest": painted(centers[stored.argmax(1)].reshape(size)),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/demo.json from the demo's network.")
    parser.add_argument("checkpoint", help="of the demo: runs/toy/last.pt")
    model = cabins.load_checkpoint(parser.parse_args().checkpoint)
    demo = make(model, data.DepthDataset("toy"))
    lines = (f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in demo.items())
    JSON.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{JSON.name}: {JSON.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    data.run_command(main)
