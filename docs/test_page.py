"""The companion page: python -m pytest docs/test_page.py

First what needs no browser: the page is as its sources, its claims are in findings.json or in the
code, and the JavaScript computes what PyTorch computes. Then the page is opened in Chromium. What
is missing (node, KaTeX, playwright, Chromium, axe-core, poppler) skips its tests and says so.
"""

import base64
import html
import io
import json
import re
import shutil
import subprocess
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

import cabins
import eval as evaluation
from clip_tokenizer import encode, number_tokens
from docs import build

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGE = DOCS / "index.html"
TEXT = PAGE.read_text(encoding="utf-8")
BODY = TEXT[TEXT.index("</style>") : TEXT.index('<script type="application/json"')]
SECTIONS = dict(re.findall(r'<section id="([\w-]+)".*?>(.*?)</section>', BODY, re.DOTALL))
DEMO = json.loads((DOCS / "demo.json").read_text(encoding="utf-8"))
FINDINGS = json.loads((DOCS / "findings.json").read_text(encoding="utf-8"))
CENTERS = torch.tensor(DEMO["centers"], dtype=torch.float64)
TRUTH = np.array(DEMO["truth"]) / 1000
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
FLAGS += " --disable-background-networking --disable-component-update"
AXE = DOCS / "node_modules/axe-core/axe.min.js"
WIDTHS = (360, 414, 768, 1024, 1280, 1440)
EQUATIONS = [f"eq-{n}" for n in range(1, 9)]
PARTS = ("build.py", "demo.py", "page.html", "page.css", "page.js", "test_page.py", "test_onnx.py")


def plain(markup: str) -> str:
    markup = re.sub(r'<span class="katex-mathml">.*?</math></span>', "", markup, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", "", markup)).replace("\u00a0", " ")


# ---- The page is as its sources ------------------------------------------------------------------
def test_each_equation_stands_beside_the_lines_that_compute_it():
    assert re.findall(r'data-eq="(\d)"', BODY) == list("12345678")
    for n in range(1, 9):
        shown = SECTIONS[f"eq-{n}"].split("<details>")
        assert any(f"# Eq. {n}:" in plain(part.split("</summary>")[-1]) for part in shown)


def test_every_line_of_code_stands_in_its_source():
    blocks = re.findall(r'data-file="([\w.]+)">(.*?)</pre>', BODY, re.DOTALL)
    assert len(blocks) > 30
    for file, shown in blocks:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        parts = re.split(r'<span class="l" data-n="(\d+)"[^>]*>', shown)[1:]
        assert parts
        for number, text in zip(parts[::2], parts[1::2]):
            text = html.unescape(re.sub(r"<[^>]+>", "", text))
            assert text.replace("⋯", "").strip() == lines[int(number) - 1].strip()


def test_anchors_resolve_nothing_comes_from_elsewhere_and_the_machinery_is_small():
    ids = re.findall(r'\sid="([^"]+)"', BODY)
    assert len(ids) == len(set(ids))
    links = re.findall(r'href="#([^"]+)"', BODY)
    assert links and not {urllib.parse.unquote(link) for link in links} - set(ids)
    for link in re.findall(r'href="(?!#|https?:|data:)([^"]+)"', BODY):
        assert (DOCS / link).exists(), link
    loaded = re.findall(r'\ssrc="([^"]*)"|<(?:link|image|use)[^>]*href="([^"]*)"', BODY)
    for address in ("".join(found) for found in loaded):
        assert address.startswith(("#", "data:")), address[:80]
    assert len(TEXT.encode()) <= 1_200_000
    assert sum(len((DOCS / name).read_text("utf-8").splitlines()) for name in PARTS) <= 2800


def table_of_readme(heading: str) -> list[str]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    part = re.search(rf"^## {heading}.*?(?=^## |\Z)", readme, re.DOTALL | re.MULTILINE)[0]
    return re.search(r"(?:^\|.*\n)+", part, re.MULTILINE)[0].splitlines()[2:]


def test_tables_of_the_readme_are_on_the_page():
    ledger = table_of_readme("Paper, released code, and here")
    shown, folded = SECTIONS["ledger"].split("<details>")
    assert shown.count("<tr") == 1 + 5 and folded.count("<tr") == 1 + len(ledger) - 5
    assert "prompts p and γ" in ledger[0] and "no optimizer" in shown  # what matters comes first
    runs = table_of_readme("What was run, and what was not")
    assert SECTIONS["runs"].count("<tr") == 1 + len(runs)
    assert SECTIONS["runs"].count("not run") == "".join(runs).count("**not run**") > 3
    assert "n_cabins" in SECTIONS["glossary"] and "v_post" in SECTIONS["glossary"]
    results = " ".join(plain(SECTIONS["results"]).split())
    assert all(f"CaBins {quoted}" in results for quoted in evaluation.QUOTED.values())


@pytest.mark.parametrize(
    "file, old, new, sentence",
    [
        ("cabins.py", "", "", ""),
        ("cabins.py", "# Eq. 1:  c(b_i) =", "# Eq. 1:  c(b_j) =", "stale"),
        ("README.md", "**not run**", "**not done**", "stale"),
        ("docs/demo.json", '"room": ', '"room": 1', "stale"),
        ("docs/findings.json", '"least": 0.00', '"least": 0.001', "stale"),
        ("docs/findings.json", '"turn"', '"turned"', "has"),
        ("cabins.py", "def expected_depth(", "def mean_depth(", "has no expected_depth"),
        ("cabins.py", "b.cumsum(1)", "b.cumsum(-1)", "has no 'b.cumsum(1)'"),
        ("README.md", "## Paper, released code", "## The ledger", "no table below"),
    ],
)
def test_the_check_notices_what_is_stale(monkeypatch, file, old, new, sentence):
    read = build.read.__wrapped__
    assert old in read(file)
    changed = {file: read(file).replace(old, new)}
    monkeypatch.setattr(build, "read", lambda name: changed.get(name) or read(name))
    build.letters_of.cache_clear()
    build.values.cache_clear()
    try:
        message = "" if build.build() == TEXT else "stale"
    except build.BuildError as error:
        if "npm ci" in str(error):
            pytest.skip(str(error))
        message = str(error)
    build.letters_of.cache_clear()
    build.values.cache_clear()
    assert (sentence in message) if sentence else not message


# ---- What the page claims ------------------------------------------------------------------------
def test_what_is_claimed_of_five_runs_was_found_in_five_runs():
    runs = FINDINGS["runs"]
    paper, released, small = (runs[name] for name in ("paper", "released", "small_epsilon"))
    assert len(FINDINGS["seeds"]) == 5 and FINDINGS["steps"] == [0, 60, 120, 240]
    for run in runs.values():  # "the mean AbsRel changes by less than 0.0001"
        rows = [[row["abs_rel"][x] for x in ("mean", "least", "greatest")] for row in run["ablation"].values()]  # fmt: skip
        assert len(rows) == 4 and np.ptp(rows, axis=0).max() < 1e-4
    share = {name: run["step_share"]["TransDecoder"]["240"] for name, run in runs.items()}
    assert 4 * share["released"]["greatest"] < share["paper"]["least"]
    assert share["released"]["greatest"] < 0.01 and 0.05 < share["paper"]["mean"] < 0.15
    assert min(x["least"] for x in small["step_share"]["TransDecoder"].values()) > 0.995
    for run in runs.values():
        for part in ("image encoder", "bins", "depth decoder"):
            assert run["step_share"][part]["240"]["least"] > 0.99
        assert 0.97 < 13 * run["attention"]["least"]["least"]  # "even": within 3 % of 1/13
        assert 13 * run["attention"]["greatest"]["greatest"] < 1.03
    assert all(abs(x["greatest"] - 1e-4) < 1e-9 for x in released["gamma_rms"].values())
    assert 10 * released["turn"]["240"]["greatest"] < paper["turn"]["240"]["least"]
    assert paper["turn"]["240"]["greatest"] < paper["digits"]["0.1 mm"]["least"]
    assert paper["one_text_best"]["least"] > 0.9
    for run in runs.values():  # "means about equal", for each of the three figures
        for end in ("mean", "least", "greatest"):
            assert 0.8 < run["digits"]["1 m"][end] / run["digits"]["0.1 mm"][end] < 1.25
    a, b = (np.array(DEMO["digits"][name]) for name in ("0.1 mm", "1 m"))
    assert (a > b).any() and (b > a).any()  # "at a single distance either can be the larger"
    widths = FINDINGS["random_widths"]
    assert widths["10 m"]["nearest"]["greatest"] < 0.001 < widths["80 m"]["nearest"]["least"]
    assert widths["10 m in cm"]["mean"]["greatest"] < 0.1 * widths["10 m in cm"]["nearest"]["least"]


def test_figures_that_are_exact():
    text = plain(BODY)
    assert f"{416 * 544:,} pixels" in text and f"about {24231 // 8 * 25 // 100 * 100:,}" in text
    near, far = (1 / (d + 1e-4) for d in (0.01, 0.1))
    assert (round(near), round(far), round(near - far)) == (99, 10, 89)
    assert f"a ratio of {np.exp(1 / (1 + 1e-4) - 1 / (10 + 1e-4)):.1f}" in text
    assert f"{10 * 0.15**0.5 * np.log(1.3):.2f} instead of {10 * np.log(1.3):.2f}" in text
    assert f"{100 * 0.15**0.5:.0f} % of the error" in text
    squares = DEMO["loss"]["var_g"], (DEMO["loss"]["mean_g"] + np.log(1.3)) ** 2
    costs = [10 * np.dot(squares, (1, part)) ** 0.5 for part in (0.15, 1)]
    assert "it makes {:.2f} instead of {:.2f}".format(*costs) in text
    rows = re.findall(r"\n\| (\w+).* 0.059 \| [\d.]+ \| (2[\d.]+)", build.read("docs/page.html"))
    rmse = {name: float(value) for name, value in rows}
    gain, gap = (100 * (rmse[name] / rmse["Ours"] - 1) for name in ("Semantic", "Mean"))
    assert f"(“Semantic bin”) 2.363: {gain:.1f} % less" in text
    assert f"rows lie {gap:.1f} % apart, twice the gain" in text and round(gap / gain) == 2


def test_gradients_reach_what_the_table_says():
    torch.manual_seed(0)
    model = cabins.CaBins(cabins.Config(backbone="tiny")).train()
    prediction, target = model(torch.randn(2, 3, 64, 96)), 1 + torch.rand(2, 1, 64, 96)
    mask = target > 0
    columns = [prediction.similarity.square().sum()]
    columns += [cabins.silog_loss(prediction.depth, target, mask)]
    columns += [cabins.chamfer_loss(prediction.centers, target, mask)]
    found = []
    for part in ("bins.", "prompts|trans_decoder.", "depth_decoder.", "clip.visual."):
        parameters = [p for n, p in model.named_parameters() if re.match(part, n)]
        grads = [torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True) for x in columns]  # fmt: skip
        found.append(["none" if all(g is None for g in some) else "yes" for some in grads])
    table = SECTIONS["digits"].split("Which gradients reach")[2]
    rows = re.findall(r"<tr><th.*?</tr>", table[: table.index("</table>")], re.DOTALL)
    assert [re.findall(r">(none|yes)<", row) for row in rows] == found


def test_the_ladder_shows_the_decoder():
    with torch.device("meta"):
        channels, h, w = cabins.BACKBONES["RN101"].channels, 416, 544
        decoder = cabins.DepthDecoder(channels, 8, 256).eval()
        pyramid = [torch.empty(1, n, h // x, w // x) for n, x in zip(channels, (4, 8, 16, 32))]
        sizes = []
        for layer in (decoder.fuse, *decoder.up, decoder.head):
            layer.register_forward_hook(lambda _, x, out: sizes.append(out.shape[1:]))
        decoder(pyramid, torch.empty(1, 8, h // 32, w // 32))
    shown = re.findall(r">(\d+)</text>.*?>(\d+) × (\d+)</text>", drawn("ladder")["plot"])
    assert [tuple(size) for size in sizes] == [tuple(map(int, size)) for size in shown]


def stored_p() -> torch.Tensor:
    """(n, 256) probabilities out of demo.json's bytes."""
    q = np.frombuffer(base64.b64decode(DEMO["p"]["data"]), np.uint8).astype(float)
    p = torch.from_numpy(q.reshape(-1, len(CENTERS)) ** 2)
    return p / p.sum(1, keepdim=True)


def test_stored_values_are_eq_1_to_5():
    b = torch.tensor([DEMO["widths"]], dtype=torch.float64)
    c = cabins.bin_centers(b / b.sum(), DEMO["min_depth"], DEMO["max_depth"])[0]
    torch.testing.assert_close(c, CENTERS, atol=2e-4, rtol=0)
    e = cabins.distance_classes(CENTERS[None], 8)[0]  # reacts to a millionth of a metre
    torch.testing.assert_close(e, torch.tensor(DEMO["cabins"]).double(), atol=1e-3, rtol=0)
    for e, text, ids in zip(DEMO["cabins"], DEMO["texts"], DEMO["tokens"]):
        assert float(text) == pytest.approx(e, abs=6e-5) and ids[1:-1] == encode(text)
    assert np.abs(DEMO["similarity"]["values"]).max() <= 1 and DEMO["p"]["depth_error"] < 0.005


# ---- JavaScript, under node: the arithmetic is PyTorch's, and what is told is what is drawn -------
def node(program: str, given) -> list:
    if not (path := shutil.which("node")):
        pytest.skip("there is no node")
    program = (
        "const { Cabins, drawings } = require(process.argv[1]);"
        "const given = JSON.parse(require('fs').readFileSync(0, 'utf8'));" + program
    )
    command, given = [path, "-e", program, str(DOCS / "page.js")], json.dumps(given)
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout)


def run_js(calls: list[list]) -> list:
    """What Cabins[name](*arguments) gives for each [name, *arguments]."""
    return node("console.log(JSON.stringify(given.map(([n, ...x]) => Cabins[n](...x))));", calls)


def drawn(name: str, **changes) -> dict:
    """The parts of a widget, 500 pixels wide, in the first state with some changes."""
    program = "const d = drawings(given.demo, given.findings);"
    state = "{ ...d.state, ...given.changes }"
    program += f"console.log(JSON.stringify(d.draw[given.name]({state}, 500)));"
    found = node(program, {"demo": DEMO, "findings": FINDINGS, "name": name, "changes": changes})
    return {key: plain(x) if key == "says" else x for key, x in found.items()}


def assert_equal(found, expected) -> None:
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("high", [10.0, 80.0])
def test_eq_1_and_2_equal_pytorch(high):
    torch.manual_seed(0)  # widths: random, equal, and the demo's
    b = [torch.rand(6, 256) ** 3 + 0.01, torch.ones(1, 256), torch.tensor([DEMO["widths"]])]
    b = torch.cat(b).double()
    b = b / b.sum(1, keepdim=True)
    c = cabins.bin_centers(b, 1e-3, high)
    assert_equal(run_js([["binCenters", row, 1e-3, high] for row in b.tolist()]), c)
    groups = c.unflatten(1, (8, -1)).flatten(0, 1)
    for unit in (1, 0.01):
        found = run_js([["distanceClass", row, unit] for row in groups.tolist()])
        e = unit * cabins.distance_classes(groups / unit, 1)[:, 0]
        assert_equal([f["e"] for f in found], e)
        for name, kind in (("m", "mean"), ("median", "median")):
            assert_equal([f[name] for f in found], cabins.distance_classes(groups, 1, kind)[:, 0])


def test_number_tokens_equal_pytorch():
    torch.manual_seed(0)
    e = [torch.rand(2000) * high for high in (1e-3, 1, 10, 80)]
    e += [torch.arange(0, 80, 1 / 32), torch.arange(0, 800) / 10]  # 1/32 is a tie: 312.5 / 10 mm
    e += [torch.tensor([0.00004, 0.00005, 0.00006, 2.9999, 2.99995, 9.99995, 10.0, 79.99999])]
    e = torch.cat(e)
    expected = [[i for i in row if i] for row in number_tokens(e, 2).tolist()]
    assert run_js([["numberTokens", value] for value in e.tolist()]) == expected


def test_eq_3_and_5_equal_pytorch():
    t, v = torch.tensor(DEMO["t"]).double(), torch.tensor(DEMO["v_post"]).double()
    for gamma in (0.01, 1):
        cosine = torch.nn.functional.cosine_similarity(t, t + gamma * v)
        found = run_js([["turn", a, b, gamma] for a, b in zip(t.tolist(), v.tolist())])
        assert_equal(found, cosine.acos())
    p, c = stored_p()[::60], CENTERS.tolist()
    d = cabins.expected_depth(CENTERS[None], p.T[None, :, :, None]).flatten()
    assert_equal(run_js([["expectedDepth", c, row] for row in p.tolist()]), d)
    assert_equal(run_js([["likeliest", c, row] for row in p.tolist()]), CENTERS[p.argmax(1)])
    quartile = CENTERS[(p.cumsum(1) < 0.25).sum(1)]
    assert_equal(run_js([["quantile", c, row, 0.25] for row in p.tolist()]), quartile)


def test_eq_6_to_8_equal_pytorch():
    torch.manual_seed(0)
    depth, target = torch.rand(2, 1, 1, 5, 7).double() * 5 + 0.5
    mask = torch.ones_like(target, dtype=torch.bool)
    g = depth.log() - target.log()
    found = run_js([["silog", g.mean().item(), g.var(unbiased=False).item()]])
    assert_equal(found[0], cabins.silog_loss(depth, target, mask))
    assert_equal(cabins.silog_loss(8 * depth, 8 * target, mask), found[0])  # has no unit
    c = (torch.rand(1, 6).double() * 5).sort(1).values.requires_grad_()
    loss = cabins.chamfer_loss(c, target, mask)
    (found,) = run_js([["chamfer", target.flatten().tolist(), c[0].tolist()]])
    assert_equal(found["toCenters"] + found["toDepths"], loss.detach())
    assert_equal(found["gradient"], torch.autograd.grad(loss, c)[0][0])
    (total,) = run_js([["total", {"pixel": 1, "bins": loss.item()}, 0.1, 8]])
    assert_equal(total[1], 0.1 * cabins.chamfer_loss(8 * c, 8 * target, mask).item())


def test_two_centres_on_one_depth_are_a_local_minimum():
    x = torch.tensor([[1.5, 1.5, 1.5, 4.2, 6, 8.4]]).double()[:, None, None]
    mask = torch.ones_like(x, dtype=torch.bool)
    here = torch.tensor([[1.5, 1.5, 33 / 7, 8.4]]).double()
    low = cabins.chamfer_loss(here, x, mask)
    torch.manual_seed(0)
    for _ in range(200):
        c = (here + 0.05 * torch.randn(1, 4).double()).sort(1).values
        assert cabins.chamfer_loss(c, x, mask) >= low
    assert cabins.chamfer_loss(torch.tensor([[1.5, 4.2, 6, 8.4]]).double(), x, mask) == 0 < low
    told = drawn("chamfer", centers=here[0].tolist())["says"]
    assert "The gradient is 0" in told and f"stay at {low:.3f} m²" in plain(BODY)


def test_an_edge_of_eq_1_follows_the_pointer():
    outputs = [0.6, 1.0, 0.3, 1.2, 0.5, 0.8, 1.6, 2.0]
    for i, share in ((0, 0.2), (3, 0.5), (6, 0.6)):
        (value,) = run_js([["dragged", outputs, i, share]])
        new = [*outputs[:i], value, *outputs[i + 1 :]]
        assert sum(new[: i + 1]) / sum(new) == pytest.approx(share) or value in (0.1, 6)
    says = drawn("bins", outputs=[0.6, 1.0, 0.3, 2.0, 0.5, 0.8, 1.6, 2.0])["says"]
    assert "7 of the 7 other centres have moved" in says  # also those before the bin that grew


def test_what_is_told_of_a_pixel_is_what_is_drawn():
    p, columns, shares = stored_p(), DEMO["p"]["size"][1], []
    depth = p @ CENTERS
    for row, column in (DEMO["pixel"], DEMO["edge"], (0, 0), (20, 5)):
        i = row * columns + column
        parts = drawn("room", row=row, column=column)
        near = 100 * p[i][(CENTERS - depth[i]).abs() < 0.5].sum()
        shares.append(near)
        assert f"Its mean, {depth[i]:.2f} m, is the depth; {near:.0f} % of p" in parts["says"]
        assert f"The truth is {TRUTH[i]:.2f} m" in parts["says"]
        low, high = (CENTERS[(p[i].cumsum(0) < share).sum()].item() for share in (0.25, 0.75))
        x, width = map(float, re.search(r'x="([\d.]+)" y="138" width="([\d.]+)"', parts["plot"]).groups())  # fmt: skip
        assert [(x + 1.5 - 10) / 48, (x + width - 1.5 - 10) / 48] == pytest.approx(
            [low, high], abs=1e-3
        )
        told = f"between {low:.2f} and {high:.2f} m" if low < high else f"bin at {low:.2f} m"
        assert told in parts["says"]
    assert shares[0] > 90 and shares[1] < 15  # one hill first; then a mean where little is


def test_what_is_told_of_maps_is_what_is_drawn():
    p = stored_p()
    likeliest, mean = CENTERS[p.argmax(1)].numpy(), (p @ CENTERS).numpy()
    maps = {"likeliest": likeliest, "mean": mean, "coarse truth": TRUTH}
    for name, depth in maps.items():
        data = base64.b64decode(DEMO["pictures"][name].partition(",")[2])
        colors = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).reshape(-1, 3)
        expected = 255 * colormaps["viridis"](depth / DEMO["shown_depth"])[:, :3]
        assert abs(colors - expected).max() < 3, name
    n_values = len(np.unique(likeliest))
    says = drawn("mean", rule="likeliest")["says"]
    errors = [(abs(d - TRUTH) / TRUTH).mean() for d in (likeliest, mean)]
    assert f"only {n_values} different depths at {len(p)} pixels" in says
    assert "its AbsRel is {:.2f}, and that of the mean {:.2f}".format(*errors) in says
    assert errors[0] > errors[1]
    s = np.array(DEMO["similarity"]["values"])
    parts, best = drawn("maps"), {DEMO["texts"][k] for k in s.argmax(0)}
    told = f"One text, “{next(iter(best))}”" if len(best) == 1 else f"{len(best)} texts"
    assert told in parts["says"] and f"varies by {np.ptp(s, axis=1).max():.3f}" in parts["says"]
    opacity = [float(x) for x in re.findall(r'fill-opacity="([\d.]+)"', parts["maps"])]
    assert opacity == pytest.approx((s.clip(0) / s.max()).ravel(), abs=0.006)  # colours from 0


# ---- In a browser --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="there is no playwright")
    if not (path := shutil.which("chromium") or shutil.which("chromium-browser")):
        pytest.skip("there is no chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS.split())
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser):
    """Opens the page from disk; afterwards there was no message and no request."""
    contexts, messages = [], []

    def open_at(width: int = 1440, scheme: str = "light", height: int = 900, **options):
        size = {"width": width, "height": height}
        context = browser.new_context(viewport=size, color_scheme=scheme, offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda r: r.url.startswith("data:") or messages.append(r.url))
        page.goto(PAGE.as_uri())
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert {message.partition("#")[0] for message in messages} <= {PAGE.as_uri()}


def says(page, widget: str) -> str:
    page.locator(f'[data-widget="{widget}"]').scroll_into_view_if_needed()
    page.wait_for_timeout(120)
    text = page.locator(f'[data-widget="{widget}"] [data-part="says"]').inner_text()
    return text.replace("\u00a0", " ")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_scrolls_sideways_and_axe_is_content(open_page, width, scheme):
    page = open_page(width, scheme)
    page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = "found => found.filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.className)"
    assert page.eval_on_selector_all("pre, .equation, .pair > *", cut) == []
    small = """found => found.filter((e) => e.getBoundingClientRect().height &&
      parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a < 11.9).map((e) => e.innerHTML)"""
    assert page.eval_on_selector_all("#figure-2 .fig2 text", small) == []
    if width not in (360, 1280):
        return  # axe takes seconds
    if not AXE.exists():
        pytest.skip("there is no axe-core: run npm ci --ignore-scripts in docs/")
    page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = false))")
    page.add_script_tag(content=AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run().then((r) => r.violations.map((v) => [v.id, v.nodes[0].html]))")
    assert found == []


def test_names_that_are_heard_are_texts(open_page):
    page = open_page()
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    spoken = [x.get("name", {}).get("value") or "" for x in nodes if not x.get("ignored")]
    assert len(spoken) > 500
    wrong = [name for name in spoken if re.search(r"\\[a-z]|\{\{|:\.\d|undefined|NaN", name)]
    kinds = ("button", "link", "slider", "image", "heading", "radio", "navigation")
    for x in nodes:
        if x.get("role", {}).get("value") in kinds and not x.get("ignored"):
            name = x.get("name", {}).get("value") or ""
            wrong += [name] if not name or re.search(r"[{}\\\x02]|:\.", name) else []
    assert wrong == []
    silent = "[type=range]:not([aria-valuetext]), [role=slider]:not([aria-valuetext])"
    assert page.locator(silent).count() == 0
    inside = "[role=img] a, [role=img] button, [role=img] [tabindex], [role=img][tabindex]"
    assert page.locator(inside).count() == 0
    for name in page.eval_on_selector_all("#strip a", "e => e.map((a) => a.ariaLabel)"):
        assert re.match(r"(b|c of b|e 3|the text|the tokens|t 3|s 3|p|d|L)\b", name)


@pytest.mark.parametrize("width", [360, 1024, 1440])
def test_the_strip_shows_what_is_read_and_leaves_after_eq_8(open_page, width):
    page = open_page(width)
    for name in [*EQUATIONS, "digits", "decoder"]:
        page.evaluate("name => { location.hash = name; }", name)
        page.wait_for_timeout(120)
        strip = page.locator("#strip").bounding_box()
        heading = page.locator(f"#{name} h2").bounding_box()
        assert strip["y"] == 0 and strip["height"] <= heading["y"] < 300
        lit = page.locator(f'#strip [aria-current=true][data-of~="{name}"]')
        assert lit.count() >= 1
        box = lit.first.bounding_box()
        assert -1 <= box["x"] and box["x"] + box["width"] <= width + 1  # the strip follows
    page.evaluate("location.hash = 'matters'")
    page.wait_for_timeout(120)
    strip = page.locator("#strip").bounding_box()
    assert strip["y"] + strip["height"] <= 0
    if width == 360:  # what moves comes before the listing
        ys = [page.locator(f"#eq-2 {x}").first.bounding_box()["y"] for x in (".widget", ".code")]
        assert ys[0] < ys[1]


def test_a_pixel_is_followed_by_mouse_and_keyboard(open_page):
    page, columns = open_page(), DEMO["p"]["size"][1]
    pad, depth = page.locator("[data-pad][role=slider]").first, (stored_p() @ CENTERS).tolist()
    shown = page.locator('#strip [data-part="d value"]')
    for row, column in ((0, 0), (16, 24), (6, 16)):
        box = pad.bounding_box()
        x, y = (column + 0.5) / columns * box["width"], (row + 0.5) / 24 * box["height"]
        pad.hover(position={"x": x, "y": y})
        assert f"{depth[row * columns + column]:.2f} m" in says(page, "room")
        assert shown.inner_text().replace("\u00a0", " ") == f"{depth[row * columns + column]:.2f} m"
    pad.focus()
    page.keyboard.press("ArrowDown")
    page.wait_for_timeout(60)
    heard = pad.get_attribute("aria-valuetext")
    assert f"depth {depth[7 * columns + 16]:.2f} m" in heard
    page.get_by_role("button", name="the edge of the box").click()
    edge = depth[DEMO["edge"][0] * columns + DEMO["edge"][1]]
    assert f"{edge:.2f} m, is the depth" in says(page, "room")


def test_a_pixels_move_costs_less_than_a_frame(open_page):
    """Nothing is drawn for the same cell; what is off screen waits; the rest is quick."""
    page = open_page()
    page.wait_for_timeout(200)
    count = """async () => {
      const drawn = new Set(), pad = document.querySelector('[data-pad]');
      const note = (found) => found.forEach((x) => drawn.add(x.target.closest('[data-widget]').dataset.widget));
      new MutationObserver(note).observe(document.body, { childList: true, subtree: true });
      const move = (x) => pad.dispatchEvent(new PointerEvent('pointermove', { pointerType: 'mouse',
        clientX: pad.getBoundingClientRect().left + x, clientY: pad.getBoundingClientRect().top + 30 }));
      const frame = () => new Promise((go) => requestAnimationFrame(() => setTimeout(go)));
      move(40); await frame(); drawn.clear(); move(40); move(41); await frame();
      const [same, start] = [drawn.size, performance.now()];
      for (let i = 0; i < 40; i++) { move(i % 2 ? 40 : 160); await frame(); }
      return [same, [...drawn].sort(), (performance.now() - start) / 40];
    }"""
    same, drawn_now, per_frame = page.evaluate(count)
    assert same == 0 and drawn_now == ["room", "strip"]
    assert per_frame < 60  # on a busy machine; 17 ms is a frame


def test_a_finger_taps_a_pixel_and_swipes_past_it(open_page):
    page = open_page(360, height=740, has_touch=True, is_mobile=True)
    pad, shown = page.locator("[data-pad]").first, page.locator('[data-widget="room"] .says')
    pad.scroll_into_view_if_needed()
    box, before = pad.bounding_box(), shown.text_content()
    x, y = box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.3
    page.touchscreen.tap(x, y)
    page.wait_for_timeout(100)
    after, from_y = shown.text_content(), page.evaluate("scrollY")
    assert after != before
    send = page.context.new_cdp_session(page).send
    points = [[{"x": x, "y": y - 20 * i}] for i in range(11)]
    kinds = ["touchStart"] + ["touchMove"] * 10 + ["touchEnd"]
    for kind, touch in zip(kinds, [*points, []]):
        send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touch})
        page.wait_for_timeout(20)
    assert page.evaluate("scrollY") > from_y + 60 and shown.text_content() == after


def test_edges_and_centres_can_be_dragged(open_page):
    page = open_page()
    for widget, start, end in (("bins", 0.39, 0.6), ("chamfer", 0.74, 0.6)):
        before = says(page, widget)
        box = page.locator(f'[data-widget="{widget}"] .plot').bounding_box()
        y = box["y"] + (51 if widget == "bins" else 112)
        page.mouse.move(box["x"] + start * box["width"], y)
        page.mouse.down()
        page.mouse.move(box["x"] + end * box["width"], y, steps=4)
        page.mouse.up()
        assert says(page, widget) != before
    assert page.locator('[data-part="center out"]').inner_text().startswith(("5.9", "6.0"))


def test_widgets_compute_what_pytorch_computes(open_page):
    page, group = open_page(), CENTERS[None, 192:224]
    page.locator("[data-in=group]").fill("7")
    page.locator("[data-in=unit]").fill("2")
    assert "largest weight is 1.00" in says(page, "group")  # "one can win in centimetres, too"
    e = page.locator('#eq-2 [data-part="e"]').inner_text()
    assert e == f"{cabins.distance_classes(100 * group, 1).item() / 100:.4f} m"
    page.get_by_label("equal bins").check()
    assert "They tie" in says(page, "group")
    x, c = torch.tensor([[1.5, 1.5, 1.5, 4.2, 6, 8.4]]), torch.tensor([[1.15, 3.4, 5.5, 9.3]])
    page.locator("[data-in=center]").fill("5.5")
    loss = cabins.chamfer_loss(c, x[:, None, None], torch.ones(1, 1, 1, 6, dtype=torch.bool))
    assert f"{loss.item():.3f} m²" in says(page, "chamfer")
    page.get_by_role("button", name="one step downhill").click()
    assert float(re.search(r"= ([\d.]+) m²", says(page, "chamfer"))[1]) < loss.item()
    page.locator("[data-in=scale]").fill("0")
    assert f"= {DEMO['loss']['pixel']:.2f}" in says(page, "silog")
    page.locator("[data-in=gamma]").fill("0")
    assert "times what 0.1 mm" in says(page, "turn")
    page.locator("[data-in=beta]").fill("0")
    assert "0.0 % of the total" in says(page, "total")
    page.get_by_label("the likeliest bin").check()
    assert "likeliest bin has its centre" in says(page, "mean")
    assert page.get_by_text("depth by the likeliest bin").is_visible()


def test_digits_jump_or_stay(open_page):
    page = open_page()
    steps = [("− 0.00001", "No token", 0), ("+ 0.0001", "one token", 1)]
    for name, words, n_new in [*steps, ("2.9999 → 3.0", "share only the point", 3)]:
        page.get_by_role("button", name=name, exact=True).click()
        assert words in says(page, "stairs") and page.locator(".tokens .new").count() == n_new


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_terms_light_up_together_and_can_be_read(open_page, scheme):
    page = open_page(scheme=scheme)
    for act in ("hover", "focus", "tap"):
        getattr(page.locator('#eq-1 .terms [data-t="half"]'), "click" if act == "tap" else act)()
        lit = page.locator(".lit").evaluate_all("found => found.map((e) => e.dataset.t)")
        assert set(lit) == {"half"} and len(lit) == 4  # equation, its name, code and widget
        if AXE.exists():  # the contrast of what is lit
            page.add_script_tag(content=AXE.read_text(encoding="utf-8"))
            run = (
                "axe.run('#eq-1', { runOnly: ['color-contrast'] }).then((r) => r.violations.length)"
            )
            assert page.evaluate(run) == 0
        page.keyboard.press("Escape")
        assert page.locator(".lit").count() == 0
        page.mouse.move(5, 5)


def test_without_javascript_each_widget_shows_its_first_state(open_page):
    page = open_page(java_script_enabled=False)
    plots = page.locator("svg.plot")
    assert plots.count() == len(re.findall('class="plot"', BODY)) == 12
    for i in range(plots.count()):
        assert plots.nth(i).bounding_box()["height"] > 60
        assert plots.nth(i).locator("line, rect, path, circle").count() > 3
    assert page.locator(".says").filter(has_text=re.compile(r"^\s*$")).count() == 0
    assert not page.get_by_role("button", name="one step downhill").is_visible()


def test_print_shows_tokens_and_no_buttons(open_page, tmp_path):
    page = open_page()
    page.emulate_media(media="print")
    assert page.locator(".tokens").first.is_visible() and page.locator("#strip").is_visible()
    assert page.locator("input:visible, [data-act]:visible, details:visible").count() == 0
    if not (painter := shutil.which("pdftoppm")):
        pytest.skip("there is no pdftoppm (poppler-utils)")
    page.pdf(path=tmp_path / "page.pdf", format="A4")
    subprocess.run([painter, "-gray", "-r", "30", "page.pdf", "sheet"], cwd=tmp_path, check=True)
    sheets = [np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("sheet*"))]
    assert 5 < len(sheets) <= 16
