"""Train CaBins by the paper's recipe (Sec. 4.1).

python train.py                               the demo: two minutes on a laptop's CPU
python train.py --data nyu --root DIR         the paper's network
python train.py --resume runs/nyu/last.pt     continues a run that was stopped
"""

import json
import os
import subprocess
import time
from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, lr_scheduler
from tqdm import tqdm

import cabins
import data
import eval as evaluation
from cabins import InputError

MAX_NORM = 0.1  # NOTE(paper silent): the released code clips gradients at this norm
LOG_EVERY = 10  # steps between rows of log.csv; an epoch's last step has a row, too
SAVE_EVERY = 600  # seconds; last.pt is also saved after each epoch
PAPER = {"backbone": "RN101", "epochs": 25, "lr": 3.57e-5}
DEMO = {"backbone": "tiny", "epochs": 3, "lr": 2e-3}  # it starts from random weights
START = {"step": 0, "best": np.inf, "tables": {"log.csv": "", "metrics.csv": ""}}  # of a new run


class Run:
    """A training run. `extras.released` overrides the five methods after `__init__`."""

    def __init__(self, args: Namespace):
        self.args = args
        self.out = Path(args.out)
        self.device = data.choose_device(args.device)
        self.rank = int(os.environ.get("RANK", "0"))
        self.n_processes = int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun
        scale = {"depth_scale": args.depth_scale, "max_depth": args.max_depth}
        self.dataset = data.DepthDataset(args.data, args.root, args.train_split, True, **scale)
        self.test_set = data.DepthDataset(args.data, args.root, args.test_split, **scale)
        self.per_epoch = self.steps_per_epoch()
        self.n_steps = args.epochs * self.per_epoch
        if args.batch_size % self.n_processes or not self.per_epoch:
            raise InputError("--batch-size exceeds the pairs, or is no multiple of the processes")
        torch.manual_seed(args.seed)
        self.model = cabins.load_checkpoint(args.last) if args.last else self.new_model()
        if self.n_processes > 1 and self.device.type == "cuda":  # SyncBatchNorm needs GPUs
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.model.to(self.device).train()
        self.optimizer = AdamW(self.trained_parameters(), args.lr, weight_decay=0.1, fused=True)
        saved = cabins.read_checkpoint(args.last) if args.last else START
        self.step = saved["step"]
        self.best = saved["best"]  # the lowest AbsRel so far
        self.tables = saved["tables"]
        if args.last:
            self.optimizer.load_state_dict(saved["optimizer"])
        # The rate rises from lr / 25 to lr and falls to lr / 2500. Momentum goes 0.95, 0.85, 0.95.
        cycle = {"final_div_factor": 100, "last_epoch": self.step - 1}
        self.scheduler = lr_scheduler.OneCycleLR(self.optimizer, args.lr, self.n_steps, **cycle)
        self.network = self.model
        if self.n_processes > 1:  # each has its own loss, and gradients are averaged, as released
            torch.distributed.init_process_group(timeout=timedelta(days=1))  # while one validates
            self.network = nn.parallel.DistributedDataParallel(self.model)
        self.network = torch.compile(self.network) if args.compile else self.network

    def new_model(self) -> cabins.CaBins:
        """The network at the start of training, with CLIP's weights or those of --init."""
        args = self.args
        longer_side = self.dataset.recipe.longer_side or max(self.dataset.frame_size)
        frame = {"max_depth": self.dataset.recipe.max_depth, "longer_side": longer_side}
        config = cabins.Config(args.backbone, args.distance_class, **frame)
        if args.init:
            content = cabins.read_checkpoint(args.init)
            print(f"{args.init} was trained for depths up to {content['config']['max_depth']} m")
            return cabins.load_strictly(cabins.CaBins(config), content["model"], args.init)
        return cabins.CaBins(config, None if args.clip == "none" else cabins.load_clip(args.clip))

    def steps_per_epoch(self) -> int:
        """The whole batches. NOTE(differs): The released code keeps the last, smaller one, too."""
        return len(self.dataset) // self.args.batch_size

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimizer gets: all but the text encoder."""
        # NOTE(differs): The released optimizer has the token embedding, but neither p nor γ.
        return [p for p in self.model.parameters() if p.requires_grad]

    def order(self, epoch: int) -> list[list[int]]:
        """This process's share of each batch. NOTE(differs): The released code never reshuffles."""
        seed = self.seed() // 2 + epoch  # of 63 bits
        pairs = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(seed))
        batches = pairs.split(self.args.batch_size)[: self.per_epoch]
        return [batch[self.rank :: self.n_processes].tolist() for batch in batches]

    def loss(self, prediction: cabins.Prediction, depth: Tensor) -> Tensor:
        """Eq. 8 for this process's share of a batch."""
        return cabins.total_loss(prediction, depth, self.model.config.min_depth)

    def seed(self, *numbers: int) -> int:
        """A seed of 64 bits from the run's own and other numbers, such as the step's."""
        sequence = np.random.SeedSequence([self.args.seed, *numbers])
        return int(sequence.generate_state(1, np.uint64)[0])

    def learn(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Take one step. Returns loss and gradient norm, which are still on the device."""
        self.step += 1
        image, depth = (batch[k].to(self.device, non_blocking=True) for k in ("image", "depth"))
        # All that is random depends on the seed, the step and the process, so a run can be resumed.
        torch.manual_seed(self.seed(self.step, self.rank))
        image, depth = data.augment(image, depth, self.dataset.recipe)
        torch.manual_seed(self.seed(self.step, self.n_processes + self.rank))  # for dropout
        with torch.autocast(self.device.type, torch.bfloat16, self.args.amp == "bf16"):
            prediction = self.network(image)
        loss = self.loss(prediction, depth)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.scheduler.step()
        return loss.detach(), norm

    def train(self) -> None:
        """Train to the last epoch. The first process logs, saves and validates."""
        if self.rank == 0:
            self.open_folder()
        info = {"data": {"name": self.args.data, "depth_scale": self.dataset.recipe.depth_scale}}
        next_save = time.monotonic() + SAVE_EVERY
        # A run that was saved at the end of an epoch begins with the validation of that epoch.
        for epoch in range(max(self.step - 1, 0) // self.per_epoch, self.args.epochs):
            data.use_tf32(True)
            batches = self.order(epoch)[self.step - epoch * self.per_epoch :]
            loader = data.load(self.dataset, self.device, self.args.workers, batch_sampler=batches)
            for batch in tqdm(loader, f"epoch {epoch + 1}", disable=self.rank > 0 or None):
                lr = self.scheduler.get_last_lr()[0]
                loss, norm = self.learn(batch)
                is_end = self.step % self.per_epoch == 0
                if self.rank > 0 or not (is_end or self.step % LOG_EVERY == 0):
                    continue
                if not torch.isfinite(loss + norm):  # the weights are lost
                    raise InputError(f"step {self.step}: loss {loss}, norm {norm}; lower --lr")
                row = {"step": self.step, "epoch": self.step / self.per_epoch, "loss": loss.item()}
                data.append_row(self.out / "log.csv", {**row, "norm": norm.item(), "lr": lr})
                if is_end or time.monotonic() > next_save:
                    more = {**info, "step": self.step, "best": self.best}  # without folders' names
                    more["tables"] = {name: (self.out / name).read_text() for name in self.tables}
                    more["optimizer"] = self.optimizer.state_dict()
                    cabins.save_checkpoint(self.out / "last.pt", self.model, **more)
                    next_save = time.monotonic() + SAVE_EVERY
            if self.rank == 0:
                metrics = evaluation.evaluate(self.model, self.test_set, self.args.workers)
                row = {"step": self.step, "epoch": epoch + 1, **metrics}
                data.append_row(self.out / "metrics.csv", row)
                tqdm.write(", ".join(f"{name} {round(value, 3)}" for name, value in row.items()))
                if metrics["abs_rel"] < self.best:
                    self.best = metrics["abs_rel"]
                    cabins.save_checkpoint(self.out / "best.pt", self.model, **info, step=self.step)
        if self.n_processes > 1:
            torch.distributed.destroy_process_group()

    def open_folder(self) -> None:
        """Make the folder of a new run, or bring the tables of a resumed one back to its step."""
        print(f"training on {data.describe(self.dataset)}")
        print(f"testing on {data.describe(self.test_set)}")
        n_trained = sum(p.numel() for p in self.trained_parameters())
        print(f"{n_trained:,} parameters learn on {self.n_processes} x {self.device}")
        if self.out.exists() and not self.args.resume:
            raise InputError(f"{self.out} exists: choose another --out, or add --resume auto")
        self.out.mkdir(parents=True, exist_ok=True)
        if not self.args.last:
            commit = subprocess.getoutput(f'git -C "{Path(__file__).parent}" rev-parse HEAD')
            content = {"options": vars(self.args), "torch": torch.__version__, "commit": commit}
            (self.out / "args.json").write_text(json.dumps(content, indent=1))
        for name, text in self.tables.items():
            (self.out / name).write_text(text)


def parse_args(argv: list[str] | None = None, script: str = "train.py", **defaults) -> Namespace:
    """The options of a run. A run that is resumed takes them from its args.json."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    add = parser.add_argument
    add("--data", choices=data.DATASETS, default="toy", help="default: toy, drawn on the fly")
    add("--train-split", type=os.path.abspath, metavar="FILE", help="list of training pairs")
    add("--test-split", type=os.path.abspath, metavar="FILE", help="list of test pairs")
    data.add_options(parser)
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
    add("--resume", metavar="LAST.pt|auto", help="continue a run; auto: OUT/last.pt, if it exists")
    args = parser.parse_args(argv)
    out = args.out or os.path.join("runs", args.data)
    last = os.path.join(out, "last.pt") if args.resume == "auto" else args.resume
    saved = {}
    if last and (args.resume != "auto" or os.path.exists(last)):
        file = Path(last).with_name("args.json")
        if Path(last).name != "last.pt" or not file.exists():
            parser.error(f"{last} is not the last.pt of a run, with its args.json beside it")
        saved = json.loads(file.read_text())["options"] | {"last": last, "out": str(file.parent)}
    parser.set_defaults(out=out, last=None, **(DEMO if args.data == "toy" else PAPER))
    parser.set_defaults(**{**defaults, **saved, "script": script})
    args = parser.parse_args(argv)  # what is typed wins
    for name, value in saved.items():
        if getattr(args, name) != value and name not in ("root", "device", "workers", "resume"):
            parser.error(f"the run began with {name} {value}: --init {last} starts a new run")
    is_gpu = data.choose_device(args.device).type == "cuda"
    args.amp = args.amp or ("bf16" if is_gpu and torch.cuda.is_bf16_supported(False) else "off")
    args.clip = args.clip or ("none" if args.backbone == "tiny" else args.backbone)
    return args


def main() -> None:
    Run(parse_args()).train()


if __name__ == "__main__":
    data.run_command(main)
