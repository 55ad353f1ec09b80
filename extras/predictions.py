"""Measure a network and keep its predictions: python -m extras.predictions CKPT --out DIR

This takes eval.py's options of network and data, and prints what eval.py prints. DIR is a new
folder. It gets results.csv, with the rows and their protocol, and a 16-bit PNG for each prediction,
in the scale of the data set's PNGs and clipped to the range, as it is measured. Folders below DIR
are those of the images. KITTI's predictions are the crops of 352 x 1216 pixels that are measured,
the size of the test images of KITTI's own benchmark.
"""

import argparse
from pathlib import Path

from torch import Tensor

import cabins
import data
import eval as evaluation
from extras.pictures import names_below, write_depth


def file_names(pairs: list[tuple]) -> list[str]:
    """A file name, without suffix, for each pair of a data set: where its image lies, or a number.

    The pairs of NYU's .mat and the toy rooms are no files.
    """
    if isinstance(pairs[0][1], int):
        return [f"{number:05}" for _, number in pairs]
    return names_below([image for image, _ in pairs])


def keeping(
    predict: evaluation.Predict, folder: Path, names: list[str], recipe: data.Recipe
) -> evaluation.Predict:
    """The function `predict`, which now also writes its depth to `folder`, one name at a time."""
    remaining = iter(names)

    def predict_and_write(image: Tensor) -> Tensor:
        depth = predict(image).cpu()
        low, high = cabins.Config.min_depth, recipe.max_depth
        path = folder / f"{next(remaining)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        clipped = depth[0, 0].nan_to_num(low, high, low).clamp(low, high)
        write_depth(str(path), clipped.numpy(), recipe.depth_scale)
        return depth

    return predict_and_write


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m extras.predictions", description=__doc__, formatter_class=raw
    )
    evaluation.add_options(parser)
    about = "a new folder to write to"
    parser.add_argument("--out", metavar="DIR", required=True, help=about)
    args = parser.parse_args()
    model, dataset = evaluation.open_checkpoint(args)
    out = Path(args.out)
    out.mkdir(parents=True)
    predict = evaluation.predictor(model, not args.no_flip)
    predict = keeping(predict, out, file_names(dataset.pairs), dataset.recipe)
    args.csv = out / "results.csv"
    evaluation.measure(args, predict, dataset, model.config.longer_side)


if __name__ == "__main__":
    data.run_command(main)
