"""python -m pytest -q extras"""

import itertools
import math
import sys

import pytest
import torch

import cabins
import data
import train
from eval import evaluate_windows, predictor
from extras import ablate, released

ROWS = ["whole", "s = 0", "classes reversed", "one text"]
TINY = cabins.Config(backbone="tiny", longer_side=128)


@pytest.fixture
def model() -> cabins.CaBins:
    """A network whose decoder uses s, whose texts differ, and whose attention is not even."""
    torch.manual_seed(0)
    model = cabins.CaBins(TINY).eval()
    with torch.no_grad():
        model.depth_decoder.fuse.weight[:, -8:] *= 1e5
        model.trans_decoder.gamma.fill_(1.0)
        model.depth_decoder.classifier.weight *= 30
        model.trans_decoder.layers[-1].cross_attn.q_proj.weight *= 300
        model.trans_decoder.layers[-1].cross_attn.k_proj.weight *= 300
    return model


@pytest.fixture
def rooms(monkeypatch) -> data.DepthDataset:
    few = {"train": range(4), "test": range(1_000_000, 1_000_002)}
    monkeypatch.setattr(data, "TOY_ROOMS", few)
    return data.DepthDataset("toy")


def metrics(predict, rooms) -> dict[str, float]:
    return evaluate_windows(predict, rooms, workers=0)["whole"].metrics


def test_rows_with_the_text_silenced(model, rooms):
    predict = predictor(model, flip=False)
    before = metrics(predict, rooms)
    windows = ablate.silenced_rows(model, predict, rooms, workers=0)
    rows = {name: found["whole"].metrics for name, found in windows.items()}
    assert metrics(predict, rooms) == before == rows["whole"]  # the network is as it was
    assert list(rows) == ROWS
    errors = sorted(row["rmse"] for row in rows.values())
    assert all(b > 1.01 * a for a, b in itertools.pairwise(errors))
    weight, texts = model.depth_decoder.fuse.weight, model.encode_distances
    one_text = predictor(model, flip=False)
    model.encode_distances = lambda e: texts(e)[:, :1].expand(-1, 8, -1)
    assert metrics(one_text, rooms) == rows["one text"]
    model.encode_distances = texts
    with torch.no_grad():
        weight[:, -8:] = weight[:, -8:].flip(1).clone()
        reverse = rows["classes reversed"]["rmse"]
        assert metrics(predict, rooms)["rmse"] == pytest.approx(reverse, rel=1e-5)
        weight[:, -8:] = 0
        assert metrics(predict, rooms)["rmse"] == pytest.approx(rows["s = 0"]["rmse"], rel=1e-5)


def test_small_and_large_angles():
    a = torch.tensor([1.0, 0.0]).expand(4, 2)
    turned = torch.tensor([0.0, 1e-9, 0.5, math.pi], dtype=torch.float64)
    b = 3 * torch.stack([turned.cos(), turned.sin()], dim=1)
    assert torch.allclose(ablate.angle(a, b), turned, rtol=1e-6, atol=0)
    a = torch.randn(5, 64)
    assert ablate.angle(a, 3 * a.double()).max() < 1e-12  # more exact than float32


def test_digit_angle_is_a_mean_over_distances_of_the_whole_range(model, monkeypatch):
    seen = []

    def turned(e):  # by e² rad
        seen.append(e)
        return torch.stack([(e * e).cos(), (e * e).sin()], dim=2)

    monkeypatch.setattr(model, "encode_distances", turned)
    found = ablate.digit_angle(model, 0.1)
    (before, after) = seen[0]
    assert len(before) == 64 and torch.allclose(after - before, torch.tensor(0.1).double())
    assert before[0] == 1e-3 and after[-1] == 10
    assert torch.equal((before * 1e4).round() / 1e4, before)  # four decimals
    angles = (after * after - before * before) % (2 * math.pi)
    expected = torch.minimum(angles, 2 * math.pi - angles).mean().item()
    assert found == pytest.approx(expected, rel=1e-6)


def test_what_the_text_does_on_the_test_images(model, rooms, monkeypatch):
    def similarity(z, t):  # random, but always the same for one image
        seed = int(1e6 * z.abs().mean())
        return torch.randn(1, 8, 3, 4, generator=torch.Generator().manual_seed(seed))

    monkeypatch.setattr(cabins, "cosine_similarity", similarity)
    found, b = ablate.text_figures(model, rooms)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    turns, shares, centers, weights = [], [], [], []
    layer = model.trans_decoder.layers[-1].cross_attn
    attend, kept = cabins.multi_head_attention, {}

    def watched(q, k, v, n_heads, is_causal=False):
        out = attend(q, k, v, n_heads, is_causal)
        kept["last"] = (q, k, v, n_heads, out)  # the last call of TransDecoder is ours
        return out

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cabins, "multi_head_attention", watched)
        for i in range(2):
            image = rooms[i]["image"][None]
            _, z_bar, z = model.clip.visual(image)
            p = model(image)
            t = model.encode_distances(p.distances)
            after = model.trans_decoder(t, z_bar, z)
            q, k, v, n_heads, out = kept["last"]
            cosine = torch.cosine_similarity(t.double(), after.double(), dim=2)
            turns.append(cosine.acos().mean().item())
            best = p.similarity[0].flatten(1).argmax(0).tolist()
            shares.append(max(best.count(k) for k in range(8)) / 12)
            assert 1 / 8 < shares[-1] < 1
            centers.append(p.centers)
            heads = [x.unflatten(2, (n_heads, -1)).transpose(1, 2) for x in (q, k, v)]
            w = (heads[0] @ heads[1].mT / heads[0].shape[-1] ** 0.5).softmax(-1)
            assert torch.allclose((w @ heads[2]).transpose(1, 2).flatten(2), out, atol=1e-5)
            weights.append(w)
    assert layer.n_heads == n_heads
    assert shares[0] != shares[1] and turns[0] != turns[1]
    assert found["turn"] == pytest.approx(sum(turns) / 2, rel=1e-4)
    assert found["one_text_best"] == pytest.approx(sum(shares) / 2)
    weights = torch.cat(weights)
    assert weights.shape[-1] == 13 and weights.max() > 1.5 / 13  # a token of z̄, and 3 x 4 of z
    assert found["attention"] == pytest.approx(
        {"least": weights.min().item(), "greatest": weights.max().item(), "even": 1 / 13}, rel=1e-4
    )
    assert torch.allclose(cabins.bin_centers(b, 1e-3, 10.0), torch.cat(centers), atol=1e-5)


def test_eq_2_in_numbers():
    b = torch.tensor([[1.0, 1.0, 2.0, 4.0, 1.0, 1.0, 1.0, 1.0]]).double() / 12
    found = ablate.eq2_figures(b, n_cabins=2)
    for name, top, metre in (("10 m", 10, 1), ("80 m", 80, 1), ("10 m in cm", 10, 100)):
        c = cabins.bin_centers(b, 1e-3 * metre, top * metre)[0]
        largest, nearest, mean = [], [], []
        for group in (c[:4], c[4:]):
            m = group.mean()
            w = torch.softmax(1 / ((group - m).abs() + 1e-4), 0)
            e = (w * group).sum()
            largest.append(w.max())
            mean.append((e - m).abs() / metre)
            nearest.append((e - group[(group - m).abs().argmin()]).abs() / metre)
        expected = {"largest_weight": largest, "nearest": nearest, "mean": mean}
        expected = {key: (sum(values) / 2).item() for key, values in expected.items()}
        assert found[name] == pytest.approx(expected, rel=1e-9), name
    even = ablate.eq2_figures(torch.full((1, 256), 1 / 256))
    assert even["10 m"]["largest_weight"] == pytest.approx(0.5, abs=1e-3)  # two centres tie
    assert even["10 m"]["mean"] < 1e-6


@pytest.mark.parametrize("kind", [train.Run, released.ReleasedRun])
def test_gradient_sizes_are_those_that_adam_saw(kind, rooms):
    run = kind(train.parse_args(["--batch-size", "2", "--workers", "0", "--device", "cpu"]))
    names = {id(p): name for name, p in run.model.named_parameters()}
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in run.trained_parameters():
        is_decoder = names[id(parameter)].startswith("trans_decoder")
        sign = 1 - 2 * (torch.arange(parameter.numel()) % 2).view_as(parameter)
        parameter.grad = (1e-9 if is_decoder else 3e-5) * sign
    for _ in range(3):
        run.optimizer.step()
    saved = run.optimizer.state_dict()
    trained = ablate.trained_names(run.model, saved)
    assert trained == [names[id(p)] for p in run.trained_parameters()]
    sizes = ablate.gradient_sizes(trained, saved)
    assert sum(n for n, _ in sizes.values()) == sum(p.numel() for p in run.trained_parameters())
    own = {"gamma", "prompts"} if kind is train.Run else {"token embedding"}
    others = {"image encoder", "bins", "depth decoder", "TransDecoder"}
    assert sizes.keys() == own | others
    for part, (_, rms) in sizes.items():
        small = part in ("TransDecoder", "gamma")
        assert rms == pytest.approx(1e-9 if small else 3e-5, rel=1e-3)
    if kind is train.Run:
        assert sizes["gamma"][0] == 64 and sizes["prompts"][0] == 8 * 64


def test_share_of_a_step():
    assert ablate.step_share(1e-8, 1e-8) == 0.5
    assert ablate.step_share(1e-9, 1e-8) == pytest.approx(1 / 11)


def test_the_command(rooms, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    options = ["--batch-size", "4", "--epochs", "1", "--workers", "0", "--out", str(out)]
    train.Run(train.parse_args(options)).train()
    model = cabins.load_checkpoint(out / "last.pt")
    for name in ("last.pt", "best.pt"):
        monkeypatch.setattr(sys, "argv", ["ablate", str(out / name), "--workers", "0"])
        capsys.readouterr()
        ablate.main()
        printed = capsys.readouterr().out
        row = metrics(predictor(model), rooms)
        rows = [line.rsplit(maxsplit=8) for line in printed.splitlines() if ", whole " in line]
        assert [first for first, *_ in rows] == [f"{n}, whole" for n in (name, *ROWS[1:])]
        assert rows[0][1] == f"{row['abs_rel']:.3f}"
        assert "flip averaging on" in printed
        found, _ = ablate.text_figures(model, rooms)
        assert f"Eq. 3 turns t by {found['turn']:.2g} rad" in printed
        assert f"0.1 mm {ablate.digit_angle(model, 1e-4):.3f}, 1 m " in printed
        assert ("TransDecoder" in printed) == ("no optimizer" not in printed) == (name == "last.pt")
