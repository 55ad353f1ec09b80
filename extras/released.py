"""Train as the released code does, where it differs from the paper.

python -m extras.released --data nyu --root DIR --out runs/nyu_released     and train.py's options

The released code is github.com/EunjinSon1/CaBins at 4e9c9a0. The overrides below are all that
train.py does otherwise. README's table says what is not followed.
"""

import math

import torch
from torch import Tensor, nn

import cabins
import data
import train
from cabins import InputError


def unbiased_silog_loss(depth: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Eq. 6 with the unbiased variance of torch.var, which is n / (n - 1) times the biased one."""
    n = mask.sum().clamp(min=1)
    g = torch.where(mask, depth, 1).log() - torch.where(mask, target, 1).log()  # 0 outside mask
    mean, mean_square = g.sum() / n, g.square().sum() / n
    square = mean_square - cabins.LAMBDA * mean.square()
    square = square + (mean_square - mean.square()) / (n - 1).clamp(min=1)
    return cabins.ALPHA * square.clamp(min=1e-12).sqrt()  # the root of 0 has no finite gradient


class ReleasedRun(train.Run):
    """A run of train.py with the released code's recipe. The float32 of `main` belongs to it."""

    def new_model(self) -> cabins.CaBins:
        """Prompts of std 0.88 (a normal of std 1, cut at ±2), 44 times ours, or those of --init."""
        model = super().new_model()
        if not self.args.init:
            nn.init.trunc_normal_(model.prompts, std=1.0)
        return model

    def steps_per_epoch(self) -> int:
        """The last, smaller batch is kept."""
        n_last = len(self.dataset) % self.args.batch_size
        if 0 < n_last < self.n_processes:
            raise InputError(f"the last batch has {n_last} pairs for {self.n_processes} processes")
        return math.ceil(len(self.dataset) / self.args.batch_size)

    def trained_parameters(self) -> list[nn.Parameter]:
        """CLIP's token embedding learns. The prompts and γ do not.

        Their gradients are never cleared, because `zero_grad` is the optimizer's. They pile up, and
        they count in the norm that is clipped. A resumed run starts without the pile.
        """
        self.model.clip.token_embedding.requires_grad_(True)
        fixed = {id(self.model.prompts), id(self.model.trans_decoder.gamma)}
        return [p for p in super().trained_parameters() if id(p) not in fixed]

    def order(self, epoch: int) -> list[list[int]]:
        """The order of the pairs is the same in every epoch."""
        return super().order(0)

    def loss(self, prediction: cabins.Prediction, depth: Tensor) -> Tensor:
        """Eq. 8 with the unbiased variance in Eq. 6."""
        mask = depth > self.model.config.min_depth
        d = cabins.resize(prediction.depth, depth.shape[-2:])
        bins = cabins.chamfer_loss(prediction.centers, depth, mask)
        return unbiased_silog_loss(d, depth, mask) + cabins.BETA * bins


def main() -> None:
    ReleasedRun(train.parse_args(script="extras.released", amp="off")).train()


if __name__ == "__main__":
    data.run_command(main)
