"""How fast is it? Plain PyTorch against what train.py and eval.py do, in Markdown rows.

python -m docs.bench train           training steps on random data
python -m docs.bench eval [CKPT]     forward passes over images of NYU's and KITTI's size
"""

import argparse
import copy
import itertools
import re
import time
from functools import partial

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import cabins
import data
from train import Learner

DEVICE = data.choose_device(None)


def seconds(run) -> float:
    """How long one call takes, until the device is done."""
    start = time.perf_counter()
    run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def product_rate(amp: str) -> float:
    """FLOP/s of a product of two large matrices in the same precision."""
    n = 2048 if DEVICE.type == "cpu" else 8192
    a = torch.randn(n, n, device=DEVICE).to(torch.bfloat16 if amp == "bf16" else torch.float32)
    seconds(lambda: a @ a)  # until `a` is made
    return 2 * n**3 / seconds(lambda: a @ a)


def print_rows(title: str, settings: dict[str, str], make, n: int, n_rounds: int) -> None:
    """Print a row of each setting, the plain one first: medians, ± half the interquartile range."""
    runs, memory = [], []
    for amp in settings.values():
        data.go_fast(bool(runs))  # not for the plain one
        before = torch.cuda.memory_allocated()
        runs.append(make(amp, plain=not runs))
        runs[-1]()  # compiles, chooses kernels, makes gradients and moments
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            runs[-1]()
        memory.append(torch.cuda.max_memory_allocated() - before)  # 0 on a CPU
    with FlopCounterMode(display=False) as counter:
        runs[0]()
    flop, (times, rates) = counter.get_total_flops(), np.zeros((2, len(runs), n_rounds))
    for turn, (i, amp) in itertools.product(range(n_rounds), enumerate(settings.values())):
        data.go_fast(i > 0)
        times[i, turn], rates[i, turn] = seconds(runs[i]), product_rate(amp)
    for name, own, rate, peak in zip(settings, times, np.median(rates, axis=1), memory):
        low, t, high = np.quantile(own, (0.25, 0.5, 0.75))
        cells = [f"{title}, {name}", f"{1000 * t:.4g} ± {500 * (high - low):.2g}"]
        gigabytes = f"{peak / 1e9:.1f}" if peak else "-"
        cells += [f"{np.median(times[0]) / t:.2f}", f"{n / t:.3g}", gigabytes]
        cells += [f"{flop / 1e12:.3g}", f"{flop / t / 1e12:.3g}", f"{flop / t / rate:.0%}"]
        print("| " + " | ".join(cells) + " |", flush=True)


def make_step(model: cabins.CaBins, args, size, n: int, amp: str, plain: bool):
    """Training steps on n random images."""
    image = torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8)
    batch = {"image": image, "depth": 10 * torch.rand(n, 1, *size)}
    how = {"amp": amp, "compile": args.compile and not plain, "as_released": False}
    how, model = argparse.Namespace(**how, lr=1e-5, seed=0), copy.deepcopy(model).train()
    learner = Learner(model, how, data.Recipe(crop=size), n_steps=10**6, device=DEVICE)
    if plain:
        model.to(memory_format=torch.contiguous_format)
        for group in learner.optimizer.param_groups:
            group["fused"] = None  # torch's default
    return lambda: learner.step(batch, 1)


def make_pass(model: cabins.CaBins, _, size, n: int, amp: str, plain: bool):
    """Forward passes over n random images, without gradients."""
    layout = torch.contiguous_format if plain else torch.channels_last
    network = copy.deepcopy(model).eval().to(DEVICE, memory_format=layout)
    run = partial(network, torch.randn(n, 3, *size, device=DEVICE))
    return torch.no_grad()(data.autocast(DEVICE, amp)(run))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("what", choices=("train", "eval"))
    add("checkpoint", nargs="?", help="one of train.py's; default: random weights")
    add("--backbone", choices=cabins.BACKBONES, default="RN101", help="without a checkpoint")
    add("--size", nargs="+", metavar="HxW", help="default: 416x544; eval: 480x640 352x1216")
    add("--batch-size", nargs="+", type=int, metavar="N", help="default: 8; eval: 1 8")
    add("--steps", type=int, default=5, help="how many are timed; default: 5")
    add("--amp", choices=("off", "bf16"), default="bf16", help="train only; default: bf16")
    add("--compile", action="store_true", help="train only")
    args = parser.parse_args(argv)
    settings = {"plain fp32": "off", "fp32, channels_last": "off", "bf16, channels_last": "bf16"}
    sizes, batch_sizes, make = ["480x640", "352x1216"], [1, 8], make_pass
    if args.what == "train":
        settings = {"plain fp32": "off", f"amp {args.amp}, compile {args.compile}": args.amp}
        sizes, batch_sizes, make = ["416x544"], [8], make_step
    sizes, batch_sizes, path = args.size or sizes, args.batch_size or batch_sizes, args.checkpoint
    if (
        not all(re.fullmatch(r"[1-9]\d+x[1-9]\d+", s) for s in sizes)
        or min(args.steps, *batch_sizes) < 1
    ):
        raise ValueError("--size must be as 416x544, --batch-size and --steps at least 1")
    model = cabins.load_checkpoint(path) if path else cabins.CaBins(cabins.Config(args.backbone))
    print("| | ms | speed-up | images/s | peak GB | TFLOP | TFLOP/s | of a product's |")
    print("|" + "---|" * 8)
    for size, n in itertools.product(sizes, batch_sizes):
        run = partial(make, model, args, tuple(map(int, size.split("x"))), n)
        print_rows(f"{model.config.backbone}, {size}, batch {n}", settings, run, n, args.steps)


if __name__ == "__main__":
    data.run_command(main)
