"""python -m pytest -q extras"""

import sys

import numpy as np
import pytest
import torch

import data
from eval import evaluate
from extras import baselines


def test_the_best_constant_is_the_best(monkeypatch, capsys):
    monkeypatch.setattr(data, "TOY_ROOMS", {"train": range(4), "test": range(1_000_000, 1_000_003)})
    rooms = data.DepthDataset("toy")
    best = baselines.best_constant(rooms)
    errors = {}
    for factor in (0.9, 1.0, 1.1):
        predict = baselines.constantly(torch.full((1, 1, 1, 1), best * factor))
        errors[factor] = evaluate(predict, rooms, 0)["abs_rel"]
    assert errors[1.0] == min(errors.values())
    monkeypatch.setattr(sys, "argv", ["baselines"])
    baselines.main()
    lines = capsys.readouterr().out.splitlines()
    assert "3 pairs" in lines[0] and f"{best:.2f} m" in lines[2]
    assert float(lines[2].split()[4]) == pytest.approx(errors[1.0], abs=1e-3)
    assert len(lines) == 4


def test_the_mean_leaves_out_what_has_no_depth(monkeypatch):
    maps = [np.full((96, 128), depth, np.float32) for depth in (2, 4)]
    maps[1][:, 64:] = 0
    monkeypatch.setattr(data, "TOY_ROOMS", {"train": range(2), "test": range(1)})
    monkeypatch.setattr(data, "draw_room", lambda i: (np.zeros((96, 128, 3), np.uint8), maps[i]))
    mean = baselines.mean_depth(data.DepthDataset("toy", train=True))
    assert mean.shape == (1, 1, 96, 128) and mean.unique().tolist() == [2, 3]
