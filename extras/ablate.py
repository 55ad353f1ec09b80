"""What does the text add to a trained network?

python -m extras.ablate CKPT                  and eval.py's options

Prints the row that eval.py prints, and rows of the same network with its text silenced in three
ways. Where the rows are equal, the depth decoder does not use the similarity s. Then it prints what
the text does on the way to s, what Eq. 2 makes of the trained bins and, for a last.pt, how large
the gradients of each part were. extras.findings measures the same after training over seeds.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import cabins
import data
import eval as evaluation
from eval import Measured, Predict

PARTS = {  # by the beginnings of the parameters' names; the first that fits counts
    "image encoder": ("clip.visual.", "reassemble."),
    "bins": ("bins.",),
    "depth decoder": ("depth_decoder.",),
    "prompts": ("prompts",),
    "gamma": ("trans_decoder.gamma",),
    "TransDecoder": ("trans_decoder.",),
    "token embedding": ("clip.token_embedding.",),  # trained by extras.released only
}
STEPS = {"0.1 mm": 1e-4, "1 m": 1.0}  # the smallest step changes the last digit of a text
N_DISTANCES = 64  # over which `digit_angle` is a mean
UNITS = {"10 m": (10.0, 1.0), "80 m": (80.0, 1.0), "10 m in cm": (10.0, 100.0)}  # range, 1 m


# ---- Rows with the text silenced -----------------------------------------------------------------
def silenced_rows(
    model: cabins.CaBins, predict: Predict, dataset: data.DepthDataset, workers: int | None = None
) -> dict[str, dict[str, Measured]]:
    """Metrics in each test window, of the whole network and with its text silenced in three ways.

    `predict` is a predictor of `model`.
    """
    decoder = model.depth_decoder
    changes = {  # a module, and its inputs from those that it gets
        "whole": (decoder, lambda pyramid, s: (pyramid, s)),
        "s = 0": (decoder, lambda pyramid, s: (pyramid, torch.zeros_like(s))),
        "classes reversed": (decoder, lambda pyramid, s: (pyramid, s.flip(1))),
        "one text": (model.trans_decoder, lambda t, *image: (t[:, :1].expand_as(t), *image)),
    }
    rows = {}
    for name, (module, change) in changes.items():
        with module.register_forward_pre_hook(lambda _, inputs, change=change: change(*inputs)):
            rows[name] = evaluation.evaluate_windows(predict, dataset, workers)
    return rows


# ---- The text on the way to s --------------------------------------------------------------------
def angle(a: Tensor, b: Tensor) -> Tensor:
    """The angle (…), in rad, between vectors (…, D). It is exact for small angles, too."""
    a, b = F.normalize(a.double(), dim=-1), F.normalize(b.double(), dim=-1)
    return 2 * torch.asin(((a - b).norm(dim=-1) / 2).clamp(max=1))


@torch.inference_mode()
def digit_angle(model: cabins.CaBins, step: float, n: int = N_DISTANCES) -> float:
    """The angle, in rad, by which t turns when its distance grows by `step` metres.

    It is a mean over n distances, spread evenly over the range of the network.
    """
    low, high = model.config.min_depth, model.config.max_depth
    e = torch.linspace(low, max(high - step, low), n, dtype=torch.float64)
    e = (e * 1e4).round() / 1e4  # the texts have four decimals
    both = torch.stack([e, e + step]).to(model.prompts.device)  # (2, n)
    return angle(*model.encode_distances(both)).mean().item()


def attention_weights(layer: cabins.TransDecoderAttention, x: Tensor, memory: Tensor) -> Tensor:
    """The weights (B, n_heads, Tq, Tk) with which `layer` attends from x to the memory."""
    q, k = layer.q_proj(x), layer.k_proj(memory)
    q, k = (x.unflatten(-1, (layer.n_heads, -1)).transpose(1, 2) for x in (q, k))
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


@torch.inference_mode()
def text_figures(model: cabins.CaBins, dataset: data.DepthDataset) -> tuple[dict, Tensor]:
    """What the text does on the test images. The bin widths b (n_images, n_bins) come with it.

    turn           angle by which Eq. 3 turns t, in rad: mean over texts and images
    attention      least and greatest weight of the last cross-attention; even: 1 / its keys
    one_text_best  share of locations at which the commonest best text of the image fits best
    """
    turns, weights, shares, all_b = [], [], [], []
    layer = model.trans_decoder.layers[-1].cross_attn

    def keep_turn(_, inputs: tuple, t: Tensor) -> None:
        turns.append(angle(inputs[0], t).mean().item())

    def keep_weights(_, inputs: tuple) -> None:
        weights.append(attention_weights(layer, *inputs))

    def keep_b(_, inputs: tuple, b: Tensor) -> None:
        all_b.append(b.cpu())

    hooks = [
        model.trans_decoder.register_forward_hook(keep_turn),
        layer.register_forward_pre_hook(keep_weights),
        model.bins.register_forward_hook(keep_b),
    ]
    for sample in data.load(dataset, workers=0):
        image = sample["image"].to(model.prompts.device)
        image = cabins.to_training_size(image, model.config.longer_side)
        best = model(image, upsample=False).similarity.argmax(1).flatten()  # (hw,)
        shares.append(best.bincount().max().item() / len(best))
    for hook in hooks:
        hook.remove()
    attention = {
        "least": min(w.min().item() for w in weights),
        "greatest": max(w.max().item() for w in weights),
        "even": 1 / weights[0].shape[-1],
    }
    n = len(dataset)
    found = {"turn": sum(turns) / n, "attention": attention, "one_text_best": sum(shares) / n}
    return found, torch.cat(all_b)


# ---- Eq. 2 in numbers ----------------------------------------------------------------------------
def eq2_figures(b: Tensor, n_cabins: int = 8) -> dict[str, dict[str, float]]:
    """What Eq. 2 makes of bin widths b (B, n_bins), for two ranges and in two units of depth.

    largest_weight  of a group's centres: mean over groups
    nearest, mean   distance of e_k from the centre nearest to m_k, and from m_k, in metres
    """
    found = {}
    for name, (max_depth, metre) in UNITS.items():
        low = metre * cabins.Config.min_depth
        c = cabins.bin_centers(b.double(), low, metre * max_depth)
        e = cabins.distance_classes(c, n_cabins)[..., None]  # (B, K, 1)
        groups = c.unflatten(1, (n_cabins, -1))  # (B, K, n_g)
        m = groups.mean(2, keepdim=True)
        w = torch.softmax(1 / ((groups - m).abs() + 1e-4), dim=2)  # of Eq. 2
        nearest = groups.gather(2, (groups - m).abs().argmin(2, keepdim=True))
        found[name] = {
            "largest_weight": w.amax(2).mean().item(),
            "nearest": (e - nearest).abs().mean().item() / metre,
            "mean": (e - m).abs().mean().item() / metre,
        }
    return found


# ---- What the optimizer says ---------------------------------------------------------------------
def trained_names(model: cabins.CaBins, optimizer: dict) -> list[str]:
    """The names of the parameters in an optimizer of train.py or of extras.released, in order."""
    fixed = {"prompts", "trans_decoder.gamma"}  # by extras.released
    paper = [name for name, p in model.named_parameters() if p.requires_grad]
    tokens = "clip.token_embedding.weight"
    either = [*paper, tokens]
    released = [
        name for name, _ in model.named_parameters() if name in either and name not in fixed
    ]
    n = len(optimizer["param_groups"][0]["params"])
    return next(names for names in (paper, released) if len(names) == n)


def gradient_sizes(names: list[str], optimizer: dict) -> dict[str, tuple[int, float]]:
    """For each part of the network: its parameters, and the RMS of their clipped gradients.

    `optimizer` is the state of an Adam, whose parameters have these `names`. Adam keeps a running
    mean of the squared gradients. Like Adam, we correct it for its start at 0.
    """
    (group,) = optimizer["param_groups"]
    numbers, sums = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0.0)
    for name, index in zip(names, group["params"], strict=True):
        moments = optimizer["state"][index]
        part = next(part for part, starts in PARTS.items() if name.startswith(starts))
        correction = 1 - group["betas"][1] ** float(moments["step"])
        sums[part] += moments["exp_avg_sq"].double().sum().item() / correction
        numbers[part] += moments["exp_avg_sq"].numel()
    return {part: (n, (sums[part] / n) ** 0.5) for part, n in numbers.items() if n}


def step_share(rms: float, eps: float) -> float:
    """Adam's step for gradients of this RMS, as a share of its step with ε = 0."""
    return rms / (rms + eps)


# ---- The command ---------------------------------------------------------------------------------
def report(model: cabins.CaBins, dataset: data.DepthDataset, content: dict) -> None:
    """Print what the test images, the digits and, if they are there, Adam's moments say."""
    config = model.config
    found, b = text_figures(model, dataset)
    attention = "{least:.4f} to {greatest:.4f}, {even:.4f} if even".format(**found["attention"])
    print(f"\nEq. 3 turns t by {found['turn']:.2g} rad. Weights of its last attention: {attention}")
    print(f"One text fits best at {found['one_text_best']:.1%} of an image's locations")
    if config.distance_class == "semantic":
        print("The texts are phrases: no distance turns t")
    else:
        angles = [f"{name} {digit_angle(model, step):.3f}" for name, step in STEPS.items()]
        about = f"rad, mean over {N_DISTANCES} distances"
        print(f"A change of the distance turns t by: {', '.join(angles)} {about}")
    for name, x in eq2_figures(b, config.n_cabins).items():
        text = "largest weight {largest_weight:.2f}, {nearest:.2g} m from the nearest centre, "
        print(f"Eq. 2, {name}: {text}{{mean:.2g}} m from the mean".format(**x))
    if "optimizer" not in content:
        print("The checkpoint has no optimizer and says nothing of gradients; a last.pt has one")
        return
    eps = content["optimizer"]["param_groups"][0]["eps"]
    names = trained_names(model, content["optimizer"])
    print(f"Clipped gradients of about the last thousand steps, beside Adam's ε of {eps:g}:")
    for part, (n, rms) in gradient_sizes(names, content["optimizer"]).items():
        share = step_share(rms, eps)
        print(f"{part:16}{n:>12,} parameters, RMS {rms:.0e}, {share:.0%} of a step with ε = 0")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m extras.ablate", description=__doc__, formatter_class=raw
    )
    evaluation.add_options(parser)
    args = parser.parse_args()
    model, dataset = evaluation.open_checkpoint(args)
    predict = evaluation.predictor(model, not args.no_flip)
    found = silenced_rows(model, predict, dataset, args.workers)
    side, flip = model.config.longer_side, "off" if args.no_flip else "on"
    for measured in found["whole"].values():
        print(f"{measured.protocol}; longer side {side} pixels, flip averaging {flip}, fp32")
    rows = {
        f"{Path(args.checkpoint).name if name == 'whole' else name}, {window}": measured.metrics
        for name, windows in found.items()
        for window, measured in windows.items()
    }
    print(evaluation.format_table(dataset, rows))
    report(model, dataset, cabins.read_checkpoint(args.checkpoint))


if __name__ == "__main__":
    data.run_command(main)
