"""Train CaBins by the paper's recipe (Sec. 4.1): python train.py --data nyu --root DIR

Without arguments, trains a tiny network on rooms drawn on the fly, in about two minutes of a
laptop's CPU, and shows what it has learnt under runs/toy/.
"""

import argparse
import itertools
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

import cabins
import eval as evaluation
from data import DATASETS, DepthDataset, add_data_options, augment, run_command, stand_apart

# Sec. 4.1
RECIPE = {"backbone": "RN101", "distance_class": "cabins", "epochs": 25, "batch_size": 8}
RECIPE |= {"lr": 3.57e-5, "seed": 0, "as_released": False, "compile": False}
TOY_RECIPE = RECIPE | {"backbone": "tiny", "epochs": 3, "lr": 2e-3}  # from random weights
MAX_NORM = 0.1
LOG_EVERY, SAVE_EVERY = 10, 500  # steps; it is also saved at the end of each epoch


# ---- One step ------------------------------------------------------------------------------------


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


def seed_of(*numbers: int) -> int:
    """One seed out of several numbers. All that is random in a step follows from (seed, step)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def gather(tensor: Tensor) -> Tensor:
    """The tensors (b, …) of all processes as one batch. Gradients go to this process's own part."""
    rank, n = evaluation.rank_of()
    own = tensor.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(n)]
    dist.all_gather(parts, own)
    parts[rank] = tensor
    return torch.cat(parts)


class Learner:
    """A network and what trains it, by `step`; `plain`: without channels_last and fused AdamW."""

    def __init__(self, model, args, dataset, n_steps: int, device, plain: bool = False):
        self.args, self.dataset, self.device = args, dataset, device
        self.model = model = model.to(device)
        if not plain:
            model.to(memory_format=torch.channels_last)
        self.amp = evaluation.autocast(device, args.amp)
        self.rank, self.n_processes = evaluation.rank_of()
        if self.n_processes > 1 and device.type == "cuda":  # torch has it for GPUs only
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.groups = parameter_groups(model, args.as_released)
        fused = None if plain else True
        self.optimizer = torch.optim.AdamW(self.groups, args.lr, weight_decay=0.1, fused=fused)
        # from lr / 25 up to lr and down to lr / 2500, the momentum from 0.95 to 0.85 and back
        self.scheduler = OneCycleLR(
            self.optimizer, args.lr, n_steps, div_factor=25, final_div_factor=100
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        self.network = DistributedDataParallel(model) if self.n_processes > 1 else model
        if args.compile:
            self.network = torch.compile(self.network)

    def step(
        self, batch: dict, number: int, mark: Callable[[], None] = lambda: None
    ) -> tuple[cabins.Prediction, Tensor, Tensor]:
        """Learn from this process's share of batch `number`; `mark` is called after each part.

        Returns the prediction, whose depth and centers are the whole batch's, the ground truth of
        it, and (loss, gradient norm), all left on the device: nothing here waits for it.
        """
        mark()
        image, depth = (batch[k].to(self.device, non_blocking=True) for k in ("image", "depth"))
        generator = torch.Generator().manual_seed(seed_of(self.args.seed, number))
        share = (self.rank, self.n_processes)
        image, depth = augment(image, depth, self.dataset, generator, share)
        mark()
        torch.manual_seed(seed_of(self.args.seed, number, 1 + self.rank))  # of dropout
        with self.amp:
            prediction = self.network(image)
        mark()
        if self.n_processes > 1:  # the loss is of the whole batch, as if it were in one process
            whole = {"depth": gather(prediction.depth), "centers": gather(prediction.centers)}
            prediction, depth = prediction._replace(**whole), gather(depth)
        low, as_released = self.model.config.min_depth, self.args.as_released
        loss = cabins.total_loss(prediction, depth, low, as_released)
        mark()
        self.model.zero_grad()  # not the optimizer's, which lacks some with --as-released
        self.scaler.scale(loss * self.n_processes).backward()  # DDP takes the mean of gradients
        mark()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        mark()
        return prediction, depth, torch.stack([loss.detach(), norm])

    def state_dict(self) -> dict:
        """What training needs beside the model. No random states: they follow from (seed, step)."""
        return {k: getattr(self, k).state_dict() for k in ("optimizer", "scheduler", "scaler")}

    def load_state_dict(self, state: dict) -> None:
        for name in self.state_dict():
            getattr(self, name).load_state_dict(state[name])


# ---- The run -------------------------------------------------------------------------------------


def batches(dataset, batch_size: int, seed: int, steps: range) -> Iterator[list[int]]:
    """This process's indices of the batch of each step, of pairs shuffled anew in each epoch."""
    rank, n = evaluation.rank_of()
    sampler = DistributedSampler(dataset, n, rank, seed=seed_of(seed) >> 1, drop_last=True)
    per_epoch, share = len(dataset) // batch_size, batch_size // n
    for step in steps:
        epoch, batch = divmod(step, per_epoch)
        if batch == 0 or step == steps.start:
            sampler.set_epoch(epoch)
            order = list(sampler)
        yield order[batch * share : (batch + 1) * share]


def read_newest(path: Path) -> tuple[Path, dict]:
    """The path and content of a run's checkpoint, or of the one before if it is damaged or gone."""
    try:
        return path, cabins.read_checkpoint(path)
    except (OSError, ValueError) as error:
        previous = path.with_name("last.prev.pt")
        if path.name != "last.pt" or not previous.exists():
            raise
        print(f"{error}; going on from {previous}", file=sys.stderr)
        return previous, cabins.read_checkpoint(previous)


def drop_rows_from(path: Path, step: int) -> None:
    """Cut off the rows of this step and later ones, and half a row, before going on."""
    if path.exists():
        header, *rows = path.read_text().splitlines(keepends=True) or [""]
        kept = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) < step]
        text = "".join([header, *kept] if kept else [])  # an empty file gets a header again
        cabins.write_whole(path, lambda partial: partial.write_text(text))


def start_process() -> torch.device:
    """This process's device; joins the others first, if torchrun started several."""
    device = evaluation.default_device()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device.type == "cuda":
            index, n = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if index >= n:
                raise ValueError(f"there are {n} GPUs here: --nproc_per_node may be at most {n}")
            torch.cuda.set_device(index)
        dist.init_process_group()
    return device


stops: list[int] = []  # Ctrl-C and SIGTERM that came


def note_stop(number: int, _) -> None:
    """A signal waits until a step is done and saved; a second one does not, but under torchrun."""
    if stops and not dist.is_initialized():  # torchrun passes one on as two
        sys.exit(128 + number)
    stops.append(number)
    again = b"" if dist.is_initialized() else b"; once more to stop at once"
    os.write(2, b"\nstopping when the next step is done and saved" + again + b"\n")


def agreed_stop(device: torch.device) -> int:
    """The signal that this process or another has got, or 0; all have to ask at the same step."""
    stop = stops[0] if stops else 0
    if dist.is_initialized():
        stop = torch.tensor(stop, device=device)
        dist.all_reduce(stop, dist.ReduceOp.MAX)
    return int(stop)


def train(args: argparse.Namespace) -> None:
    """Train from args.resume or from the start, to the last epoch."""
    saved = vars(args).pop("saved")
    device, out = start_process(), Path(args.out)
    rank, n_processes = evaluation.rank_of()
    if args.batch_size % n_processes:
        raise ValueError(
            f"--batch-size {args.batch_size} is the total; {n_processes} processes must divide it"
        )
    if not args.resume or Path(args.resume).resolve().parent != out.resolve():
        names = ("last.pt", "last.prev.pt", "best.pt")
        taken = [out / name for name in names if (out / name).exists()]
        if taken and (args.resume or out != Path("runs/toy") or args.data != "toy"):  # not the demo
            raise ValueError(f"{out} holds another run: go on with --resume, or take another --out")
        if taken and rank == 0:
            print(f"the run in {out} is replaced")
            for path in taken:
                path.unlink()
    scale = {"depth_scale": args.depth_scale, "max_depth": args.max_depth}
    dataset = DepthDataset(args.data, args.root, args.train_split, train=True, **scale)
    test_set = DepthDataset(args.data, args.root, args.test_split, **scale)
    per_epoch = len(dataset) // args.batch_size
    if per_epoch == 0:
        raise ValueError(f"--batch-size {args.batch_size} is more than the {len(dataset)} pairs")
    n_steps = args.epochs * per_epoch

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
    evaluation.go_fast()
    learner = Learner(model, args, dataset, n_steps, device)
    if saved:
        try:
            learner.load_state_dict(saved)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{args.resume} cannot be resumed: {error!r}") from None
    first, best = saved.get("step", 0), saved.get("best", math.inf)
    del saved
    predict = evaluation.predictor(model)

    def say(*lines: str) -> None:
        if rank == 0:
            tqdm.write("\n".join(lines))

    say(
        f"{args.data}: {len(dataset)} training pairs, {len(test_set)} test pairs; "
        f"{n_processes} x {device}, {args.amp if args.amp != 'off' else 'fp32'}"
    )
    frozen = [p for p in model.parameters() if not p.requires_grad]
    for group in [*learner.groups, {"name": "frozen: text encoder", "params": frozen}]:
        n = sum(p.numel() for p in group["params"])
        say(f"{group['name']:20} {n:>12,} parameters in {len(group['params'])} tensors")
    if args.as_released:
        say("as released: prompts and gamma stay, token embedding learns, unbiased SILog")

    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        drop_rows_from(out / "log.csv", first + 1)
        drop_rows_from(out / "metrics.csv", first)

    rotates = not (args.resume or "").endswith("last.prev.pt")  # not for a damaged last.pt

    def save(name: str) -> None:
        nonlocal rotates
        if rank == 0:
            state = {"args": vars(args), "n_pairs": len(dataset), "step": step, "best": best}
            cabins.save_checkpoint(out / "new.pt", model, **state, **learner.state_dict())
            if name == "last.pt" and (out / name).exists() and rotates:
                (out / name).replace(out / "last.prev.pt")
            (out / "new.pt").replace(out / name)
            rotates = rotates or name == "last.pt"

    def validate() -> dict[str, dict[str, float]]:
        nonlocal best
        if n_processes > 1:  # on CPUs their BatchNorms differ; the first one's are saved
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        evaluation.go_fast(False)
        windows = evaluation.evaluate_windows(predict, test_set, progress=True)
        row = next(iter(windows.values()))
        if rank == 0:
            epoch = step // per_epoch
            evaluation.append_row(out / "metrics.csv", {"step": step, "epoch": epoch, **row})
            evaluation.draw_samples(out, model, test_set, 1, predict)
            say(
                f"epoch {epoch}/{args.epochs}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items())
            )
        if row["abs_rel"] < best:
            best = row["abs_rel"]
            save("best.pt")
            save("last.pt")  # which knows the best
        evaluation.go_fast()
        model.train()  # which measuring and drawing left in eval mode
        return windows

    def check() -> None:
        """Stop if a step since the last look was not finite; looking at each would hold it up."""
        for number, lr, paths, result in recent:
            loss, norm = result.tolist()
            if not math.isfinite(loss if args.amp == "fp16" else loss + norm):  # fp16 skips steps
                raise ValueError(
                    f"loss {loss} and gradient norm {norm} at step {number}, learning rate "
                    f"{lr:.3g}, of the images {', '.join(paths)}; "
                    f"what was saved in {out} is from before"
                )
        if learner.scaler.is_enabled() and learner.scaler.get_scale() < 1:
            raise ValueError("in fp16 most steps overflow: train with --amp bf16 or --amp off")
        recent.clear()

    step, recent = first, []
    if step and step % per_epoch == 0:  # stopped after its save, perhaps before its validation
        windows = validate()
    order = batches(dataset, args.batch_size, args.seed, range(first, n_steps))
    workers = evaluation.default_workers()
    how = {"num_workers": workers, "pin_memory": device.type == "cuda"}
    how |= {"worker_init_fn": stand_apart}
    say(f"{workers} workers read images; on a GPU the first step can take a minute")
    done, total = first * args.batch_size, n_steps * args.batch_size
    bar = tqdm(initial=done, total=total, unit="image", disable=None if rank == 0 else True)
    model.train()
    for step, batch in enumerate(DataLoader(dataset, batch_sampler=order, **how), first + 1):
        lr = learner.scheduler.get_last_lr()[0]
        prediction, depth, result = learner.step(batch, step)
        recent.append((step, lr, batch["path"], result))
        bar.update(args.batch_size)

        is_log, is_end = step % LOG_EVERY == 0 or step == n_steps, step % per_epoch == 0
        if is_log:
            check()
            mask = depth > model.config.min_depth
            bins = cabins.chamfer_loss(prediction.centers.detach(), depth, mask).item()
            row = {"loss": result[0].item(), "bins": bins, "lr": lr}
            bar.set_postfix({k: f"{v:.3g}" for k, v in row.items()})
            row = {"step": step, "epoch": step / per_epoch, **row}
            if rank == 0:
                evaluation.append_row(out / "log.csv", row)
        stop = agreed_stop(device) if is_log or n_processes == 1 else 0
        if stop or is_end or step % SAVE_EVERY == 0:
            check()
            save("last.pt")
        if stop:
            bar.close()
            say(f"stopped after step {step} of {n_steps}; go on with --resume {out}/last.pt")
            sys.exit(128 + stop)
        if is_end:
            windows = validate()
    bar.close()

    rows = {f"last.pt, {window}": row for window, row in windows.items()}
    if args.data == "toy":
        rows |= baselines(dataset, test_set)
    if rank == 0:
        for window in windows:
            print(evaluation.protocol(test_set, window, flip=True))
        print(evaluation.format_table(args.data, rows))
        draw_curves(out)
        print(
            f"{out} has last.pt; best.pt, chosen by AbsRel on these very test images; "
            "log.csv and metrics.csv, drawn in curves.png; comparison.png and explained_0.png"
        )
    if n_processes > 1:
        dist.destroy_process_group()


def draw_curves(out: Path) -> None:
    """Draw losses and metrics over epochs, from the CSV files of a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    losses = {"loss": "total loss", "bins": "bins loss (m²)"}
    metrics = {"abs_rel": "AbsRel", "rmse": "RMSE (m)", "d1": "δ < 1.25"}
    files = (("log.csv", losses, ""), ("metrics.csv", metrics, "."))
    for axis, (file, columns, marker) in zip(figure.subplots(1, 2), files):
        if not (out / file).exists():  # a finished run, resumed into a new --out
            continue
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


# ---- Speed ---------------------------------------------------------------------------------------


def bench(args: argparse.Namespace) -> None:
    """Print what a step costs on random data, plain and as `train` takes it, in Markdown."""
    device, n = evaluation.default_device(), args.batch_size
    size = args.size or DATASETS[args.data].crop or (416, 544)
    image = torch.randint(0, 256, (n, 3, size[0] + 11, size[1] + 21), dtype=torch.uint8)
    depth = 10 * torch.rand(n, 1, *image.shape[2:])  # of some pixels more than the random crop
    batch = {"image": image, "depth": depth}
    if device.type == "cuda":
        batch = {k: v.pin_memory() for k, v in batch.items()}
    crop = SimpleNamespace(recipe=DATASETS[args.data]._replace(crop=size))

    def make(plain: bool) -> evaluation.Run:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that weights are random
            model = cabins.CaBins(cabins.Config(args.backbone, args.distance_class))
        options = vars(args) | ({"amp": "off", "compile": False} if plain else {})
        learner = Learner(model, argparse.Namespace(**options), crop, 10**6, device, plain)
        numbers = itertools.count()
        return lambda mark: learner.step(batch, next(numbers), mark)

    fast = ["fp32" if args.amp == "off" else args.amp, "channels_last", "fused AdamW"]
    fast += ["compiled"] if args.compile else []
    settings = {
        "plain fp32": ("off", lambda: make(plain=True)),
        ", ".join(fast): (args.amp, lambda: make(plain=False)),
    }
    phases = ("data", "forward", "loss", "backward", "optimizer")
    title = f"{args.backbone}, {size[0]}x{size[1]}, batch {n}"
    evaluation.print_bench_header(phases)
    evaluation.bench(title, settings, n, device, args.steps)


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
    about = "precision of the convolutions and products; default: bf16 on GPUs that have it, or off"
    add("--amp", choices=evaluation.AMP, help=about)
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the network")
    about = "train as the released code does where it is not the paper: see the README's ledger"
    add("--as-released", action=argparse.BooleanOptionalAction, help=about)
    add("--out", metavar="DIR", help="default: runs/DATA")
    add("--resume", nargs="?", const="", metavar="CKPT", help="go on; default: OUT/last.pt")
    add("--bench", action="store_true", default=False, help="only measure steps on random data")
    about = "--bench: of the images; default: the crop"
    add("--size", type=size_of, default=None, metavar="HxW", help=about)
    add("--steps", type=int, default=5, help="--bench: how many; default: 5")
    given = vars(parser.parse_args(argv))
    for name in ("epochs", "batch_size", "lr", "steps"):
        if not 0 < (value := given.get(name, 1)) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be positive")
    if not 0 <= given.get("seed", 0) < 2**31:
        raise ValueError(f"--seed is {given['seed']}; it must be from 0 to 2147483647")

    data = given.get("data", "nyu" if given["bench"] else "toy")
    out = given.get("out", f"runs/{data}")
    resume = given.pop("resume", None)
    for name in ("root", "train_split", "test_split"):
        if given.get(name):
            given[name] = str(Path(given[name]).resolve())  # eval.py may run elsewhere
            if data == "toy" and resume is None:
                raise ValueError(f"--{name.replace('_', '-')} is not for toy rooms: add --data")
    if resume is not None:
        path, content = read_newest(Path(resume or Path(out) / "last.pt"))
        resume = str(path)
        if not {"args", "n_pairs", "step", "optimizer", "scheduler", "scaler"} <= content.keys():
            raise ValueError(f"{resume} was not written by train.py: it cannot be resumed")
        if not isinstance(args := content["args"], dict):
            raise ValueError(f"{resume} does not say how it was trained: it cannot be resumed")
        movable = ("root", "train_split", "test_split", "out", "compile", "bench", "size", "steps")
        changed = [k for k in given if k not in movable and given[k] != args.get(k)]
        if changed:
            found = ", ".join(f"{k} {args.get(k)}, not {given[k]}" for k in changed)
            remedy = "leave these options out, or start another run"
            raise ValueError(f"{resume} was trained with {found}: {remedy}")
        out = given.get("out", str(Path(resume).parent))
        origin = {"out": out, "resume": resume, "saved": content}
        return argparse.Namespace(**args | given | origin)
    places = dict.fromkeys(("root", "train_split", "test_split", "depth_scale", "max_depth"))
    args = places | (TOY_RECIPE if data == "toy" else RECIPE) | given | {"data": data, "out": out}
    args.setdefault("clip", "none" if args["backbone"] == "tiny" else args["backbone"])
    args.setdefault("amp", evaluation.default_amp())
    if args["amp"] == "fp16" and args["as_released"]:
        raise ValueError("--as-released has gradients that fp16's scaler does not see: --amp bf16")
    return argparse.Namespace(**args, resume=None, saved={})


def size_of(text: str) -> tuple[int, int]:
    """Rows and columns that a text such as 416x544 names."""
    size = tuple(map(int, re.findall(r"\d+", text)))
    if len(size) != 2 or min(size) < 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers from 64 on, as 416x544")
    return size


def main() -> None:
    args = parse_args()
    if args.bench:
        bench(args)
    else:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, note_stop)
        try:
            train(args)
        except RuntimeError as error:  # of a worker or a process that got the signal as well
            if not stops:
                raise
            print(f"stopped ({error}); {args.out} has what was saved before", file=sys.stderr)
            sys.exit(128 + stops[0])


if __name__ == "__main__":
    run_command(main)
