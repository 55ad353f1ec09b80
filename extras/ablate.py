"""What does the text add to a trained network? python -m extras.ablate CKPT [options of eval.py]

Prints the row that eval.py prints, and rows of the same network with its text silenced in three
ways. Where the rows are equal, the depth decoder makes no use of the similarity s.

Then it prints by which angle a text embedding t turns when its distance grows by 0.1 mm, which
changes the last digit of the prompt, and by 1 m. Both are means over 64 distances, spread evenly
over the depth range. For a last.pt of train.py, it also prints how large the gradients of each part
of the network are, beside Adam's ε. Adam hardly moves the parts whose gradients are far smaller.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import cabins
import data
import train
from eval import (
    Predict,
    add_network_options,
    evaluate_windows,
    format_table,
    open_data_set,
    open_network,
    predictor,
    protocol,
    side_for,
)

PARTS = {  # by the beginnings of the parameters' names, of which the first that fits counts
    "image encoder": ("clip.visual.", "reassemble."),
    "bins": ("bins.",),
    "depth decoder": ("depth_decoder.",),
    "prompts": ("prompts",),
    "gamma": ("trans_decoder.gamma",),
    "TransDecoder": ("trans_decoder.",),
    "token embedding": ("clip.token_embedding.",),  # trained with --as-released
}
N_DISTANCES = 64  # over which `text_angle` is a mean


# ---- Rows with the text silenced -----------------------------------------------------------------


def without_s(pyramid: list[Tensor], s: Tensor) -> tuple[list[Tensor], Tensor]:
    return pyramid, torch.zeros_like(s)


def with_classes_reversed(pyramid: list[Tensor], s: Tensor) -> tuple[list[Tensor], Tensor]:
    return pyramid, s.flip(1)


def with_one_text(t: Tensor, z_bar: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return t[:, :1].expand_as(t), z_bar, z


@contextlib.contextmanager
def changed_inputs(module: nn.Module, change: Callable) -> Iterator[None]:
    """Inside, `module` gets the inputs that `change` makes of its own."""
    hook = module.register_forward_pre_hook(lambda _, inputs: change(*inputs))
    try:
        yield
    finally:
        hook.remove()


def ablate(
    model: cabins.CaBins, predict: Predict, dataset: data.DepthDataset, workers: int | None = None
) -> dict[str, dict[str, float]]:
    """A row of metrics for each way to silence the text and each test window."""
    changes = {
        "s = 0": (model.depth_decoder, without_s),
        "s of the classes in reverse": (model.depth_decoder, with_classes_reversed),
        "one text for all classes": (model.trans_decoder, with_one_text),
    }
    rows = {}
    for name, (module, change) in changes.items():
        with changed_inputs(module, change):
            windows = evaluate_windows(predict, dataset, workers)
        rows |= {f"{name}, {window}": row for window, row in windows.items()}
    return rows


# ---- What the weights and the optimizer say ------------------------------------------------------


@torch.inference_mode()
def text_angle(model: cabins.CaBins, step: float, n: int = N_DISTANCES) -> float:
    """The mean angle, in rad, between the text embeddings of n distances and of those plus `step`.

    The distances are spread evenly over the range of the network. `step` is in metres.
    """
    low, high = model.config.min_depth, model.config.max_depth
    e = torch.linspace(low, max(high - step, low), n, dtype=torch.float64)
    e = (e * 1e4).round() / 1e4  # the prompts have four decimals
    both = torch.stack([e, e + step]).to(next(model.parameters()).device)  # (2, n)
    a, b = nn.functional.normalize(model.encode_prompts(both).double(), dim=2)  # (n, D) each
    return (2 * torch.asin((a - b).norm(dim=1) / 2)).mean().item()


def gradient_sizes(model: cabins.CaBins, content: dict) -> dict[str, tuple[int, float]]:
    """For each part: its number of parameters, and the RMS of their clipped gradients.

    `content` is what `cabins.read_checkpoint` gave for a last.pt. Adam keeps a running mean of the
    squared gradients. Like Adam, we correct it for its start at zero.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = train.parameter_groups(model, content["args"].get("as_released", False))
    numbers, sums = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0.0)
    for group, saved in zip(groups, content["optimizer"]["param_groups"]):
        for parameter, index in zip(group["params"], saved["params"]):
            name, moments = names[id(parameter)], content["optimizer"]["state"][index]
            part = next(part for part, starts in PARTS.items() if name.startswith(starts))
            correction = 1 - saved["betas"][1] ** float(moments["step"])
            sums[part] += moments["exp_avg_sq"].double().sum().item() / correction
            numbers[part] += parameter.numel()
    return {part: (n, (sums[part] / n) ** 0.5) for part, n in numbers.items() if n}


def report(model: cabins.CaBins, content: dict) -> None:
    """Print what the weights and, if they are there, Adam's moments say about the text."""
    if model.config.distance_class == "semantic":
        print("\nThe prompts of this network are phrases: no distance turns its text embeddings.")
    else:
        low, high = model.config.min_depth, model.config.max_depth
        sample = f"mean over {N_DISTANCES} distances from {low:g} to {high:g} m"
        angles = f"0.1 mm {text_angle(model, 1e-4):.3f} rad, 1 m {text_angle(model, 1.0):.3f} rad"
        print(f"\nHow far a change of the distance turns its text embedding t ({sample}): {angles}")
    if "optimizer" not in content:
        print("The checkpoint has no optimizer and says nothing of gradients; a last.pt has one.")
        return
    eps = content["optimizer"]["param_groups"][0]["eps"]
    print(f"Gradients of each part over about the last thousand steps, beside Adam's ε of {eps:g}:")
    for part, (n, rms) in gradient_sizes(model, content).items():
        share = rms / (rms + eps)  # of the step that Adam takes where ε is negligible
        print(f"{part:16}{n:>12,} parameters, RMS {rms:.0e}, steps of {share:.0%} of the full size")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = data.Parser(prog="python -m extras.ablate", description=__doc__, formatter_class=raw)
    add_network_options(parser)
    args = parser.parse_args()
    data.use_tf32(False)
    model, saved = open_network(args)
    dataset = open_data_set(args, model, saved)
    side = side_for(model, dataset)
    predict = predictor(model, not args.no_flip, side)
    windows = evaluate_windows(predict, dataset, args.workers)
    rows = {f"{Path(args.checkpoint).name}, {window}": row for window, row in windows.items()}
    rows |= ablate(model, predict, dataset, args.workers)
    for window in windows:
        print(protocol(dataset, window, not args.no_flip, side))
    print(format_table(args.data, rows))
    report(model, cabins.read_checkpoint(args.checkpoint))


if __name__ == "__main__":
    data.run_command(main)
