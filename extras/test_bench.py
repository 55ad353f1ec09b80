"""python -m pytest -q extras"""

import sys

import pytest
import torch
from torch import nn

import cabins
import data
import train
from extras import bench

HEADINGS = ["", "ms", "speed-up", "images/s", "peak GB", "TFLOP", "TFLOP/s", "of a product's"]
product_rate = bench.product_rate
TINY = ["--backbone", "tiny", "--size", "64x96", "--batch-size", "2", "--steps", "3"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread, as several would wait for each other, and a product of 1 TFLOP/s."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(bench, "product_rate", lambda amp, device: 1e12)
    yield
    torch.set_num_threads(n_threads)
    data.use_tf32(False)


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    bench.main()


def tflop_by_hand() -> float:
    """Of the convolutions and linear layers, in one pass over two images of 64 x 96 pixels."""
    counts, model = [], cabins.CaBins(cabins.Config("tiny")).eval()

    def count(layer, _, output) -> None:
        n_weights = layer.weight[0].numel()  # each is multiplied and added once for each output
        counts.append(2 * output.numel() * n_weights)

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 96))
    return sum(counts) / 1e12


# a step computes each layer's output, its input's gradient and its weights' gradient
@pytest.mark.parametrize("what, n_passes", [("eval", 1), ("train", 3)])
def test_rows_are_complete_and_agree_with_each_other(what, n_passes, monkeypatch, capsys):
    run(monkeypatch, what, *TINY)
    heading, line, *rows = (row[1:-1].split("|") for row in capsys.readouterr().out.splitlines())
    assert [cell.strip() for cell in heading] == HEADINGS and line == ["---"] * len(HEADINGS)
    assert len(rows) == 3 and "defaults" in rows[0][0] and rows[0][2] == " 1.00 "
    for row in rows:
        _, ms, _, images, memory, tflop, rate, share = (cell.strip() for cell in row)
        seconds = float(ms.split(" ± ")[0]) / 1000
        assert float(tflop) == pytest.approx(n_passes * tflop_by_hand(), rel=0.15)
        assert float(images) == pytest.approx(2 / seconds, rel=0.02)
        assert float(rate) == pytest.approx(float(tflop) / seconds, rel=0.02)
        assert (memory == "-") == (not torch.cuda.is_available())
        assert float(share.rstrip("%")) == pytest.approx(100 * float(rate), abs=0.6)


def test_plain_steps_have_torchs_defaults_and_the_others_are_those_of_training(monkeypatch):
    steps = {}  # of each run: the precision of each step, and the size of its crops

    class Run(train.Run):
        def learn(self, batch):
            flags = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
            steps.setdefault(self, []).append(flags)
            return super().learn(batch)

        def loss(self, prediction, depth):
            steps[self][-1] += (tuple(depth.shape),)
            return super().loss(prediction, depth)

    monkeypatch.setattr(train, "Run", Run)
    run(monkeypatch, "train", *TINY)
    for (a_run, found), setting in zip(steps.items(), bench.SETTINGS, strict=True):
        weight = a_run.model.depth_decoder.head.weight
        is_fast = not setting.is_plain
        assert weight.is_contiguous(memory_format=torch.channels_last) == is_fast
        assert all(bool(group["fused"]) == is_fast for group in a_run.optimizer.param_groups)
        assert (a_run.args.amp, a_run.model.training) == (setting.amp, True)
        assert len(found) >= 4  # one to warm up, three to be timed
        assert {*found} == {(True, "high" if is_fast else "highest", (2, 1, 64, 96))}
    assert [run.args.amp for run in steps] == ["off", "off", "bf16"]


def test_the_rate_of_a_product(monkeypatch):
    products = []
    monkeypatch.setattr(bench, "seconds", lambda run, device: products.append(run()) or 2.0)
    assert product_rate("bf16", torch.device("cpu")) == 2048**3
    assert {product.dtype for product in products} == {torch.bfloat16}


def test_passes_have_the_precision_of_evaluation(monkeypatch):
    found = []

    def forward(self, image):
        autocasts = torch.is_autocast_enabled(image.device.type)
        found.append((torch.get_float32_matmul_precision(), autocasts, self.training))

    monkeypatch.setattr(cabins.CaBins, "forward", forward)
    run(monkeypatch, "eval", *TINY)
    assert found[-3:] == [("highest", autocasts, False) for autocasts in (False, False, True)]


@pytest.mark.parametrize("what", ["eval", "train"])
def test_all_but_the_plain_networks_are_compiled(what, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    run(monkeypatch, what, *TINY, "--steps", "1")
    assert not compiled
    run(monkeypatch, what, *TINY, "--steps", "1", "--compile")
    assert len(compiled) == len(bench.SETTINGS) - 1


@pytest.mark.parametrize("size", ["416", "416x", "axb"])
def test_a_wrong_size_is_an_error_of_argparse(size, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "train", "--size", size)
    assert stop.value.code == 2 and f"'{size}'" in capsys.readouterr().err
