"""Two baselines that do not look at the image: python -m extras.baselines [--data NAME …]

The first predicts one depth for all pixels of all images, the best there is by AbsRel. The second
predicts the mean depth map of the training set.
"""

import argparse

import torch

import cabins
import data
from eval import Predict, evaluate, format_table


def best_constant(test_set: data.DepthDataset) -> float:
    """The depth, in metres, that has the least AbsRel over all pixels of the test set.

    Σ |c - d*| / d* is least at the median of the depths d*, weighted by 1 / d*. Every fourth row
    and column is enough to find it.
    """
    depths = [test_set[i]["depth"][:, ::4, ::4] for i in range(len(test_set))]
    depths = torch.cat([depth[depth > 0] for depth in depths]).sort().values
    weights = (1 / depths).cumsum(0)
    return depths[torch.searchsorted(weights, weights[-1] / 2)].item()


def mean_depth(dataset: data.DepthDataset, n: int = 256) -> torch.Tensor:
    """The mean of the first n depth maps (1, 1, h, w), in metres; 0 where none has a depth."""
    depths = torch.stack([dataset[i]["depth"] for i in range(min(n, len(dataset)))])
    return depths.sum(0, keepdim=True) / (depths > 0).sum(0, keepdim=True).clamp(min=1)


def constantly(depth: torch.Tensor) -> Predict:
    """A function from images to depth that returns this map for every image, at its size."""
    return lambda image: cabins.resize(depth, image.shape[-2:])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m extras.baselines", description=__doc__.split(":")[0]
    )
    add = parser.add_argument
    add("--data", choices=data.DATASETS, default="toy", help="default: toy")
    add("--train-split", metavar="FILE", help="list of training pairs")
    add("--test-split", metavar="FILE", help="list of test pairs")
    data.add_options(parser)
    args = parser.parse_args()
    scale = {"depth_scale": args.depth_scale, "max_depth": args.max_depth}
    dataset = data.DepthDataset(args.data, args.root, args.train_split, True, **scale)
    test_set = data.DepthDataset(args.data, args.root, args.test_split, **scale)
    print(f"testing on {args.data}: {data.describe(test_set)}")
    constant = best_constant(test_set)
    maps = {
        f"best constant, {constant:.2f} m": torch.full((1, 1, 1, 1), constant),
        "mean of training depths": mean_depth(dataset),
    }
    device = data.choose_device(args.device)
    rows = {}
    for name, depth in maps.items():
        rows[name] = evaluate(constantly(depth.to(device)), test_set, args.workers)
    print(format_table(test_set, rows))


if __name__ == "__main__":
    data.run_command(main)
