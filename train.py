"""Train CaBins by the paper's recipe (Sec. 4.1).

python train.py                               the demo: two minutes on a laptop's CPU
python train.py --data nyu --root DIR         the paper's network
python train.py --resume runs/nyu/last.pt     continues a run that was stopped
"""

import argparse
import dataclasses
import fcntl
import math
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

import cabins
import data
import eval as evaluation

DEFAULTS = {"data": "toy", "backbone": "RN101", "distance_class": "cabins", "epochs": 25}
DEFAULTS |= {"batch_size": 8, "lr": 3.57e-5, "seed": 0, "as_released": False, "compile": False}
DEMO_DEFAULTS = {"backbone": "tiny", "epochs": 3, "lr": 2e-3}  # it starts from random weights
MAX_NORM = 0.1  # NOTE(paper silent): the released code clips gradients at this norm
LOG_EVERY, PRINT_EVERY = 10, 100  # steps; the last one of an epoch is logged too
SAVE_EVERY = 600  # seconds; last.pt is also saved after each validation
FILES = ("last.pt", "best.pt", "log.csv", "metrics.csv")  # a folder with one of these has a run
MAY_CHANGE = {"root", "train_split", "test_split", "device", "workers", "compile", "resume"}
stops: list[int] = []  # the signals that this process has received


def parameter_groups(model: cabins.CaBins, as_released: bool = False) -> list[dict]:
    """Freeze or free the token embedding, and return the one group of all that is trained."""
    # NOTE(differs): the released optimizer has the token embedding, but neither p nor γ.
    model.clip.token_embedding.requires_grad_(as_released)
    left_out = ("prompts", "trans_decoder.gamma") if as_released else ()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return [{"params": [p for name, p in trained.items() if name not in left_out]}]


def seed_of(*numbers: int) -> int:
    """One seed of 64 bits from several numbers, such as the run's seed and the step's number."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def batches(n_pairs: int, batch_size: int, steps: range, seed: int, as_released: bool):
    """Yield the indices of this process's share of each step's batch."""
    rank, n_processes = data.rank_of()
    # NOTE(differs): the released code keeps the last, smaller batch of an epoch and has the same
    # order in every epoch. We drop that batch and shuffle each epoch anew.
    per_epoch = math.ceil(n_pairs / batch_size) if as_released else n_pairs // batch_size
    for step in steps:
        epoch, batch = divmod(step, per_epoch)
        epoch_seed = seed_of(seed) // 2 + (0 if as_released else epoch)  # 63 bits, and the epoch
        order = torch.randperm(n_pairs, generator=torch.Generator().manual_seed(epoch_seed))
        yield order[batch * batch_size : (batch + 1) * batch_size][rank::n_processes].tolist()


class Learner:
    """A network with its optimizer and its schedule. No step waits for the device."""

    def __init__(self, model, recipe, n_steps, lr, amp="off", seed=0, as_released=False):
        """`model` is on its device. `recipe` says how `data.augment` draws."""
        self.model, self.recipe, self.seed, self.as_released = model, recipe, seed, as_released
        self.device = next(model.parameters()).device
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, amp == "bf16")
        self.rank, self.n_processes = data.rank_of()
        if self.n_processes > 1 and self.device.type == "cuda":  # torch has it for GPUs only
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        groups = parameter_groups(model, as_released)
        self.optimizer = torch.optim.AdamW(groups, lr, weight_decay=0.1, fused=True)
        # The rate rises from lr / 25 to lr and falls to lr / 2500. Momentum goes 0.95, 0.85, 0.95.
        self.scheduler = OneCycleLR(self.optimizer, lr, n_steps, final_div_factor=100)
        self.network = nn.parallel.DistributedDataParallel(model) if self.n_processes > 1 else model

    def forward(self, batch: dict, number: int) -> tuple[cabins.Prediction, Tensor, Tensor]:
        """Prediction, truth and loss of the whole batch `number`, from this process's share."""
        image, depth = (batch[k].to(self.device, non_blocking=True) for k in ("image", "depth"))
        generator = torch.Generator().manual_seed(seed_of(self.seed, number))
        image, depth = data.augment(image, depth, self.recipe, generator, data.rank_of())
        torch.manual_seed(seed_of(self.seed, number, 1 + self.rank))  # for dropout
        with self.autocast:
            prediction = self.network(image)
        if self.n_processes > 1:
            # NOTE(differs): one loss for the whole batch. The released code has one for each GPU.
            whole = {name: self.gather(getattr(prediction, name)) for name in ("depth", "centers")}
            prediction, depth = prediction._replace(**whole), self.gather(depth)
        min_depth = self.model.config.min_depth
        return prediction, depth, cabins.total_loss(prediction, depth, min_depth, self.as_released)

    def gather(self, share: Tensor) -> Tensor:
        """The shares of all processes. Only this process's own share has a gradient."""
        shares = [torch.empty_like(share.contiguous()) for _ in range(self.n_processes)]
        dist.all_gather(shares, share.contiguous())
        shares[self.rank] = share
        return torch.cat(shares)

    def step(self, batch: dict, number: int) -> tuple[cabins.Prediction, Tensor, Tensor]:
        """Learn from batch `number`. Returns prediction, truth, and [loss, gradient norm]."""
        prediction, depth, loss = self.forward(batch, number)
        # NOTE(differs): the released code never clears the gradients of p and γ, and they count in
        # the norm. With --as-released the optimizer does not have them, so they are not cleared.
        self.optimizer.zero_grad()
        (loss * self.n_processes).backward()  # DDP averages, but these are parts of a sum
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.scheduler.step()
        return prediction, depth, torch.stack([loss.detach(), norm])


class Run:
    """The data, the network, the progress and the folder of one run."""

    def __init__(self, args: argparse.Namespace, saved: dict):
        """`saved` is what last.pt holds, or {} for a new run. It is emptied to free its memory."""
        self.args, self.device = args, data.choose_device(args.device)
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))  # among the processes of this machine
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # torchrun started several
            if self.device.type == "cuda":
                torch.cuda.set_device(local_rank)
            dist.init_process_group(timeout=timedelta(days=1))  # a validation can take long
        self.rank, self.n_processes = data.rank_of()
        self.step, self.best = saved.get("step", 0), saved.get("best", math.inf)
        if local_rank > 0:  # the first process of each machine downloads for the others
            dist.barrier()
        self.load_data()
        if self.rank == 0:
            self.take_folder()
        model = cabins.restore(saved, args.resume) if saved else self.new_model()
        if local_rank == 0 and self.n_processes > 1:
            dist.barrier()
        how = args.lr, args.amp, args.seed, args.as_released
        self.learner = Learner(model.to(self.device), self.dataset.recipe, self.n_steps, *how)
        if args.compile:
            self.learner.network = torch.compile(self.learner.network)
        if saved:
            self.restore_progress(saved)

    def load_data(self) -> None:
        """Find the training and test pairs, and check that a run can use them."""
        args, n = self.args, self.args.batch_size
        scales = {"depth_scale": args.depth_scale, "max_depth": args.max_depth}
        self.dataset = data.DepthDataset(args.data, args.root, args.train_split, True, **scales)
        self.test_set = data.DepthDataset(args.data, args.root, args.test_split, **scales)
        self.lists = [self.dataset.checksum, self.test_set.checksum]
        n_pairs = len(self.dataset)
        if n > n_pairs:
            raise ValueError(f"--batch-size {n} is more than the {n_pairs} training pairs")
        sizes = {n, n_pairs % n or n} if args.as_released else {n}  # the last batch may be smaller
        if any(size % self.n_processes for size in sizes):
            what = f"batches of {sizes} pairs do not divide among {self.n_processes} processes"
            raise ValueError(f"{what}: choose another --batch-size")
        if self.rank == 0:
            print(f"training on {data.describe(self.dataset)}")
            print(f"testing on {data.describe(self.test_set)}")
        self.per_epoch = math.ceil(n_pairs / n) if args.as_released else n_pairs // n
        self.n_steps = args.epochs * self.per_epoch

    def new_model(self) -> cabins.CaBins:
        """The network at the start of training, with CLIP's weights or those of --init."""
        args, recipe = self.args, self.dataset.recipe
        torch.manual_seed(args.seed % 2**63)  # torch takes at most 64 bits
        size = self.dataset.frame_size or self.test_set[0]["image"].shape[1:]
        seen = {"max_depth": recipe.max_depth, "longer_side": max(size)}
        config = cabins.Config(args.backbone, args.distance_class, **seen)
        if args.init:
            state = cabins.read_checkpoint(args.init)["model"]
            return cabins.load_strictly(cabins.CaBins(config), state, args.init)
        model = cabins.CaBins(config, None if args.clip == "none" else cabins.load_clip(args.clip))
        if args.as_released:  # NOTE(differs): the released prompts start 44 times larger
            nn.init.trunc_normal_(model.prompts, std=1.0)
        return model

    def take_folder(self) -> None:
        """Claim the folder before the work begins. The files of another run are not overwritten."""
        self.out, n_demos = Path(self.args.out or "runs/toy"), 1
        while not self.args.out and run_files(self.out):
            n_demos += 1
            self.out = Path(f"runs/toy_{n_demos}")
        if n_demos > 1:
            print(f"runs/toy holds a run already: this one goes to {self.out}")
        claim(self.out)
        found = run_files(self.out)
        if found and not self.args.resume:
            remedy = f"continue it with --resume {self.out}/last.pt, or choose another --out"
            raise ValueError(f"{found[0]} is another run's: {remedy}")

    def restore_progress(self, saved: dict) -> None:
        """Continue the optimizer, the schedule, the best network and the tables of a run."""
        path = Path(self.args.resume)
        try:
            self.learner.optimizer.load_state_dict(saved["optimizer"])
            self.learner.scheduler.load_state_dict(saved["scheduler"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be resumed: {error!r}") from None
        if saved["lists"] != self.lists:
            raise ValueError(f"{path} was trained with other pairs: start anew with --init {path}")
        saved.clear()
        if self.rank > 0:
            return
        if not (self.out / "best.pt").exists():  # the best network was not kept with last.pt
            self.best = math.inf
        for name in ("log.csv", "metrics.csv"):
            drop_rows(self.out / name, self.step)

    def log(self, prediction: cabins.Prediction, depth: Tensor, lr: float, loss: float) -> str:
        """Add a row to log.csv, and return it as a text. Without a terminal, print some rows."""
        mask = depth > self.learner.model.config.min_depth
        bins = cabins.chamfer_loss(prediction.centers.detach(), depth, mask).item()
        row = {"epoch": self.step / self.per_epoch, "loss": loss, "bins": bins, "lr": lr}
        text = ", ".join(f"{name} {value:.3g}" for name, value in row.items())
        data.append_row(self.out / "log.csv", {"step": self.step, **row})
        if self.step % PRINT_EVERY == 0 and not sys.stderr.isatty():
            print(f"step {self.step} of {self.n_steps}: {text}", flush=True)
        return text

    def save(self, name: str) -> None:
        """Write last.pt, from which training continues exactly, or best.pt without optimizer."""
        model = self.learner.model
        content = {"config": dataclasses.asdict(model.config), "model": model.state_dict()}
        content |= {"args": vars(self.args), "lists": self.lists}
        content |= {"step": self.step, "best": self.best}
        if name == "last.pt":
            content["optimizer"] = self.learner.optimizer.state_dict()
            content["scheduler"] = self.learner.scheduler.state_dict()
        data.write_whole(self.out / name, lambda partial: torch.save(content, partial))

    def validate(self) -> None:
        """Measure on the test set, draw, and keep the network if it is the best so far."""
        data.use_tf32(False)
        model, epoch = self.learner.model, self.step // self.per_epoch
        predict = evaluation.predictor(model, longer_side=evaluation.side_for(model, self.test_set))
        row = evaluation.evaluate(predict, self.test_set, self.args.workers)
        data.use_tf32(True)
        data.append_row(self.out / "metrics.csv", {"step": self.step, "epoch": epoch, **row})
        evaluation.draw_samples(self.out, model, self.test_set, 1)
        metrics = ", ".join(f"{name} {value:.3f}" for name, value in row.items())
        tqdm.write(f"epoch {epoch}/{self.args.epochs}: {metrics}")
        if row["abs_rel"] < self.best:
            self.best = row["abs_rel"]
            self.save("best.pt")


def train(args: argparse.Namespace, saved: dict) -> None:
    """Train from the start, or from what last.pt holds, to the last epoch."""
    run = Run(args, saved)
    learner, is_first = run.learner, run.rank == 0
    if is_first:
        trained = sum(p.numel() for p in learner.optimizer.param_groups[0]["params"])
        print(f"{trained:,} parameters learn on {run.n_processes} x {run.device}, amp {args.amp}")
    data.use_tf32(True)
    learner.model.train()
    steps = range(run.step, run.n_steps)
    order = batches(len(run.dataset), args.batch_size, steps, args.seed, args.as_released)
    loader = data.load(run.dataset, run.device, args.workers, batch_sampler=order)
    hidden = None if is_first else True  # None: shown in a terminal only
    bar = tqdm(loader, "training", run.n_steps, initial=run.step, disable=hidden)
    next_save = time.monotonic() + SAVE_EVERY
    for batch in bar:
        lr = learner.scheduler.get_last_lr()[0]
        prediction, depth, result = learner.step(batch, run.step + 1)
        run.step += 1
        is_end = run.step % run.per_epoch == 0
        is_log = is_end or run.step % LOG_EVERY == 0
        stop = max(stops, default=0)
        if run.n_processes > 1:  # they stop together, at a step that is logged
            stop = is_log and learner.gather(torch.tensor([stop], device=run.device)).max().item()
        if is_log or stop:
            loss, norm = result.tolist()
            if not math.isfinite(loss + norm):  # the weights, too, are not finite any more
                raise ValueError(f"step {run.step}: loss {loss}, gradient norm {norm}; lower --lr?")
        if is_first and is_log:
            bar.set_postfix_str(run.log(prediction, depth, lr, loss))
        if is_first and is_end:
            run.validate()
        if is_first and (is_end or stop or (is_log and time.monotonic() > next_save)):
            run.save("last.pt")
            next_save = time.monotonic() + SAVE_EVERY
        if (is_end or stop) and run.n_processes > 1:
            dist.barrier()  # the other processes wait for the first
        if stop:
            if is_first:
                tqdm.write(f"stopped after step {run.step}: go on with --resume {run.out}/last.pt")
            sys.exit(128 + stop)
    if is_first:
        print(f"training has finished: python eval.py {run.out}/last.pt prints its metrics")
    if dist.is_initialized():
        dist.destroy_process_group()


def note_stop(number: int, _) -> None:
    """Let a signal wait until the step is done and saved. The same signal again ends at once."""
    stops.append(number)
    if not dist.is_initialized():  # torchrun sends each process the signal once more
        signal.signal(number, signal.SIG_DFL)
    os.write(2, b"\nstopping after this step, or after the validation\n")


def run_files(folder: Path) -> list[Path]:
    """The files that a run has left in a folder."""
    return [folder / name for name in FILES if (folder / name).exists()]


def claim(folder: Path) -> None:
    """Lock a folder for this process. The system releases the lock when the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / ".claim", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"another run is writing to {folder}: choose another --out") from None
    except OSError as error:
        print(f"{folder} cannot be locked ({error.strerror}): start no second run there")


def drop_rows(path: Path, last: int) -> None:
    """Remove the rows of steps after `last`, and a row that was not written to its end."""
    if path.exists():
        header, *rows = path.read_text().splitlines(keepends=True) or [""]
        rows = [r for r in rows if r.endswith("\n") and int(r.split(",")[0]) <= last]
        data.write_whole(path, lambda partial: partial.write_text("".join([header, *rows])))


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict]:
    """The options of a run, and the content of the checkpoint that it resumes, or {}."""
    parser = data.Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = data.add_data_options(parser).add_argument
    add("--data", choices=data.DATASETS, help="default: toy, rooms drawn on the fly")
    group = parser.add_argument_group("training")
    data.add_device_options(group)
    add, switch = group.add_argument, {"action": argparse.BooleanOptionalAction}
    add("--backbone", choices=cabins.BACKBONES, help="default: RN101; toy: tiny")
    start = group.add_mutually_exclusive_group().add_argument
    start("--clip", metavar="NAME|FILE|none", help="CLIP's weights; default: the backbone's own")
    start("--init", metavar="CKPT", help="start from its weights, train.py's or the authors'")
    add("--distance-class", choices=cabins.DISTANCE_CLASSES, help="see Table 3; default: cabins")
    add("--amp", choices=("off", "bf16"), help="default: bf16 on GPUs that have it, else off")
    add("--compile", **switch, help="torch.compile the network")
    add("--epochs", type=data.positive_int, metavar="N", help="default: 25; toy: 3")
    add("--batch-size", type=data.positive_int, metavar="N", help="of all processes; default: 8")
    add("--lr", type=data.positive_float, metavar="X", help="default: 3.57e-5; toy: 2e-3")
    add("--seed", type=data.whole_number, metavar="N", help="default: 0")
    add("--as-released", **switch, help="as the released code does: see README's table")
    add("--out", type=os.path.normpath, metavar="DIR", help="default: runs/DATA, or runs/toy_2, …")
    add("--resume", nargs="?", const="", metavar="CKPT", help="continue; default: OUT/last.pt")
    args, saved = parser.parse_args(argv), {}
    typed = {name: value for name, value in vars(args).items() if value is not None}
    for name in {"root", "train_split", "test_split"} & typed.keys():
        typed[name] = os.path.abspath(typed[name])  # for eval.py in another folder
    is_demo = args.data in (None, "toy")
    options = DEFAULTS | (DEMO_DEFAULTS if is_demo else {"out": f"runs/{args.data}"})
    if args.resume is not None:
        path = args.resume or f"{args.out or options.get('out', 'runs/toy')}/last.pt"
        saved = cabins.read_checkpoint(path)
        if not {"args", "lists", "step", "optimizer", "scheduler"} <= saved.keys():
            raise ValueError(f"{path} is no last.pt of train.py: it cannot be resumed")
        options |= saved["args"] | {"out": str(Path(path).parent)}
        typed["resume"] = path
        for name in typed.keys() & options.keys() - MAY_CHANGE:
            if typed[name] != options[name]:
                what = f"{path} was trained with --{name.replace('_', '-')} {options[name]}"
                raise ValueError(f"{what}: start a new run with --init {path}")
    vars(args).update(options | typed)
    is_gpu = data.choose_device(args.device).type == "cuda"
    is_bf16 = is_gpu and torch.cuda.is_bf16_supported(False) and not args.as_released
    args.amp = args.amp or ("bf16" if is_bf16 else "off")
    args.clip = args.clip or ("none" if args.backbone == "tiny" else args.backbone)
    return args, saved


def main() -> None:
    args, saved = parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note_stop)
    train(args, saved)


if __name__ == "__main__":
    data.run_command(main)
