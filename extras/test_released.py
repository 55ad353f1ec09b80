"""python -m pytest -q extras"""

import json
import math
import re
import sys

import pytest
import torch
from torch import nn

import cabins
import data
import train
from cabins import InputError
from extras import convert, released
from extras.test_convert import made_state
from test_cabins import made_truth, normal

# What the released code computes in four steps of its training loop: with its optimizer, schedule,
# clipping and losses, on made weights, without augmentation and dropout, in float32.
LR = (4.0e-6, 5.2e-5, 1.0e-4, 9.505042e-5)
LOSS = (10.298327, 10.059315, 9.681469, 9.263819)
NORM = (2351.0032, 1497.6074, 1003.7192, 671.90137)  # of all gradients, before they are clipped
MOVED = {  # norm of what four steps add to a tensor
    "contexts": 0.0,
    "gamma": 0.0,
    "clip_model.token_embedding.weight": 0.0025597117,
    "clip_model.positional_embedding": 0.0,
    "clip_model.text_projection": 0.0,
    "clip_model.logit_scale": 0.0,
    "clip_model.transformer.resblocks.0.mlp.c_fc.weight": 0.0,
    "clip_model.visual.conv1.weight": 0.0030098825,
    "clip_model.visual.layer4.2.conv3.weight": 0.084726572,
    "clip_model.visual.attnpool.positional_embedding": 0.011094469,
    "computeAdaptiveBin.regressor.4.weight": 0.023518857,
    "decoder.conv2.weight": 0.14766870,
    "decoder.up3._net.3.weight": 0.082657777,
    "decoder.up3._net.1.weight": 0.0017180418,
    "predict_D.conv_out.0.weight": 0.018546062,
    "context_decoder.decoder.5.cross_attn.k_proj.weight": 0.00040174366,
}
BUFFER = {"clip.visual.bn1.running_mean": 0.40644562, "depth_decoder.up.2.1.running_var": 14.2715}
FIXED = {"prompts", "trans_decoder.gamma"}


def run_args(*options: str, script: str = "extras.released"):
    return train.parse_args(["--device", "cpu", "--workers", "0", *options], script, amp="off")


@pytest.fixture
def rooms(monkeypatch):
    """The demo with five rooms for training and one for the test."""
    few = {"train": range(5), "test": range(1_000_000, 1_000_001)}
    monkeypatch.setattr(data, "TOY_ROOMS", few)


@pytest.fixture
def run(rooms) -> released.ReleasedRun:
    return released.ReleasedRun(run_args("--batch-size", "2"))


def batch_of(run: train.Run, n: int = 2) -> dict:
    samples = [run.dataset[i] for i in range(n)]
    return {key: torch.stack([s[key] for s in samples]) for key in ("image", "depth")}


class MadeRun(released.ReleasedRun):
    """Starts from the goldens' weights, without dropout."""

    def new_model(self) -> cabins.CaBins:
        model, state = super().new_model(), made_state()
        state = {name: state[convert.their_name(name)] for name in model.state_dict()}
        state["prompts"] = state["prompts"][0]
        positions = torch.zeros(77, 512)
        positions[:30] = state["clip.positional_embedding"]
        model.load_state_dict(state | {"clip.positional_embedding": positions})
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model


def test_the_released_training_loop(monkeypatch):
    monkeypatch.setattr(data, "TOY_ROOMS", {"train": range(20), "test": range(20, 21)})
    monkeypatch.setattr(data, "augment", lambda image, depth, *_: (image, depth))
    options = ["--backbone", "RN101", "--clip", "none", "--batch-size", "2"]
    run = MadeRun(run_args(*options, "--epochs", "1", "--lr", "1e-4"))
    assert run.n_steps == 10
    run.model.train()
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    batch = {"image": torch.from_numpy(normal("image", (2, 3, 96, 128))), "depth": made_truth()}
    for i, (lr, loss, norm) in enumerate(zip(LR, LOSS, NORM)):
        assert run.scheduler.get_last_lr()[0] == pytest.approx(lr, rel=1e-6)
        # An image that is changed by 1e-6 moves the released code's own later norms by 17 %.
        close = [pytest.approx(loss, rel=1e-2 if i else 1e-4)]
        close.append(pytest.approx(norm, rel=0.4 if i else 1e-2))
        assert [x.item() for x in run.learn(batch)] == close
    after = run.model.state_dict()
    for name, tensor in after.items():
        moved = MOVED.get(convert.their_name(name))
        if moved is not None:
            assert (tensor - before[name]).norm().item() == pytest.approx(moved, rel=0.08), name
    for name, norm in BUFFER.items():
        assert after[name].norm().item() == pytest.approx(norm, rel=0.02), name


def test_prompts_start_44_times_as_large_as_ours(run, tmp_path):
    prompts = run.model.prompts.detach()
    assert prompts.std().item() == pytest.approx(0.88, abs=0.04)
    assert prompts.abs().max() <= 2
    ours = train.Run(run_args("--batch-size", "2")).model.prompts.std().item()
    assert prompts.std().item() / ours == pytest.approx(44, rel=0.05)
    cabins.save_checkpoint(tmp_path / "start.pt", run.model)
    again = released.ReleasedRun(run_args("--seed", "1", "--init", str(tmp_path / "start.pt")))
    assert torch.equal(again.model.prompts, prompts)  # those of a checkpoint stay


def test_the_last_smaller_batch_is_kept_and_the_order_is_the_same_in_every_epoch(run):
    assert run.per_epoch == 3 and run.n_steps == 9
    batches = [batch for epoch in range(3) for batch in run.order(epoch)]
    assert [len(batch) for batch in batches] == 3 * [2, 2, 1]
    first, *others = [[*a, *b, *c] for a, b, c in zip(batches[::3], batches[1::3], batches[2::3])]
    assert sorted(first) == [0, 1, 2, 3, 4] and others == [first, first]
    paper = train.Run(run_args("--batch-size", "2"))
    assert paper.per_epoch == 2
    assert len({str(paper.order(epoch)) for epoch in range(9)}) > 1
    assert first[:4] == [*paper.order(0)[0], *paper.order(0)[1]]
    run.n_processes = 2
    with pytest.raises(InputError, match="the last batch has 1 pairs for 2 processes"):
        run.steps_per_epoch()


def test_the_token_embedding_learns_and_prompts_and_gamma_do_not(run):
    names = {id(p): name for name, p in run.model.named_parameters()}
    trained = [names[id(p)] for p in run.trained_parameters()]
    frozen = ("clip.transformer.", "clip.positional_embedding", "clip.ln_final.")
    frozen += ("clip.text_projection", "clip.logit_scale")
    assert len(trained) == len({*trained})
    assert {*names.values()} - {*trained} - FIXED == {
        name for name in names.values() if name.startswith(frozen)
    }
    assert "clip.token_embedding.weight" in trained and not FIXED & {*trained}
    run.model.train()
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    run.learn(batch_of(run))
    after = dict(run.model.named_parameters())
    for name in FIXED:
        assert torch.equal(before[name], after[name])
    assert not torch.equal(
        before["clip.token_embedding.weight"], after["clip.token_embedding.weight"]
    )


def test_gradients_of_prompts_and_gamma_pile_up_and_count_in_the_norm(run):
    run.model.train()
    run.learn(batch_of(run))
    run.optimizer.zero_grad()
    kept = {name for name, p in run.model.named_parameters() if p.grad is not None}
    assert kept == FIXED
    run.model.prompts.grad.fill_(1e6)
    norm = run.learn(batch_of(run))[1].item()
    assert norm == pytest.approx(1e6 * math.sqrt(run.model.prompts.numel()), rel=1e-2)


def test_the_loss_has_the_unbiased_variance(run):
    depth, target = torch.tensor([[1.0, 2.0, 4.0, 7.0], [1.5, 2.0, 3.0, 0.0]])
    mask = target > 0
    g = depth[:3].log() - target[:3].log()
    silog = 10 * (torch.var(g) + 0.15 * g.mean().square()).sqrt()
    found = released.unbiased_silog_loss(depth, target, mask)
    assert found.item() == pytest.approx(silog.item(), rel=1e-5)
    assert found > 1.01 * cabins.silog_loss(depth, target, mask)
    one = mask & (target == 2)
    for empty in (one, one & ~one):  # one valid pixel, whose error is 0, and none
        d = depth.clone().requires_grad_()
        loss = released.unbiased_silog_loss(d, target, empty)
        loss.backward()
        assert loss.item() == pytest.approx(1e-5, rel=1e-3) and d.grad.isfinite().all()

    centers = torch.linspace(0.5, 9.5, 256)[None]
    prediction = cabins.Prediction(depth.view(1, 1, 2, 2), centers, None, None, None)
    target, mask = target.view(1, 1, 2, 2), mask.view(1, 1, 2, 2)
    loss = silog + 0.1 * cabins.chamfer_loss(centers, target, mask)
    assert run.loss(prediction, target).item() == pytest.approx(loss.item(), rel=1e-5)
    half = cabins.Prediction(torch.full((1, 1, 2, 2), 2.0), centers, None, None, None)
    whole = half._replace(depth=torch.full((1, 1, 4, 4), 2.0))
    target = torch.linspace(1, 9, 16).view(1, 1, 4, 4)
    assert run.loss(half, target) == run.loss(whole, target)  # at the size of the truth


def test_the_command_is_in_float32_even_on_a_gpu_with_bf16(rooms, monkeypatch):
    started = []

    class Recorded(released.ReleasedRun):
        def __init__(self, args):
            started.append(args)

        def train(self):
            started.append("trained")

    monkeypatch.setattr(released, "ReleasedRun", Recorded)
    monkeypatch.setattr(data, "choose_device", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(sys, "argv", ["released", "--epochs", "2"])
    released.main()
    args, trained = started
    assert (args.amp, args.script, args.epochs, trained) == ("off", "extras.released", 2, "trained")
    assert train.parse_args([]).amp == "bf16"


def test_train_py_does_not_resume_a_released_run(rooms, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    options = ["--batch-size", "2", "--epochs", "1", "--out", str(out)]
    released.ReleasedRun(run_args(*options)).train()
    last = str(out / "last.pt")
    assert json.loads((out / "args.json").read_text())["options"]["script"] == "extras.released"
    with pytest.raises(SystemExit):
        train.parse_args(["--resume", last])
    assert re.search("the run began with .*extras.released", capsys.readouterr().err)
    resumed = released.ReleasedRun(run_args("--resume", last))
    assert resumed.step == 3
    assert resumed.optimizer.param_groups[0]["params"] == [*resumed.trained_parameters()]
