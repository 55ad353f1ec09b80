"""Train CaBins by the paper's recipe (Sec. 4.1).

python train.py                               the demo: two minutes on a laptop's CPU
python train.py --data nyu --root DIR         the paper's network
python train.py --resume runs/nyu/last.pt     continues a run that was stopped
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
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
from cabins import InputError

MAX_NORM = 0.1  # NOTE(paper silent): the released code clips gradients at this norm
LOG_EVERY = 10  # steps between rows of log.csv; an epoch's last step has a row, too
PRINT_EVERY = 100  # steps
SAVE_EVERY = 600  # seconds; last.pt is also saved after each epoch
PAPER = {"backbone": "RN101", "epochs": 25, "lr": 3.57e-5}
DEMO = {"backbone": "tiny", "epochs": 3, "lr": 2e-3}  # it starts from random weights
MAY_CHANGE = {"root", "device", "workers"}  # options that a resumed run may change


def seed_of(*numbers: int) -> int:
    """One seed of 64 bits from several numbers, such as the run's seed and the step's number."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class Run:
    """A training run: options, data, network, optimizer, schedule and progress.

    `extras.released` overrides the five methods after `__init__`, which are the recipe.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.out = Path(args.out)
        self.step = 0
        self.best = math.inf  # the lowest AbsRel so far
        self.device = data.choose_device(args.device)
        self.rank = 0
        self.n_processes = int(os.environ.get("WORLD_SIZE", "1"))
        if self.n_processes > 1:  # torchrun started several
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            # The other processes wait while the first one validates.
            dist.init_process_group(timeout=timedelta(days=1))
            self.rank = dist.get_rank()
        scales = {"depth_scale": args.depth_scale, "max_depth": args.max_depth}
        self.dataset = data.DepthDataset(args.data, args.root, args.train_split, True, **scales)
        self.test_set = data.DepthDataset(args.data, args.root, args.test_split, **scales)
        self.per_epoch = self.steps_per_epoch()
        if args.batch_size % self.n_processes or not self.per_epoch:
            pairs = f"{len(self.dataset)} pairs and {self.n_processes} processes"
            raise InputError(f"--batch-size {args.batch_size} does not fit {pairs}: choose another")
        self.n_steps = args.epochs * self.per_epoch
        torch.manual_seed(args.seed)
        self.model = cabins.load_checkpoint(args.last) if args.last else self.new_model()
        self.model.to(self.device)
        if self.n_processes > 1 and self.device.type == "cuda":  # needs GPUs
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.parameters = self.trained_parameters()
        self.optimizer = torch.optim.AdamW(self.parameters, args.lr, weight_decay=0.1, fused=True)
        if args.last:
            content = cabins.read_checkpoint(args.last)
            if "optimizer" not in content:
                raise InputError(f"{args.last} has no optimizer: only last.pt can be resumed")
            self.optimizer.load_state_dict(content["optimizer"])
            self.step = content["step"]
            self.best = content["best"]
        # The rate rises from lr / 25 to lr and falls to lr / 2500. Momentum goes 0.95, 0.85, 0.95.
        self.scheduler = OneCycleLR(
            self.optimizer, args.lr, self.n_steps, final_div_factor=100, last_epoch=self.step - 1
        )
        # Each process has a loss of its own, and gradients are averaged, as in the released code.
        several = self.n_processes > 1
        self.network = nn.parallel.DistributedDataParallel(self.model) if several else self.model
        self.network = torch.compile(self.network) if args.compile else self.network

    def new_model(self) -> cabins.CaBins:
        """The network at the start of training, with CLIP's weights or those of --init."""
        args, recipe = self.args, self.dataset.recipe
        longer_side = recipe.longer_side or max(self.dataset.read(0)[1].shape)
        depths = {"max_depth": recipe.max_depth, "longer_side": longer_side}
        config = cabins.Config(args.backbone, args.distance_class, **depths)
        if args.init:
            content = cabins.read_checkpoint(args.init)
            top = content["config"]["max_depth"]
            if top != config.max_depth:
                print(f"{args.init} is for {top} m: its depths are scaled")
            return cabins.load_strictly(cabins.CaBins(config), content["model"], args.init)
        clip = None if args.clip == "none" else cabins.load_clip(args.clip)
        return cabins.CaBins(config, clip)

    def steps_per_epoch(self) -> int:
        """How many batches an epoch has."""
        # NOTE(differs): The released code keeps the last, smaller batch. We drop it.
        return len(self.dataset) // self.args.batch_size

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimizer gets: all but the text encoder."""
        # NOTE(differs): The released optimizer has the token embedding, but neither p nor γ.
        return [p for p in self.model.parameters() if p.requires_grad]

    def order(self, epoch: int) -> Tensor:
        """The numbers of all pairs in the order of an epoch."""
        # NOTE(differs): The released code has the same order in every epoch.
        seed = seed_of(self.args.seed) // 2 + epoch  # of 63 bits
        return torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(seed))

    def loss(self, prediction: cabins.Prediction, depth: Tensor) -> Tensor:
        """Eq. 8 for this process's share of a batch."""
        return cabins.total_loss(prediction, depth, self.model.config.min_depth)

    def batches(self) -> Iterator[list[int]]:
        """The pairs of this process's share of each batch, from the next step on."""
        n = self.args.batch_size
        for step in range(self.step, self.n_steps):
            epoch, i = divmod(step, self.per_epoch)
            yield self.order(epoch)[i * n : (i + 1) * n][self.rank :: self.n_processes].tolist()

    def learn(self, batch: dict) -> tuple[cabins.Prediction, Tensor, Tensor]:
        """Take one step. Returns prediction, truth, and [loss, gradient norm] on the device."""
        self.step += 1
        image, depth = (batch[k].to(self.device, non_blocking=True) for k in ("image", "depth"))
        # All that is random depends on the seed, the step and the process, so a run can be resumed.
        seed = self.args.seed
        generator = torch.Generator().manual_seed(seed_of(seed, self.step, self.rank))
        image, depth = data.augment(image, depth, self.dataset.recipe, generator)
        torch.manual_seed(seed_of(seed, self.step, self.n_processes + self.rank))  # for dropout
        with torch.autocast(self.device.type, torch.bfloat16, self.args.amp == "bf16"):
            prediction = self.network(image)
        loss = self.loss(prediction, depth)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.scheduler.step()
        return prediction, depth, torch.stack([loss.detach(), norm])

    def train(self) -> None:
        """Train to the last epoch. The first process logs, saves and validates."""
        if self.rank == 0:
            self.open_folder()
        data.use_tf32(True)
        self.model.train()
        batches = self.batches()
        loader = data.load(self.dataset, self.device, self.args.workers, batch_sampler=batches)
        hidden = self.rank > 0 or None  # None: shown in a terminal only
        next_save = time.monotonic() + SAVE_EVERY
        for batch in tqdm(loader, "training", self.n_steps, initial=self.step, disable=hidden):
            lr = self.scheduler.get_last_lr()[0]
            prediction, depth, result = self.learn(batch)
            is_end = self.step % self.per_epoch == 0
            if not (is_end or self.step % LOG_EVERY == 0):
                continue
            loss, norm = result.tolist()
            if not math.isfinite(loss + norm):  # the weights are lost
                found = f"loss {loss}, gradient norm {norm}"
                raise InputError(f"step {self.step}: {found}; try a lower --lr")
            if self.rank > 0:
                continue
            self.log(prediction, depth, lr, loss)
            if is_end or time.monotonic() > next_save:
                self.save("last.pt", optimizer=self.optimizer.state_dict())
                next_save = time.monotonic() + SAVE_EVERY
            if is_end:
                self.validate()
        if self.rank == 0:
            print(f"training has finished: python eval.py {self.out}/last.pt prints its metrics")
        if self.n_processes > 1:
            dist.destroy_process_group()

    def open_folder(self) -> None:
        """Make the folder of a new run, or cut the tables of a resumed one back to its step."""
        print(f"training on {data.describe(self.dataset)}")
        print(f"testing on {data.describe(self.test_set)}")
        n_trained = sum(p.numel() for p in self.parameters)
        devices = f"{self.n_processes} x {self.device}, amp {self.args.amp}"
        print(f"{n_trained:,} parameters learn on {devices}")
        try:
            self.out.mkdir(parents=True, exist_ok=bool(self.args.resume))
        except FileExistsError:
            remedy = "add --resume auto to continue its run, or choose another --out"
            raise InputError(f"{self.out} exists: {remedy}") from None
        how = {"shell": True, "cwd": Path(__file__).parent, "capture_output": True, "text": True}
        commit = subprocess.run("git rev-parse HEAD", check=False, **how).stdout.strip()
        options = {k: v for k, v in vars(self.args).items() if k not in ("resume", "last")}
        content = {"options": options, "torch": torch.__version__, "commit": commit}
        partial = self.out / "args.json.partial"
        partial.write_text(json.dumps(content, indent=1))
        partial.replace(self.out / "args.json")
        # Rows of later steps go, and a half-written row. An epoch that ended is validated again.
        for table, end in (("log.csv", self.step + 1), ("metrics.csv", self.step)):
            if (self.out / table).exists():
                header, *rows = (self.out / table).read_text().splitlines(keepends=True) or [""]
                rows = [x for x in rows if x.endswith("\n") and int(x.split(",")[0]) < end]
                (self.out / table).write_text("".join([header, *rows]))
        if self.step and self.step % self.per_epoch == 0:
            self.validate()

    def log(self, prediction: cabins.Prediction, depth: Tensor, lr: float, loss: float) -> None:
        """Add a row to log.csv, and print some of the rows."""
        mask = depth > self.model.config.min_depth
        bins = cabins.chamfer_loss(prediction.centers.detach(), depth, mask).item()
        row = {"epoch": self.step / self.per_epoch, "loss": loss, "bins": bins, "lr": lr}
        data.append_row(self.out / "log.csv", {"step": self.step, **row})
        if self.step % PRINT_EVERY == 0:
            text = ", ".join(f"{name} {value:.3g}" for name, value in row.items())
            tqdm.write(f"step {self.step} of {self.n_steps}: {text}")

    def save(self, name: str, **more) -> None:
        """Write a checkpoint that names the data, but no folder of this machine."""
        recipe = self.dataset.recipe
        scale = {"depth_scale": recipe.depth_scale, "max_depth": recipe.max_depth}
        more |= {"data": {"name": self.args.data, **scale}, "step": self.step, "best": self.best}
        cabins.save_checkpoint(self.out / name, self.model, **more)

    def validate(self) -> None:
        """Measure on the test set, draw, and keep the network if it is the best so far."""
        data.use_tf32(False)
        self.model.eval()
        row = evaluation.evaluate(self.model, self.test_set, self.args.workers)
        if row["abs_rel"] < self.best:
            self.best = row["abs_rel"]
            self.save("best.pt")
        evaluation.draw_samples(self.out, self.model, self.test_set, 1)
        epoch = self.step // self.per_epoch
        data.append_row(self.out / "metrics.csv", {"step": self.step, "epoch": epoch, **row})
        metrics = ", ".join(f"{name} {value:.3f}" for name, value in row.items())
        tqdm.write(f"epoch {epoch}/{self.args.epochs}: {metrics}")
        self.model.train()
        data.use_tf32(True)


def parse_args(argv: list[str], script: str = "train.py", **defaults) -> argparse.Namespace:
    """The options of a run. A run that is resumed takes them from its args.json."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--data", choices=data.DATASETS, default="toy", help="default: toy, drawn on the fly")
    data.add_data_options(parser)
    add("--train-split", type=os.path.abspath, metavar="FILE", help="list of training pairs")
    add("--test-split", type=os.path.abspath, metavar="FILE", help="list of test pairs")
    data.add_device_options(parser)
    add("--backbone", choices=cabins.BACKBONES, help="default: RN101; toy: tiny")
    start = parser.add_mutually_exclusive_group().add_argument
    start("--clip", metavar="NAME|FILE|none", help="CLIP's weights; default: the backbone's own")
    start("--init", metavar="CKPT", help="start from the weights of a checkpoint")
    add("--distance-class", choices=cabins.TABLE_3, default="cabins", help="see Table 3")
    add("--amp", choices=("off", "bf16"), help="default: bf16 on GPUs that have it, else off")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--epochs", type=int, metavar="N", help="default: 25; toy: 3")
    add("--batch-size", type=int, default=8, metavar="N", help="of all processes; default: 8")
    add("--lr", type=float, metavar="X", help="default: 3.57e-5; toy: 2e-3")
    add("--seed", type=int, default=0, metavar="N", help="default: 0")
    add("--out", type=os.path.normpath, metavar="DIR", help="a new folder; default: runs/DATA")
    about = "continue a run from its last.pt; auto: from OUT/last.pt, if it is there"
    add("--resume", metavar="LAST.pt|auto", help=about)
    args = parser.parse_args(argv)
    out = args.out or os.path.join("runs", args.data)
    last = args.resume
    saved = {}
    if last == "auto":
        last = os.path.join(out, "last.pt")
        last = last if os.path.exists(last) else None
    if last:
        file = Path(last).with_name("args.json")
        if not file.exists():
            parser.error(f"{file} is missing, which holds the options of the run")
        saved = json.loads(file.read_text())["options"]
        saved["out"] = os.path.normpath(os.path.dirname(last))
    recipe = DEMO if args.data == "toy" else PAPER
    fixed = {"script": script, "last": last}
    parser.set_defaults(**{"out": out, **recipe, **defaults, **saved, **fixed})
    args = parser.parse_args(argv)  # what is typed wins
    for name, value in saved.items():
        if name not in MAY_CHANGE and getattr(args, name) != value:
            parser.error(f"the run began with {name} {value}: --init {last} starts a new run")
    is_gpu = data.choose_device(args.device).type == "cuda"
    amp = "bf16" if is_gpu and torch.cuda.is_bf16_supported(False) else "off"
    args.amp = args.amp or amp
    args.clip = args.clip or ("none" if args.backbone == "tiny" else args.backbone)
    return args


def main() -> None:
    Run(parse_args(sys.argv[1:])).train()


if __name__ == "__main__":
    data.run_command(main)
