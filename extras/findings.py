"""Measure what docs/findings.md says of training, over several seeds.

python -m extras.findings                                       the demo: half an hour on two cores
python -m extras.findings --list DIR TRAIN TEST --out FILE      the same network on your own pairs

Each seed trains three times, by the recipe of train.py. "paper" is that recipe. "released" leaves γ
and the prompts p out of the optimizer, as the released code does, and changes nothing else. (All
that the released code does otherwise is extras.released.) "small_epsilon" has Adam's ε at 1e-15.
All start from random weights, so they say nothing of OpenAI's text encoder.

Prints the mean, least and greatest figure over the seeds, and writes them to --out. Until then,
the runs that have finished stand in OUT.partial, from which an interrupted command goes on.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import data
import train
from eval import predictor
from extras import ablate

VARIANTS = ("paper", "released", "small_epsilon")
SMALL_EPSILON = 1e-15
SHARES = (0, 0.25, 0.5, 1)  # of the run, after which we measure
METRICS = ("abs_rel", "rmse", "d1")
N_DRAWS = 1000  # of random widths


class FixedTextRun(train.Run):
    """A run whose optimizer has neither γ nor the prompts. Their gradients pile up, as released."""

    def trained_parameters(self) -> list[nn.Parameter]:
        fixed = {id(self.model.prompts), id(self.model.trans_decoder.gamma)}
        return [p for p in super().trained_parameters() if id(p) not in fixed]


def new_run(variant: str, seed: int, options: list[str]) -> train.Run:
    """A run of a variant, with the options of train.py."""
    args = train.parse_args(["--seed", str(seed), *options])
    run = FixedTextRun(args) if variant == "released" else train.Run(args)
    if variant == "small_epsilon":
        for group in run.optimizer.param_groups:
            group["eps"] = SMALL_EPSILON
    return run


def measured_steps(run: train.Run) -> list[int]:
    """The steps after which we measure: 0, 60, 120 and 240 in the demo."""
    return sorted({round(share * run.n_steps) for share in SHARES})


def measure_text(run: train.Run) -> dict:
    """What the text does now. The network is in training mode afterwards."""
    run.model.eval()
    found, b = ablate.text_figures(run.model, run.test_set)
    run.model.train()
    found["eq2"] = ablate.eq2_figures(b, run.model.config.n_cabins)
    found["gamma_rms"] = run.model.trans_decoder.gamma.square().mean().sqrt().item()
    return found


def measure_gradients(run: train.Run) -> dict[str, float]:
    """The RMS of the clipped gradients of each part so far."""
    names = {id(p): name for name, p in run.model.named_parameters()}
    names = [names[id(p)] for p in run.trained_parameters()]
    sizes = ablate.gradient_sizes(names, run.optimizer.state_dict())
    return {part: rms for part, (_, rms) in sizes.items()}


def train_and_measure(run: train.Run) -> dict:
    """Train to the end. Returns the figures of one run, in the layout of --out."""
    text, gradients = {"0": measure_text(run)}, {}
    data.use_tf32(True)
    order = itertools.chain.from_iterable(map(run.order, range(run.args.epochs)))
    loader = data.load(run.dataset, run.device, run.args.workers, batch_sampler=order)
    for batch in tqdm(loader, "training", run.n_steps, leave=False, disable=None):
        run.learn(batch)
        if run.step == 1:
            gradients["0"] = measure_gradients(run)  # those of the first step alone
        if run.step in measured_steps(run):
            gradients[str(run.step)] = measure_gradients(run)
            text[str(run.step)] = measure_text(run)
    data.use_tf32(False)
    run.model.eval()
    windows = ablate.silenced_rows(run.model, predictor(run.model), run.test_set, run.args.workers)
    rows = {name: next(iter(found.values())).metrics for name, found in windows.items()}
    (eps,) = {group["eps"] for group in run.optimizer.param_groups}
    last = text[str(run.n_steps)]
    found = {
        "gamma_rms": {step: found["gamma_rms"] for step, found in text.items()},
        "gradient_rms": {},
        "step_share": {},
        "turn": {step: found["turn"] for step, found in text.items()},
        "attention": last["attention"],
        "ablation": {name: {m: row[m] for m in METRICS} for name, row in rows.items()},
        "digits": {name: ablate.digit_angle(run.model, x) for name, x in ablate.STEPS.items()},
        "one_text_best": last["one_text_best"],
        "eq2": last["eq2"],
    }
    for part in gradients["0"]:
        sizes = {step: rms[part] for step, rms in gradients.items()}
        found["gradient_rms"][part] = sizes
        found["step_share"][part] = {s: ablate.step_share(rms, eps) for s, rms in sizes.items()}
    return found


def random_widths(seed: int) -> dict:
    """Figures of Eq. 2 for 256 widths that are uniform on [0.1, 1.1], then normalised."""
    generator = torch.Generator().manual_seed(seed)
    b = 0.1 + torch.rand(N_DRAWS, 256, generator=generator, dtype=torch.float64)
    return ablate.eq2_figures(b / b.sum(1, keepdim=True))


def summarize(runs: list[dict]) -> dict:
    """Mean, least and greatest of each number over the runs, which have one layout."""
    summary = {}
    for key, first in runs[0].items():
        values = [run[key] for run in runs]
        if isinstance(first, dict):
            summary[key] = summarize(values)
        elif key == "even":  # is no measurement
            summary[key] = first
        else:
            n = {"mean": sum(values) / len(values), "least": min(values), "greatest": max(values)}
            summary[key] = {name: float(f"{value:.6g}") for name, value in n.items()}
    return summary


def print_table(title: str, rows: dict[str, dict], digits: str = ".3g") -> None:
    """Rows of columns, each with the mean and, in brackets, the least and the greatest."""
    print(f"\n{title}")
    columns = [*next(iter(rows.values()))]
    width = max(len(name) for name in rows)
    print(" " * width, *(f"{column:>28}" for column in columns))
    for name, row in rows.items():
        cells = (
            "{mean:{d}} ({least:{d}} to {greatest:{d}})".format(**n, d=digits) for n in row.values()
        )
        print(f"{name:{width}}", *(f"{cell:>28}" for cell in cells))


def print_figures(found: dict) -> None:
    for variant, r in found["runs"].items():
        print_table(f"{variant}, after steps", {"RMS of γ": r["gamma_rms"], "turn, rad": r["turn"]})
        print_table(f"{variant}, RMS of the clipped gradients, after steps", r["gradient_rms"])
        print_table(f"{variant}, share of a step with ε = 0, after steps", r["step_share"])
        print_table(f"{variant}, metrics", r["ablation"], ".4f")
        ends = {name: r["attention"][name] for name in ("least", "greatest")}
        even = f"{r['attention']['even']:.5f} if even"
        print_table(f"{variant}, weights of the last attention, {even}", {"": ends}, ".5f")
        print_table(f"{variant}, t turns with the distance, rad", {"": r["digits"]})
        print_table(f"{variant}, one text fits best, share", {"": {"": r["one_text_best"]}})
        print_table(f"{variant}, Eq. 2 of the trained bins", r["eq2"])
    if "random_widths" in found:
        print_table("Eq. 2 of random widths", found["random_widths"])


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m extras.findings", description=__doc__, formatter_class=raw
    )
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    add("--runs", nargs="+", choices=VARIANTS, default=VARIANTS, help="default: all three")
    files = ("DIR", "TRAIN", "TEST")
    add("--list", nargs=3, metavar=files, help="folder of your own pairs, and the two lists")
    add("--epochs", type=int, metavar="N", help="default: 3; with --list: 4")
    add("--out", type=Path, metavar="FILE", help="default: docs/findings.json")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--workers", type=int, metavar="N", help="loading processes; default: up to 8")
    args = parser.parse_args()
    if args.list and not args.out:
        parser.error("--list needs --out, because docs/findings.json holds the demo's figures")
    out = args.out or Path(__file__).resolve().parents[1] / "docs" / "findings.json"
    options = ["--epochs", str(args.epochs or (4 if args.list else 3))]
    if args.list:
        root, training, test = args.list
        options += ["--data", "list", "--root", root, "--train-split", training]
        options += ["--test-split", test, "--backbone", "tiny", "--lr", "2e-3"]
    options += ["--device", args.device] if args.device else []
    options += ["--workers", str(args.workers)] if args.workers is not None else []

    partial = Path(f"{out}.partial")
    known = json.loads(partial.read_text()) if partial.exists() else {}  # runs that are finished
    for variant in args.runs:
        for seed in args.seeds:
            name = f"{variant} {seed}"
            if name in known:
                continue
            run = new_run(variant, seed, options)
            known[name] = {"steps": measured_steps(run), "figures": train_and_measure(run)}
            partial.write_text(json.dumps(known))
            row = known[name]["figures"]["ablation"]["whole"]
            print(f"{name}: " + ", ".join(f"{m} {v:.3f}" for m, v in row.items()), flush=True)
    runs = {
        variant: summarize([known[f"{variant} {seed}"]["figures"] for seed in args.seeds])
        for variant in args.runs
    }
    steps = known[f"{args.runs[0]} {args.seeds[0]}"]["steps"]
    found = {"seeds": args.seeds, "torch": torch.__version__, "steps": steps, "runs": runs}
    if not args.list:
        found["random_widths"] = summarize([random_widths(seed) for seed in args.seeds])
    print_figures(found)
    out.write_text(json.dumps(found, indent=1) + "\n")
    partial.unlink()


if __name__ == "__main__":
    data.run_command(main)
