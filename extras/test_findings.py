"""python -m pytest -q extras"""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import train
from eval import evaluate
from extras import findings

PARTS = {"TransDecoder", "gamma", "image encoder", "bins", "depth decoder", "prompts"}
TEXT = {"gamma", "prompts"}
UNITS = {"10 m", "80 m", "10 m in cm"}


@pytest.fixture
def rooms(monkeypatch):
    """The demo with two steps in an epoch and two rooms for the test."""
    few = {"train": range(16), "test": range(1_000_000, 1_000_002)}
    monkeypatch.setattr(data, "TOY_ROOMS", few)


def run_command(monkeypatch, *options: str) -> None:
    command = ["findings", "--workers", "0", "--device", "cpu", "--epochs", "1", *options]
    monkeypatch.setattr(sys, "argv", command)
    findings.main()


def is_number(found: dict) -> bool:
    least, mean, greatest = (found[key] for key in ("least", "mean", "greatest"))
    return len(found) == 3 and least <= mean <= greatest


def check_layout(run: dict, parts: set[str], steps: list[str]) -> None:
    """The layout that docs/build.py reads."""
    keys = "gamma_rms turn gradient_rms step_share attention ablation digits one_text_best eq2"
    assert run.keys() == set(keys.split())
    for found in (run["gamma_rms"], run["turn"]):
        assert list(found) == steps and all(map(is_number, found.values()))
    for found in (run["gradient_rms"], run["step_share"]):
        assert found.keys() == parts
        assert all(
            list(row) == steps and all(map(is_number, row.values())) for row in found.values()
        )
    assert is_number(run["attention"]["least"]) and is_number(run["attention"]["greatest"])
    assert run["attention"]["even"] == 1 / 13
    assert list(run["ablation"]) == ["whole", "s = 0", "classes reversed", "one text"]
    for row in run["ablation"].values():
        assert list(row) == ["abs_rel", "rmse", "d1"] and all(map(is_number, row.values()))
    assert run["digits"].keys() == {"0.1 mm", "1 m"} and all(map(is_number, run["digits"].values()))
    assert is_number(run["one_text_best"])
    check_eq2(run["eq2"])


def check_eq2(found: dict) -> None:
    assert found.keys() == UNITS
    for row in found.values():
        assert row.keys() == {"largest_weight", "nearest", "mean"} and all(
            map(is_number, row.values())
        )


def test_two_steps_of_each_run(rooms, tmp_path, monkeypatch, capsys):
    out = tmp_path / "findings.json"
    run_command(monkeypatch, "--seeds", "0", "1", "--out", str(out))
    assert [path.name for path in tmp_path.iterdir()] == ["findings.json"]
    found = json.loads(out.read_text())
    assert found.keys() == {"seeds", "torch", "steps", "runs", "random_widths"}
    assert (found["seeds"], found["torch"]) == ([0, 1], torch.__version__)
    assert found["steps"] == [0, 1, 2]
    check_eq2(found["random_widths"])
    width = found["random_widths"]["10 m"]["nearest"]
    assert width["least"] < width["greatest"]  # each seed draws its own
    paper, fixed, small = (found["runs"][name] for name in findings.VARIANTS)
    check_layout(paper, PARTS, ["0", "1", "2"])
    check_layout(fixed, PARTS - TEXT, ["0", "1", "2"])
    check_layout(small, PARTS, ["0", "1", "2"])
    for step in ("0", "1", "2"):
        assert fixed["gamma_rms"][step]["mean"] == pytest.approx(1e-4)
        assert small["step_share"]["TransDecoder"][step]["least"] > 0.99
        assert paper["step_share"]["TransDecoder"][step]["greatest"] < 0.1
    for run in (paper, small):
        assert run["gamma_rms"]["2"]["least"] > run["gamma_rms"]["0"]["greatest"]
        assert run["turn"]["2"]["least"] > run["turn"]["0"]["greatest"]
    assert paper["gradient_rms"]["bins"]["0"] == small["gradient_rms"]["bins"]["0"]
    printed = capsys.readouterr().out
    assert "paper 0: abs_rel" in printed and "small_epsilon, metrics" in printed

    # The run "paper" is the run of train.py.
    options = ["--workers", "0", "--device", "cpu", "--epochs", "1", "--out", str(tmp_path / "run")]
    rows = []
    for seed in ("0", "1"):
        run = train.Run(train.parse_args([*options, "--seed", seed]))
        run.model.train()
        for batch in data.load(run.dataset, workers=0, batch_sampler=run.order(0)):
            run.learn(batch)
            if run.step == 1:
                weights = [p.grad for n, p in run.model.named_parameters() if n.startswith("bins.")]
                rms = torch.cat([w.flatten() for w in weights]).square().mean().sqrt().item()
                least, greatest = (
                    paper["gradient_rms"]["bins"]["0"][k] for k in ("least", "greatest")
                )
                assert min(abs(rms - least), abs(rms - greatest)) < 1e-3 * rms
        rows.append(evaluate(run.model, run.test_set, workers=0)["abs_rel"])
    whole = paper["ablation"]["whole"]["abs_rel"]
    assert [whole["least"], whole["greatest"]] == pytest.approx(sorted(rows), rel=1e-4)
    assert whole["mean"] == pytest.approx(sum(rows) / 2, rel=1e-4)


def test_an_interrupted_command_goes_on(rooms, tmp_path, monkeypatch):
    started = []

    def new_run(variant: str, seed: int, options: list[str]):
        started.append((variant, seed))
        if len(started) == 2:
            raise KeyboardInterrupt
        return original(variant, seed, options)

    original = findings.new_run
    monkeypatch.setattr(findings, "new_run", new_run)
    options = ["--out", str(tmp_path / "out.json"), "--seeds", "3", "4", "--runs", "released"]
    with pytest.raises(KeyboardInterrupt):
        run_command(monkeypatch, *options)
    assert [path.name for path in tmp_path.iterdir()] == ["out.json.partial"]
    run_command(monkeypatch, *options)
    assert started == [("released", 3), ("released", 4), ("released", 4)]
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found["runs"]) == ["released"] and found["seeds"] == [3, 4]
    check_layout(found["runs"]["released"], PARTS - TEXT, ["0", "1", "2"])


def test_an_own_list(tmp_path, monkeypatch):
    lines = []
    for i in range(10):
        image, depth = data.draw_room(i)
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        Image.fromarray((1000 * depth).astype("uint16")).save(tmp_path / f"{i}_depth.png")
        lines.append(f"{i}.png {i}_depth.png\n")
    train_list, test_list, out = (tmp_path / name for name in ("train.txt", "test.txt", "own.json"))
    train_list.write_text("".join(lines[:8]))
    test_list.write_text("".join(lines[8:]))
    files = [str(tmp_path), str(train_list), str(test_list)]
    run_command(monkeypatch, "--list", *files, "--seeds", "0", "--runs", "paper", "--out", str(out))
    with pytest.raises(SystemExit):  # docs/findings.json stays
        run_command(monkeypatch, "--list", *files)
    found = json.loads(out.read_text())
    assert found["steps"] == [0, 1] and "random_widths" not in found
    check_layout(found["runs"]["paper"], PARTS, ["0", "1"])


# ---- What is quoted ------------------------------------------------------------------------------
HERE = Path(__file__).resolve().parents[1]
D, R, E, K, W = (
    "demo paper",
    "demo released",
    "demo small_epsilon",
    "kitchen paper",
    "random_widths",
)
ROWS = ("whole", "s = 0", "classes reversed", "one text")
QUOTED = {  # rows of docs/findings.md, and their figures: run, path, format, factor
    2: [(D, "turn/0", ".1e", 1)],
    3: [(R, "turn/240", ".1e", 1)],
    9: [
        (W, "10 m/nearest", ".2f", 1000),
        (W, "80 m/nearest", ".0f", 1000),
        (W, "10 m in cm/mean", ".2f", 1000),
        (D, "eq2/10 m/nearest", ".2f", 1000),
        (K, "eq2/10 m/nearest", ".1f", 1000),
    ],
    10: [(run, f"digits/{step}", ".3f", 1) for run in (D, K) for step in ("0.1 mm", "1 m")],
    11: [
        (D, "step_share/TransDecoder/0", ".2f", 100),
        (D, "step_share/TransDecoder/240", ".1f", 100),
        (R, "step_share/TransDecoder/240", ".2f", 100),
        (K, "step_share/TransDecoder/400", ".1f", 100),
        (D, "gamma_rms/240", ".4f", 1),
        (K, "gamma_rms/400", ".4f", 1),
    ],
    12: [
        (E, "step_share/TransDecoder/240", ".0f", 100),
        (E, "ablation/whole/abs_rel", ".4f", 1),
        (E, "ablation/s = 0/abs_rel", ".4f", 1),
        (E, "attention/least", ".4f", 1),
        (E, "attention/greatest", ".4f", 1),
    ],
    13: [
        *((run, f"ablation/{row}/abs_rel", ".4f", 1) for run in (D, K) for row in ROWS[:2]),
        (D, "one_text_best", ".0f", 100),
        (K, "one_text_best", ".0f", 100),
    ],
}
FACTORS = (1, 100, 1000)  # also in per cent, and in millimetres
SPREAD = r"([\d.e-]*\d) \(([\d.e-]*\d) to ([\d.e-]*\d)[\w ]*\)"  # a figure, its least and greatest


def figures() -> dict:
    """The committed figures of each run."""
    demo = json.loads((HERE / "docs/findings.json").read_text())
    kitchen = json.loads((HERE / "docs/findings_kitchen.json").read_text())
    runs = {f"demo {name}": run for name, run in demo["runs"].items()}
    runs |= {f"kitchen {name}": run for name, run in kitchen["runs"].items()}
    return runs | {"random_widths": demo["random_widths"]}


def look_up(found: dict, run: str, path: str) -> dict[str, float]:
    for key in (run, *path.split("/")):
        found = found[key]
    return found


def written(n: dict[str, float], form: str, factor: float) -> str:
    """A figure as it is quoted: the mean, with the least and the greatest in brackets."""
    mean, least, greatest = (
        f"{factor * n[key]:{form}}".replace("e-0", "e-") for key in ("mean", "least", "greatest")
    )
    return f"{mean} ({least} to {greatest})"


def read(file: str) -> str:
    return " ".join((HERE / file).read_text(encoding="utf-8").split())


def test_each_figure_of_the_page_is_that_of_the_files():
    found, page = figures(), (HERE / "docs/findings.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d+) \|(.*)$", page, re.MULTILINE))
    assert [*rows] == [str(i) for i in range(1, 15)]
    for i, row in rows.items():
        for run, path, form, factor in QUOTED.get(int(i), []):
            text = written(look_up(found, run, path), form, factor)
            assert text in row, f"finding {i}: {run} {path} is {text}"
            row = row.replace(text, "", 1)
        assert not re.findall(SPREAD, row), f"finding {i} has a figure that is not checked"
    outside = re.sub(r"^\|.*$", "", page, flags=re.MULTILINE)
    assert not re.findall(SPREAD, outside)
    (centimetres,) = re.findall(r"by (\d+) cm with random widths over 80 m", " ".join(page.split()))
    assert centimetres == f"{100 * look_up(found, W, '80 m/mean')['mean']:.0f}"


@pytest.mark.parametrize("file", ["README.md", "cabins.py"])
def test_figures_with_a_spread_elsewhere_are_those_of_the_files(file):
    known, found = set(), [figures()]
    while found:
        n = found.pop()
        if n.keys() == {"mean", "least", "greatest"}:
            forms = [
                (f".{i}{kind}", factor) for i in range(6) for kind in "fe" for factor in FACTORS
            ]
            known |= {written(n, form, factor) for form, factor in forms}
        else:
            found += [value for value in n.values() if isinstance(value, dict)]
    quoted = {f"{mean} ({low} to {high})" for mean, low, high in re.findall(SPREAD, read(file))}
    assert quoted <= known


def test_what_the_first_page_and_the_docstrings_say_was_measured():
    found, text = figures(), read("cabins.py")
    numbers = {
        r"Over 10 m, e_k lies ([\d.]+) mm from the centre nearest to m_k": "10 m/nearest",
        r"from the centre nearest to m_k[ \w]*, and over 80 m ([\d.]+) mm": "80 m/nearest",
        r"in centimetres, e_k lies ([\d.]+) mm from m_k itself": "10 m in cm/mean",
    }
    for pattern, path in numbers.items():
        (quoted,) = re.findall(pattern, text)
        digits = len(quoted.partition(".")[2])
        mean = 1000 * look_up(found, W, path)["mean"]
        assert quoted == f"{mean:.{digits}f}", f"{path} is {mean} mm"
    for run in (D, K):
        turn, share, rms = (
            found[run][key] if key == "turn" else found[run][key]["TransDecoder"]
            for key in ("turn", "step_share", "gradient_rms")
        )
        last = list(turn)[-1]
        assert turn["0"]["greatest"] < 1e-4  # "Eq. 3 is nearly the identity"
        assert rms["0"]["greatest"] < 1e-10  # "far below Adam's ε"
        assert share["0"]["greatest"] < 0.01  # "its layers hardly learn before γ grows"
        assert share[last]["least"] > 10 * share["0"]["greatest"]
    fixed = found[R]  # "There, Eq. 3 stays nearly the identity"
    assert all(n["greatest"] < 1e-4 for n in fixed["turn"].values())
    assert all(n["greatest"] < 0.01 for n in fixed["step_share"]["TransDecoder"].values())


def test_the_four_rows_are_equal_as_readme_says():
    found = figures()
    (most,) = re.findall(r"the demo's four rows differ by less than (0\.\d+)", read("README.md"))
    for run in (D, R, E, K):  # and the kitchen's
        whole, *others = (found[run]["ablation"][row] for row in ROWS)
        for row in others:
            for metric, n in row.items():
                for key, value in n.items():
                    assert value == pytest.approx(whole[metric][key], abs=float(most)), (
                        run,
                        metric,
                    )


def test_the_tests_and_keys_that_the_page_names_exist():
    page = (HERE / "docs/findings.md").read_text(encoding="utf-8")
    files = [HERE / "test_cabins.py", *HERE.glob("extras/test_*.py")]
    tests = "".join(path.read_text(encoding="utf-8") for path in files)
    rows = "".join(re.findall(r"^\|.*$", page, re.MULTILINE))
    named = re.findall(r"`-k (\w+)`", rows)
    assert len(named) == 8 and all(re.search(rf"def test_\w*{name}", tests) for name in named)
    assert {*re.findall(r"`(\w+)`", rows)} <= {*figures(), *figures()[D]}
