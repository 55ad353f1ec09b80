"""Train CaBins by the paper's recipe (Sec. 4.1): python train.py --data nyu --root DIR

Without arguments, trains a tiny network on rooms drawn on the fly, in about two minutes of a
laptop's CPU, and shows what it has learnt under runs/toy/.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from tqdm import tqdm

import cabins
import eval as evaluation
from data import DATASETS, DepthDataset, add_data_options, augment, run_command

# Sec. 4.1
RECIPE = {"backbone": "RN101", "distance_class": "cabins", "epochs": 25, "batch_size": 8}
RECIPE |= {"lr": 3.57e-5, "seed": 0, "as_released": False}
TOY_RECIPE = RECIPE | {"backbone": "tiny", "epochs": 3, "lr": 2e-3}  # from random weights
CLIP_NORM = 0.1
LOG_EVERY = 10  # steps


def parameter_groups(model: cabins.CaBins, as_released: bool = False) -> list[dict]:
    """All that is trained, each tensor in exactly one group; all groups learn at the same rate.

    NOTE(differs): the released code's optimizer lacks prompts and γ, and has the token embedding.
    """
    groups = {"image encoder": [], "prompts and gamma": [], "bins and decoders": []}
    if as_released:
        groups["token embedding"] = [model.clip.token_embedding.weight.requires_grad_()]
    for name, parameter in model.named_parameters():
        if name.startswith("clip.visual."):
            groups["image encoder"].append(parameter)
        elif name in ("prompts", "context_decoder.gamma"):
            groups["prompts and gamma"].append(parameter)
        elif not name.startswith("clip."):
            groups["bins and decoders"].append(parameter)
    if as_released:
        del groups["prompts and gamma"]
    return [{"name": name, "params": parameters} for name, parameters in groups.items()]


def seed_of(seed: int, number: int) -> int:
    """One seed out of two numbers. All that is random in a step follows from (seed, step)."""
    return (seed << 32) + number


def batches(n: int, batch_size: int, seed: int, steps: range) -> Iterator[list[int]]:
    """Indices of the batch of each step, of n pairs that are shuffled anew in each epoch."""
    per_epoch = n // batch_size
    for step in steps:
        epoch, batch = divmod(step, per_epoch)
        if batch == 0 or step == steps.start:
            generator = torch.Generator().manual_seed(seed_of(seed, epoch))
            order = torch.randperm(n, generator=generator).tolist()
        yield order[batch * batch_size : (batch + 1) * batch_size]


def drop_rows_from(path: Path, step: int) -> None:
    """Cut off the rows of this step and later ones, which a resumed run will write again."""
    if path.exists():
        header, *rows = path.read_text().splitlines(keepends=True) or [""]
        steps = [row.split(",")[0] for row in rows]
        kept = [row for row, s in zip(rows, steps) if s.isdigit() and int(s) < step]
        text = "".join([header, *kept] if kept else [])  # an empty file gets a header again
        cabins.write_whole(path, lambda partial: partial.write_text(text))


def train(args: argparse.Namespace) -> None:
    """Train from args.resume or from the start, to the last epoch."""
    device, out = evaluation.default_device(), Path(args.out)
    taken = (out / "last.pt").exists() or (out / "best.pt").exists()
    is_demo = args.data == "toy" and out == Path("runs/toy")
    if taken and not args.resume and not is_demo:
        raise ValueError(f"{out} holds another run: go on with --resume, or choose another --out")
    scale = {"depth_scale": args.depth_scale, "max_depth": args.max_depth}
    dataset = DepthDataset(args.data, args.root, args.train_split, train=True, **scale)
    test_set = DepthDataset(args.data, args.root, args.test_split, **scale)
    per_epoch = len(dataset) // args.batch_size
    if per_epoch == 0:
        raise ValueError(f"--batch-size {args.batch_size} is more than the {len(dataset)} pairs")
    n_steps = args.epochs * per_epoch

    saved = cabins.read_checkpoint(args.resume) if args.resume else {}
    if saved:
        if (n := saved["n_pairs"]) != len(dataset):
            raise ValueError(f"{args.resume} was trained on {n} pairs, but here are {len(dataset)}")
        model = cabins.restore(saved, args.resume)
    else:
        torch.manual_seed(args.seed)
        config = cabins.Config(
            args.backbone, args.distance_class, max_depth=dataset.recipe.max_depth
        )
        model = cabins.CaBins(config, None if args.clip == "none" else cabins.load_clip(args.clip))
    model = model.to(device)
    groups = parameter_groups(model, args.as_released)
    optimizer = torch.optim.AdamW(groups, args.lr, weight_decay=0.1)
    # from lr / 25 up to lr and down to lr / 2500, the momentum from 0.95 to 0.85 and back
    scheduler = OneCycleLR(optimizer, args.lr, n_steps, div_factor=25, final_div_factor=100)
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
    first, best = saved.get("step", 0), saved.get("best", math.inf)
    del saved

    print(f"{args.data}: {len(dataset)} training pairs, {len(test_set)} test pairs; {device}")
    for group in groups:
        n = sum(p.numel() for p in group["params"])
        print(f"trained  {group['name']:18} {n:>12,} parameters in {len(group['params'])} tensors")
    n = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    print(f"frozen   {'text encoder':18} {n:>12,} parameters")
    if args.as_released:
        print("as released: prompts and gamma stay, token embedding learns, unbiased SILog")

    out.mkdir(parents=True, exist_ok=True)
    drop_rows_from(out / "log.csv", first + 1)
    drop_rows_from(out / "metrics.csv", first)
    predict = evaluation.predictor(model)

    def save(name: str) -> None:  # no random states: all that is random follows from (seed, step)
        state = {"args": vars(args), "n_pairs": len(dataset), "step": step, "best": best}
        state |= {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        cabins.save_checkpoint(out / name, model, **state)

    def validate() -> dict[str, dict[str, float]]:
        nonlocal best
        windows = evaluation.evaluate_windows(predict, test_set, progress=True)
        row = next(iter(windows.values()))
        evaluation.append_row(
            out / "metrics.csv", {"step": step, "epoch": step // per_epoch, **row}
        )
        evaluation.draw_samples(out, model, test_set, 1, predict)
        epoch = f"epoch {step // per_epoch}/{args.epochs}"
        tqdm.write(f"{epoch}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items()))
        if row["abs_rel"] < best:
            best = row["abs_rel"]
            save("best.pt")
            save("last.pt")  # which knows the best
        model.train()  # which measuring and drawing left in eval mode
        return windows

    step = first
    if step and step % per_epoch == 0:  # stopped after its save, perhaps before its validation
        windows = validate()
    order = batches(len(dataset), args.batch_size, args.seed, range(first, n_steps))
    how = {"num_workers": evaluation.default_workers(), "pin_memory": device.type == "cuda"}
    loader = DataLoader(dataset, batch_sampler=order, **how)
    done, total = first * args.batch_size, n_steps * args.batch_size
    bar = tqdm(initial=done, total=total, unit="image", disable=None)
    model.train()
    for step, batch in enumerate(loader, first + 1):
        torch.manual_seed(seed_of(args.seed, step))  # of the augmentation and of dropout
        image, depth = (batch[k].to(device, non_blocking=True) for k in ("image", "depth"))
        image, depth = augment(image, depth, dataset)
        prediction = model(image)
        loss = cabins.total_loss(prediction, depth, model.config.min_depth, args.as_released)
        model.zero_grad()  # of more than the optimizer has, with --as-released
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        lr = scheduler.get_last_lr()[0]
        if not torch.isfinite(loss + norm):
            raise ValueError(
                f"loss {loss.item()} and gradient norm {norm.item()} at step {step}, learning rate "
                f"{lr:.3g}, of the images {', '.join(batch['path'])}; "
                f"what was saved in {out} is from before"
            )
        optimizer.step()
        scheduler.step()
        bar.update(args.batch_size)

        if step % LOG_EVERY == 0 or step == n_steps:
            mask = depth > model.config.min_depth
            bins = cabins.chamfer_loss(prediction.centers.detach(), depth, mask).item()
            row = {"loss": loss.item(), "bins": bins, "lr": lr}
            bar.set_postfix({k: f"{v:.3g}" for k, v in row.items()})
            evaluation.append_row(out / "log.csv", {"step": step, "epoch": step / per_epoch, **row})
        if step % per_epoch == 0:
            save("last.pt")
            windows = validate()
    bar.close()

    rows = {f"last.pt, {window}": row for window, row in windows.items()}
    if args.data == "toy":
        rows |= baselines(dataset, test_set)
    for window in windows:
        print(evaluation.protocol(test_set, window, flip=True))
    print(evaluation.format_table(args.data, rows))
    draw_curves(out)
    print(
        f"{out} has last.pt; best.pt, chosen by AbsRel on these very test images; "
        "log.csv and metrics.csv, drawn in curves.png; comparison.png and explained_0.png"
    )


def draw_curves(out: Path) -> None:
    """Draw losses over steps, and metrics over epochs, from the CSV files of a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    losses = {"loss": "total loss", "bins": "bins loss (m²)"}
    metrics = {"abs_rel": "AbsRel", "rmse": "RMSE (m)", "d1": "δ < 1.25"}
    files = (("log.csv", losses, ""), ("metrics.csv", metrics, "."))
    for axis, (file, columns, marker) in zip(figure.subplots(1, 2), files):
        curves = np.genfromtxt(out / file, delimiter=",", names=True)
        for column, label in columns.items():
            axis.plot(curves["epoch"], curves[column], marker=marker, label=label)
        axis.set(xlabel="epoch", ylim=(0, None))
        axis.legend()
    cabins.write_whole(
        out / "curves.png", lambda partial: figure.savefig(partial, dpi=100, format="png")
    )


def baselines(dataset: DepthDataset, test_set: DepthDataset) -> dict[str, dict[str, float]]:
    """What is reached without looking at the image, if every pixel of every image has depth."""
    depths = torch.cat([test_set[i]["depth"].flatten() for i in range(len(test_set))]).sort().values
    weights = (1 / depths).cumsum(0)  # Σ |c - d*| / d* is least at the median weighted with 1 / d*
    constant = depths[torch.searchsorted(weights, weights[-1] / 2)]
    mean = torch.stack([dataset[i]["depth"] for i in range(256)]).mean(0, keepdim=True)
    names = (f"best constant, {constant:.2f} m", "mean of 256 training rooms")
    maps = (constant.expand(mean.shape), mean)
    return {k: evaluation.evaluate(lambda _, v=v: v, test_set) for k, v in zip(names, maps)}


# ---- Command line --------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Options, completed by the data set's recipe, or with --resume by the checkpoint's own."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Without arguments: a tiny network on rooms drawn on the fly.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--data", choices=DATASETS, help="default: toy")
    add_data_options(parser)
    add("--backbone", choices=cabins.BACKBONES, help="default: RN101; toy: tiny")
    add("--clip", metavar="NAME|FILE|none", help="CLIP's weights; default: the backbone's own")
    add("--distance-class", choices=cabins.DISTANCE_CLASSES, help="row of Table 3; default: cabins")
    add("--epochs", type=int, help="default: 25; toy: 3")
    add("--batch-size", type=int, help="default: 8")
    add("--lr", type=float, help="highest learning rate; default: 3.57e-5; toy: 2e-3")
    add("--seed", type=int, help="default: 0")
    about = "train as the released code does where it is not the paper: see the README's ledger"
    add("--as-released", action=argparse.BooleanOptionalAction, help=about)
    add("--out", metavar="DIR", help="default: runs/DATA")
    add("--resume", nargs="?", const="", metavar="CKPT", help="go on; default: OUT/last.pt")
    given = vars(parser.parse_args(argv))
    for name in ("epochs", "batch_size", "lr"):
        if not 0 < given.get(name, 1) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {given[name]}; it must be positive")
    if not 0 <= given.get("seed", 0) < 2**31:
        raise ValueError(f"--seed is {given['seed']}; it must be from 0 to 2147483647")

    data = given.get("data", "toy")
    out = given.get("out", f"runs/{data}")
    resume = given.pop("resume", None)
    for name in ("root", "train_split", "test_split"):
        if given.get(name):
            given[name] = str(Path(given[name]).resolve())  # eval.py may run elsewhere
            if data == "toy" and resume is None:
                raise ValueError(f"--{name.replace('_', '-')} is not for toy rooms: add --data")
    if resume is not None:
        resume = resume or str(Path(out) / "last.pt")
        content = cabins.read_checkpoint(resume)
        if not {"args", "step", "optimizer", "scheduler"} <= content.keys():
            raise ValueError(f"{resume} was not written by train.py: it cannot be resumed")
        if not isinstance(args := content["args"], dict):
            raise ValueError(f"{resume} does not say how it was trained: it cannot be resumed")
        movable = ("root", "train_split", "test_split", "out")  # may have another place by now
        changed = [k for k in given if k not in movable and given[k] != args[k]]
        if changed:
            found = ", ".join(f"{k} {args[k]}, not {given[k]}" for k in changed)
            remedy = "leave these options out, or start another run"
            raise ValueError(f"{resume} was trained with {found}: {remedy}")
        out = given.get("out", str(Path(resume).parent))
        return argparse.Namespace(**args | given | {"out": out, "resume": resume})
    places = dict.fromkeys(("root", "train_split", "test_split", "depth_scale", "max_depth"))
    args = places | (TOY_RECIPE if data == "toy" else RECIPE) | given | {"data": data, "out": out}
    args.setdefault("clip", "none" if args["backbone"] == "tiny" else args["backbone"])
    return argparse.Namespace(**args, resume=None)


if __name__ == "__main__":
    run_command(lambda: train(parse_args()))
