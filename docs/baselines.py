"""Two baselines that do not look at the image: python -m docs.baselines [--data list --root DIR …]

One depth for all pixels, the best that there is by AbsRel, and the mean depth map of the training set.
"""

import argparse

import torch

import cabins
import data
from eval import Predict, evaluate, format_table


def best_constant(test_set: data.DepthDataset) -> float:
    """The depth of least AbsRel over all pixels of the test set, in metres.

    Σ |c - d*| / d* is least at the median of the depths, weighted with 1 / d*.
    """
    some = [test_set[i]["depth"][:, ::4, ::4] for i in range(len(test_set))]
    depths = torch.cat([depth[depth > 0] for depth in some]).sort().values
    if not len(depths):
        raise ValueError(f"none of the {len(test_set)} images has ground truth to measure against")
    weights = (1 / depths).cumsum(0)
    return depths[torch.searchsorted(weights, weights[-1] / 2)].item()


def mean_depth(dataset: data.DepthDataset, n: int = 256) -> torch.Tensor:
    """The mean of the first n depth maps (1, 1, h, w), in metres; 0 where none has a depth."""
    some = torch.stack([dataset[i]["depth"] for i in range(min(n, len(dataset)))])
    return some.sum(0, keepdim=True) / (some > 0).sum(0, keepdim=True).clamp(min=1)


def constantly(depth: torch.Tensor) -> Predict:
    """The function from images to depth that gives this map, whatever the image."""
    return lambda image: cabins.resize(depth, image.shape[-2:])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data.add_data_options(parser).add_argument("--data", choices=data.DATASETS, default="toy")
    args = parser.parse_args(argv)
    scale = (args.depth_scale, args.max_depth)
    dataset = data.DepthDataset(args.data, args.root, args.train_split, True, *scale)
    test_set = data.DepthDataset(args.data, args.root, args.test_split, False, *scale)
    constant = best_constant(test_set)
    maps = {f"best constant, {constant:.2f} m": torch.full((1, 1, 1, 1), constant)}
    maps["mean of training depths"] = mean_depth(dataset)
    rows = {name: evaluate(constantly(depth), test_set) for name, depth in maps.items()}
    print(format_table(args.data, rows))


if __name__ == "__main__":
    data.run_command(main)
