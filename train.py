"""Train CaBins by the paper's recipe (Sec. 4.1): python train.py --data nyu --root DIR

python train.py                               rooms drawn on the fly: two minutes on a laptop's CPU
python train.py --data nyu --root DIR         the paper's network
python train.py --resume runs/nyu/last.pt     goes on where a run stopped
"""

import argparse
import math
import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DistributedSampler
from tqdm import tqdm

import cabins
import data
from eval import draw_samples, evaluate_windows, format_table, predictor, protocol, save_figure

TOY_DEFAULTS = {"backbone": "tiny", "epochs": 3, "lr": 2e-3}  # from random weights
MAX_NORM = 0.1  # NOTE(paper silent): the released code clips gradients at this norm
LOG_EVERY, SAVE_EVERY = 10, 500  # steps; last.pt is also saved at the end of each epoch
stops: list[int] = []  # signals received


def parameter_groups(model: cabins.CaBins, as_released: bool = False) -> list[dict]:
    """All that is trained, each tensor in exactly one group. All groups learn at the same rate."""
    # NOTE(differs): the released code's optimizer lacks prompts and γ, and has the token embedding
    model.clip.token_embedding.requires_grad_(as_released)
    beginnings = {
        "image encoder": "clip.visual.",
        "prompts and gamma": ("prompts", "context_decoder.gamma"),
        "token embedding": "clip.token_embedding.",
        "bins and decoders": "",  # all that is left
    }
    groups = {name: [] for name in beginnings}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = next(g for g, beginning in beginnings.items() if name.startswith(beginning))
            groups[group].append(parameter)
    del groups["prompts and gamma" if as_released else "token embedding"]
    return [{"name": name, "params": parameters} for name, parameters in groups.items()]


def seed_of(*numbers: int) -> int:
    """One seed out of several numbers. All that is random in a step follows from (seed, step)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class Learner:
    """A network and what trains it, by one `step` after another. No step waits for the device."""

    def __init__(self, model: cabins.CaBins, args, recipe: data.Recipe, n_steps: int, device):
        self.args, self.recipe, self.device = args, recipe, device
        self.model = model = model.to(device)
        self.amp = data.autocast(device, args.amp)
        self.rank, self.n_processes = data.rank_of()
        if self.n_processes > 1 and device.type == "cuda":  # torch has it for GPUs only
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.groups = parameter_groups(model, args.as_released)
        self.optimizer = torch.optim.AdamW(self.groups, args.lr, weight_decay=0.1, fused=True)
        # from lr / 25 up to lr and down to lr / 2500, the momentum from 0.95 to 0.85 and back
        self.scheduler = OneCycleLR(self.optimizer, args.lr, n_steps, final_div_factor=100)
        network = nn.parallel.DistributedDataParallel(model) if self.n_processes > 1 else model
        self.network = torch.compile(network) if args.compile else network

    def forward(self, batch: dict, number: int) -> tuple[cabins.Prediction, Tensor, Tensor]:
        """Prediction, truth and loss of the whole batch `number`, from this process's share."""
        image, depth = (batch[k].to(self.device, non_blocking=True) for k in ("image", "depth"))
        generator = torch.Generator().manual_seed(seed_of(self.args.seed, number))
        image, depth = data.augment(image, depth, self.recipe, generator, data.rank_of())
        torch.manual_seed(seed_of(self.args.seed, number, 1 + self.rank))  # of dropout
        with self.amp:
            prediction = self.network(image)
        if self.n_processes > 1:  # the loss is the whole batch's, as if in one process
            whole = []
            for part in (prediction.depth, prediction.centers, depth):
                parts = [torch.empty_like(part.contiguous()) for _ in range(self.n_processes)]
                dist.all_gather(parts, part.contiguous())
                parts[self.rank] = part  # the only one that has a gradient here
                whole.append(torch.cat(parts))
            prediction, depth = prediction._replace(depth=whole[0], centers=whole[1]), whole[2]
        min_depth, unbiased = self.model.config.min_depth, self.args.as_released
        return prediction, depth, cabins.total_loss(prediction, depth, min_depth, unbiased)

    def step(self, batch: dict, number: int) -> tuple[cabins.Prediction, Tensor, Tensor]:
        """Learn from batch `number`. Returns prediction, truth, and (loss, gradient norm)."""
        prediction, depth, loss = self.forward(batch, number)
        # NOTE(differs): with --as-released this leaves p and γ out, whose gradients pile up
        self.optimizer.zero_grad()
        (loss * self.n_processes).backward()  # as their gradients are averaged
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.scheduler.step()
        return prediction, depth, torch.stack([loss.detach(), norm])


def batches(dataset, args: argparse.Namespace, steps: range, per_epoch: int) -> Iterator[list[int]]:
    """This process's indices of the batch of each step, of pairs shuffled anew in each epoch."""
    # NOTE(differs): the released code has one order in all epochs, and keeps the last, small batch
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
    """Data, network, progress and folder of one run; `saved` is the checkpoint that it resumes."""

    def __init__(self, args: argparse.Namespace, saved: dict):
        self.args, self.out, self.device = args, Path(args.out), data.choose_device(args.device)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # torchrun started several
            if self.device.type == "cuda":
                index, n = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
                if index >= n:
                    raise ValueError(f"there are {n} GPUs: --nproc_per_node may be at most {n}")
                torch.cuda.set_device(index)
            dist.init_process_group(timeout=timedelta(days=1))  # validation can take long
        self.rank, self.n_processes = data.rank_of()
        n, how = args.batch_size, {"depth_scale": args.depth_scale, "max_depth": args.max_depth}
        self.dataset = data.DepthDataset(args.data, args.root, args.train_split, train=True, **how)
        self.test_set = data.DepthDataset(args.data, args.root, args.test_split, **how)
        n_pairs, self.lists = len(self.dataset), [self.dataset.checksum, self.test_set.checksum]
        if n % self.n_processes or n > n_pairs:
            must = f"{self.n_processes} processes must divide it, and {n_pairs} pairs fill it"
            raise ValueError(f"--batch-size {n} is the total: {must}")
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
            if saved["lists"] != self.lists:
                raise ValueError(f"{args.resume} is of other pairs or test pairs: start a new run")
        self.predict = predictor(model)
        if self.rank == 0:
            self.take_folder()

    def new_model(self) -> cabins.CaBins:
        args, recipe = self.args, self.dataset.recipe
        torch.manual_seed(args.seed)
        size = self.dataset.size_to_train or self.test_set[0]["image"].shape[1:]
        how = {"max_depth": recipe.max_depth, "image_width": max(size), "focal": recipe.focal}
        config = cabins.Config(args.backbone, args.distance_class, **how)
        if args.init:
            saved = cabins.read_checkpoint(args.init)
            top = None if "config" in saved else recipe.max_depth  # the authors' do not say it
            start = cabins.restore(saved, args.init, top)
            if start.config.backbone != args.backbone:
                raise ValueError(f"{args.init} needs --backbone {start.config.backbone}")
            model = cabins.CaBins(config, start.clip)
            cabins.load_strictly(model, start.state_dict(), args.init)
            return model
        model = cabins.CaBins(config, None if args.clip == "none" else cabins.load_clip(args.clip))
        if args.as_released:  # 44 times CaBins' own start, and never trained
            nn.init.trunc_normal_(model.prompts, std=1.0)
        return model

    def take_folder(self) -> None:
        """Make the folder this run's own. Another run is never overwritten, except the demo's."""
        self.out.mkdir(parents=True, exist_ok=True)
        resume, is_demo = self.args.resume, self.out == Path("runs/toy") and self.args.data == "toy"
        is_own = resume and Path(resume).resolve().parent == self.out.resolve()
        taken = not is_own and any((self.out / n).exists() for n in ("last.pt", "best.pt"))
        if taken and (resume or not is_demo):
            raise ValueError(f"{self.out} holds another run: --resume it, or take another --out")
        if taken or (resume and not is_own):
            self.save("last.pt")
        if taken:
            (self.out / "best.pt").unlink(missing_ok=True)
            print(f"the run in {self.out} is replaced")
        for name, first in (("log.csv", self.step + 1), ("metrics.csv", self.step)):
            if (path := self.out / name).exists():  # rows to come, and half a row, are cut off
                header, *rows = path.read_text().splitlines(keepends=True) or [""]
                rows = [r for r in rows if r.endswith("\n") and int(r.split(",")[0]) < first]
                text = "".join([header, *rows] if rows else [])  # an empty file gets a header again
                cabins.write_whole(path, lambda partial, text=text: partial.write_text(text))

    def announce(self) -> None:
        """Print what is trained, on what, and what is not."""
        where = f"{self.n_processes} x {self.device}, {self.args.amp.replace('off', 'fp32')}"
        print(f"{len(self.dataset)} training pairs, {len(self.test_set)} test pairs; {where}")
        frozen = [p for p in self.learner.model.parameters() if not p.requires_grad]
        for group in [*self.learner.groups, {"name": "frozen: text encoder", "params": frozen}]:
            n = sum(p.numel() for p in group["params"])
            print(f"{group['name']:20} {n:>12,} parameters in {len(group['params'])} tensors")
        if self.args.as_released:
            print("as released: see the rows marked * of README's ledger")

    def check(self) -> None:
        """Stop if a step since the last look was not finite; looking at each would hold it up."""
        for number, lr, paths, result in self.recent:
            loss, norm = result.tolist()
            if not math.isfinite(loss + norm):
                where = f"step {number}, learning rate {lr:.3g}, of the images {', '.join(paths)}"
                raise ValueError(f"loss {loss} and gradient norm {norm} at {where}")
        self.recent.clear()

    def log(self, prediction: cabins.Prediction, depth: Tensor) -> dict[str, float]:
        """Check the last steps and add a row to log.csv; returns loss, bins loss, learning rate."""
        _, lr, _, result = self.recent[-1]
        self.check()
        mask = depth > self.learner.model.config.min_depth
        if not mask.any():
            raise ValueError(f"no depth of step {self.step} is valid: check the data with data.py")
        bins = cabins.chamfer_loss(prediction.centers.detach(), depth, mask).item()
        row = {"loss": result[0].item(), "bins": bins, "lr": lr}
        if self.rank == 0:
            epoch = self.step / self.per_epoch
            data.append_row(self.out / "log.csv", {"step": self.step, "epoch": epoch, **row})
        return row

    def save(self, name: str) -> None:
        """Write last.pt, from which training goes on exactly, or best.pt, the network only."""
        if self.rank == 0:
            state = {"args": vars(self.args), "lists": self.lists, "step": self.step}
            if name == "last.pt":
                state["optimizer"] = self.learner.optimizer.state_dict()
                state["scheduler"] = self.learner.scheduler.state_dict()
            cabins.save_checkpoint(self.out / name, self.learner.model, best=self.best, **state)

    def validate(self) -> None:
        """Measure on the test set, draw a sample, and keep the network if it is the best so far."""
        if self.rank == 0:
            data.go_fast(False)
            self.windows = evaluate_windows(self.predict, self.test_set, progress=True)
            row, epoch = next(iter(self.windows.values())), self.step // self.per_epoch
            data.append_row(self.out / "metrics.csv", {"step": self.step, "epoch": epoch, **row})
            draw_samples(self.out, self.learner.model, self.test_set, 1)
            metrics = ", ".join(f"{k} {v:.3f}" for k, v in row.items())
            tqdm.write(f"epoch {epoch}/{self.args.epochs}: {metrics}")
            if row["abs_rel"] < self.best:
                self.best = row["abs_rel"]
                self.save("best.pt")
                self.save("last.pt")  # which knows the best
            data.go_fast()
            self.learner.model.train()  # which measuring and drawing left in eval mode
        if dist.is_initialized():
            dist.barrier()  # the others wait

    def report(self) -> None:
        """Print the rows of last.pt and best.pt in the paper's table, and draw the curves."""
        data.go_fast(False)
        rows = {f"last.pt, {window}": row for window, row in self.windows.items()}
        if (path := self.out / "best.pt").exists():  # it is not in a new --out of a resumed run
            best = predictor(cabins.load_checkpoint(path, map_location=self.device))
            windows = evaluate_windows(best, self.test_set, progress=True)
            rows |= {f"best.pt, {window}": row for window, row in windows.items()}
        for window in self.windows:
            print(protocol(self.test_set, window, flip=True))
        print(format_table(self.args.data, rows))
        draw_curves(self.out)
        best = "; best.pt is chosen by AbsRel on these test images" if path.exists() else ""
        print(f"{self.out} has last.pt{best}")


def train(args: argparse.Namespace, saved: dict) -> None:
    """Train from the start, or from where `saved` is, to the last epoch."""
    run = Run(args, saved)
    if run.rank == 0:
        run.announce()
    data.go_fast()
    if run.step and run.step % run.per_epoch == 0:  # stopped perhaps before its validation
        run.validate()
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
            if run.rank == 0:
                go_on = f"go on with --resume {run.out}/last.pt"
                print(f"stopped after step {run.step} of {run.n_steps}; {go_on}")
            sys.exit(128 + stop)
        if is_end:
            run.validate()
    bar.close()
    if run.rank == 0:
        run.report()
    if dist.is_initialized():
        dist.destroy_process_group()


def note_stop(number: int, _) -> None:
    """A signal waits until a step is done and saved; but for torchrun, a second stops at once."""
    if stops and not dist.is_initialized():  # torchrun passes one on as two
        os.write(2, b"\nstopped at once\n")
        os._exit(128 + number)
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


def draw_curves(out: Path) -> None:
    """Draw losses and metrics over epochs, from the CSV files of a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = [("log", {"loss": "total loss", "bins": "bins loss (m²)"})]
    panels += [("metrics", {"abs_rel": "AbsRel", "d1": "δ < 1.25"})]
    panels += [("metrics", {"rmse": "RMSE (m)"})]
    for axis, (file, columns) in zip(figure.subplots(1, 3), panels):
        if (path := out / f"{file}.csv").exists():  # not in the new --out of a finished run
            curves = np.genfromtxt(path, delimiter=",", names=True)
            for column, label in columns.items():
                axis.plot(curves["epoch"], curves[column], marker=".", label=label)
            axis.set(xlabel="epoch", ylim=(0, None))
            axis.legend()
    save_figure(out / "curves.png", figure)


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict]:
    """The options and {}; with --resume, those of the run to go on with, and its checkpoint."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = data.add_data_options(parser).add_argument
    add("--data", choices=data.DATASETS, default="toy", help="default: toy, rooms drawn on the fly")
    group = parser.add_argument_group("network")
    data.add_device_options(group, "bf16 on GPUs that have it, or off")
    add, switch = group.add_argument, {"action": argparse.BooleanOptionalAction, "default": False}
    add("--backbone", choices=cabins.BACKBONES, default="RN101", help="default: RN101; toy: tiny")
    add("--clip", metavar="NAME|FILE|none", help="CLIP's weights; default: the backbone's own")
    add("--init", metavar="CKPT", help="start from its weights, train.py's or the authors'")
    add("--distance-class", choices=cabins.DISTANCE_CLASSES, default="cabins", help="see Table 3")
    add("--compile", **switch, help="torch.compile the network")
    add = parser.add_argument_group("run").add_argument
    add("--epochs", type=int, default=25, help="default: 25; toy: 3")
    add("--batch-size", type=int, default=8, help="of all processes together; default: 8")
    add("--lr", type=float, default=3.57e-5, help="the highest; default: 3.57e-5; toy: 2e-3")
    add("--seed", type=int, default=0, help="default: 0")
    add("--as-released", **switch, help="as the released code does: see README's ledger")
    add("--out", metavar="DIR", help="default: runs/DATA")
    add("--resume", nargs="?", const="", metavar="CKPT", help="go on; default: OUT/last.pt")
    saved, before = {}, {}
    args = parser.parse_args(argv)
    if args.data == "toy":
        parser.set_defaults(**TOY_DEFAULTS)
        args = parser.parse_args(argv)
    args.out = args.out or f"runs/{args.data}"
    if args.resume is not None:
        path = args.resume or f"{args.out}/last.pt"
        saved = cabins.read_checkpoint(path)
        if not {"args", "lists", "step", "optimizer", "scheduler"} <= saved.keys():
            raise ValueError(f"{path} is no last.pt of train.py: it cannot be resumed")
        before = saved["args"] | {"out": str(Path(path).parent), "resume": None}
        args = parser.parse_args(argv, argparse.Namespace(**before))
        args.resume = path
    if args.init and not saved:
        data.refuse(args, "clip", "is not for --init, which has CLIP's weights")
    for name in ("root", "train_split", "test_split"):
        if path := getattr(args, name):
            setattr(args, name, str(Path(path).resolve()))  # eval.py may run elsewhere
    is_gpu = data.choose_device(args.device).type == "cuda"
    is_bf16 = is_gpu and torch.cuda.is_bf16_supported(False) and not args.as_released
    args.amp = args.amp or ("bf16" if is_bf16 else "off")
    args.clip = args.clip or ("none" if args.backbone == "tiny" else args.backbone)
    for name in ("epochs", "batch_size", "lr"):
        if not 0 < (value := getattr(args, name)) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be positive")
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"--seed is {args.seed}; it must be from 0 to 2147483647")
    movable = ("root", "train_split", "test_split", "out", "compile", "device", "resume")
    for name in before.keys() - movable:
        if (value := getattr(args, name)) != before[name]:
            was = f"was trained with {name} {before[name]}, not {value}"
            raise ValueError(f"{args.resume} {was}: leave it out, or start another run")
    return args, saved


def main() -> None:
    args, saved = parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note_stop)
    try:
        train(args, saved)
    except RuntimeError as error:  # of a worker or a process that got the signal as well
        if not stops:
            raise
        print(f"stopped before the step was done: {error}", file=sys.stderr)
        sys.exit(128 + stops[0])


if __name__ == "__main__":
    data.run_command(main)
