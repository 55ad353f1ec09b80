"""The widgets of the companion page: python -m pytest docs/test_widgets.py

What docs/widgets.js computes is compared with PyTorch, under node and without a browser. Then each
widget is moved in a browser, by mouse and by keyboard, and its numbers are checked.
"""

import base64
import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import cabins
from clip_tokenizer import encode, number_tokens

DOCS = Path(__file__).parent
DEMO = json.loads((DOCS / "demo.json").read_text(encoding="utf-8"))
SCRIPT, STYLE = DOCS / "widgets.js", DOCS / "widgets.css"
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
FLAGS += " --disable-background-networking --disable-component-update"


# ---- demo.json agrees with itself ----------------------------------------------------------------


def unpacked(field: dict, dtype: str) -> np.ndarray:
    """A packed map of demo.json, in metres."""
    values = np.frombuffer(base64.b64decode(field["data"]), dtype).astype(float)
    return values.reshape(field["size"]) * field["unit"]


def stored_p() -> np.ndarray:
    """(24, 32, 256) probabilities out of demo.json's bytes."""
    q = np.frombuffer(base64.b64decode(DEMO["p"]["data"]), np.uint8).astype(float)
    q = q.reshape(*DEMO["p"]["size"], len(DEMO["centers"])) ** 2
    return q / q.sum(-1, keepdims=True)


def test_demo_is_small_and_whole():
    assert (DOCS / "demo.json").stat().st_size <= 600_000
    assert len(DEMO["widths"]) == len(DEMO["centers"]) == 256
    assert sum(DEMO["widths"]) == pytest.approx(1, abs=1e-5)
    for name in ("picture", "depth_png", "truth_png"):
        assert DEMO[name].startswith("data:image/png;base64,")
    sizes = [DEMO[name]["size"] for name in ("depth", "truth")]
    assert sizes == [[side // 2 for side in DEMO["size"]], DEMO["size"]]
    assert all(len(values) == 12 for values in DEMO["similarity"]["values"])


def test_stored_bins_are_eq_1_and_2():
    b = torch.tensor([DEMO["widths"]], dtype=torch.float64)
    c = cabins.bin_centers(b, DEMO["min_depth"], DEMO["max_depth"])
    centers = torch.tensor([DEMO["centers"]], dtype=torch.float64)
    torch.testing.assert_close(c, centers, atol=2e-5, rtol=0)
    means = centers.view(8, -1).mean(1)
    torch.testing.assert_close(means, torch.tensor(DEMO["means"]).double(), atol=1e-5, rtol=0)
    # weights react to a millionth of a metre where a centre is close to the mean
    e = cabins.distance_classes(centers, 8)[0]
    torch.testing.assert_close(e, torch.tensor(DEMO["cabins"]).double(), atol=1e-3, rtol=0)


def test_stored_p_gives_the_stored_depth():
    step, p = DEMO["p"]["step"], stored_p()
    depth = unpacked(DEMO["depth"], "<u2")[::step, ::step]
    error = abs(p @ np.array(DEMO["centers"]) - depth)
    assert error.max() <= DEMO["p"]["depth_error"] + DEMO["depth"]["unit"] + 1e-5
    assert DEMO["p"]["depth_error"] < 0.005 and DEMO["p"]["p_error"] < 0.005


def test_stored_texts_are_what_the_network_reads():
    for e, text, ids in zip(DEMO["cabins"], DEMO["texts"], DEMO["tokens"]):
        assert float(text) == pytest.approx(e, abs=6e-5)
        assert ids[1:-1] == encode(text)


def test_stored_silence_agrees_with_its_map():
    silenced = DEMO["silenced"]
    difference = 1000 * abs(unpacked(silenced["difference"], "<i2"))
    half = 500 * silenced["difference"]["unit"] + 1e-3
    assert difference.mean() == pytest.approx(silenced["mean_mm"], abs=half)
    assert difference.max() == pytest.approx(silenced["max_mm"], abs=half)
    assert silenced["all_max_mm"] >= silenced["max_mm"]
    assert {"whole", "s = 0"} <= silenced["metrics"].keys()


# ---- JavaScript computes what PyTorch computes, under node ---------------------------------------


def run_js(calls: list[list]) -> list:
    """What Cabins[name](*arguments) gives for each [name, *arguments]."""
    if not (node := shutil.which("node")):
        pytest.skip("there is no node")
    program = (
        "const Cabins = require(process.argv[1]);"
        "const calls = JSON.parse(require('fs').readFileSync(0, 'utf8'));"
        "console.log(JSON.stringify(calls.map(([name, ...given]) => Cabins[name](...given))));"
    )
    command, given = [node, "-e", program, str(SCRIPT)], json.dumps(calls)
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout)


def assert_equal(found, expected) -> None:
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def some_widths() -> list[torch.Tensor]:
    """Random widths, equal ones, one bin that takes nearly all, and the demo's."""
    generator = torch.Generator().manual_seed(0)
    b = [torch.rand(256, generator=generator).double() ** 3 + 0.01 for _ in range(6)]
    b += [torch.ones(256).double(), torch.full((256,), 1e-4).double()]
    b[-1][77] = 1
    b.append(torch.tensor(DEMO["widths"]).double())
    return [values / values.sum() for values in b]


@pytest.mark.parametrize("high", [10.0, 80.0])
def test_bin_centers_equal_pytorch(high):
    widths = some_widths()
    found = run_js([["binCenters", b.tolist(), 1e-3, high] for b in widths])
    assert_equal(found, cabins.bin_centers(torch.stack(widths), 1e-3, high))


@pytest.mark.parametrize("unit", [1, 0.01])
@pytest.mark.parametrize("high", [10.0, 80.0])
def test_distance_classes_equal_pytorch(high, unit):
    c = cabins.bin_centers(torch.stack(some_widths()), 1e-3, high)
    found = run_js([["distanceClasses", row.tolist(), 8, unit] for row in c])
    groups = c.view(len(c), 8, 32) / unit
    m = groups.mean(2, keepdim=True)
    w = torch.softmax(1 / ((groups - m).abs() + 1e-4), dim=2)
    assert_equal([f["w"] for f in found], w)
    assert_equal([f["m"] for f in found], cabins.distance_classes(c, 8, "mean"))
    assert_equal([f["median"] for f in found], cabins.distance_classes(c, 8, "median"))
    assert_equal([f["e"] for f in found], unit * cabins.distance_classes(c / unit, 8))


def test_equal_bins_give_the_weights_that_the_page_tells():
    c = cabins.bin_centers(torch.full((1, 256), 1 / 256).double(), 1e-3, 10)[0].tolist()
    far = cabins.bin_centers(torch.full((1, 256), 1 / 256).double(), 1e-3, 80)[0].tolist()
    calls = [["distanceClasses", *given] for given in ([c, 8], [far, 8], [c, 8, 0.01])]
    near, far, centimetres = (sorted(found["w"][0])[::-1] for found in run_js(calls))
    assert near[:2] == pytest.approx([0.5, 0.5]) and near[2] < 1e-12
    assert far[:4] == pytest.approx([0.475, 0.475, 0.0067, 0.0067], rel=0.1)
    assert centimetres[0] == pytest.approx(0.048, abs=0.001) and centimetres[2] < 0.04


def test_number_tokens_equal_pytorch():
    generator = torch.Generator().manual_seed(0)
    e = [torch.rand(3000, generator=generator) * high for high in (1e-3, 1, 10, 80)]
    e.append(torch.arange(0, 80, 1 / 32))  # every second one is a tie: 1/32 is 312.5 tenths of a mm
    e.append(torch.arange(0, 800) / 10)
    e.append(torch.arange(0, 30_001) / 10_000)
    e.append(torch.tensor([0.00004, 0.00005, 0.00006, 2.9999, 2.99995, 9.99995, 10.0, 79.99999]))
    e = torch.cat(e)
    found = run_js([["numberTokens", value] for value in e.tolist()])
    expected = [[i for i in row if i] for row in number_tokens(e, 2).tolist()]
    assert found == expected
    typed = [n / 1e5 for n in range(5, 800_000, 130)]  # halves, before float32 rounds them
    expected = [[i for i in row if i] for row in number_tokens(torch.tensor(typed), 2).tolist()]
    assert run_js([["numberTokens", value] for value in typed]) == expected
    texts = run_js([["numberText", value] for value in e[::50].tolist()])
    assert texts == [str(round(value, 4)) for value in e[::50].tolist()]


def test_depth_and_spread_equal_pytorch():
    p = torch.from_numpy(stored_p()).flatten(0, 1)[::40]
    one = torch.zeros(1, 256).double()
    one[0, 3] = 1
    p = torch.cat([p, one, torch.full((1, 256), 1 / 256).double()])
    c = torch.tensor([DEMO["centers"]]).double()
    depths = [cabins.expected_depth(c, row[None, :, None, None]).squeeze() for row in p]
    spreads = [(row * (c[0] - depth).square()).sum().sqrt() for row, depth in zip(p, depths)]
    calls = [
        [name, DEMO["centers"], row.tolist()] for name in ("expectedDepth", "std") for row in p
    ]
    found = run_js(calls)
    assert_equal(found, [x.item() for x in (*depths, *spreads)])


def silog(g: list[float], factor: float = 0.85) -> float:
    """Eq. 6 by cabins.silog_loss, with another λ."""
    g = torch.tensor(g).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cabins, "LAMBDA", factor)
        loss = cabins.silog_loss(g.exp(), torch.ones_like(g), torch.ones_like(g, dtype=torch.bool))
    return loss.item()


def test_silog_equals_pytorch():
    generator = torch.Generator().manual_seed(0)
    errors = [torch.randn(n, generator=generator).tolist() for n in (1, 2, 8, 50)]
    errors += [[0.0] * 5, [0.3] * 5, [-0.1, 0.1]]
    cases = [(g, factor) for g in errors for factor in (0.0, 0.5, 0.85)]
    cases += [(g, 1.0) for g in errors if len(set(g)) > 1]
    found = run_js([["silog", *case] for case in cases])
    assert_equal([f["loss"] for f in found], [silog(*case) for case in cases])
    for (g, _), f in zip(cases, found):
        total = f["variance"] + f["left"] + f["forgiven"]
        assert total == pytest.approx(np.square(g).mean(), abs=1e-9)


def chamfer(x: list[float], c: list[float]) -> torch.Tensor:
    """Eq. 7 of depths and centres in any order, by cabins.chamfer_loss, with centres to derive by."""
    c = torch.tensor(c).double().requires_grad_()
    x = torch.tensor(x).double().view(1, 1, 1, -1)
    loss = cabins.chamfer_loss(c.sort().values[None], x, torch.ones_like(x, dtype=torch.bool))
    loss.backward()
    return loss.detach(), c.grad


def test_chamfer_and_its_gradient_equal_pytorch():
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, 1), (1, 5), (6, 1), (6, 5), (40, 30)]
    cases = [[torch.rand(n, generator=generator).mul(10).tolist() for n in size] for size in sizes]
    cases += [[[1.0, 1.0, 3.0], [2.0, 4.0]], [[2.5], [2.5, 2.5]], [[3.0, 1.0], [9.0, 0.5, 2.0]]]
    found = run_js([["chamfer", *case] for case in cases])
    assert_equal([f["loss"] for f in found], [chamfer(*case)[0].item() for case in cases])
    for f in found:
        assert f["loss"] == pytest.approx(f["toCenters"] + f["toDepths"])
    for case, after in zip(cases[:5], run_js([["chamferStep", *case, 0.4] for case in cases[:5]])):
        assert_equal(after, torch.tensor(case[1]).double() - 0.4 * chamfer(*case)[1])


def test_warp_goes_through_its_knots_and_never_turns_back():
    knots = [0, 0.1, 0.11, 0.4, 0.6, 1]
    moved = [0, 0.3, 0.304, 0.5, 0.504, 1]
    fine = np.linspace(0, 1, 1001).tolist()
    at_knots, same, curve = run_js(
        [["warp", knots, moved, knots], ["warp", knots, knots, fine], ["warp", knots, moved, fine]]
    )
    assert_equal(at_knots, moved)
    assert_equal(same, fine)
    assert min(np.diff(curve)) > 0


def test_stored_bytes_become_the_same_p():
    q = list(base64.b64decode(DEMO["p"]["data"])[: 3 * 256])
    program = f"Cabins.probabilities(Uint8Array.from({q}), 2, 256)"
    if not (node := shutil.which("node")):
        pytest.skip("there is no node")
    code = (
        f"const Cabins = require({json.dumps(str(SCRIPT))}); console.log(JSON.stringify({program}))"
    )
    done = subprocess.run([node, "-e", code], capture_output=True, text=True, check=True)
    assert_equal(json.loads(done.stdout), stored_p().reshape(-1, 256)[2])


# ---- In a browser: each widget moved by mouse and by keyboard ------------------------------------

COLOURS = "--paper:#fff;--ink:#222;--soft:#555;--rule:#ddd;--panel:#f8f8f8;--accent:#06c;"
COLOURS += "--c3:#009e73;--c5:#0072b2;--c6:#d55e00;--c7:#cc79a7;--serif:serif;--sans:sans-serif;"
NAMES = ("bins", "tokens", "pixel", "maps", "silog", "chamfer")


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="there is no playwright")
    if not (path := shutil.which("chromium") or shutil.which("chromium-browser")):
        pytest.skip("there is no chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS.split())
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def harness(tmp_path_factory) -> str:
    """The address of a page with the six widgets and nothing else."""
    figures = "".join(f'<figure class="widget" data-widget="{name}"></figure>' for name in NAMES)
    demo = json.dumps(DEMO).replace("</", "<\\/")
    path = tmp_path_factory.mktemp("widgets") / "harness.html"
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Widgets</title>'
        f"<style>:root{{{COLOURS}}}{STYLE.read_text(encoding='utf-8')}</style>{figures}"
        f'<script type="application/json" id="demo">{demo}</script>'
        f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>",
        encoding="utf-8",
    )
    return path.as_uri()


@pytest.fixture
def page(browser, harness):
    page = browser.new_page(viewport={"width": 768, "height": 1000})
    messages = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto(harness)
    page.wait_for_selector("[data-widget=chamfer] dd:not(:empty)")
    yield page
    page.close()
    assert not messages


class Widget:
    """One figure: its controls by the names that a reader sees or hears, its numbers by key."""

    def __init__(self, page, name: str):
        self.page, self.figure = page, page.locator(f"figure[data-widget={name}]")
        self.figure.scroll_into_view_if_needed()

    def number(self, key: str) -> float:
        text = self.figure.locator(f"[data-key={key}]").inner_text()
        return float(text.split()[0].replace("−", "-"))

    def press(self, name: str) -> None:
        self.figure.get_by_role("button", name=name, exact=True).click()

    def choose(self, name: str) -> None:
        self.figure.get_by_role("radio", name=name, exact=True).check()

    def slider(self, name: str):
        return self.figure.get_by_role("slider", name=name, exact=True)

    def value(self, name: str) -> float:
        return float(self.slider(name).get_attribute("aria-valuenow"))

    def key(self, name: str, *keys: str) -> None:
        for key in keys:
            self.slider(name).press(key)

    def drag(self, name: str, dx: float, dy: float) -> None:
        circle = self.slider(name).locator(".w-hit").bounding_box()
        x, y = circle["x"] + circle["width"] / 2, circle["y"] + circle["height"] / 2
        mouse = self.page.mouse
        mouse.move(x, y)
        mouse.down()
        mouse.move(x + dx / 2, y + dy / 2)
        mouse.move(x + dx, y + dy)
        mouse.up()


def close(found: float, expected: float, digits: int) -> bool:
    """Whether `found`, shown with so many digits, is `expected`."""
    return abs(found - expected) <= 0.51 * 10**-digits


def test_bins_widget(page):
    widget = Widget(page, "bins")
    assert close(widget.number("e"), DEMO["cabins"][2], 4)
    widget.press("equal bins")
    c = cabins.bin_centers(torch.full((1, 256), 1 / 256).double(), 1e-3, 10)
    e, m = (cabins.distance_classes(c, 8, kind)[0, 2] for kind in ("cabins", "mean"))
    assert close(widget.number("e"), e, 4) and close(widget.number("m"), m, 4)
    assert close(widget.number("effective"), 2, 1)  # two bins share all the weight
    widget.choose("centimetres")
    assert widget.number("effective") > 25
    widget.choose("80 m")
    far = cabins.bin_centers(torch.full((1, 256), 1 / 256).double(), 1e-3, 80)
    e = cabins.distance_classes(100 * far, 8)[0, 2] / 100
    assert close(widget.number("e"), e, 4)
    bin_ = widget.slider("bin i")  # by keyboard, to the last group
    bin_.press("End")
    assert close(widget.number("median"), far[0, 224 + 15], 4)


def bins_after(page, edges: list[float], moved: int, to: float) -> torch.Tensor:
    """Centres up to 10 m, when a border of eight groups of the bins with these edges is moved."""
    knots = edges[::32]
    target = [*knots]
    target[moved] = (to - 1e-3) / (10 - 1e-3)
    warped = page.evaluate(
        "([from, to, edges]) => Cabins.warp(from, to, edges)", [knots, target, edges]
    )
    b = torch.tensor(warped).double().diff()[None]
    return cabins.bin_centers(b, 1e-3, 10)


def test_borders_of_groups_move(page):
    widget, name = Widget(page, "bins"), "border of groups 3 and 4"
    widget.press("equal bins")
    equal = np.linspace(0, 1, 257).tolist()
    before = widget.value(name)
    box = widget.figure.locator("svg").first.bounding_box()
    widget.drag(name, 60, 0)
    after = widget.value(name)
    assert after - before == pytest.approx(60 * 9.999 / (box["width"] - 16), abs=0.02)
    e = cabins.distance_classes(bins_after(page, equal, 3, after), 8)[0, 2]
    assert widget.number("e") == pytest.approx(e.item(), abs=2e-3)
    widget.key(name, "ArrowLeft", "ArrowLeft", "PageDown")
    assert widget.value(name) == pytest.approx(after - 12 * 10 / 200, abs=1e-3)
    m = bins_after(page, equal, 3, widget.value(name)).view(8, 32).mean(1)[2]
    assert widget.number("m") == pytest.approx(m.item(), abs=2e-4)
    widget.key(name, "End")  # never past its neighbour
    assert widget.value(name) < widget.value("border of groups 4 and 5")


def test_tokens_widget(page):
    widget = Widget(page, "tokens")
    assert widget.number("differ") == 5  # of 6: "2.9999" and "3.0" share only the point
    assert "They share only the point." in widget.figure.locator(".w-says").inner_text()
    field = widget.figure.get_by_role("spinbutton")
    field.fill("")
    field.press_sequentially("1.23")
    tiles = widget.figure.locator(".w-own .w-tile small").all_inner_texts()
    ids = [i for i in number_tokens(torch.tensor(1.23), 2).tolist() if i]
    assert [int(text) for text in tiles if text != "learnt"] == ids
    widget.press("+ 0.0001")
    assert field.input_value() == "1.2301" and widget.number("differ") == 1
    field.press("ArrowDown")
    assert "“1.23” and “1.2301”" in widget.figure.locator(".w-says").inner_text()
    widget.press(DEMO["texts"][3])
    assert field.input_value() == DEMO["texts"][3]
    box = widget.figure.locator("svg").bounding_box()  # a bar near the right end: 2 mm further
    page.mouse.click(box["x"] + box["width"] - 3, box["y"] + box["height"] / 2)
    assert float(field.input_value()) == pytest.approx(float(DEMO["texts"][3]) + 0.002, abs=1e-6)


def expected_pixel(row: int, column: int) -> tuple[float, float, float]:
    """Depth by Eq. 5, its spread and the truth at a place of the grid of demo.p."""
    c, p = np.array(DEMO["centers"]), stored_p()[row, column]
    depth = p @ c
    (big_h, big_w), (h, w) = DEMO["size"], DEMO["depth"]["size"]
    y, x = (
        math.floor(2 * i * (big - 1) / (small - 1) + 0.5)
        for i, big, small in ((row, big_h, h), (column, big_w, w))
    )
    return depth, math.sqrt(p @ (c - depth) ** 2), unpacked(DEMO["truth"], "<u2")[y, x]


def assert_pixel(widget: Widget, row: int, column: int) -> None:
    place = int(widget.figure.get_by_role("slider").get_attribute("aria-valuenow"))
    assert place == row * DEMO["p"]["size"][1] + column
    for key, expected in zip(("depth", "spread", "truth"), expected_pixel(row, column)):
        assert close(widget.number(key), expected, 3), key
    depth = unpacked(DEMO["depth"], "<u2")[2 * row, 2 * column]
    assert widget.number("depth") == pytest.approx(depth, abs=DEMO["p"]["depth_error"] + 1e-3)


def test_pixel_widget(page):
    widget = Widget(page, "pixel")
    box = widget.figure.locator(".w-photo").bounding_box()
    for row, column in ((4, 7), (20, 3), (23, 31), (0, 0)):
        y, x = (2 * row + 0.5) / 48, (2 * column + 0.5) / 64
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        assert_pixel(widget, row, column)
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp"):
        widget.figure.get_by_role("slider").press(key)
    assert_pixel(widget, 1, 1)
    widget.press("surest pixel")
    sure = widget.number("spread")
    widget.press("least sure pixel")
    assert widget.number("spread") > sure
    widget.choose("predicted")
    assert widget.figure.locator("img").get_attribute("src") == DEMO["depth_png"]


def test_maps_widget(page):
    widget = Widget(page, "maps")
    view = widget.figure.locator("canvas").last
    shown = {}
    for name in ("with s", "s = 0", "difference"):
        widget.choose(name)
        shown[name] = view.evaluate("canvas => canvas.toDataURL()")
    assert len(set(shown.values())) == 3
    values = DEMO["similarity"]["values"]
    widget.choose(DEMO["texts"][2])
    assert close(widget.number("range"), min(values[2]), 3)
    widget.figure.locator(".w-maps input").nth(2).press("ArrowRight")
    assert close(widget.number("range"), min(values[3]), 3)
    others = np.delete(values, 3, axis=0).mean(0)
    says = widget.figure.locator(".w-says").inner_text()
    assert says.startswith(f"“{DEMO['texts'][3]}”")
    assert f"correlation of {np.corrcoef(values[3], others)[0, 1]:.2f}." in says
    here, metric = (
        widget.figure.locator(f"[data-key={key}]").inner_text() for key in ("here", "metric")
    )
    silenced = DEMO["silenced"]
    assert here == f"{silenced['mean_mm']:.1f}, {silenced['max_mm']:.1f} mm"
    rows = (silenced["metrics"][row]["abs_rel"] for row in ("whole", "s = 0"))
    assert [float(part) for part in metric.split("; ")] == pytest.approx(list(rows), abs=6e-5)


def test_silog_widget(page):
    widget = Widget(page, "silog")
    errors = [f"g of pixel {i}" for i in range(1, 9)]

    def g() -> list[float]:
        return [widget.value(name) for name in errors]

    assert close(widget.number("loss"), silog(g()), 3)
    before = g()
    widget.drag(errors[0], 0, -60)
    assert g()[0] > before[0] + 0.3 and close(widget.number("loss"), silog(g()), 3)
    widget.key(errors[1], "ArrowUp", "ArrowUp", "PageDown")
    assert g()[1] == pytest.approx(before[1] - 0.08)
    assert close(widget.number("loss"), silog(g()), 3)
    variance = widget.number("variance")
    widget.press("all depths × 1.3")
    assert widget.number("variance") == variance
    assert widget.number("loss") == pytest.approx(silog(g()), abs=2e-3)
    widget.slider("λ").press("End")
    assert widget.number("left") == 0
    assert widget.number("loss") == pytest.approx(10 * variance**0.5, abs=5e-3)
    widget.slider("λ").press("Home")
    assert widget.number("loss") == pytest.approx(silog(g(), 0.0), abs=2e-3)


def test_chamfer_widget(page):
    widget = Widget(page, "chamfer")
    depths = [f"true depth {i}" for i in range(1, 7)]
    centers = [f"bin centre {i}" for i in range(1, 6)]

    def loss() -> float:
        x, c = ([widget.value(name) for name in names] for names in (depths, centers))
        return chamfer(x, c)[0].item()

    def agrees() -> bool:
        return widget.number("loss") == pytest.approx(loss(), abs=2e-3)

    assert agrees()
    before = widget.value(centers[4])
    widget.drag(centers[4], -80, 0)
    width = widget.figure.locator("svg").bounding_box()["width"] - 24  # of 10 m
    assert widget.value(centers[4]) == pytest.approx(before - 80 * 10 / width, abs=0.02)
    assert agrees()
    widget.key(depths[5], "ArrowRight", "PageUp")
    assert widget.value(depths[5]) == pytest.approx(5.8 + 0.55) and agrees()
    first = widget.number("loss")
    widget.press("one step downhill")
    assert widget.number("loss") < first and agrees()
    widget.press("twenty steps")
    assert widget.number("loss") < first / 2 and agrees()


@pytest.mark.parametrize("width", [360, 768, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_page(browser, harness, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto(harness)
    page.wait_for_selector("[data-widget=chamfer] dd:not(:empty)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_touch_moves_the_pixel(browser, harness):
    page = browser.new_page(viewport={"width": 360, "height": 740}, has_touch=True)
    page.goto(harness)
    widget = Widget(page, "pixel")
    widget.figure.locator(".w-photo").tap(position={"x": 20, "y": 20})
    first = widget.number("depth")
    widget.figure.locator(".w-photo").tap(position={"x": 200, "y": 150})
    assert widget.number("depth") != first
    page.close()
