"""Train CaBins by the paper's recipe (Sec. 4.1): python train.py --data nyu --root DIR

Without arguments, trains a tiny network on rooms drawn on the fly, in about two minutes of a
laptop's CPU, and shows what it has learnt under runs/toy/.
"""

import argparse
import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DistributedSampler
from tqdm import tqdm

import cabins
import data
from data import DepthDataset, Recipe
from eval import draw_samples, evaluate, evaluate_windows, format_table, predictor, protocol

TOY_DEFAULTS = {"backbone": "tiny", "epochs": 3, "lr": 2e-3}  # from random weights
MAX_NORM = 0.1  # NOTE(paper silent): the released code clips gradients at this norm
LOG_EVERY, SAVE_EVERY = 10, 500  # steps; it is also saved at the end of each epoch


# ---- One step ------------------------------------------------------------------------------------


def parameter_groups(model: cabins.CaBins, as_released: bool = False) -> list[dict]:
    """All that is trained, each tensor in exactly one group. All groups learn at the same rate.

    NOTE(differs): the released code's optimizer lacks prompts and γ, and has the token embedding.
    """
    model.clip.token_embedding.requires_grad_(as_released)
    left = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def take(*beginnings: str) -> list[Tensor]:
        return [left.pop(name) for name in list(left) if name.startswith(beginnings)]

    groups = {
        "image encoder": take("clip.visual."),
        "prompts and gamma": take("prompts", "context_decoder.gamma"),
        "token embedding": take("clip.token_embedding."),
        "bins and decoders": take(""),  # all that is left
    }
    del groups["prompts and gamma" if as_released else "token embedding"]
    return [{"name": name, "params": parameters} for name, parameters in groups.items()]


def seed_of(*numbers: int) -> int:
    """One seed out of several numbers. All that is random in a step follows from (seed, step)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def gather(tensor: Tensor) -> Tensor:
    """The tensors (b, …) of all processes as one batch, to which each has the whole gradient."""
    return torch.cat(all_gather(tensor.contiguous()))


class Learner:
    """A network and what trains it, one `step` at a time. Nothing in a step waits for the device."""

    def __init__(self, model: cabins.CaBins, args, recipe: Recipe, n_steps: int, device):
        self.args, self.recipe, self.device = args, recipe, device
        self.model = model = model.to(device, memory_format=torch.channels_last)
        self.amp = data.autocast(device, args.amp)
        self.rank, self.n_processes = data.rank_of()
        if self.n_processes > 1 and device.type == "cuda":  # torch has it for GPUs only
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.groups = parameter_groups(model, args.as_released)
        self.optimizer = torch.optim.AdamW(self.groups, args.lr, weight_decay=0.1, fused=True)
        # from lr / 25 up to lr and down to lr / 2500, the momentum from 0.95 to 0.85 and back
        self.scheduler = OneCycleLR(
            self.optimizer, args.lr, n_steps, div_factor=25, final_div_factor=100
        )
        self.network = DistributedDataParallel(model) if self.n_processes > 1 else model
        if args.compile:
            self.network = torch.compile(self.network)

    def forward(self, batch: dict, number: int) -> tuple[cabins.Prediction, Tensor, Tensor]:
        """Prediction, ground truth and loss of the whole batch `number`, from this process's share."""
        image, depth = (batch[k].to(self.device, non_blocking=True) for k in ("image", "depth"))
        generator = torch.Generator().manual_seed(seed_of(self.args.seed, number))
        share = (self.rank, self.n_processes)
        image, depth = data.augment(image, depth, self.recipe, generator, share)
        torch.manual_seed(seed_of(self.args.seed, number, 1 + self.rank))  # of dropout
        with self.amp:
            prediction = self.network(image)
        if self.n_processes > 1:  # the loss is the whole batch's, as if in one process
            whole = {k: gather(getattr(prediction, k)) for k in ("depth", "centers")}
            prediction, depth = prediction._replace(**whole), gather(depth)
        min_depth, unbiased = self.model.config.min_depth, self.args.as_released
        return prediction, depth, cabins.total_loss(prediction, depth, min_depth, unbiased)

    def step(self, batch: dict, number: int) -> tuple[cabins.Prediction, Tensor, Tensor]:
        """Learn from batch `number`. Returns prediction, ground truth, and (loss, gradient norm)."""
        prediction, depth, loss = self.forward(batch, number)
        # NOTE(differs): with --as-released this leaves p and γ out, whose gradients pile up
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.scheduler.step()
        return prediction, depth, torch.stack([loss.detach(), norm])


# ---- The run -------------------------------------------------------------------------------------


def batches(dataset, args: argparse.Namespace, steps: range, per_epoch: int) -> Iterator[list[int]]:
    """This process's indices of the batch of each step, of pairs shuffled anew in each epoch.

    NOTE(differs): the released code has one order in all epochs, and keeps the last, smaller batch.
    """
    (rank, n), keep = data.rank_of(), args.as_released
    sampler = DistributedSampler(dataset, n, rank, seed=seed_of(args.seed) >> 1, drop_last=not keep)
    share = args.batch_size // n
    for step in steps:
        epoch, batch = divmod(step, per_epoch)
        if batch == 0 or step == steps.start:
            sampler.set_epoch(0 if args.as_released else epoch)
            order = list(sampler)
        yield order[batch * share : (batch + 1) * share]


class Run:
    """One training run: its data, its network, how far it is, and the folder that it writes to.

    `saved` is what its checkpoint holds, if it goes on from one.
    """

    def __init__(self, args: argparse.Namespace, saved: dict):
        self.args, self.out, self.device = args, Path(args.out), start_process()
        self.rank, self.n_processes = data.rank_of()
        n = args.batch_size
        if n % self.n_processes:
            of = f"{self.n_processes} processes must divide it"
            raise ValueError(f"--batch-size {n} is the total; {of}")
        scale = {"depth_scale": args.depth_scale, "max_depth": args.max_depth}
        self.dataset = DepthDataset(args.data, args.root, args.train_split, train=True, **scale)
        self.test_set = DepthDataset(args.data, args.root, args.test_split, **scale)
        n_pairs = len(self.dataset)
        if n > n_pairs:
            raise ValueError(f"--batch-size {n} is more than the {n_pairs} pairs")
        if saved and (before := saved["n_pairs"]) != n_pairs:
            raise ValueError(f"{args.resume} was trained on {before} pairs, but here are {n_pairs}")
        self.per_epoch = math.ceil(n_pairs / n) if args.as_released else n_pairs // n
        self.n_steps = args.epochs * self.per_epoch
        self.step, self.best, self.recent = saved.get("step", 0), saved.get("best", math.inf), []
        model = cabins.restore(saved, args.resume) if saved else self.new_model()
        self.learner = Learner(model, args, self.dataset.recipe, self.n_steps, self.device)
        if saved:
            try:
                self.learner.optimizer.load_state_dict(saved["optimizer"])
                self.learner.scheduler.load_state_dict(saved["scheduler"])
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"{args.resume} cannot be resumed: {error!r}") from None
        self.predict = predictor(model)
        if self.rank == 0:
            self.take_folder()

    def new_model(self) -> cabins.CaBins:
        args = self.args
        torch.manual_seed(args.seed)
        top, width = self.dataset.recipe.max_depth, self.test_set[0]["image"].shape[-1]
        config = cabins.Config(args.backbone, args.distance_class, max_depth=top, image_width=width)
        clip = None if args.clip == "none" else cabins.load_clip(args.clip)
        model = cabins.CaBins(config, clip)
        if args.as_released:  # 44 times CaBins' own start, and never trained
            nn.init.trunc_normal_(model.prompts, std=1.0)
        return model

    def take_folder(self) -> None:
        """Make the folder this run's own. Nothing of another run goes, but for the demo's own."""
        self.out.mkdir(parents=True, exist_ok=True)
        if not self.args.resume or Path(self.args.resume).resolve().parent != self.out.resolve():
            taken = [name for name in ("last.pt", "best.pt") if (self.out / name).exists()]
            is_demo = self.out == Path("runs/toy") and self.args.data == "toy"
            if taken and (self.args.resume or not is_demo):
                remedy = "go on with --resume, or take another --out"
                raise ValueError(f"{self.out} holds another run: {remedy}")
            if taken:
                print(f"the run in {self.out} is replaced")
                self.save("last.pt")
                (self.out / "best.pt").unlink(missing_ok=True)
        for name, first in (("log.csv", self.step + 1), ("metrics.csv", self.step)):
            drop_rows_from(self.out / name, first)

    def say(self, line: str) -> None:
        if self.rank == 0:
            tqdm.write(line)

    def announce(self) -> None:
        """Say what is trained, on what, and what is not."""
        args, amp = self.args, self.args.amp
        self.say(
            f"{args.data}: {len(self.dataset)} training pairs, {len(self.test_set)} test pairs; "
            f"{self.n_processes} x {self.device}, {amp if amp != 'off' else 'fp32'}"
        )
        frozen = [p for p in self.learner.model.parameters() if not p.requires_grad]
        for group in [*self.learner.groups, {"name": "frozen: text encoder", "params": frozen}]:
            n = sum(p.numel() for p in group["params"])
            self.say(f"{group['name']:20} {n:>12,} parameters in {len(group['params'])} tensors")
        if args.as_released:
            self.say("as released: see the rows marked * of README's ledger")
        self.say("on a GPU the first step can take a minute")

    def check(self) -> None:
        """Stop if a step since the last look was not finite; looking at each would hold it up."""
        for number, lr, paths, result in self.recent:
            loss, norm = result.tolist()
            if not math.isfinite(loss + norm):
                raise ValueError(
                    f"loss {loss} and gradient norm {norm} at step {number}, learning rate "
                    f"{lr:.3g}, of the images {', '.join(paths)}; "
                    f"what was saved in {self.out} is from before"
                )
        self.recent.clear()

    def log(self, prediction: cabins.Prediction, depth: Tensor) -> dict[str, float]:
        """Check the last steps and add a row to log.csv; returns loss, bins loss, learning rate."""
        _, lr, _, result = self.recent[-1]
        self.check()
        mask = depth > self.learner.model.config.min_depth
        bins = cabins.chamfer_loss(prediction.centers.detach(), depth, mask).item()
        row = {"loss": result[0].item(), "bins": bins, "lr": lr}
        if self.rank == 0:
            epoch = self.step / self.per_epoch
            data.append_row(self.out / "log.csv", {"step": self.step, "epoch": epoch, **row})
        return row

    def save(self, name: str) -> None:
        """Write a checkpoint, whole or not at all. It needs no random states: see `seed_of`."""
        if self.rank == 0:
            state = {k: getattr(self.learner, k).state_dict() for k in ("optimizer", "scheduler")}
            state |= {"args": vars(self.args), "n_pairs": len(self.dataset)}
            state |= {"step": self.step, "best": self.best}
            cabins.save_checkpoint(self.out / name, self.learner.model, **state)

    def validate(self) -> dict[str, dict[str, float]]:
        """Measure on the test set, draw a sample, and keep the network if it is the best so far."""
        model = self.learner.model
        if self.n_processes > 1:  # on CPUs their BatchNorms differ; the first one's are saved
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        data.go_fast(False)
        windows = evaluate_windows(self.predict, self.test_set, progress=True)
        row = next(iter(windows.values()))
        if self.rank == 0:
            epoch = self.step // self.per_epoch
            data.append_row(self.out / "metrics.csv", {"step": self.step, "epoch": epoch, **row})
            draw_samples(self.out, model, self.test_set, 1, self.predict)
            metrics = ", ".join(f"{k} {v:.3f}" for k, v in row.items())
            self.say(f"epoch {epoch}/{self.args.epochs}: {metrics}")
        if row["abs_rel"] < self.best:
            self.best = row["abs_rel"]
            self.save("best.pt")
            self.save("last.pt")  # which knows the best
        data.go_fast()
        model.train()  # which measuring and drawing left in eval mode
        return windows

    def report(self, windows: dict[str, dict[str, float]]) -> None:
        """Print the rows of last.pt and best.pt in the paper's table, and draw the curves."""
        rows = {f"last.pt, {window}": row for window, row in windows.items()}
        if dist.is_initialized():
            dist.barrier()  # until the first process has saved
        if (path := self.out / "best.pt").exists():  # it is not in a new --out of a resumed run
            best = predictor(cabins.load_checkpoint(path, map_location=self.device))
            windows = evaluate_windows(best, self.test_set, progress=True)
            rows |= {f"best.pt, {window}": row for window, row in windows.items()}
        if self.args.data not in ("nyu", "kitti"):
            rows |= baselines(self.dataset, self.test_set)
        if self.rank == 0:
            for window in windows:
                print(protocol(self.test_set, window, flip=True))
            print(format_table(self.args.data, rows))
            draw_curves(self.out)
            print(f"{self.out} has last.pt; best.pt is chosen by AbsRel on these test images")


def train(args: argparse.Namespace, saved: dict) -> None:
    """Train from the start, or from where `saved` is, to the last epoch."""
    run = Run(args, saved)
    run.announce()
    data.go_fast()
    if run.step and run.step % run.per_epoch == 0:  # stopped perhaps before its validation
        windows = run.validate()
    n, done = args.batch_size, run.step * args.batch_size
    bar = tqdm(total=run.n_steps * n, initial=done, unit="image", disable=run.rank > 0 or None)
    run.learner.model.train()
    order = batches(run.dataset, args, range(run.step, run.n_steps), run.per_epoch)
    for batch in data.load(run.dataset, batch_sampler=order):
        lr = run.learner.scheduler.get_last_lr()[0]
        prediction, depth, result = run.learner.step(batch, run.step + 1)
        run.step += 1
        run.recent.append((run.step, lr, batch["path"], result))
        bar.update(n)
        is_end = run.step % run.per_epoch == 0
        is_log = run.step % LOG_EVERY == 0 or run.step == run.n_steps
        if is_log:
            row = run.log(prediction, depth)
            bar.set_postfix({k: f"{v:.3g}" for k, v in row.items()})
        stop = agreed_stop(run.device) if is_log or run.n_processes == 1 else 0
        if stop or is_end or run.step % SAVE_EVERY == 0:
            run.check()
            run.save("last.pt")
        if stop:
            bar.close()
            where = f"after step {run.step} of {run.n_steps}"
            run.say(f"stopped {where}; go on with --resume {run.out}/last.pt")
            sys.exit(128 + stop)
        if is_end:
            windows = run.validate()
    bar.close()
    run.report(windows)
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- Processes and signals -----------------------------------------------------------------------


def start_process() -> torch.device:
    """This process's device; joins the others first, if torchrun started several."""
    device = data.default_device()
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


# ---- Tables and curves ---------------------------------------------------------------------------


def drop_rows_from(path: Path, step: int) -> None:
    """Cut off the rows of this step and later ones, and half a row, before going on."""
    if path.exists():
        header, *rows = path.read_text().splitlines(keepends=True) or [""]
        kept = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) < step]
        text = "".join([header, *kept] if kept else [])  # an empty file gets a header again
        cabins.write_whole(path, lambda partial: partial.write_text(text))


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
    """What is reached without looking at the image: one depth, or one depth map, for all."""
    some = [test_set[i]["depth"][:, ::4, ::4] for i in range(len(test_set))]
    depths = torch.cat([depth[depth > 0] for depth in some]).sort().values
    weights = (1 / depths).cumsum(0)  # Σ |c - d*| / d* is least at the median weighted with 1 / d*
    constant = depths[torch.searchsorted(weights, weights[-1] / 2)]
    some = torch.stack([dataset[i]["depth"] for i in range(min(256, len(dataset)))])
    n = (some > 0).sum(0)
    mean = torch.where(n > 0, some.sum(0) / n, constant)[None]  # (1, 1, h, w)
    maps = {f"best constant, {constant:.2f} m": constant.expand(1, 1, 1, 1)}
    maps[f"mean of {len(some)} training depths"] = mean
    predict = {k: lambda image, d=d: cabins.resize(d, image.shape[-2:]) for k, d in maps.items()}
    return {name: evaluate(function, test_set) for name, function in predict.items()}


# ---- Command line --------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict]:
    """The options and {}; with --resume, those of the run to go on with, and its checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", choices=data.DATASETS, default="toy", help="default: toy, rooms drawn on the fly")
    data.add_data_options(parser)
    add("--backbone", choices=cabins.BACKBONES, default="RN101", help="default: RN101; toy: tiny")
    add("--clip", metavar="NAME|FILE|none", help="CLIP's weights; default: the backbone's own")
    kinds = cabins.DISTANCE_CLASSES
    add("--distance-class", choices=kinds, default="cabins", help="row of Table 3; default: cabins")
    add("--epochs", type=int, default=25, help="default: 25; toy: 3")
    add("--batch-size", type=int, default=8, help="of all processes together; default: 8")
    add("--lr", type=float, default=3.57e-5, help="the highest; default: 3.57e-5; toy: 2e-3")
    add("--seed", type=int, default=0, help="default: 0")
    about = "precision of convolutions and products; default: bf16 on GPUs that have it, or off"
    add("--amp", choices=data.PRECISIONS, help=about)
    switch = {"action": argparse.BooleanOptionalAction, "default": False}
    add("--compile", **switch, help="torch.compile the network")
    about = "train as the released code does where it is not the paper: see the README's ledger"
    add("--as-released", **switch, help=about)
    add("--out", metavar="DIR", help="default: runs/DATA")
    add("--resume", nargs="?", const="", metavar="CKPT", help="go on; default: OUT/last.pt")
    args = parser.parse_args(argv)
    if args.data == "toy":
        parser.set_defaults(**TOY_DEFAULTS)
        args = parser.parse_args(argv)
    args.out, saved, before = args.out or f"runs/{args.data}", {}, {}
    if args.resume is not None:
        path = args.resume or f"{args.out}/last.pt"
        saved = read_run(path)
        before = saved["args"] | {"out": str(Path(path).parent), "resume": None}
        args = parser.parse_args(argv, argparse.Namespace(**before))
        args.resume = path
    for name in ("root", "train_split", "test_split"):
        if path := getattr(args, name):
            setattr(args, name, str(Path(path).resolve()))  # eval.py may run elsewhere
            if args.data == "toy":
                raise ValueError(f"--{name.replace('_', '-')} is not for toy rooms: add --data")
    args.amp = args.amp or ("off" if args.as_released else data.default_amp())
    args.clip = args.clip or ("none" if args.backbone == "tiny" else args.backbone)
    for name in ("epochs", "batch_size", "lr"):
        if not 0 < (value := getattr(args, name)) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be positive")
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"--seed is {args.seed}; it must be from 0 to 2147483647")
    movable = ("root", "train_split", "test_split", "out", "compile", "resume")
    if changed := [k for k in before if k not in movable and getattr(args, k) != before[k]]:
        found = ", ".join(f"{k} {before[k]}, not {getattr(args, k)}" for k in changed)
        raise ValueError(f"{args.resume} was trained with {found}: leave out, or start another run")
    return args, saved


def read_run(path: str) -> dict:
    """A checkpoint that training can go on from."""
    saved = cabins.read_checkpoint(path)
    needed = {"args": dict, "n_pairs": int, "step": int, "optimizer": dict, "scheduler": dict}
    if not all(isinstance(saved.get(key), kind) for key, kind in needed.items()):
        raise ValueError(f"{path} was not written by train.py: it cannot be resumed")
    return saved


def main() -> None:
    args, saved = parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note_stop)
    try:
        train(args, saved)
    except RuntimeError as error:  # of a worker or a process that got the signal as well
        if not stops:
            raise
        print(f"stopped ({error}); {args.out} has what was saved before", file=sys.stderr)
        sys.exit(128 + stops[0])


if __name__ == "__main__":
    data.run_command(main)
