"""How fast is it? Plain PyTorch beside what train.py and eval.py do, as rows of a Markdown table.

python -m extras.bench train           training steps on random data
python -m extras.bench eval [CKPT]     forward passes over images of NYU's and KITTI's size
"""

import argparse
import copy
import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import cabins
import data
from train import Learner


class Setting(NamedTuple):
    """One row: how a network runs. A plain network has no channels_last and no fused AdamW."""

    name: str
    amp: str = "off"
    plain: bool = False
    tf32: bool = False  # in all float32 products and convolutions, as train.py has it

    def choose_precision(self) -> None:
        data.use_tf32(self.tf32)
        if self.plain:  # torch's default on GPUs: TF32 in convolutions, not in matrix products
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


def print_rows(title: str, n: int, settings: list[Setting], make, n_rounds: int, device) -> None:
    """Time `make(setting)` for each setting, in turns, and print a row for each.

    A row has medians, and half the interquartile range after "±". The first setting is the plain
    one, with which the others are compared.
    """
    runs, memory = [], []
    for setting in settings:
        setting.choose_precision()
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        runs.append(make(setting))
        memory.append(peak_memory(runs[-1], before))
    settings[0].choose_precision()
    with FlopCounterMode(display=False) as counter:
        runs[0]()
    flop, times, rates = counter.get_total_flops(), *np.zeros((2, len(runs), n_rounds))
    for turn, (i, setting) in itertools.product(range(n_rounds), enumerate(settings)):
        setting.choose_precision()
        times[i, turn] = seconds(runs[i], device)
        rates[i, turn] = product_rate(setting.amp, device)
    for setting, own, rate, peak in zip(settings, times, np.median(rates, axis=1), memory):
        low, t, high = np.quantile(own, (0.25, 0.5, 0.75))
        cells = [f"{title}, {setting.name}", f"{1000 * t:.4g} ± {500 * (high - low):.2g}"]
        gigabytes = f"{peak / 1e9:.1f}" if peak else "-"
        cells += [f"{np.median(times[0]) / t:.2f}", f"{n / t:.3g}", gigabytes]
        cells += [f"{flop / 1e12:.3g}", f"{flop / t / 1e12:.3g}", f"{flop / t / rate:.0%}"]
        print("| " + " | ".join(cells) + " |", flush=True)


def make_step(model: cabins.CaBins, size, n: int, setting: Setting, device, compile: bool):
    """A training step on n random images."""
    image = torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8)
    batch = {"image": image, "depth": 10 * torch.rand(n, 1, *size)}
    network = copy.deepcopy(model).train().to(device)
    learner = Learner(network, data.Recipe(crop=size), 10**6, lr=1e-5, amp=setting.amp)
    if compile and not setting.plain:
        learner.network = torch.compile(learner.network)
    if setting.plain:
        network.to(memory_format=torch.contiguous_format)
        for group in learner.optimizer.param_groups:
            group["fused"] = None  # torch's default
    return lambda: learner.step(batch, 1)


def make_pass(model: cabins.CaBins, size, n: int, setting: Setting, device):
    """A forward pass over n random images, without gradients."""
    layout = torch.contiguous_format if setting.plain else torch.channels_last
    network = copy.deepcopy(model).eval().to(device, memory_format=layout)
    image = torch.randn(n, 3, *size, device=device)

    @torch.no_grad()
    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, setting.amp == "bf16"):
            network(image)

    return run


def image_size(text: str) -> tuple[int, int]:
    """Height and width, as the `type` of an option."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and min(int(height), int(width)) >= 64):
        raise argparse.ArgumentTypeError(f"{text} is no size such as 416x544, of 64 or more")
    return int(height), int(width)


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawTextHelpFormatter
    parser = data.Parser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("what", choices=("train", "eval"))
    add("checkpoint", nargs="?", help="a checkpoint of train.py; default: random weights")
    add("--backbone", choices=cabins.BACKBONES, help="without a checkpoint; default: RN101")
    about = "default: 416x544; eval: 480x640 352x1216"
    add("--size", nargs="+", type=image_size, metavar="HxW", help=about)
    about = "default: 8; eval: 1 8"
    add("--batch-size", nargs="+", type=data.positive_int, metavar="N", help=about)
    add("--steps", type=data.positive_int, default=5, help="steps that are timed; default: 5")
    add("--amp", choices=("off", "bf16"), help="train only; default: bf16")
    add("--compile", action="store_true", help="train only")
    args = parser.parse_args(argv)
    if args.what == "eval":
        data.refuse(args, "amp compile", "is for train")
    if args.checkpoint:
        data.refuse(args, "backbone", "is for random weights")
        model = cabins.load_checkpoint(args.checkpoint)
    else:
        model = cabins.CaBins(cabins.Config(args.backbone or "RN101"))
    device, plain = data.choose_device(None), Setting("torch's defaults", plain=True)
    settings = [plain, Setting("fp32, channels_last"), Setting("bf16, channels_last", "bf16")]
    sizes, batch_sizes = [(480, 640), (352, 1216)], [1, 8]
    if args.what == "train":
        amp, sizes, batch_sizes = args.amp or "bf16", [(416, 544)], [8]
        name = f"amp {amp}{', compiled' if args.compile else ''}"
        settings = [plain, Setting(name, amp, tf32=True)]
    print("| | ms | speed-up | images/s | peak GB | TFLOP | TFLOP/s | of a product's |")
    print("|" + "---|" * 8)
    for size, n in itertools.product(args.size or sizes, args.batch_size or batch_sizes):

        def make(setting: Setting, size=size, n=n) -> Callable:
            if args.what == "train":
                return make_step(model, size, n, setting, device, args.compile)
            return make_pass(model, size, n, setting, device)

        title = f"{model.config.backbone}, {size[0]}x{size[1]}, batch {n}"
        print_rows(title, n, settings, make, args.steps, device)


if __name__ == "__main__":
    data.run_command(main)
