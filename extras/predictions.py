"""Measure a network and keep its predictions: python -m extras.predictions CKPT --out DIR

This takes eval.py's options of data and network, and prints what eval.py prints. It also adds the
rows to DIR/results.csv, and keeps the predictions in DIR/predictions_DATE_TIME/. They are clipped to
the range, as they are measured, and written as 16-bit PNGs in the scale of the data set's PNGs.
"""

import argparse
import os
import time
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

import cabins
import data
from eval import (
    Predict,
    add_network_options,
    evaluate_windows,
    format_table,
    new_name,
    open_data_set,
    open_network,
    predictor,
    protocol,
    side_for,
    write_depth,
)


def file_names(pairs: Iterable, root: str | Path | None) -> list[str]:
    """A file name, without suffix, for each pair of a data set: the image's path below the root.

    NYU's .mat and the toy rooms have no images in files. Their pairs are named after their numbers.
    """
    names, taken = [], set()
    for image, depth in pairs:
        if isinstance(depth, int):
            name = f"{Path(image).stem} {depth}"
        else:
            name = os.path.splitext(os.path.relpath(image, root))[0].replace(os.sep, "_")
        names.append(new_name(name, taken))
    return names


def keeping(predict: Predict, folder: Path, names: list[str], recipe: data.Recipe) -> Predict:
    """The function `predict`, which now also writes its depth to `folder`, one name at a time."""
    remaining = iter(names)

    def predict_and_write(image: Tensor) -> Tensor:
        depth = predict(image).clamp(cabins.Config.min_depth, recipe.max_depth).cpu()
        path = f"{folder / next(remaining)}.png"
        write_depth(path, depth[0, 0].numpy(), recipe.depth_scale)
        return depth

    return predict_and_write


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    options = {"description": __doc__, "formatter_class": raw}
    parser = data.Parser(prog="python -m extras.predictions", **options)
    add_network_options(parser)
    about = "folder of results.csv and of the predictions"
    parser.add_argument("--out", metavar="DIR", required=True, help=about)
    args = parser.parse_args()
    data.use_tf32(False)
    model, saved = open_network(args)
    dataset = open_data_set(args, model, saved)

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    name = new_name(time.strftime("predictions_%Y-%m-%d_%H-%M-%S"), {*os.listdir(out)})
    source = {"checkpoint": str(Path(args.checkpoint).resolve()), "predictions": name}
    source["list"] = f"{args.test_split or 'the default'} ({dataset.checksum:08x})"
    (out / name).mkdir()

    flip, side = not args.no_flip, side_for(model, dataset)
    predict = predictor(model, flip, side)
    predict = keeping(predict, out / name, file_names(dataset.pairs, args.root), dataset.recipe)
    windows = evaluate_windows(predict, dataset, args.workers)
    rows = {f"{Path(args.checkpoint).name}, {window}": row for window, row in windows.items()}
    lines = [protocol(dataset, window, flip, side) for window in windows]
    print(*lines, format_table(args.data, rows), sep="\n")
    for (label, row), line in zip(rows.items(), lines):
        data.append_row(out / "results.csv", {"label": label, **source, "protocol": line, **row})


if __name__ == "__main__":
    data.run_command(main)
