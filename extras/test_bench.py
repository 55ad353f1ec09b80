"""python -m pytest -q extras"""

import warnings

import pytest
import torch
from torch import nn

import cabins
import data
import train
from extras import bench

HEADINGS = ["", "ms", "speed-up", "images/s", "peak GB", "TFLOP", "TFLOP/s", "of a product's"]
TINY = ["--backbone", "tiny", "--size", "64x96", "--batch-size", "2", "--steps", "3"]


@pytest.fixture(autouse=True)
def one_thread():
    """Several threads would wait for each other where other processes run."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)
    data.use_tf32(False)


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
@pytest.mark.parametrize("what, n_rows, n_passes", [("eval", 3, 1), ("train", 2, 3)])
def test_rows_are_complete_and_agree_with_each_other(capsys, what, n_rows, n_passes):
    bench.main([what, *TINY])
    heading, line, *rows = (row[1:-1].split("|") for row in capsys.readouterr().out.splitlines())
    assert [cell.strip() for cell in heading] == HEADINGS and line == ["---"] * len(HEADINGS)
    assert len(rows) == n_rows and "defaults" in rows[0][0] and rows[0][2] == " 1.00 "
    for row in rows:
        _, ms, _, images, memory, tflop, rate, share = (cell.strip() for cell in row)
        seconds = float(ms.split(" ± ")[0]) / 1000
        assert float(tflop) == pytest.approx(n_passes * tflop_by_hand(), rel=0.15)
        assert float(images) == pytest.approx(2 / seconds, rel=0.02)
        assert float(rate) == pytest.approx(float(tflop) / seconds, rel=0.02)
        assert (memory == "-") == (not torch.cuda.is_available())
        assert float(share.rstrip("%")) > 0


def test_plain_steps_have_torchs_defaults_and_the_others_are_those_of_training(monkeypatch):
    made, precisions = [], []

    class Learner(train.Learner):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append((self, options["amp"]))

        def step(self, batch, number):
            flags = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
            precisions.append((self.model, *flags))
            return super().step(batch, number)

    monkeypatch.setattr(bench, "Learner", Learner)
    bench.main(["train", *TINY, "--amp", "bf16"])
    for (learner, amp), is_fast in zip(made, (False, True)):
        weight = learner.model.depth_decoder.features.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == is_fast
        assert all(bool(group["fused"]) == is_fast for group in learner.optimizer.param_groups)
        assert (amp, learner.model.training) == ("bf16" if is_fast else "off", True)
        assert learner.optimizer.state[weight]["step"] >= 4  # one to warm up, three to be timed
        found = {(tf32, product) for model, tf32, product in precisions if model is learner.model}
        assert found == {(True, "high" if is_fast else "highest")}


@pytest.mark.parametrize(
    "wrong",
    ["train --size 416", "train --batch-size 0", "train --steps 0", "eval --amp bf16"],
)
def test_wrong_options_are_refused(wrong):
    with warnings.catch_warnings(), pytest.raises(ValueError, match=wrong.split()[1]):
        warnings.simplefilter("ignore")  # of random weights
        bench.main(wrong.split())
