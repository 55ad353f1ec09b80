"""python -m pytest -q extras"""

import csv
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import cabins
import data
import eval as evaluation
from extras import predictions

TINY = cabins.Config(backbone="tiny", longer_side=128)


@pytest.fixture(scope="module")
def model() -> cabins.CaBins:
    torch.manual_seed(0)
    return cabins.CaBins(TINY).eval()


@pytest.fixture
def pairs(tmp_path):
    """Two pairs below rooms/, named by list.txt. The first is larger than the network's images."""
    rng, lines = np.random.default_rng(0), []
    (tmp_path / "rooms" / "deep").mkdir(parents=True)
    for name, height, width in (("1", 192, 256), ("deep/2", 96, 128)):
        image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        image.resize((width, height)).save(tmp_path / "rooms" / f"{name}.jpg")
        depth = Image.fromarray(np.full((height, width), 3000, np.uint16))
        depth.save(tmp_path / "rooms" / f"{name}.png")
        lines.append(f"rooms/{name}.jpg rooms/{name}.png\n")
    (tmp_path / "list.txt").write_text("".join(lines))
    return tmp_path


def run(monkeypatch, *arguments) -> None:
    options = ["--workers", "0", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["predictions", *map(str, arguments), *options])
    predictions.main()


def test_kept_predictions_give_the_row_that_eval_prints(model, pairs, monkeypatch, capsys):
    checkpoint, split = pairs / "a.pt", pairs / "list.txt"
    cabins.save_checkpoint(checkpoint, model)
    data_set = ("--data", "list", "--root", pairs, "--split", split)
    for flip, options in (("on", ()), ("off", ("--no-flip",))):
        out = pairs / f"out_{flip}"
        run(monkeypatch, checkpoint, *data_set, *options, "--out", out)
        printed = capsys.readouterr().out
        (row,) = csv.DictReader((out / "results.csv").read_text().splitlines())
        assert f"averaging {flip}" in row["protocol"] and row["protocol"] in printed
        assert (row["checkpoint"], row["window"]) == (str(checkpoint), "whole")
        names = ["1.png", "deep/2.png"]  # below rooms/, where all images lie
        files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
        assert files == {*names, "results.csv"}

        dataset = data.DepthDataset("list", pairs, split)
        expected = evaluation.evaluate(evaluation.predictor(model, not options), dataset, 0)
        kept = (np.asarray(Image.open(out / name)) / 1000 for name in names)
        again = evaluation.evaluate(lambda _, kept=kept: next(kept)[None, None], dataset, 0)
        for metric, value in expected.items():
            assert float(row[metric]) == pytest.approx(value, rel=1e-9)
            assert again[metric] == pytest.approx(value, rel=1e-3)

        evals = ["eval.py", checkpoint, *data_set, *options, "--workers", 0, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [*map(str, evals)])
        evaluation.main()
        assert capsys.readouterr().out == printed
    with pytest.raises(FileExistsError):
        run(monkeypatch, checkpoint, *data_set, "--out", out)


def test_predictions_are_clipped_and_written_in_the_scale_of_the_data(tmp_path):
    for recipe, depth, written in (
        (data.DATASETS["kitti"], 79.6, 20378),
        (data.DATASETS["kitti"], 99.0, 80 * 256),
        (data.DATASETS["nyu"], 9.6, 9600),
        (data.DATASETS["nyu"], math.nan, 1),  # as it is measured
        (data.Recipe(max_depth=80.0), 79.6, 65535),  # the most that 16 bits hold
    ):
        predict = predictions.keeping(
            lambda image, depth=depth: torch.full((1, 1, 2, 2), depth), tmp_path, ["b/a"], recipe
        )
        assert predict(None)[0, 0, 0, 0].item() == pytest.approx(depth, nan_ok=True)
        assert (np.asarray(Image.open(tmp_path / "b" / "a.png")) == written).all()


def test_pairs_that_are_no_files_are_named_by_their_numbers():
    assert predictions.file_names([("root/nyu.mat", 0), ("root/nyu.mat", 8)]) == ["00000", "00008"]
    assert predictions.file_names([("room", 1_000_000)]) == ["1000000"]
