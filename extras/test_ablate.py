"""python -m pytest -q extras"""

import sys

import pytest
import torch

import cabins
import data
import train
from eval import evaluate, predictor
from extras import ablate
from test_cabins import save_network

SILENCED = ["s = 0, whole", "s of the classes in reverse, whole", "one text for all classes, whole"]
TINY = cabins.Config(backbone="tiny", longer_side=128)


@pytest.fixture
def model():
    """A network whose decoder makes use of s, and whose texts differ."""
    torch.manual_seed(0)
    model = cabins.CaBins(TINY).eval()
    with torch.no_grad():
        model.depth_decoder.fuse.weight[:, -8:] *= 100
        model.trans_decoder.gamma.fill_(1.0)
        model.depth_decoder.logits.weight *= 30
    return model


@pytest.fixture
def rooms(monkeypatch):
    monkeypatch.setattr(data, "TOY_ROOMS", {"train": range(2), "test": range(1_000_000, 1_000_002)})
    return data.DepthDataset("toy")


def test_rows_with_the_text_silenced(model, rooms):
    predict = predictor(model, flip=False)
    before = evaluate(predict, rooms)
    rows = ablate.ablate(model, predict, rooms, workers=0)
    assert evaluate(predict, rooms) == before  # the network is as it was
    assert list(rows) == SILENCED
    silent, reverse, _ = SILENCED
    assert len({row["abs_rel"] for row in [before, *rows.values()]}) == 4
    weight = model.depth_decoder.fuse.weight
    with torch.no_grad():
        weight[:, -8:] = weight[:, -8:].flip(1).clone()
        assert evaluate(predict, rooms)["rmse"] == pytest.approx(rows[reverse]["rmse"], rel=1e-5)
        weight[:, -8:] = 0
        assert evaluate(predict, rooms)["rmse"] == pytest.approx(rows[silent]["rmse"], rel=1e-5)


def test_text_angle_is_a_mean_of_angles(model, monkeypatch):
    def turned(e):  # by 0.5 rad for each metre
        angle = 0.5 * e
        return torch.stack([angle.cos(), angle.sin()], dim=2)

    monkeypatch.setattr(model, "encode_prompts", turned)
    assert ablate.text_angle(model, 1.0) == pytest.approx(0.5, rel=1e-6)
    assert ablate.text_angle(model, 1e-4) == pytest.approx(5e-5, rel=1e-4)


def test_gradient_sizes_are_those_that_adam_saw(model):
    groups = train.parameter_groups(model)
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    for name, parameter in model.named_parameters():
        size = 1e-9 if name.startswith("trans_decoder") else 3e-5
        sign = 1 - 2 * (torch.arange(parameter.numel()) % 2).view_as(parameter)
        parameter.grad = size * sign if parameter.requires_grad else None
    for _ in range(3):
        optimizer.step()
    content = {"args": {}, "optimizer": optimizer.state_dict()}
    sizes = ablate.gradient_sizes(model, content)
    assert sizes["TransDecoder"][1] == pytest.approx(1e-9, rel=1e-3)
    assert sizes["gamma"] == (64, pytest.approx(1e-9, rel=1e-3))
    for part in ("image encoder", "bins", "depth decoder", "prompts"):
        assert sizes[part][1] == pytest.approx(3e-5, rel=1e-3)
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(n for n, _ in sizes.values()) == n


def test_the_command(model, rooms, tmp_path, monkeypatch, capsys):
    save_network(tmp_path / "best.pt", model, args={"data": "toy"})
    command = ["ablate", str(tmp_path / "best.pt"), "--workers", "0", "--no-flip"]
    monkeypatch.setattr(sys, "argv", command)
    ablate.main()
    printed = capsys.readouterr().out
    row = evaluate(predictor(model, flip=False), rooms)
    rows = [line.rsplit(maxsplit=8) for line in printed.splitlines() if ", whole " in line]
    assert [name for name, *_ in rows] == ["best.pt, whole", *SILENCED]
    assert rows[0][1] == f"{row['abs_rel']:.3f}"
    assert f"{ablate.text_angle(model, 1e-4):.3f}" in printed
