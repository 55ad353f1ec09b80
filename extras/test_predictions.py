"""python -m pytest -q extras"""

import csv
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import cabins
import data
import eval as evaluation
from extras import predictions
from test_cabins import save_network

TINY = cabins.Config(backbone="tiny", longer_side=128)


@pytest.fixture(scope="module")
def model() -> cabins.CaBins:
    torch.manual_seed(0)
    return cabins.CaBins(TINY).eval()


@pytest.fixture
def pairs(tmp_path):
    """A folder of two pairs in rooms/, named by list.txt. The first is larger than the network's."""
    rng, lines = np.random.default_rng(0), []
    (tmp_path / "rooms").mkdir()
    for name, height, width in (("1", 192, 256), ("2", 96, 128)):
        image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        image.resize((width, height)).save(tmp_path / "rooms" / f"{name}.jpg")
        depth = Image.fromarray(np.full((height, width), 3000, np.uint16))
        depth.save(tmp_path / "rooms" / f"{name}.png")
        lines.append(f"rooms/{name}.jpg rooms/{name}.png\n")
    (tmp_path / "list.txt").write_text("".join(lines))
    return tmp_path


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["predictions", *map(str, arguments), "--workers", "0"])
    predictions.main()


def test_kept_predictions_give_the_same_row(model, pairs, monkeypatch, capsys):
    checkpoint, split, out = pairs / "a.pt", pairs / "list.txt", pairs / "out"
    known = {"data": "list", "root": str(pairs), "test_split": str(split)}
    save_network(checkpoint, model, args=known)  # it says on what it was trained
    for options in ([], [], ["--no-flip"]):
        run(monkeypatch, checkpoint, "--out", out, *options)
    first, _, last = rows = [*csv.DictReader((out / "results.csv").read_text().splitlines())]
    assert "averaging on" in first["protocol"] != last["protocol"] and str(split) in last["list"]
    assert {row["checkpoint"] for row in rows} == {str(checkpoint)}
    folders = {*out.glob("predictions_*/")}
    assert {out / row["predictions"] for row in rows} == folders and len(folders) == 3
    names = ["rooms_1.png", "rooms_2.png"]
    assert all({path.name for path in folder.iterdir()} == {*names} for folder in folders)

    dataset = data.DepthDataset("list", pairs, split)
    row = evaluation.evaluate(evaluation.predictor(model, longer_side=128), dataset)
    kept = (np.asarray(Image.open(out / first["predictions"] / name)) / 1000 for name in names)
    again = evaluation.evaluate(lambda _: next(kept)[None, None], dataset)
    for metric, value in row.items():
        assert float(first[metric]) == pytest.approx(value, rel=1e-9)
        assert again[metric] == pytest.approx(value, rel=1e-3)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["eval.py", str(checkpoint), "--no-flip", "--workers", "0"])
    evaluation.main()
    printed = capsys.readouterr().out
    run(monkeypatch, checkpoint, "--out", out, "--no-flip")
    assert capsys.readouterr().out == printed  # it prints what eval.py prints


def test_predictions_are_clipped_and_written_in_the_scale_of_the_data(tmp_path):
    for recipe, depth, written in (
        (data.DATASETS["kitti"], 79.6, 20378),
        (data.DATASETS["kitti"], 99.0, 80 * 256),
        (data.DATASETS["nyu"], 9.6, 9600),
        (data.Recipe(max_depth=80.0), 79.6, 65535),  # the most that 16 bits hold
    ):
        predict = predictions.keeping(
            lambda image, depth=depth: torch.full((1, 1, 2, 2), depth), tmp_path, ["a"], recipe
        )
        assert predict(None).max() == pytest.approx(min(depth, recipe.max_depth))
        assert (np.asarray(Image.open(tmp_path / "a.png")) == written).all()


def test_each_pair_has_a_file_name_of_its_own():
    pairs = [("root/a/1.jpg", "d.png"), ("root/a_1.png", "d.png"), ("root/b.c/1.jpg", "d.png")]
    assert predictions.file_names(pairs, "root") == ["a_1", "a_1_", "b.c_1"]
    assert predictions.file_names([("root/nyu.mat", 0), ("root/nyu.mat", 8)], "root") == [
        "nyu 0",
        "nyu 8",
    ]
    assert predictions.file_names([("room", 3)], None) == ["room 3"]


def test_eval_names_this_script(model, tmp_path, monkeypatch):
    save_network(tmp_path / "a.pt", model, args={"data": "toy"})
    monkeypatch.setattr(sys, "argv", ["eval.py", str(tmp_path / "a.pt"), "--out", str(tmp_path)])
    with pytest.raises(ValueError, match=predictions.__name__):
        evaluation.main()
