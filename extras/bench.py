"""How fast is it? Plain PyTorch beside what train.py and eval.py do, as rows of a Markdown table.

python -m extras.bench train     training steps on random data, with random weights
python -m extras.bench eval      forward passes over images of NYU's and KITTI's size
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import cabins
import data
import train


class Setting(NamedTuple):
    """One row: how a network runs. A plain network has no channels_last and no fused AdamW."""

    name: str
    amp: str = "off"
    is_plain: bool = False


SETTINGS = [
    Setting("torch's defaults", is_plain=True),
    Setting("fp32, channels_last"),
    Setting("bf16, channels_last", "bf16"),
]


def choose_precision(setting: Setting, is_training: bool) -> None:
    """TF32 is on in train.py and off in eval.py. The bfloat16 of a network is its own."""
    data.use_tf32(is_training and not setting.is_plain)
    if setting.is_plain:  # torch's default on GPUs: TF32 in convolutions, not in matrix products
        torch.backends.cudnn.allow_tf32 = True


def seconds(run: Callable, device: torch.device) -> float:
    """The time that one call takes, until the device has finished."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def product_rate(amp: str, device: torch.device) -> float:
    """FLOP/s of the product of two large matrices in the same precision."""
    n = 2048 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device).to(torch.bfloat16 if amp == "bf16" else torch.float32)
    seconds(lambda: a @ a, device)  # the matrix is ready after this
    return 2 * n**3 / seconds(lambda: a @ a, device)


def peak_memory(run: Callable, before: int) -> int:
    """The most bytes that a GPU holds during one call, beyond `before`; 0 on a CPU."""
    run()  # compiles, chooses kernels, and makes gradients and moments
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def make_step(args, size: tuple[int, int], n: int, setting: Setting) -> Callable:
    """A training step on n random images, with train.py's own code."""
    options = ["--backbone", args.backbone, "--clip", "none", "--amp", setting.amp]
    options += ["--batch-size", str(n), "--epochs", "1000000"]  # the schedule must not end
    options += ["--compile"] if args.compile and not setting.is_plain else []
    run = train.Run(train.parse_args(options))
    run.dataset.recipe = data.Recipe(crop=size)
    if setting.is_plain:
        run.model.to(memory_format=torch.contiguous_format)
        for group in run.optimizer.param_groups:
            group["fused"] = None  # torch's default
    image = torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8)
    batch = {"image": image, "depth": 10 * torch.rand(n, 1, *size)}
    return lambda: run.learn(batch)


def make_pass(args, size: tuple[int, int], n: int, setting: Setting) -> Callable:
    """A forward pass over n random images, without gradients."""
    device = data.choose_device()
    network = cabins.CaBins(cabins.Config(args.backbone)).eval().to(device)
    if setting.is_plain:
        network.to(memory_format=torch.contiguous_format)
    elif args.compile:
        network = torch.compile(network)
    image = torch.randn(n, 3, *size, device=device)

    @torch.no_grad()
    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, setting.amp == "bf16"):
            network(image)

    return run


def print_rows(title: str, n: int, make: Callable, args: argparse.Namespace) -> None:
    """Time `make(setting)` for each setting, in turns, and print a row for each.

    A row has medians, and half the interquartile range after "±". The first setting is the plain
    one, with which the others are compared.
    """
    device, is_training = data.choose_device(), args.what == "train"
    runs, memory = [], []
    for setting in SETTINGS:
        choose_precision(setting, is_training)
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        runs.append(make(setting))
        memory.append(peak_memory(runs[-1], before))
    choose_precision(SETTINGS[0], is_training)
    with FlopCounterMode(display=False) as counter:
        runs[0]()
    flop, times, rates = counter.get_total_flops(), *np.zeros((2, len(runs), args.steps))
    for turn, (i, setting) in itertools.product(range(args.steps), enumerate(SETTINGS)):
        choose_precision(setting, is_training)
        times[i, turn] = seconds(runs[i], device)
        rates[i, turn] = product_rate(setting.amp, device)
    for setting, own, rate, peak in zip(SETTINGS, times, np.median(rates, axis=1), memory):
        low, t, high = np.quantile(own, (0.25, 0.5, 0.75))
        cells = [f"{title}, {setting.name}", f"{1000 * t:.4g} ± {500 * (high - low):.2g}"]
        gigabytes = f"{peak / 1e9:.1f}" if peak else "-"
        cells += [f"{np.median(times[0]) / t:.2f}", f"{n / t:.3g}", gigabytes]
        cells += [f"{flop / 1e12:.3g}", f"{flop / t / 1e12:.3g}", f"{flop / t / rate:.0%}"]
        print("| " + " | ".join(cells) + " |", flush=True)


def image_size(text: str) -> tuple[int, int]:
    """Height and width, as the `type` of an option."""
    height, width = map(int, text.split("x"))
    return height, width


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m extras.bench", description=__doc__, formatter_class=raw
    )
    add = parser.add_argument
    add("what", choices=("train", "eval"))
    add("--backbone", choices=cabins.BACKBONES, default="RN101", help="default: RN101")
    about = "default: 416x544; eval: 480x640 352x1216"
    add("--size", nargs="+", type=image_size, metavar="HxW", help=about)
    about = "default: 8; eval: 1 8"
    add("--batch-size", nargs="+", type=int, metavar="N", help=about)
    add("--steps", type=int, default=5, metavar="N", help="steps that are timed; default: 5")
    add("--compile", action="store_true", help="torch.compile the network, except the first row's")
    args = parser.parse_args()
    sizes, batch_sizes, make_run = [(480, 640), (352, 1216)], [1, 8], make_pass
    if args.what == "train":
        sizes, batch_sizes, make_run = [(416, 544)], [8], make_step
    print("| | ms | speed-up | images/s | peak GB | TFLOP | TFLOP/s | of a product's |")
    print("|" + "---|" * 8)
    for size, n in itertools.product(args.size or sizes, args.batch_size or batch_sizes):
        title = f"{args.backbone}, {size[0]}x{size[1]}, batch {n}"
        print_rows(title, n, functools.partial(make_run, args, size, n), args)


if __name__ == "__main__":
    data.run_command(main)
