"""The companion page: python -m pytest docs/test_page.py

First what needs no browser: the page is as its sources. Then it is opened in Chromium. What is
missing (Pygments, node, KaTeX, playwright, Chromium, axe-core) skips its tests and says so.
"""

import ast
import html
import re
import shutil
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGE = DOCS / "index.html"
TEXT = PAGE.read_text(encoding="utf-8")
BODY = TEXT[TEXT.index("</style>") : TEXT.index('<script type="application/json"')]
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
FLAGS += " --disable-background-networking --disable-component-update"
AXE = DOCS / "node_modules/axe-core/axe.min.js"
WIDTHS = (360, 768, 1440)
SOURCES = ("cabins.py", "clip_tokenizer.py", "eval.py", "test_cabins.py", "README.md")


# ---- Without a browser ---------------------------------------------------------------------------


def test_each_equation_occurs_once():
    assert re.findall(r'data-eq="(\d)"', BODY) == list("12345678")
    source = (ROOT / "cabins.py").read_text(encoding="utf-8")
    assert sorted(re.findall(r"# Eq\. (\d):", source)) == list("12345678")


def test_equations_stand_beside_the_code_that_computes_them():
    rows = re.split(r'<section class="row"', BODY)[1:]
    found = [row for row in rows if 'data-eq="' in row]
    assert len(found) == 8
    for row in found:
        number = re.search(r'data-eq="(\d)"', row)[1]
        code = re.sub(r"<[^>]+>", "", row[row.index('<div class="right">') :])
        assert f"# Eq. {number}:" in code


def test_every_line_of_code_stands_in_its_source():
    blocks = re.findall(
        r'data-file="([\w.]+)" data-ranges="([\d,-]+)">(.*?)</pre>', BODY, re.DOTALL
    )
    assert len(blocks) > 50
    for file, ranges, shown in blocks:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        expected = []
        for span in ranges.split(","):
            first, last = map(int, span.split("-"))
            expected += [(str(n), lines[n - 1]) for n in range(first, last + 1)]
        parts = re.split(r'<span data-n="(\d+)"[^>]*>', shown)[1:]
        texts = [html.unescape(re.sub(r"<[^>]+>", "", part)) for part in parts[1::2]]
        assert list(zip(parts[::2], [text.rstrip("\n") for text in texts])) == expected


def plain(text: str) -> str:
    """Text without white space, markup and the kind of its quotes."""
    return re.sub(r"[\s`*]|NOTE\([\w ]+\):?", "", text).translate(str.maketrans("“”‘’", "\"\"''"))


def test_prose_is_the_docstrings_word_for_word():
    rows = re.findall(
        r'<section class="row" id="([\w.]+)">(.*?)<div class="right">', BODY, re.DOTALL
    )
    assert len(rows) > 30
    n_paragraphs = 0
    for name, left in rows:
        file = "clip_tokenizer.py" if name == "number_tokens" else "cabins.py"
        node = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        for part in name.split("."):
            node = next(n for n in node.body if getattr(n, "name", "") == part)
        shown = plain(html.unescape(re.sub(r"<[^>]+>", "", left)))
        for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
            for note in re.split(r"\n(?=NOTE)", paragraph):
                assert plain(note) in shown, f"{name}: {note}"
                n_paragraphs += 1
    assert n_paragraphs > 60


def test_anchors_and_symbols_resolve():
    ids = re.findall(r'\sid="([^"]+)"', BODY)
    assert len(ids) == len(set(ids))
    links = re.findall(r'href="#([^"]+)"', BODY)
    assert links and not {urllib.parse.unquote(link) for link in links} - set(ids)
    glossary = re.search(r'aria-label="Glossary">(.*?)</table>', BODY, re.DOTALL)[1]
    defined = set(re.findall(r'data-s="(\w+)"', glossary))
    assert set(re.findall(r'data-s="(\w+)"', BODY)) == defined


def test_nothing_comes_from_elsewhere():
    code = re.sub(r'<script type="application/json".*?</script>', "", TEXT, flags=re.DOTALL)
    addresses = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import', code)
    for address in ("".join(pair).strip("'\"") for pair in addresses):
        assert address.startswith(("#", "data:")), address[:80]
    assert len(TEXT.encode()) <= 1_500_000


def test_ledger_rows_and_unrun_things_are_on_the_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert BODY.count('class="ledger"') >= BODY.count('class="note"') / 2
    assert BODY.count("<strong>not run</strong>") == readme.count("**not run**")
    for label in ("measured here", "quoted"):
        assert label in BODY


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    """A copy of what the builder reads."""
    pytest.importorskip("pygments", reason="there is no Pygments")
    pytest.importorskip("markdown_it", reason="there is no markdown-it-py")
    if not shutil.which("node") or not (DOCS / "node_modules/katex").is_dir():
        pytest.skip("there is no node, or no KaTeX: run npm ci --ignore-scripts in docs/")
    root = tmp_path_factory.mktemp("page")
    (root / "docs").mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, root / name)
    for path in DOCS.iterdir():
        if path.suffix in (".py", ".html", ".css", ".js", ".json"):
            shutil.copy(path, root / "docs" / path.name)
    (root / "docs/node_modules").symlink_to(DOCS / "node_modules", target_is_directory=True)
    return root


def check(root: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "docs.build", "--check"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_the_page_is_what_would_be_built(copied):
    done = check(copied)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "file, old, new, sentence",
    [
        ("cabins.py", "# Eq. 1:  c(b_i) =", "# Eq. 1:  c(b_j) =", "stale"),
        ("clip_tokenizer.py", "def number_tokens(", "def number_tokens( ", "stale"),
        ("README.md", "released code, as it runs", "released code, as it ran", "stale"),
        (
            "test_cabins.py",
            "def test_bin_centers_are_eq_1(",
            "def test_eq_1(",
            "has no test_bin_cen",
        ),
        ("cabins.py", "def expected_depth(", "def mean_depth(", "has no expected_depth"),
    ],
)
def test_a_changed_source_is_noticed(copied, file, old, new, sentence):
    path = copied / file
    before = path.read_text(encoding="utf-8")
    assert old in before
    try:
        path.write_text(before.replace(old, new, 1), encoding="utf-8")
        done = check(copied)
    finally:
        path.write_text(before, encoding="utf-8")
    assert done.returncode and sentence in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


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

    def open_at(width: int = 1440, scheme: str = "light", **options):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True, **options
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda r: r.url.startswith("data:") or messages.append(r.url))
        page.goto(PAGE.as_uri())
        page.wait_for_selector("[data-widget=chamfer] dd:not(:empty)")
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert set(messages) <= {PAGE.as_uri()}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_no_sideways_scrolling_and_eight_equations(open_page, width, scheme):
    page = open_page(width, scheme)
    page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    drawn = page.locator(".equation .katex-html")
    assert drawn.count() == 8
    for box in (equation.bounding_box() for equation in drawn.all()):
        assert box["width"] > 50 and box["height"] > 10
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] < 128")
    assert dark == (scheme == "dark")


@pytest.mark.parametrize("width, scheme", [(360, "light"), (1440, "dark")])
def test_axe_finds_no_violation(open_page, width, scheme):
    if not AXE.exists():
        pytest.skip("there is no axe-core: run npm ci --ignore-scripts in docs/")
    page = open_page(width, scheme)
    page.evaluate("document.querySelectorAll('.fold').forEach((d) => (d.open = true))")
    page.add_script_tag(content=AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run().then((r) => r.violations.map((v) => [v.id, v.nodes[0].html]))")
    assert found == []


def lit(page) -> set[str]:
    """The names of the symbols that are lit; all of a name are, or none."""
    names = page.eval_on_selector_all(".lit", "found => found.map((e) => e.dataset.s)")
    for name in set(names):
        assert page.locator(f'[data-s="{name}"]').count() == names.count(name) > 3
    return set(names)


def test_a_symbol_lights_up_by_mouse(open_page):
    page = open_page()
    card = page.locator("#card")
    assert lit(page) == set() and card.is_hidden()
    places = ["#eq-2 [data-s=e]", "#distance_classes pre [data-s=m]", "#AdaptiveBins p [data-s=b]"]
    places += [".figure2.wide tspan[data-s=s]", "#eq-5 + ul button[data-s=p]"]
    words = {"e": "metres", "m": "(B, K, 1)", "b": "widths", "s": "cosine", "p": "probability"}
    for place in places:
        page.locator(place).first.hover()
        (name,) = lit(page)
        assert words[name] in card.inner_text()
        box = card.bounding_box()
        assert 0 <= box["x"] and box["x"] + box["width"] <= 1440
    page.mouse.move(2, 500)
    assert lit(page) == set() and card.is_hidden()


def test_no_symbol_of_an_equation_is_covered(open_page):
    covered = """found => found.filter((e) => {
      e.scrollIntoView({ block: "center" });
      const box = e.getBoundingClientRect();
      const top = document.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2);
      return !top || top.closest("[data-s]") !== e;
    }).map((e) => e.dataset.s)"""
    page = open_page()
    symbols = ".equation .katex-html [data-s]"
    assert page.locator(symbols).count() > 20
    assert page.eval_on_selector_all(symbols, covered) == []


def test_a_symbol_lights_up_by_keyboard(open_page):
    page = open_page()
    page.locator("#eq-1 .display").focus()
    page.keyboard.press("Tab")
    assert lit(page) == {"c"} and "metres" in page.locator("#card").inner_text()
    page.keyboard.press("Tab")
    assert lit(page) == {"b"}
    page.keyboard.press("Escape")
    assert lit(page) == set() and page.locator("#card").is_hidden()
    for place in ("#bin_centers pre [data-s=b]", ".figure2.wide [data-s=e]", "#CLIP p [data-s]"):
        assert page.locator(place).first.get_attribute("tabindex") == "0"


def test_a_symbol_lights_up_by_touch(open_page):
    page = open_page(360, has_touch=True, is_mobile=True)
    page.locator("#eq-5 [data-s=p]").first.tap()
    assert lit(page) == {"p"} and "probability" in page.locator("#card").inner_text()
    page.locator("h1").tap()
    assert lit(page) == set()


@pytest.mark.parametrize("width", WIDTHS)
def test_figure_2_and_its_switches(open_page, width):
    page = open_page(width)
    drawing = page.locator(".figure2:visible")
    assert drawing.count() == 1
    assert "3×480×640" in drawing.text_content() and not drawing.locator(".bwd").first.is_visible()
    page.get_by_label("tiny, 128 × 96").check()
    page.get_by_label("where gradients flow").check()
    assert drawing.locator(".rn101:visible").count() == 0
    assert drawing.locator(".tiny:visible").count() > 8
    assert drawing.locator(".scissors").is_visible()
    assert "no derivative" in page.locator(".says-back").inner_text()
    drawing.locator("a", has_text="CaBins").first.click()
    assert page.evaluate("location.hash") == "#distance_classes"


def test_links_unfold_what_is_folded(open_page):
    page = open_page()
    assert not page.locator("#VisionTransformer").is_visible()
    page.evaluate("location.hash = 'VisionTransformer'")
    page.wait_for_selector("#VisionTransformer", state="visible")


def test_lines_of_text_have_60_to_75_characters(open_page):
    page = open_page(1440)
    count = """found => found.map((p) => {
      const range = document.createRange();
      range.selectNodeContents(p);
      return p.textContent.length / new Set(
        Array.from(range.getClientRects(), (r) => Math.round(r.bottom / 12))).size;
    })"""
    paragraphs = page.eval_on_selector_all(".idea .doc, .row .left > p.doc", count)
    longest = max(paragraphs)
    assert 45 < longest <= 80


def test_printing_cuts_no_row(open_page, tmp_path):
    """Each row, and what stands in it, gets a mark at its two ends: both are on one page."""
    if not (reader := shutil.which("pdftotext")):
        pytest.skip("there is no pdftotext (poppler-utils)")
    page = open_page()
    page.evaluate("document.querySelectorAll('.fold').forEach((d) => (d.open = true))")
    mark = """found => found.filter((e) => e.checkVisibility()).map((e, i) => {
      const box = e.cells ? e.cells[0] : e;
      box.style.position = "relative";
      for (const end of ["top", "bottom"]) {
        const mark = document.createElement("span");
        mark.textContent = ` @${i}${end}@ `;
        mark.style.cssText = `position: absolute; ${end}: 0; font: 4px serif`;
        box.append(mark);
      }
      return e.id || e.textContent.slice(0, 60);
    })"""
    names = page.eval_on_selector_all(".row, .ledger, .equation, tr, .widget, .network", mark)
    page.pdf(path=tmp_path / "page.pdf", format="A4")
    command = [reader, tmp_path / "page.pdf", "-"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sheets = {}
    for number, sheet in enumerate(text.split("\f")):
        sheets |= dict.fromkeys(re.findall(r"@(\d+(?:top|bottom))@", sheet), number)
    assert len(names) > 100 and len(sheets) == 2 * len(names)
    cut = [n for i, n in enumerate(names) if sheets[f"{i}top"] != sheets[f"{i}bottom"]]
    assert cut == []


def test_printing_leaves_out_what_is_for_the_hand(open_page):
    page = open_page(768)
    page.emulate_media(media="print")
    for kind in ("nav", ".switches", ".widget button", ".widget input[type=range]"):
        assert page.locator(kind).count() and not page.locator(f"{kind}:visible").count(), kind


def test_a_short_code_block_stays_beside_its_prose(open_page):
    page = open_page()
    page.evaluate("document.querySelectorAll('.tests details').forEach((d) => (d.open = true))")
    scroll = "e => scrollTo(0, e.getBoundingClientRect().top + scrollY + 400)"
    page.locator("#bin_centers").evaluate(scroll)
    nav, block = page.locator("nav").bounding_box(), page.locator("#bin_centers .right > .code")
    assert nav["height"] < block.bounding_box()["y"] < 120
