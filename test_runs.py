"""What commands train and measure, what a run's folder promises, and what a wrong command says."""
# ruff: noqa: F811 (the fixture tiny is imported until the two files are one)

import contextlib
import csv
import itertools
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

HAS_GPU = shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are the CPU's, but for one
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes that tests start, too

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

import cabins
import data
import eval as evaluation
import train
from test_cabins import TINY, Ran, close, run_script, tiny, write_pair  # noqa: F401

torch.set_num_threads(1)  # on small networks several threads only wait for each other


# ---- What a command trains: a spy looks at each part while it is used ----------------------------


@pytest.fixture
def short(monkeypatch):
    """Eight toy rooms, no figures, and no process for loading."""
    monkeypatch.setattr(data, "TOY_ROOMS", {"train": range(8), "test": range(50, 52)})
    monkeypatch.setattr(evaluation, "draw_samples", lambda *_: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    return monkeypatch


def run_train(*options) -> Ran:
    return run_script("train.py", *options)


def rows_of(table: Path) -> list[dict[str, str]]:
    return [*csv.DictReader(table.read_text().splitlines())]


def spied(patch, holder, name: str, note) -> None:
    """Call `note` with the arguments of each call of holder.name."""
    function = getattr(holder, name)

    def spy(*given, **more):
        note(*given, **more)
        return function(*given, **more)

    patch.setattr(holder, name, spy)


def watched(script: str, *options) -> SimpleNamespace:
    """Run a command, and return what its parts were given."""
    names = ("rates", "momenta", "recipes", "seeds", "inputs", "order", "forwards", "measured")
    seen = SimpleNamespace(**{name: [] for name in names}, compiled=[], loaders=[])

    def look_at_run(run):
        seen.run = run
        seen.start = {k: v.clone() for k, v in run.model.state_dict().items()}

    def look_at_step(run, batch):
        (group,) = run.optimizer.param_groups
        seen.rates.append(group["lr"])
        seen.momenta.append(group["betas"][0])

    def look_at_augment(image, depth, recipe, generator):
        seen.recipes.append(recipe)
        seen.seeds.append(generator.initial_seed())
        seen.inputs.append((tuple(image.shape), depth.max().item()))

    def look_at_forward(model, image, upsample=True):
        tf32 = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision() == "high"
        about = (model.training, tuple(image.shape), torch.is_autocast_enabled("cpu"), tf32)
        seen.forwards.append((*about, torch.initial_seed()))

    def look_at_measuring(predict, dataset, *_):
        if not isinstance(predict, nn.Module):  # else this is called again, with a predictor
            seen.measured.append(dataset)

    with pytest.MonkeyPatch.context() as patch:
        spied(patch, train.Run, "train", look_at_run)
        spied(patch, train.Run, "learn", look_at_step)
        spied(patch, data, "augment", look_at_augment)
        spied(patch, cabins.CaBins, "forward", look_at_forward)
        spied(
            patch, data.DepthDataset, "__getitem__", lambda x, i: x.train and seen.order.append(i)
        )
        spied(
            patch,
            data,
            "load",
            lambda _, device=None, n=None, **__: seen.loaders.append((device, n)),
        )
        spied(patch, evaluation, "evaluate_windows", look_at_measuring)
        compiled = lambda module: lambda image: seen.compiled.append(1) or module(image)
        patch.setattr(torch, "compile", compiled)
        seen.ran = run_script(script, *options)
    assert seen.ran.status == 0, seen.ran.err
    return seen


@pytest.fixture
def narrow(monkeypatch, tmp_path) -> Path:
    """Backbones of reduced width, and torch.hub's cache with a CLIP for each and the lists."""
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for i, (name, full) in enumerate([*cabins.BACKBONES.items()][:3]):
        sizes = {"embed_dim": full.embed_dim // 32, "text_width": 64, "text_layers": 1}
        sizes |= {"channels": (8, 16, 32, 64), "decoder_width": 64, "decoder_layers": 1}
        sizes |= {"width": 64, "layers": (4,)} if full.is_vit else {"width": 2, "layers": (1,) * 4}
        small = full._replace(**sizes)
        monkeypatch.setitem(cabins.BACKBONES, name, small)
        torch.manual_seed(7 + i)
        torch.save(cabins.CLIP(small).state_dict(), cache / f"clip-{name.replace('/', '-')}.pt")
    return cache


def write_data(root: Path, lists: Path, name: str) -> list[str]:
    """Two pairs for training, and one for testing. Returns the options of a command for them."""
    options, lines = ["--data", name, "--root", str(root), "--batch-size", "1"], []
    if name == "nyu":
        lines = [write_pair(root / "sync" / "den", f"{i}", depth=9000 + i) for i in (1, 2)]
        lines.append(write_pair(root / "official_splits" / "test" / "den", "3"))
    elif name == "list":
        lines = [write_pair(root / "a", f"{i}", 96, 160, 1000 + 500 * i) for i in range(2)]
        lines.append(write_pair(root / "a", "2", 192, 320))  # measured at the size of training
        for part in ("train", "test"):  # relative ones, as users type them
            options += [f"--{part}-split", os.path.relpath(lists / f"own_{part}.txt")]
        options += ["--depth-scale", "500", "--max-depth", "6"]
    for i, folder in enumerate(("train", "val", "val") if name == "kitti" else ()):
        image, depth = f"2011/image_02/data/{i}", f"proj_depth/groundtruth/image_02/{i}.png"
        values = np.random.default_rng(i).integers(0, 256, (376, 1241, 3), np.uint8)
        frames = {f"raw/{image}.png": values}
        frames[f"data_depth_annotated/{folder}/{depth}"] = np.full((376, 1241), 5120, np.uint16)
        for file, values in frames.items():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(root / file)
        lines.append(f"{image}.jpg {depth} 721.5\n")
    file = {"nyu": "nyudepthv2_{}_files_with_gt", "kitti": "kitti_eigen_{}_files_with_gt"}
    file = file.get(name, "own_{}") + ".txt"
    (lists / file.format("train")).write_text("# mine\n/" + "/".join(lines[:2]))
    (lists / file.format("test")).write_text("".join(lines[2:]) + "a.jpg None 721.5\n")
    return ["--batch-size", "4"] if name == "toy" else options


# max_depth, depth_scale, crop, degrees and brightness; longer side and backbone; what augment gets:
# size and deepest point; the size of a random crop; the size at which the network is measured
KNOWN = {
    "toy": ((10, 1000, (96, 128), 0, 0.1), (128, "tiny"), (4, 3, 96, 128), None, (96, 128)),
    "nyu": ((10, 1000, (416, 544), 2.5, 0.25), (640, "RN101"), (1, 3, 427, 565), 9, (480, 640)),
    "kitti": ((80, 256, (352, 704), 1, 0.1), (1216, "RN101"), (1, 3, 352, 1216), 20, (352, 1216)),
    "list": ((6, 500, None, 2.5, 0.1), (160, "RN101"), (1, 3, 96, 160), 3, (96, 160)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_a_command_trains_and_measures(name, short, narrow, tmp_path):
    """Also that eval.py, from elsewhere and without options, measures what the run measured."""
    recipe, (side, backbone), size, deepest, shown = KNOWN[name]
    crop = recipe[2] or (64, 128)
    out, options = tmp_path / "out", write_data(tmp_path / "data", narrow, name)
    seen = watched("train.py", *options, "--epochs", 1, "--out", out)
    run, n = seen.run, 2
    expected = (backbone, "cabins", 256, 8, 8, 1e-3, recipe[0], side)
    assert tuple(vars(run.model.config).values()) == expected
    assert [tuple(r)[:5] for r in seen.recipes] == [recipe] * n
    assert [x[0] for x in seen.inputs] == [size] * n
    assert deepest is None or max(x[1] for x in seen.inputs) == pytest.approx(deepest, rel=1e-3)
    assert sorted(seen.order) == [*range(8 if name == "toy" else 2)]
    lr = 2e-3 if name == "toy" else 3.57e-5
    assert len(seen.rates) == n and seen.rates[-1] == pytest.approx(lr / 2500)
    given = {f"clip.{k}": v for k, v in torch.load(narrow / "clip-RN101.pt").items()}
    assert all(torch.equal(seen.start[k], v) for k, v in given.items()) == (name != "toy")
    learning = [x for x in seen.forwards if x[0]]
    assert [x[1] for x in learning] == [(size[0], 3, *crop)] * n
    assert {x[3] for x in learning} == {(True, True)}  # TF32, on a GPU
    measuring, (tested,) = [x for x in seen.forwards if not x[0]], seen.measured
    assert {x[1] for x in measuring} == {(2, 3, *shown)} and len(measuring) == len(tested)
    assert {x[3] for x in measuring} == {(False, False)} and not any(x[2] for x in seen.forwards)
    assert (tested.name, tested.train, tuple(tested.recipe)[:2]) == (name, False, recipe[:2])
    assert seen.loaders == [(run.device, None), (None, None)]  # as many processes as cores allow
    saved = cabins.read_checkpoint(out / "last.pt")
    scale = dict(zip(("max_depth", "depth_scale"), recipe))
    assert saved["data"] == {"name": name, **scale} and saved["step"] == n

    short.chdir(narrow)
    again = watched("eval.py", out / "last.pt", "--csv", tmp_path / "rows.csv")
    (dataset,) = again.measured
    assert (dataset.pairs, dataset.recipe) == (tested.pairs, tested.recipe)
    assert len(dataset) == 1 + (name == "toy") and dataset.n_left_out == (name != "toy")
    assert [x[1:4] for x in again.forwards] == [x[1:4] for x in measuring]
    row, *_ = rows_of(tmp_path / "rows.csv")
    (same_row,) = rows_of(out / "metrics.csv")
    assert all(row[key] == same_row[key] for key in evaluation.HEADINGS)  # all digits
    assert row["window"] == {"nyu": "eigen", "kitti": "nested"}.get(name, "whole")
    assert (same_row["step"], same_row["epoch"]) == ("2", "1")


def test_defaults_are_the_papers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nyu", "kitti", "list", "toy"):
        args = train.parse_args(["--data", name, "--root", "x"])
        papers = (3.57e-5, 25, "RN101", "RN101") if name != "toy" else (2e-3, 3, "tiny", "none")
        assert (args.lr, args.epochs, args.backbone, args.clip) == papers
        assert (args.batch_size, args.seed, args.distance_class, args.amp) == (
            8,
            0,
            "cabins",
            "off",
        )
        assert (args.out, args.root) == (f"runs/{name}", str(tmp_path / "x"))


def one_cycle(lr: float, n: int) -> list[tuple[float, float]]:
    """Rate and momentum of each of n steps: Sec. 4.1 names the policy, the release its ends."""
    found, top = [], 0.3 * n - 1
    for i in range(n):
        x = i / top if i <= top else 1 - (i - top) / (n - 1 - top)
        height = (1 - math.cos(math.pi * x)) / 2
        low = lr / 25 if i <= top else lr / 2500
        found.append((low + (lr - low) * height, 0.95 - 0.1 * height))
    return found


def test_options_reach_schedule_order_seeds_and_network(short, tmp_path):
    command = ["--epochs", 3, "--batch-size", 2, "--lr", 1e-2, "--out"]
    some = [], ["--seed", 3, "--amp", "bf16", "--compile", "--distance-class", "mean"]
    seen = [
        watched("train.py", *command, tmp_path / f"{len(x)}", *x, *["--workers", 0]) for x in some
    ]
    for k, one in enumerate(seen):
        assert np.allclose([*zip(one.rates, one.momenta)], one_cycle(1e-2, 12), rtol=1e-6)
        forwards = [x for x in one.forwards if x[0]]
        one.dropout = [x[4] for x in forwards]
        assert len({*one.seeds, *one.dropout}) == 24  # another seed in each step, for either
        assert {x[3] for x in forwards} == {(True, True)}  # also after a validation
        assert {x[2] for x in forwards} == {k == 1} and len(one.compiled) == 12 * k
        assert one.run.model.config.distance_class == ("cabins", "mean")[k]
        epochs = [tuple(one.order[i : i + 8]) for i in range(0, 24, 8)]
        assert all(sorted(epoch) == [*range(8)] for epoch in epochs) and len({*epochs}) == 3
        assert one.loaders == [(one.run.device, 0), *[(None, 0)] * 3]
        log = rows_of(one.run.out / "log.csv")
        assert [int(row["step"]) for row in log] == [4, 8, 10, 12]
        assert [float(row["lr"]) for row in log] == [one.rates[i] for i in (3, 7, 9, 11)]
        assert [float(row["epoch"]) for row in log] == [1, 2, 2.5, 3]
    weight = "bins.mlp.0.weight"
    assert not {*seen[0].seeds, *seen[0].dropout} & {*seen[1].seeds, *seen[1].dropout}
    assert seen[0].order != seen[1].order
    assert not torch.equal(seen[0].start[weight], seen[1].start[weight])


def same(a, b) -> bool:
    """Whether nested contents are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_a_step_is_adamws_with_a_decay_of_a_tenth_and_clipped_gradients(short):
    run = train.Run(train.parse_args(["--lr", "0.01", "--batch-size", "2"]))
    run.model.train().bins.mlp[0].weight.grad = torch.full((512, 64), 1e6)  # of an earlier step
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    prediction, depth, (loss, norm) = run.learn(next(iter(data.load(run.dataset, batch_size=2))))
    torch.testing.assert_close(loss, cabins.total_loss(prediction, depth, 1e-3))
    lr, squares, learners = 0.01 / 25, 0.0, {}
    for name, p in run.model.named_parameters():
        if p.grad is not None:
            learners[name] = p
            squares += p.grad.square().sum().item()
            expected = before[name] * (1 - lr * 0.1) - lr * p.grad / (p.grad.abs() + 1e-8)
            torch.testing.assert_close(p, expected, rtol=0, atol=1e-6)
    assert {*before} - {*learners} == {x for x in before if re.match(r"clip\.(?!visual)", x)}
    assert 0.1 < norm < 1e4 and math.sqrt(squares) == pytest.approx(0.1, rel=1e-3)
    (group,) = run.optimizer.param_groups
    assert [*map(id, group["params"])] == [*map(id, learners.values())] and run.step == 1
    assert group["betas"][1] == 0.999 and group["lr"] != lr


ROWS = ("RN50 semantic", "RN50 median", "RN50 mean", "RN101 cabins", "ViT-B/16 mean")


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_tables_trains_from_its_own_clip(row, short, narrow, tmp_path):
    backbone, kind = row.split()
    file, option = narrow / f"clip-{backbone.replace('/', '-')}.pt", []
    if kind == "median":  # a file, whose name says nothing
        file, option = tmp_path / "a.bin", ["--clip", tmp_path / "a.bin"]
        torch.save(cabins.CLIP(cabins.BACKBONES[backbone]).state_dict(), file)
    option += ["--backbone", backbone, "--distance-class", kind, "--out", tmp_path / "out"]
    seen, given = watched("train.py", "--epochs", 1, "--batch-size", 4, *option), torch.load(file)
    assert all(torch.equal(seen.start[f"clip.{name}"], x) for name, x in given.items())
    model = cabins.load_checkpoint(tmp_path / "out" / "last.pt")
    assert (model.config.backbone, model.config.distance_class) == (backbone, kind)
    for name, x in model.clip.state_dict().items():
        assert torch.equal(x, given[name]) or name.startswith("visual."), name  # which learns
    assert not torch.equal(model.clip.visual.conv1.weight, given["visual.conv1.weight"])


def test_training_starts_from_a_checkpoint_and_scales_its_depths(tiny, short, tmp_path):
    cabins.save_checkpoint(tmp_path / "a.pt", tiny)
    options = ["--init", tmp_path / "a.pt", "--epochs", 1, "--out"]
    seen = watched("train.py", *options, tmp_path / "1", "--max-depth", 20)
    assert same(seen.start, dict(tiny.state_dict())) and "10.0 m" in seen.ran.out
    assert seen.run.model.config.max_depth == seen.measured[0].recipe.max_depth == 20
    assert "scaled" not in watched("train.py", *options, tmp_path / "2").ran.out


def test_workers_leave_a_core_and_memory_is_pinned_for_gpus(monkeypatch):
    found = []
    monkeypatch.setattr(data, "DataLoader", lambda *_, **options: found.append(options))
    for cores, processes, workers in ((1, 1, 0), (4, 1, 3), (64, 1, 8), (8, 2, 3), (8, 8, 0)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: {*range(n)}, raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        data.load(None)
        assert found[-1] == {"num_workers": workers, "pin_memory": False}
    for device, is_pinned in (("cuda", True), ("cpu", False)):
        data.load(None, torch.device(device), 5, batch_size=3)
        assert found[-1] == {"num_workers": 5, "pin_memory": is_pinned, "batch_size": 3}


# ---- What a command measures ---------------------------------------------------------------------


def test_eval_prints_how_it_measured_and_writes_all_digits_first(tiny, short, tmp_path):
    about = {"name": "toy", "depth_scale": 1000.0, "max_depth": 10.0}
    cabins.save_checkpoint(tmp_path / "a.pt", tiny, data=about)
    command = "eval.py", tmp_path / "a.pt", "--csv", tmp_path / "rows.csv"
    data.use_tf32(True)  # which eval.py must undo
    for options, top, flip in (([], 10.0, "on"), (["--no-flip", "--max-depth", 7], 7.0, "off")):
        seen = watched(*command, *options)
        assert {x[3] for x in seen.forwards} == {(False, False)} and seen.ran.out.isascii()
        assert {x[1][0] for x in seen.forwards} == {1 + (flip == "on")}
        dataset = data.DepthDataset("toy", max_depth=top)
        expected = evaluation.evaluate(evaluation.predictor(tiny, flip == "on"), dataset, 0)
        line = (
            f"toy: 2 of 2 images have ground truth in the window whole, 0.001 < depth < {top} m, "
        )
        line += f"longer side 128 pixels, flip averaging {flip}, fp32, mean over images"
        row = rows_of(tmp_path / "rows.csv")[-1]
        values = {name: str(value) for name, value in expected.items()}
        first = {"checkpoint": str(tmp_path / "a.pt"), "window": "whole"}
        assert row == {**first, **values, "protocol": line} and line in seen.ran.out
    short.setattr(evaluation, "format_table", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_script(*command)
    assert len(rows_of(tmp_path / "rows.csv")) == 3
    nan = evaluation.protocol(dataset, "whole", evaluation.Measured({}, 1, 5), "how")
    assert "1 of 2 images" in nan and "5 predicted pixels are NaN" in nan


def test_eval_takes_from_the_run_what_the_options_leave_open(tiny, short, tmp_path):
    """And nothing, when the data set is another one: its own scale and range, then."""
    run, other, used, drawn = tmp_path / "run", tmp_path / "other", [], []
    for root in (run, other):
        line = write_pair(root / "a", "1", 96, 128, 3000)
        (root / "list.txt").write_text(line * 9)
    short.undo()
    short.setattr(evaluation, "evaluate_windows", lambda _, x, *__: used.append(x) or {})
    short.setattr(evaluation, "draw_explained", lambda path, *_: drawn.append(path.name))
    about = {"name": "list", "depth_scale": 500.0, "max_depth": 10.0}
    cabins.save_checkpoint(run / "best.pt", tiny, data=about)
    options = {"root": str(run), "test_split": str(run / "list.txt")}
    (run / "args.json").write_text(json.dumps({"options": options}))
    shutil.copy(run / "best.pt", tmp_path / "best.pt")  # published: without its folder
    elsewhere = ["--root", other, "--split", other / "list.txt"]
    commands = {
        ("run/best.pt",): ("list", 500, 10, run),
        ("run/best.pt", "--depth-scale", 400, "--max-depth", 9): ("list", 400, 9, run),
        ("run/best.pt", "--data", "list", *elsewhere): ("list", 500, 10, other),
        ("best.pt", *elsewhere): ("list", 500, 10, other),
        ("run/best.pt", "--data", "kitti", *elsewhere): ("kitti", 256, 80, other),
        ("run/best.pt", "--data", "toy", "--figures", tmp_path / "new"): ("toy", 1000, 10, None),
    }
    for (path, *more), expected in commands.items():
        ran = run_script("eval.py", tmp_path / path, *more)
        assert ran.status == 0, ran.err
        found = used[-1].name, used[-1].recipe.depth_scale, used[-1].recipe.max_depth
        root = Path(used[-1].pairs[0][0]).parents[1] if found[0] != "toy" else None
        assert (*found, root) == expected
    assert drawn == [f"explained_{i}.png" for i in (0, 21, 42, 63)]


# ---- A run's folder: saved in time, resumed exactly ----------------------------------------------

EIGHT_STEPS = ("--epochs", 2, "--batch-size", 2)


def made_clock(monkeypatch, seconds: int) -> None:
    """Each step is logged. The clock is read at the start, for each of these, and after a save."""
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    clock = itertools.count(0, seconds).__next__
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=clock))


def killed(monkeypatch, what: str, at: int, *options) -> None:
    """Run train.py until the call number `at` of this method of a run, where the process dies."""
    count = itertools.count(1)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        spied(patch, train.Run, what, lambda *_, **__: next(count) == at and 1 / 0)
        run_train(*options)


def files_of(folder: Path) -> dict:
    """What a run leaves: checkpoints as dictionaries, and tables as texts."""
    found = {name: cabins.read_checkpoint(folder / name) for name in ("last.pt", "best.pt")}
    return found | {name: (folder / name).read_text() for name in ("log.csv", "metrics.csv")}


def test_last_is_saved_every_ten_minutes_and_before_each_validation(short, tmp_path):
    events, found = [], iter([0.5, 0.6, 0.4])
    made_clock(short, 250)
    short.setattr(train, "PRINT_EVERY", 5)
    metrics = dict.fromkeys(evaluation.HEADINGS, 1.0)
    measure = lambda *_: events.append("validate") or metrics | {"abs_rel": next(found)}
    save = lambda path, _, **more: events.append((path.name, more["step"]))
    short.setattr(evaluation, "evaluate", measure)
    short.setattr(cabins, "save_checkpoint", save)
    short.setattr(evaluation, "draw_samples", lambda *given: events.append(("draw", given[3])))
    ran = run_train("--epochs", 3, "--batch-size", 2, "--out", tmp_path / "a")
    assert events == [
        *[("last.pt", 3), ("last.pt", 4), "validate", ("best.pt", 4), ("draw", 1)],
        *[("last.pt", 7), ("last.pt", 8), "validate", ("draw", 1)],  # which is worse
        *[("last.pt", 11), ("last.pt", 12), "validate", ("best.pt", 12), ("draw", 1)],
    ]
    assert [f"step {i} of 12" in ran.out for i in (4, 5, 6, 10)] == [False, True, False, True]
    assert train.SAVE_EVERY == 600 and "epoch 2/3: abs_rel 0.600" in ran.out and ran.out.isascii()
    assert f"python eval.py {tmp_path}/a/last.pt" in ran.out


def test_a_killed_run_goes_on_exactly(short, tmp_path):
    """Killed in an epoch and in a validation; with cut tables; moved."""
    made_clock(short, 250)
    assert run_train(*EIGHT_STEPS, "--out", tmp_path / "whole").status == 0
    whole = files_of(tmp_path / "whole")
    assert whole["last.pt"]["optimizer"]["state"][0]["step"] == whole["last.pt"]["step"] == 8
    for what, at, step in (("learn", 4, 3), ("learn", 7, 4), ("validate", 1, 4)):
        out = tmp_path / f"{what}{at}"
        made_clock(short, 250)
        killed(short, what, at, *EIGHT_STEPS, "--out", out)
        assert cabins.read_checkpoint(out / "last.pt")["step"] == step
        (out / "best.pt.partial").write_bytes(b"half")
        with open(out / "log.csv", "a") as file:
            file.write(f"{step + 2},0.5,1,1,1\n1")  # of a later step, and one that was cut
        out = out.rename(tmp_path / f"moved_{what}{at}")
        assert run_train("--resume", out / "last.pt").status == 0
        assert same(files_of(out), whole), what
    assert run_train("--resume", "auto", "--out", out).status == 0  # it has finished
    assert same(files_of(out), whole)


def test_resume_auto_begins_where_there_is_nothing(short, tmp_path):
    short.chdir(tmp_path)
    (tmp_path / "runs" / "toy").mkdir(parents=True)  # of a run that was killed before it saved
    (tmp_path / "runs" / "toy" / "log.csv").write_text("step,loss\n1,2\n")
    for _ in range(2):
        assert run_train("--resume", "auto", "--epochs", 1, "--batch-size", 4).status == 0
        assert cabins.read_checkpoint("runs/toy/last.pt")["step"] == 2
        assert Path("runs/toy/log.csv").read_text().count("\n") == 2
    train.Run(train.parse_args(["--resume", "auto", "--out", "new"])).open_folder()
    assert os.listdir("new") == ["args.json"]


def test_a_run_names_its_options_and_its_checkpoints_name_no_folder(short, tmp_path):
    options = write_data(tmp_path / "data", tmp_path, "list") + ["--backbone", "tiny"]
    killed(short, "validate", 1, *options, "--epochs", 2, "--out", tmp_path / "a")
    about = json.loads((tmp_path / "a" / "args.json").read_text())
    git = ["git", "-C", Path(train.__file__).parent, "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    assert about == {"options": about["options"], "torch": torch.__version__, "commit": head}
    known = {"data": "list", "root": str(tmp_path / "data"), "epochs": 2, "seed": 0, "amp": "off"}
    known |= {"depth_scale": 500, "train_split": str(tmp_path / "own_train.txt"), "clip": "none"}
    assert about["options"].items() >= known.items()
    (tmp_path / "data").rename(tmp_path / "moved")
    last = tmp_path / "a" / "last.pt"
    ran = run_train("--resume", last)
    assert ran.status == 1 and f"--root {tmp_path}/data does not exist" in ran.err
    again = ("--root", tmp_path / "moved", "--device", "cpu", "--workers", 0)
    seen = watched("train.py", "--resume", last, *again)
    assert [x.pairs[0][0] for x in seen.measured] == [str(tmp_path / "moved/a/rgb_2.jpg")] * 2
    assert seen.run.step == 4 and len(seen.rates) == 2
    for name in ("last.pt", "best.pt"):
        with zipfile.ZipFile(tmp_path / "a" / name) as file:
            (record,) = [x for x in file.namelist() if x.endswith("data.pkl")]
            assert str(tmp_path).encode() not in file.read(record)
    assert run_script("eval.py", last).status == 0  # finds the data where the run last did


CHANGES = "--epochs 3 | --batch-size 4 | --seed 1 | --lr 1 | --data nyu | --out b | --compile"
CHANGES += " | --distance-class mean | --amp bf16 | --max-depth 5 | --backbone RN50 | --init a.pt"


def test_a_resumed_run_keeps_its_options_and_a_new_one_takes_a_new_folder(short, tmp_path):
    short.chdir(tmp_path)
    killed(short, "validate", 1, *EIGHT_STEPS, "--out", "a")
    before = files_below(tmp_path)
    for change in CHANGES.split(" | "):
        ran = run_train("--resume", "a/last.pt", *change.split())
        assert ran.status == 2 and change.split()[0] in ran.err and "--init a/last.pt" in ran.err
    with pytest.raises(SystemExit, match="2"):  # another recipe
        train.parse_args(["--resume", "a/last.pt"], script="extras.released")
    for taken in ("a", "a/last.pt"):
        ran = run_train(*EIGHT_STEPS, "--out", taken)
        assert ran.status == 1 and ran.err.count("\n") == 1
        assert all(word in ran.err for word in (f"error: {taken} exists", "--resume", "--out"))
    assert files_below(tmp_path) == before
    args = train.parse_args(["--resume", "a/last.pt", "--epochs", "2", "--seed", "0"])  # the same
    assert (args.batch_size, args.last, args.out) == (2, "a/last.pt", "a")


def test_a_loss_that_is_not_a_number_ends_a_run_within_ten_steps(short, tmp_path):
    short.setitem(data.TOY_ROOMS, "train", range(24))
    steps, loss = itertools.count(1), cabins.total_loss
    bad = lambda *given: loss(*given) * (math.nan if next(steps) >= 4 else 1)
    short.setattr(cabins, "total_loss", bad)
    ran = run_train("--epochs", 1, "--batch-size", 2, "--out", tmp_path / "a")
    assert ran.status == 1 and "step 10: loss nan" in ran.err and "--lr" in ran.err
    assert os.listdir(tmp_path / "a") == ["args.json"]


# ---- Several processes, and what a GPU would see -------------------------------------------------

HEAD = f"""
import sys
sys.path[:0] = {sys.path}
import numpy as np, torch, cabins, data, eval as evaluation, train
data.TOY_ROOMS = {{"train": range(8), "test": range(50, 52)}}
"""
TWO = """
learn, whole = train.Run.learn, train.Run.train

def told_learn(run, batch):
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    loss = learn(run, batch)[2][0]
    gradients = {n: p.grad for n, p in run.model.named_parameters() if p.requires_grad}
    torch.save((batch, before, gradients, loss), f"step{run.step}_{run.rank}.pt")
    return None, None, torch.stack([loss, loss])

def told_train(run):
    run.log = lambda *_: None
    whole(run)
    torch.save([*run.model.parameters()], f"end_{run.rank}.pt")

train.Run.learn, train.Run.train, train.MAX_NORM = told_learn, told_train, 1e9
data.run_command(train.main)
"""


def test_two_processes_average_the_gradients_of_their_shares(short, tmp_path):
    (tmp_path / "script.py").write_text(HEAD + TWO)
    options = ["--epochs", "1", "--batch-size", "4", "--seed", "3", "--workers", "0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 180}
    command += ["script.py", *options, "--out", "a"]
    ran = subprocess.run(command, cwd=tmp_path, check=False, **how)
    assert ran.returncode == 0, ran.stdout
    for line in ("training on", "2 x cpu", "epoch 1/1", "training has finished"):
        assert ran.stdout.count(line) == 1  # only the first process speaks
    assert len(rows_of(tmp_path / "a" / "metrics.csv")) == 1
    one, two = (torch.load(tmp_path / f"end_{rank}.pt") for rank in (0, 1))
    assert same(one, two) and cabins.read_checkpoint(tmp_path / "a" / "last.pt")["step"] == 2

    short.setattr(train, "MAX_NORM", 1e9)
    run, sums = train.Run(train.parse_args(options)), {}
    run.n_processes, order = 2, run.order(0)[4:].tolist()
    told = [torch.load(tmp_path / f"step2_{rank}.pt") for rank in (0, 1)]
    for run.rank, (batch, before, _, loss) in enumerate(told):
        assert batch["path"] == [f"room {i}" for i in order[run.rank :: 2]]
        run.model.train().load_state_dict(before)
        run.step = 1
        close(run.learn(batch)[2][0], loss, 1e-4)  # of its own share, with its own random numbers
        for name, p in run.model.named_parameters():
            sums[name] = sums.get(name, 0) + p.grad / 2 if p.requires_grad else 0
    for _, _, gradients, _ in told:
        close(torch.cat([*map(torch.ravel, gradients.values())]), flat_of(sums, gradients), 1e-3)
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        short.setenv(name, value)
    short.setattr(dist, "init_process_group", lambda **_: None)
    short.setattr(dist, "get_rank", lambda: 0)
    with pytest.raises(cabins.InputError, match=r"--batch-size 5 .*2 processes"):
        train.Run(train.parse_args(["--batch-size", "5"]))


def flat_of(tensors: dict, names) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in names])


def test_each_process_has_its_own_gpu_and_all_share_batchnorms_statistics(short):
    calls, gpu = [], torch.device("cuda", 1)
    note = lambda name: lambda *given, **_: calls.append((name, *given))
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        short.setenv(name, value)
    short.setattr(torch.cuda, "is_available", lambda: True)
    short.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    short.setattr(torch.cuda, "set_device", note("set_device"))
    short.setattr(dist, "init_process_group", note("init"))
    short.setattr(dist, "get_rank", lambda: 1)
    short.setattr(nn.parallel, "DistributedDataParallel", note("parallel"))
    short.setattr(cabins.CaBins, "to", lambda model, *given, **_: note("to")(*given) or model)
    args = train.parse_args(["--batch-size", "4"])
    run = train.Run(args)
    assert (args.device, args.amp, run.device, run.rank) == (None, "bf16", gpu, 1)
    wanted = [("to",), ("to", gpu), ("parallel", run.model)]
    assert calls == [("set_device", gpu), ("init",), *wanted]
    kinds = {type(module) for module in run.model.modules()}
    assert nn.SyncBatchNorm in kinds and nn.BatchNorm2d not in kinds
    assert [len(batch) for batch in run.batches()] == [2] * 6
    short.setattr(torch.cuda, "is_bf16_supported", lambda *_: False)
    assert train.parse_args([]).amp == train.parse_args(["--device", "cpu"]).amp == "off"
    assert data.choose_device("cpu").type == "cpu" and data.choose_device().type == "cuda"


def test_all_of_a_step_is_on_one_device(short):
    """The device "meta" stands for a GPU: it computes shapes, and refuses tensors of the CPU."""
    autocast = []
    note = lambda *given: autocast.append(given) or contextlib.nullcontext()
    short.setattr(torch, "autocast", note)
    short.setattr(torch.optim, "AdamW", lambda p, lr, **_: torch.optim.SGD(p, lr, 0.9))
    run = train.Run(train.parse_args(["--device", "meta", "--amp", "bf16", "--batch-size", "2"]))
    prediction, depth, result = run.learn(next(iter(data.load(run.dataset, batch_size=2))))
    assert {x.device.type for x in (*prediction, depth, result)} == {"meta"}
    assert autocast == [("meta", torch.bfloat16, True)]


def test_pictures_and_test_images_go_to_the_networks_device(tiny, short, tmp_path):
    cabins.save_checkpoint(tmp_path / "a.pt", tiny, data={"name": "toy"})
    found = []

    def forward(model, image, upsample=True):
        found.append((image.device.type, image.dtype, model.prompts.device.type))
        p = torch.full((len(image), 256, 48, 64), 1 / 256)
        return cabins.Prediction(p[:, :1], p[:, :, 0, 0], p[:, :8, 0, 0], p[:, :8], p)

    short.setattr(cabins.CaBins, "forward", forward)
    model = cabins.load_checkpoint(tmp_path / "a.pt", "meta").half()
    cabins.infer(model, np.zeros((90, 120, 3), np.uint8))
    assert run_script("eval.py", tmp_path / "a.pt", "--device", "meta").status == 0
    assert found == [("meta", torch.half, "meta"), *[("meta", torch.float, "meta")] * 2]


def test_a_gpus_checkpoint_loads_where_there_is_none(tiny, tmp_path):
    cabins.save_checkpoint(tmp_path / "a.pt", tiny)
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():  # "cpu" and its length, as pickle writes them
            on_gpu = old.read(name).replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0")
            new.writestr(name, on_gpu if name.endswith("data.pkl") else old.read(name))
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(tmp_path / "b.pt", weights_only=True)
    assert same(cabins.load_checkpoint(tmp_path / "b.pt").state_dict(), tiny.state_dict())


ON_GPU = """
found = []
torch.nn.Dropout.forward = lambda self, x: x  # a GPU has random numbers of its own
for device in ("cpu", sys.argv[1]):
    data.use_tf32(False)
    run = train.Run(train.parse_args(["--device", device, "--amp", "off"]))
    batch = next(iter(data.load(run.dataset, run.device, 0, batch_size=4)))
    numbers = [*run.learn(batch)[2].tolist()]
    numbers += evaluation.evaluate(run.model, run.test_set, 0).values()
    picture = cabins.infer(run.model.eval(), batch["image"][0].permute(1, 2, 0).numpy())
    found.append([*numbers, *picture.depth[::20, ::20].flatten(), *picture.distances])
np.testing.assert_allclose(*found, rtol=1e-2)
"""


@pytest.mark.skipif(not HAS_GPU, reason="there is no GPU here")
def test_a_gpu_computes_what_the_cpu_computes():
    env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", HEAD + ON_GPU, "cuda"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert ran.returncode == 0, ran.stderr


# ---- Errors --------------------------------------------------------------------------------------

SLIP = """
draw, kind, workers = data.draw_room, *sys.argv[1:]

def slip(i):
    if i == 3:
        raise IndexError("a slip") if kind == "bug" else data.InputError("room 3")
    return draw(i)

data.describe, data.draw_room = lambda _: "", slip  # in the processes that load, too
if __name__ == "__main__":
    sys.argv[1:] = ["--batch-size", "8", "--workers", workers]
    data.run_command(train.main)
"""


@pytest.mark.parametrize(
    "kind, workers", [("bug", "0"), ("bug", "1"), ("error", "0"), ("error", "1")]
)
def test_an_input_error_is_one_sentence_and_a_bug_keeps_its_traceback(kind, workers, tmp_path):
    (tmp_path / "script.py").write_text(HEAD + SLIP)
    command = [sys.executable, "script.py", kind, workers]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ran.returncode == 1
    if kind == "error":
        assert ran.stderr == "error: room 3\n"
    else:
        assert "Traceback" in ran.stderr and 'script.py", line' in ran.stderr
        assert ran.stderr.rstrip().endswith("IndexError: a slip")


class Harmful:  # which pickle would build by running a command
    def __reduce__(self):
        return os.system, ("touch was_run",)


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """A folder of good files, and of broken ones that are named after what is wrong with them."""
    root = tmp_path_factory.mktemp("broken")
    good = write_pair(root / "a", "1", 96, 128)
    jpg, png = ((root / "a" / name).read_bytes() for name in ("rgb_1.jpg", "sync_depth_1.png"))
    files = {
        "a/cut.jpg": jpg[:500],
        "a/text.jpg": b"none",
        "a/cut.png": png[:60],
        "a/x.npy": b"\x93",
    }
    files |= {"binary.txt": b"\xff\xfe\x00", "nyu.mat": b"no HDF5", "text.pt": b"no network"}
    for mode in ("L", "RGB"):
        Image.new(mode, (128, 96)).save(root / "a" / f"{mode}.tif")
    files |= {f"{x}.txt": f"a/{x}.jpg a/sync_depth_1.png".encode() for x in ("cut", "text", "gone")}
    depths = ("L.tif", "RGB.tif", "cut.png", "x.npy", "sync_depth_narrow.png")
    files |= {f"{x}.txt": f"a/rgb_1.jpg a/{x}".encode() for x in depths}
    texts = {"small": write_pair(root / "a", "small", 48, 64), "nonsense": f"{good}x", "good": good}
    texts |= {"spaces": "my room/1.jpg my room/1.png", "notruth": "a/rgb_1.jpg None", "nothing": ""}
    write_pair(root / "a", "narrow", 80, 128)
    torch.manual_seed(0)
    cabins.save_checkpoint(root / "tiny.pt", cabins.CaBins(TINY))
    whole = (root / "tiny.pt").read_bytes()
    middle = len(whole) // 2
    files |= {"cut.pt": whole[:100_000], "bit.pt": whole[:middle] + b"bit" + whole[middle + 3 :]}
    for name, content in (files | {f"{x}.txt": text.encode() for x, text in texts.items()}).items():
        (root / name).write_bytes(content)
    content = torch.load(root / "tiny.pt", weights_only=True)
    config, state = content["config"], content["model"]
    clip = {k.removeprefix("clip."): v for k, v in state.items() if k.startswith("clip.")}
    files = {"clip": clip, "less": {k: v for k, v in clip.items() if k != "visual.bn1.bias"}}
    files |= {"theirs": {"model": {"module.contexts": torch.zeros(1, 8, 512)}}, "list": [1, 2]}
    files |= {
        "shapes": content | {"config": config | {"n_bins": 128}},
        "evil": content | {"a": Harmful()},
    }
    files |= {"k": content | {"config": config | {"n_cabins": 7}}, "other": {"a": torch.zeros(1)}}
    for name, value in files.items():
        torch.save(value, root / f"{name}.pt")
    with zipfile.ZipFile(root / "script.pt", "w") as archive:  # as TorchScript's are
        archive.writestr("script/data.pkl", pickle.dumps(Harmful()))
        archive.writestr("script/constants.pkl", pickle.dumps(()))
    return root


LIST = "data.py list --root . --train-split good.txt --test-split"
TRAIN = "train.py --data list --root . --backbone tiny --batch-size 1 --test-split good.txt"
TRAIN += " --train-split good.txt --clip"
# Each command is its beginning and one of these ends. What the sentence must name is in [] or, if
# it is not typed, in {}.
WRONG = {
    "data.py": "[nyu] | list --root [none] | toy [--root] . | list --root . {--train-split}"
    " | nyu --root [nyu.mat] --test-split good.txt | kitti --root . --train-split [small].txt",
    LIST: "[none.txt] | [binary.txt] | nothing.txt {test list} | notruth.txt {test list}"
    " | [nonsense].txt | [spaces.txt] | [gone].txt | [cut].txt | [text].txt | [L.tif].txt"
    " | [RGB.tif].txt | [cut.png].txt | [x.npy].txt | sync_depth_narrow.png.txt {80, 128}"
    " | [small].txt | good.txt --max-depth 1 {wrong --depth-scale or --max-depth}",
    "train.py": "[--batch-size] 1000 | --out [a] | --out [tiny.pt] | --init [none.pt]"
    " | --init [tiny.pt] --backbone RN50 | --init theirs.pt {python -m extras.convert theirs.pt}"
    " | --clip clip.pt --backbone [RN50] | --init [cut.pt]",
    TRAIN: "[none.pt] | [text.pt] | [other.pt] | [less.pt] | [evil.pt] | [script.pt]",
    "eval.py": "[none.pt] | [cut.pt] | [bit.pt] | [text.pt] | [list.pt] | [shapes.pt] | k.pt {7}"
    " | [evil.pt] | [script.pt] | theirs.pt {python -m extras.convert theirs.pt} | tiny.pt {--data}"
    " | tiny.pt --data [nyu] | tiny.pt --data toy --figures [a]"
    " | tiny.pt --data list --root . --split good.txt --depth-scale 1 {wrong --depth-scale}",
}
WRONG_OPTIONS = {  # argparse's own errors
    "train.py": "--epochs [x] | --data [moon] | --backbone [RN102] | --amp [fp16] | [--epoch-x] 3"
    " | --init tiny.pt [--clip] RN50 | --resume a/last.pt {args.json}",
    "eval.py": "{checkpoint}",
}
COMMANDS = [
    (" ".join([start, *end.split()]), status)
    for status, table in ((1, WRONG), (2, WRONG_OPTIONS))
    for start, ends in table.items()
    for end in ends.split("|")
]


def files_below(folder: Path) -> dict[str, tuple]:
    stats = {str(path): path.stat() for path in folder.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


@pytest.mark.parametrize("command, status", COMMANDS, ids=str)
def test_a_wrong_command_says_why_and_changes_no_file(command, status, broken, short):
    short.chdir(broken)
    before, named = files_below(broken), re.search(r"[{\[](.*?)[\]}]", command)[1]
    ran = run_script(*re.sub(r"{.*}|[\[\]]", "", command).split())
    assert ran.status == status and named in ran.err, ran.err
    assert status == 2 or ran.err.startswith("error: ") and ran.err.count("\n") == 1, ran.err
    assert not re.search(r"Traceback|0x[0-9a-f]{6}", ran.err) and files_below(broken) == before
