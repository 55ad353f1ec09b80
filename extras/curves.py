"""Draw how runs learn: python -m extras.curves RUN …

RUN is a folder of train.py, such as runs/nyu. RUN/curves.png shows the loss of its log.csv, and
AbsRel and δ < 1.25 of its metrics.csv, over the epochs. The run may still be going on.
"""

import argparse
import csv
from pathlib import Path

import data
from cabins import InputError

PANELS = {"loss": "log.csv", "abs_rel": "metrics.csv", "d1": "metrics.csv"}  # column: its table


def read_curve(table: Path, name: str) -> tuple[list[float], list[float]]:
    """The epochs of a table, and its column `name`. A row that was cut off is left out."""
    lines = [line for line in table.read_text().splitlines(True) if line.endswith("\n")]
    rows = [*csv.DictReader(lines)]
    return [float(row["epoch"]) for row in rows], [float(row[name]) for row in rows]


def draw_curves(run: Path) -> str:
    """Draw the tables of a run into its folder; return a line about the figure."""
    from matplotlib.figure import Figure

    if not (run / "log.csv").exists():
        raise InputError(f"{run}/log.csv is missing; is this the folder of a run?")
    has_metrics = (run / "metrics.csv").exists()
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axis, (name, file) in zip(figure.subplots(1, len(PANELS)), PANELS.items()):
        if has_metrics or file == "log.csv":
            axis.plot(*read_curve(run / file, name), marker=".")
        axis.set(title=name, xlabel="epoch", xlim=(0, None), ylim=(0, None))
    figure.savefig(run / "curves.png", bbox_inches="tight")
    return f"{run}/curves.png" + ("" if has_metrics else ", without metrics.csv, which is missing")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m extras.curves", description=__doc__, formatter_class=raw
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folder of a run")
    for run in parser.parse_args().runs:
        print(draw_curves(run))


if __name__ == "__main__":
    data.run_command(main)
