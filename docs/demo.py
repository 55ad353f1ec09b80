"""The numbers that the companion page shows: one room in the demo's network, in docs/demo.json.

    python train.py                            trains the demo, in about two minutes
    python -m docs.demo runs/toy/last.pt       writes docs/demo.json

The room is one of the toy test set. It is H x W = 96 x 128, so x4 and z are 3 x 4, and the decoder
works at 48 x 64. Lengths are in metres. Values between the layers are read by forward hooks.

    room, n_rooms      number of the room in data.DepthDataset("toy"), and how many there are
    size, min_depth, max_depth
    widths, centers    b and c(b) of Eq. 1, 256 each
    n_least            how many of the widths are the least that ReLU + 0.1 allows
    means, cabins      m_k and e_k of Eq. 2, 8 each
    texts, tokens      e_k as the prompts have them, and their ids from start to end token
    t, v_post, gamma   of Eq. 3: t (8, D) before the image is looked at, v_post (8, D), and γ (D,)
    attention          (8, 1 + hw), of the last cross-attention, averaged over its heads
    similarity         s of Eq. 4, (8, hw)
    depth, truth       {"size", "data"}: base64 of little-endian uint16, value * `unit` is metres
    p                  p at every second row and column, {"size", "data"}: one byte q for each
                       location and bin, bins innermost, and p_k = q_k² / Σ q²; `quantise` says how
                       q is chosen. depth_error: the greatest error of Eq. 5 with them
    pixel              row and column of p at which the page starts: its p has two hills
    nudge              angles in rad between t of e_3 and t of e_3 + i / 10 mm, i from -20 to 20
    metre              the same angle, for one metre
    gradients          norms of the gradients of Σ s² and of the loss, by part; null: no path
    rms, step_share    by part: RMS of the clipped gradients, out of Adam's second moments in the
                       checkpoint, and what share of a full step ε leaves: the mean of r / (r + ε)
    loss               Eq. 6, 7 and 8 in this room, and the mean and variance of g
    ablation           rows of metrics over all rooms, the network whole and with less of its text
    silenced           mean and greatest change of depth, in mm over all rooms, where s is set to 0
    picture            PNG of the room as a data URI
    told               what the text tells of these values
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
from eval import evaluate_windows, predictor
from extras.ablate import ablate, changed_inputs, without_s
from train import parameter_groups

ROOM, PIXEL, GROUP = 22, (10, 16), 2  # the pixel at a box's edge, and the third CaBin
STEP = 2  # between the rows and the columns whose p is stored
JSON = Path(__file__).with_name("demo.json")
PARTS = {  # of the network, by how the names of their parameters begin
    "image encoder": "clip.visual.",
    "bins": "bins.",
    "depth decoder": "depth_decoder.",
    "prompts p": "prompts",
    "γ": "trans_decoder.gamma",
    "TransDecoder": "trans_decoder.",
}


def part_of(name: str) -> str:
    return next(part for part, beginning in PARTS.items() if name.startswith(beginning))


def rounded(values: Tensor, decimals: int) -> list:
    return np.round(values.detach().double().numpy(), decimals).tolist()


def encode(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


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


def pack_probabilities(c: Tensor, p: Tensor) -> dict:
    """Every STEP-th row and column of p (n_bins, h, w), in bytes."""
    p = p[:, ::STEP, ::STEP]
    flat, c = p.flatten(1).T.double().numpy(), c.double().numpy()
    q = quantise(flat)
    found = q.astype(float) ** 2
    error = (found / found.sum(1, keepdims=True) - flat) @ c
    return {"size": list(p.shape[1:]), "data": encode(q), "depth_error": round(abs(error).max(), 5)}


def watch(model: cabins.CaBins, image: Tensor) -> dict:
    """One forward pass: the prediction, and what its layers took and gave, by their names."""
    last = list(model.trans_decoder.layers)[-1].cross_attn
    modules = {"visual": model.clip.visual, "bins": model.bins, "p": model.depth_decoder}
    modules |= {"eq3": model.trans_decoder, "q": last.q_proj, "k": last.k_proj}
    seen, hooks = {}, []
    for name, module in modules.items():

        def keep(_, inputs, output, name=name):
            seen[name], seen[f"{name} in"] = output, inputs

        hooks.append(module.register_forward_hook(keep))
    with cabins.eval_mode(model):
        seen["prediction"] = model(image)
    for hook in hooks:
        hook.remove()
    q, k = (seen[x][0].unflatten(-1, (last.n_heads, -1)).transpose(0, 1) for x in "qk")
    seen["attention"] = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(0)  # (K, 1 + hw)
    return seen


def gradients(model: cabins.CaBins, seen: dict, target: Tensor) -> dict:
    """Norms of the gradients of Σ s² and of the loss at each part and at z. None: no path."""
    prediction, parameters = seen["prediction"], dict(model.named_parameters())
    trained = {n: p for n, p in parameters.items() if p.requires_grad}
    tensors = [seen["visual"][2], *trained.values()]
    names = ["z", *map(part_of, trained)]
    loss = cabins.total_loss(prediction, target, model.config.min_depth)
    found = {}
    for what, scalar in (("s", prediction.similarity.square().sum()), ("loss", loss)):
        squares = dict.fromkeys(["z", *PARTS])
        grads = torch.autograd.grad(scalar, tensors, retain_graph=True, allow_unused=True)
        for name, grad in zip(names, grads):
            if grad is not None:
                squares[name] = (squares[name] or 0) + grad.square().sum().item()
        found[what] = {n: s and float(f"{s**0.5:.3g}") for n, s in squares.items()}
    return found


def learning(model: cabins.CaBins, optimizer: dict) -> tuple[dict, dict]:
    """RMS of each part's clipped gradients, and the share of a full step that Adam's ε leaves."""
    names = {id(p): part_of(n) for n, p in model.named_parameters() if p.requires_grad}
    parameters = [p for group in parameter_groups(model) for p in group["params"]]
    (_, beta), eps = optimizer["param_groups"][0]["betas"], optimizer["param_groups"][0]["eps"]
    roots = {part: [] for part in PARTS}
    for i, parameter in enumerate(parameters):
        state = optimizer["state"][i]
        mean = state["exp_avg_sq"].double() / (1 - beta ** float(state["step"]))
        roots[names[id(parameter)]].append(mean.sqrt().flatten())
    roots = {part: torch.cat(found) for part, found in roots.items()}
    rms = {part: float(f"{r.square().mean().sqrt():.2g}") for part, r in roots.items()}
    return rms, {part: float(f"{(r / (r + eps)).mean():.2g}") for part, r in roots.items()}


def angle(a: Tensor, b: Tensor) -> Tensor:
    """The angle in rad between vectors (…, D)."""
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).clamp(-1, 1).acos()


@torch.no_grad()
def nudges(model: cabins.CaBins, e: Tensor) -> tuple[list, float]:
    """How far the text embedding turns when its distance moves by tenths of mm, and by a metre."""
    middle = (e.double() * 1e4).round() / 1e4
    moved = torch.cat([middle + torch.arange(-20, 21) / 1e4, middle[None] + 1])
    ids = number_tokens(moved, len(f"{model.config.max_depth:.0f}"))
    t = model.clip.encode_text(ids, model.prompts)
    turned = angle(t, t[20])
    return rounded(turned[:-1], 4), round(turned[-1].item(), 3)


@torch.inference_mode()
def silence(model: cabins.CaBins, dataset: data.DepthDataset) -> list[float]:
    """Mean and greatest change of depth in mm, over all rooms, where s is set to 0."""
    changes = []
    with cabins.eval_mode(model):
        for i in range(len(dataset)):
            image, decoder = dataset[i]["image"][None], model.depth_decoder
            depth = model(image).depth
            with changed_inputs(decoder, without_s):
                changes.append(1000 * (model(image).depth - depth).abs())
    changes = torch.cat(changes)
    return [round(changes.mean().item(), 3), round(changes.max().item(), 3)]


def told(demo: dict, c: Tensor, p: Tensor, target: Tensor) -> dict:
    """What the page's text says of the room: small sums of the values that `make` gives."""
    flat = p[:, ::STEP, ::STEP].flatten(1).T  # (n, n_bins)
    mean, likeliest = flat @ c, c[flat.argmax(1)]
    truth = target[0, 0, :: 2 * STEP, :: 2 * STEP].flatten()
    t, v, gamma = (torch.tensor(demo[name]) for name in ("t", "v_post", "gamma"))
    s = torch.tensor(demo["similarity"]["values"])
    abs_rel = [((d - truth).abs() / truth).mean().item() for d in (mean, likeliest)]
    return {
        "least_mm": 1000 * min(demo["widths"]) * (demo["max_depth"] - demo["min_depth"]),
        "n_wide": len(demo["widths"]) - demo["n_least"],
        "n_keys": len(demo["attention"][0]),
        "gamma_rms": gamma.square().mean().sqrt().item(),
        "turn": math.degrees(angle(t, t + gamma * v).mean().item()),
        "s_within": (s.amax(1) - s.amin(1)).max().item(),
        "s_between": (s.mean(1).max() - s.mean(1).min()).item(),
        "n_pixels": len(flat),
        "n_values": len(likeliest.unique()),
        "abs_rel": abs_rel[0],
        "abs_rel_likeliest": abs_rel[1],
        "bins_share": 10 * demo["loss"]["bins"] / demo["loss"]["total"],
        "step_share": 100 * demo["step_share"]["TransDecoder"],
    }


def make(checkpoint: str | Path) -> dict:
    """All that demo.json holds, from the demo's last.pt."""
    content = cabins.read_checkpoint(checkpoint)
    model, dataset = cabins.restore(content, checkpoint), data.DepthDataset("toy")
    sample, config = dataset[ROOM], model.config
    image, target = sample["image"][None], sample["depth"][None]
    seen = watch(model, image)
    depth, c, e, s = seen["prediction"]
    (t, *_), after, gamma = seen["eq3 in"], seen["eq3"], model.trans_decoder.gamma
    g = (depth.log() - target.log())[target > config.min_depth].double()
    mask = target > config.min_depth
    pixel = cabins.silog_loss(depth, target, mask).item()
    chamfer = cabins.chamfer_loss(c, target, mask).item()
    rms, share = learning(model, content["optimizer"])
    turned, metre = nudges(model, e[0, GROUP])
    unit = config.max_depth / 65_535
    b, p = seen["bins"][0].detach(), seen["p"][0].detach()
    half = cabins.expected_depth(c, p[None])[0, 0].detach()
    rows = {"whole, ": next(iter(evaluate_windows(predictor(model), dataset, 0).values()))}
    rows |= ablate(model, predictor(model), dataset, 0)
    picture, file = (255 * data.denormalize(image[0])).round().byte(), io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "png", optimize=True)

    def pack(depths: Tensor) -> dict:
        whole = (depths.double() / unit).round().numpy().astype("<u2")
        return {"size": list(depths.shape), "data": encode(whole)}

    demo = {
        "room": ROOM,
        "n_rooms": len(dataset),
        "size": list(target.shape[2:]),
        "min_depth": config.min_depth,
        "max_depth": config.max_depth,
        "unit": unit,
        "widths": rounded(b, 7),
        "n_least": int((b < b.min() * 1.001).sum()),
        "centers": rounded(c[0], 6),
        "means": rounded(c[0].view(config.n_cabins, -1).mean(1), 6),
        "cabins": rounded(e[0], 6),
        "texts": [str(round(value, 4)) for value in e[0].tolist()],
        "tokens": [[i for i in row if i] for row in number_tokens(e[0].detach(), 2).tolist()],
        "t": rounded(t[0], 4),
        "v_post": rounded((after - t)[0] / gamma, 4),
        "gamma": rounded(gamma, 7),
        "attention": rounded(seen["attention"], 7),
        "similarity": {"size": list(s.shape[2:]), "values": rounded(s[0].flatten(1), 4)},
        "depth": pack(half),
        "truth": pack(target[0, 0]),
        "p": pack_probabilities(c[0].detach(), p),
        "pixel": list(PIXEL),
        "nudge": turned,
        "metre": metre,
        "gradients": gradients(model, seen, target),
        "rms": rms,
        "step_share": share,
        "loss": {
            "pixel": round(pixel, 4),
            "bins": round(chamfer, 4),
            "total": round(pixel + cabins.BETA * chamfer, 4),
            "mean_g": round(g.mean().item(), 5),
            "var_g": round(g.var(unbiased=False).item(), 5),
        },
        "ablation": {
            name.rpartition(", ")[0]: {metric: round(v, 5) for metric, v in row.items()}
            for name, row in rows.items()
        },
        "silenced": dict(zip(("mean", "max"), silence(model, dataset))),
        "shown_depth": math.ceil(target.max().item()),
        "picture": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
    }
    demo["told"] = told(demo, c[0].detach(), p, target)
    return demo


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/demo.json from the demo's network.")
    parser.add_argument("checkpoint", help="of the demo: runs/toy/last.pt")
    demo = make(parser.parse_args().checkpoint)
    lines = (f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in demo.items())
    JSON.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{JSON.name}: {JSON.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    data.run_command(main)
