"""The companion page: python -m pytest docs/test_page.py

First what needs no browser: the page is as its sources, demo.json agrees with itself, and the
JavaScript computes what PyTorch computes. Then the page is opened in Chromium. What is missing
(node, KaTeX, playwright, Chromium, axe-core, poppler) skips its tests and says so.
"""

import base64
import html
import io
import json
import re
import shutil
import subprocess
import sys
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cabins
from clip_tokenizer import encode, number_tokens

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGE = DOCS / "index.html"
TEXT = PAGE.read_text(encoding="utf-8")
BODY = TEXT[TEXT.index("</style>") : TEXT.index('<script type="application/json"')]
SECTIONS = dict(re.findall(r'<section id="([\w-]+)".*?>(.*?)</section>', BODY, re.DOTALL))
DEMO = json.loads((DOCS / "demo.json").read_text(encoding="utf-8"))
CENTERS = torch.tensor(DEMO["centers"], dtype=torch.float64)
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
FLAGS += " --disable-background-networking --disable-component-update"
AXE = DOCS / "node_modules/axe-core/axe.min.js"
WIDTHS = (360, 768, 1100, 1280, 1440)
EQUATIONS = [f"eq-{n}" for n in range(1, 9)]


def plain(markup: str) -> str:
    markup = re.sub(r'<span class="katex-mathml">.*?</math></span>', "", markup, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", "", markup))


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
            assert plain(text).replace("⋯", "").strip() == lines[int(number) - 1].strip()


def test_terms_have_a_partner():
    """What is named below an equation stands in the equation, and mostly in the code as well."""
    partners = []
    for section in (SECTIONS[name] for name in EQUATIONS):
        for term in re.findall(r'<button type="button" data-t="(\w+)"', section):
            partners.append(section.count(f'data-t="{term}"'))
    assert len(partners) > 20 and min(partners) >= 2 and np.mean(partners) >= 2.5


def test_anchors_resolve_and_nothing_comes_from_elsewhere():
    ids = re.findall(r'\sid="([^"]+)"', BODY)
    assert len(ids) == len(set(ids))
    links = re.findall(r'href="#([^"]+)"', BODY)
    assert links and not {urllib.parse.unquote(link) for link in links} - set(ids)
    code = re.sub(r'<script type="application/json".*?</script>', "", TEXT, flags=re.DOTALL)
    loaded = re.findall(
        r'\ssrc="([^"]*)"|url\(([^)]*)\)|<(?:link|image|use)[^>]*href="([^"]*)"', code
    )
    for address in ("".join(found).strip("'\"") for found in loaded):
        assert address.startswith(("#", "data:")), address[:80]
    assert len(TEXT.encode()) <= 1_200_000


def test_explanations_have_60_to_120_words():
    for name in EQUATIONS:
        prose = re.findall(r'<div class="prose">(.*?)</div>', SECTIONS[name], re.DOTALL)
        n_words = sum(len(plain(part).split()) for part in prose)
        assert 60 <= n_words <= 135, (name, n_words)  # TeX in the prose counts for several words


def test_ledger_and_unrun_things_are_on_the_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for heading, section in (("Paper, released code", "ledger"), ("What was run", "runs")):
        part = re.search(rf"^## {heading}.*?(?=^## |\Z)", readme, re.DOTALL | re.MULTILINE)[0]
        table = re.search(r"(?:^\|.*\n)+", part, re.MULTILINE)[0]
        n_rows = sum("---" not in row and bool(row.strip("| \n")) for row in table.splitlines())
        assert SECTIONS[section].count("<tr") in (n_rows, n_rows + 1)
    assert SECTIONS["runs"].count("not run") == readme.count("**not run**") > 3
    assert ">measured<" in BODY and ">quoted<" in BODY


def test_the_machinery_is_small():
    names = ("build.py", "demo.py", "test_page.py", "page.html", "page.css", "page.js")
    assert sum(len((DOCS / name).read_text("utf-8").splitlines()) for name in names) <= 2800


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    """A copy of what the builder reads."""
    if not shutil.which("node") or not (DOCS / "node_modules/katex").is_dir():
        pytest.skip("there is no node, or no KaTeX: run npm ci --ignore-scripts in docs/")
    root = tmp_path_factory.mktemp("page")
    (root / "docs").mkdir()
    for name in ("cabins.py", "clip_tokenizer.py", "eval.py", "README.md"):
        shutil.copy(ROOT / name, root / name)
    for name in ("build.py", "demo.json", "page.html", "page.css", "page.js", "index.html"):
        shutil.copy(DOCS / name, root / "docs" / name)
    (root / "docs/node_modules").symlink_to(DOCS / "node_modules", target_is_directory=True)
    return root


@pytest.mark.parametrize(
    "file, old, new, sentence",
    [
        ("cabins.py", "", "", ""),
        ("cabins.py", "# Eq. 1:  c(b_i) =", "# Eq. 1:  c(b_j) =", "stale"),
        ("README.md", "**not run**", "**not done**", "stale"),
        ("docs/demo.json", '"room": 22', '"room": 23', "stale"),
        ("cabins.py", "def expected_depth(", "def mean_depth(", "has no expected_depth"),
        ("cabins.py", "b.cumsum(1)", "b.cumsum(-1)", "has no 'b.cumsum(1)'"),
        ("README.md", "## Paper, released code", "## The ledger", "no table below"),
    ],
)
def test_the_check_notices_what_is_stale(copied, file, old, new, sentence):
    path, command = copied / file, [sys.executable, "-m", "docs.build", "--check"]
    before = path.read_text(encoding="utf-8")
    assert old in before
    try:
        path.write_text(before.replace(old, new), encoding="utf-8")
        done = subprocess.run(command, cwd=copied, capture_output=True, text=True, check=False)
    finally:
        path.write_text(before, encoding="utf-8")
    assert bool(done.returncode) == bool(sentence), done.stderr
    assert sentence in done.stderr and done.stderr.count("\n") == bool(sentence)


# ---- demo.json agrees with itself ----------------------------------------------------------------


def stored_p() -> torch.Tensor:
    """(n, 256) probabilities out of demo.json's bytes."""
    q = np.frombuffer(base64.b64decode(DEMO["p"]["data"]), np.uint8).astype(float)
    p = torch.from_numpy(q.reshape(-1, len(CENTERS)) ** 2)
    return p / p.sum(1, keepdim=True)


def metres(field: dict) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(field["data"]), "<u2").reshape(field["size"])
    return values * DEMO["unit"]


def test_stored_values_are_eq_1_to_5():
    b = torch.tensor([DEMO["widths"]], dtype=torch.float64)
    c = cabins.bin_centers(b / b.sum(), DEMO["min_depth"], DEMO["max_depth"])[0]
    torch.testing.assert_close(c, CENTERS, atol=2e-4, rtol=0)
    e = cabins.distance_classes(CENTERS[None], 8)[0]  # reacts to a millionth of a metre
    torch.testing.assert_close(e, torch.tensor(DEMO["cabins"]).double(), atol=1e-3, rtol=0)
    for e, text, ids in zip(DEMO["cabins"], DEMO["texts"], DEMO["tokens"]):
        assert float(text) == pytest.approx(e, abs=6e-5) and ids[1:-1] == encode(text)
    assert np.sum(DEMO["attention"], axis=1) == pytest.approx(1, abs=1e-4)
    assert np.abs(DEMO["similarity"]["values"]).max() <= 1
    depth = metres(DEMO["depth"])[::2, ::2].ravel()
    error = np.abs((stored_p() @ CENTERS).numpy() - depth).max()
    assert error <= DEMO["p"]["depth_error"] + DEMO["unit"] and DEMO["p"]["depth_error"] < 0.005


def test_what_the_text_claims_is_measured():
    gradients, rms = DEMO["gradients"], DEMO["rms"]
    assert gradients["s"]["bins"] is None and gradients["loss"]["bins"] > 0
    assert all(gradients["s"][part] > 0 for part in ("z", "prompts p", "γ", "TransDecoder"))
    assert rms["TransDecoder"] < 1e-8 < min(v for k, v in rms.items() if k != "TransDecoder")
    flat = np.array(DEMO["attention"])
    assert np.abs(flat - 1 / flat.shape[1]).max() < 5e-5  # "to four decimals"
    rows = [(row["abs_rel"], row["rmse"]) for row in DEMO["ablation"].values()]
    assert len(rows) == 4 and np.ptp(rows, axis=0).max() < 1e-3
    assert DEMO["told"]["abs_rel"] < DEMO["told"]["abs_rel_likeliest"]
    assert DEMO["nudge"][21] > DEMO["metre"]  # the stairs are steep


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
    command, given = [node, "-e", program, str(DOCS / "page.js")], json.dumps(calls)
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout)


def assert_equal(found, expected) -> None:
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def some_centers(high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Widths and centres: random, equal, one bin that takes nearly all, and the demo's."""
    torch.manual_seed(0)
    b = torch.cat([torch.rand(6, 256).double() ** 3 + 0.01, torch.ones(2, 256).double()])
    b[-1, 77] = 1e4
    b = torch.cat([b, torch.tensor([DEMO["widths"]]).double()])
    b = b / b.sum(1, keepdim=True)
    return b, cabins.bin_centers(b, 1e-3, high)


@pytest.mark.parametrize("high", [10.0, 80.0])
def test_eq_1_and_2_equal_pytorch(high):
    b, c = some_centers(high)
    assert_equal(run_js([["binCenters", row, 1e-3, high] for row in b.tolist()]), c)
    groups = c.unflatten(1, (8, -1)).flatten(0, 1)
    for unit in (1, 0.01):
        found = run_js([["distanceClass", row, unit] for row in groups.tolist()])
        assert_equal(
            [f["e"] for f in found], unit * cabins.distance_classes(groups / unit, 1)[:, 0]
        )
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
        assert_equal(found, cosine.acos().rad2deg())
    p, c = stored_p()[::60], CENTERS.tolist()
    found = run_js([["expectedDepth", c, row] for row in p.tolist()])
    expected = cabins.expected_depth(CENTERS[None], p.T[None, :, :, None])
    assert_equal(found, expected.flatten())
    found = run_js([["likeliest", c, row] for row in p.tolist()])
    assert_equal(found, CENTERS[p.argmax(1)])


def test_eq_6_and_7_equal_pytorch():
    torch.manual_seed(0)
    depth, target = torch.rand(2, 1, 1, 5, 7).double() * 5 + 0.5
    mask = torch.ones_like(target, dtype=torch.bool)
    g = depth.log() - target.log()
    found = run_js([["silog", g.mean().item(), g.var(unbiased=False).item()]])
    assert_equal(found[0], cabins.silog_loss(depth, target, mask))
    c = (torch.rand(1, 6).double() * 5).sort(1).values.requires_grad_()
    loss = cabins.chamfer_loss(c, target, mask)
    (found,) = run_js([["chamfer", target.flatten().tolist(), c[0].tolist()]])
    assert_equal(found["toCenters"] + found["toDepths"], loss.detach())
    assert_equal(found["gradient"], torch.autograd.grad(loss, c)[0][0])


def test_the_verdict_on_p():
    c = (np.arange(256) + 0.5) / 25.6
    flat, near, far = np.ones(256), np.exp(-((c - 2) ** 2) / 0.1), np.exp(-((c - 7) ** 2) / 0.5)
    double = near + np.exp(-((c - 2.9) ** 2) / 0.1)
    shapes = [p / p.sum() for p in (flat, near, near + far, near + 0.02 * far, double)]
    flat, one, two, uneven, double = run_js([["shape", c.tolist(), p.tolist(), 10] for p in shapes])
    assert flat["flat"] and not flat["between"]
    assert not one["flat"] and one["hills"] == [2] and not one["between"]
    assert two["hills"] == [2, 7] and two["between"]
    assert uneven["hills"] == [2]  # a hill of a few percent is none
    assert len(double["hills"]) == 1  # a shallow dip does not make two hills of one


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
        page.wait_for_selector('[data-widget="learns"] .plot line', state="attached")
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert {message.partition("#")[0] for message in messages} <= {PAGE.as_uri()}


def says(page, widget: str) -> str:
    return page.locator(f'[data-says="{widget}"]').inner_text().replace("\u00a0", " ")


def set_slider(page, widget: str, name: str, value: float) -> None:
    give = "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', { bubbles: true })); }"
    page.locator(f'[data-widget="{widget}"] [data-in="{name}"]').evaluate(give, value)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_scrolls_sideways_and_axe_is_content(open_page, width, scheme):
    page = open_page(width, scheme)
    page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = "found => found.filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.className)"
    assert page.eval_on_selector_all("pre, .equation, .pair > *, table", cut) == []
    assert page.locator("a[href], button, input, summary, [tabindex='0']").count() <= 100
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] < 128")
    assert dark == (scheme == "dark")
    if not AXE.exists():
        pytest.skip("there is no axe-core: run npm ci --ignore-scripts in docs/")
    page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = false))")
    page.add_script_tag(content=AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run().then((r) => r.violations.map((v) => [v.id, v.nodes[0].html]))")
    assert found == []


@pytest.mark.parametrize("width", WIDTHS)
def test_links_land_with_their_code_in_view(open_page, width):
    page = open_page(width)
    for name in [*EQUATIONS, "digits"]:
        page.evaluate("name => { location.hash = name; }", name)
        page.wait_for_timeout(50)
        strip = page.locator("#strip").bounding_box()
        heading = page.locator(f"#{name} h2").bounding_box()
        code = page.locator(f"#{name} .code pre").first.bounding_box()
        assert strip["y"] == 0 and strip["height"] <= heading["y"] < 300
        assert strip["height"] < code["y"] and code["y"] + min(code["height"], 60) < 900, name
        lit = page.locator(f'#strip [aria-current][data-of~="{name}"]')
        assert lit.count() >= 1
        box = lit.first.bounding_box()
        assert -1 <= box["x"] and box["x"] + box["width"] <= width + 1  # the strip follows


def test_a_pixel_is_followed_by_mouse_and_keyboard(open_page):
    page, columns = open_page(), DEMO["p"]["size"][1]
    picture = page.locator('[data-map="picture"]')
    depth = (stored_p() @ CENTERS).tolist()
    for row, column, verdict in (
        (0, 0, "Nearly flat"),
        (16, 24, "One hill"),
        (10, 16, "Two hills"),
    ):
        box = picture.bounding_box()
        x, y = (column + 0.5) / columns * box["width"], (row + 0.5) / 24 * box["height"]
        picture.hover(position={"x": x, "y": y})
        value = depth[row * columns + column]
        assert says(page, "room").startswith(verdict) and f"{value:.2f} m" in says(page, "room")
        assert page.locator('#strip [data-value="d"]').inner_text() == f"{value:.2f} m"
    assert "between them" in says(page, "room")
    picture.focus()
    page.keyboard.press("ArrowDown")
    value = depth[11 * columns + 16]
    assert page.locator('#strip [data-value="d"]').inner_text() == f"{value:.2f} m"
    assert page.evaluate("document.activeElement.dataset.map") == "picture"


def test_a_finger_taps_a_pixel_and_swipes_past_it(open_page):
    page = open_page(360, height=740, has_touch=True, is_mobile=True)
    picture, shown = page.locator('[data-map="picture"]'), page.locator('#strip [data-value="d"]')
    box, before = picture.bounding_box(), shown.text_content()
    x, y = box["x"] + box["width"] * 0.75, box["y"] + box["height"] * 0.8
    page.touchscreen.tap(x, y)
    after = shown.text_content()
    assert after != before
    send = page.context.new_cdp_session(page).send
    points = [[{"x": x, "y": y - 20 * i}] for i in range(11)]
    kinds = ["touchStart"] + ["touchMove"] * 10 + ["touchEnd"]
    for kind, touch in zip(kinds, [*points, []]):
        send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touch})
        page.wait_for_timeout(20)
    assert page.evaluate("scrollY") > 100 and shown.text_content() == after


def test_widgets_compute_what_pytorch_computes(open_page):
    page, group = open_page(), CENTERS[None, 64:96]
    e = page.locator('#eq-2 [data-value="e"]')
    assert e.inner_text() == f"{cabins.distance_classes(group, 1).item():.4f} m"
    set_slider(page, "group", "unit", 2)
    assert e.inner_text() == f"{cabins.distance_classes(100 * group, 1).item() / 100:.4f} m"
    b = torch.tensor([[0.6, 1.0, 0.3, 2.0, 0.1, 0.5, 1.6, 2.4]])
    set_slider(page, "bins", "width", 2.0)
    c = cabins.bin_centers(b / b.sum(), 1e-3, 10)
    assert f"{c[0, 3].item():.3f} m" in says(page, "bins")
    x, c = torch.tensor([[1, 1.3, 1.7, 5, 5.4, 6]]), torch.tensor([[1.15, 3.4, 5.5, 9.3]])
    set_slider(page, "chamfer", "centre", 5.5)
    loss = cabins.chamfer_loss(c, x[:, None, None], torch.ones(1, 1, 1, 6, dtype=torch.bool))
    assert f"{loss.item():.3f} m²" in says(page, "chamfer")
    page.get_by_role("button", name="One step downhill").click()
    assert float(re.search(r"= ([\d.]+) m²", says(page, "chamfer"))[1]) < loss.item()
    set_slider(page, "silog", "scale", 0)
    assert f"= {DEMO['loss']['pixel']:.2f}" in says(page, "silog")
    set_slider(page, "attention", "gamma", 0)
    assert float(re.search(r"texts by ([\d.]+)°", says(page, "attention"))[1]) > 1
    page.get_by_label("the likeliest bin").check()
    assert "likeliest bin has its centre" in says(page, "mean")


def test_digits_jump_or_stay(open_page):
    page = open_page()
    tokens = page.locator('[data-value="ids"] li')
    before = tokens.all_inner_texts()
    for name, words, n_new in (("+ 0.00001", "No token", 0), ("+ 0.0001", "One token", 1)):
        page.get_by_role("button", name=name, exact=True).click()
        assert words in says(page, "stairs") and page.locator(".tokens .new").count() == n_new
    page.get_by_role("button", name="“2.9999”").click()
    page.get_by_role("button", name="+ 0.0001", exact=True).click()
    assert "6 tokens" in says(page, "stairs")  # 3.0 shares the point alone; five ids move or go
    page.get_by_role("button", name="back to").click()
    assert tokens.all_inner_texts() == before


def test_terms_light_up_together(open_page):
    page = open_page()
    for act in ("hover", "focus", "tap"):
        getattr(page.locator('#eq-1 .terms [data-t="half"]'), "click" if act == "tap" else act)()
        lit = page.locator(".lit").evaluate_all("found => found.map((e) => e.dataset.t)")
        assert set(lit) == {"half"} and len(lit) == 4  # equation, its name, code and widget
        page.keyboard.press("Escape")
        assert page.locator(".lit").count() == 0
        page.mouse.move(5, 5)


def test_figure_2_turns_over(open_page):
    """The cross is drawn in the gradient view alone, and blue arrows are."""
    page, n_colored = open_page(), []
    for drawing in ("#figure-2 .fig2", "#digits .fig2"):
        path = page.locator(drawing)
        path.scroll_into_view_if_needed()
        pixels = page.screenshot(clip=path.bounding_box() | {"width": 900}, full_page=False)
        image = np.asarray(Image.open(io.BytesIO(pixels)).convert("RGB")).astype(int)
        colors = ((0x0B, 0x5C, 0x94), (0xB8, 0x3A, 0x06))
        n_colored.append([(np.abs(image - color).sum(-1) < 12).sum() for color in colors])
    (blue, orange), (blue_back, orange_back) = n_colored
    assert max(blue, orange) < 20 and blue_back > 500 and orange_back > 20


def test_print_fills_at_most_14_pages(open_page, tmp_path):
    if not (painter := shutil.which("pdftoppm")):
        pytest.skip("there is no pdftoppm (poppler-utils)")
    open_page().pdf(path=tmp_path / "page.pdf", format="A4")
    subprocess.run([painter, "-gray", "-r", "30", "page.pdf", "sheet"], cwd=tmp_path, check=True)
    sheets = [np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("sheet*"))]
    assert 5 < len(sheets) <= 14
    filled = [np.flatnonzero((sheet < 200).any(1)).max() / len(sheet) for sheet in sheets[:-1]]
    assert min(filled) > 0.55, filled
