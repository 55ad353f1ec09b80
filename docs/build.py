"""The companion page: the paper's story, its equations and the code, in one file.

    pip install -r docs/requirements.txt     once: Pygments and markdown-it-py
    (cd docs && npm ci --ignore-scripts)     once: KaTeX and the fonts
    python -m docs.build                     builds docs/index.html
    python -m docs.build --check             fails if the page is not what would be built
    python -m docs.demo runs/toy/last.pt     computes docs/demo.json anew, from a trained demo
    python -m extras.findings                measures docs/findings.json anew

docs/page.html is the template. In it `{{cabins/2:.4f}}` is a value of docs/demo.json or
docs/findings.json, `{{range PATH | mm}}` the least and the greatest figure of the runs, `$…$` is
TeX, and an element such as <x-code of="bin_centers"> becomes what `fill_code` makes of it. Code is
found by the names of functions and by the text of its lines, so it cannot go stale: what is not
found stops the build with one sentence. docs/page.js draws the first state of each widget, so the
page needs no JavaScript to be read.
"""

import argparse
import ast
import base64
import html
import itertools
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from pygments.lexers import PythonLexer
from pygments.token import STANDARD_TYPES

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGE = DOCS / "index.html"
MODULES = DOCS / "node_modules"
KATEX = MODULES / "katex/dist"
REMEDY = "run npm ci --ignore-scripts in docs/"


class BuildError(Exception):
    """One sentence that says what is missing."""


@cache
def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# ---- Code of the sources -------------------------------------------------------------------------
@cache
def letters_of(file: str) -> list[list[tuple[str, str]]]:
    """For each line of a file, its characters with the class that Pygments gives them."""
    lines: list[list[tuple[str, str]]] = [[]]
    for kind, text in PythonLexer(stripnl=False).get_tokens(read(file)):
        style = STANDARD_TYPES.get(kind, "")
        style = style[:2] if style in ("nf", "nc") else style[:1] if style[:1] in "ckms" else ""
        for char in text:
            lines[-1].append((char, style))
            if char == "\n":
                lines.append([])
    return lines


def find(file: str, name: str) -> ast.AST:
    """The class or function of a name such as "CaBins.forward"."""
    node = ast.parse(read(file))
    for part in name.split("."):
        node = next((x for x in node.body if getattr(x, "name", None) == part), None)
        if node is None:
            raise BuildError(f"{file} has no {name}, which docs/page.html shows.")
    return node


def draw_line(file: str, number: int, dedent: int, terms: dict[str, str]) -> str:
    """One line in colours, as an element that wraps under its own indent, with its terms marked."""
    letters = letters_of(file)[number - 1]
    text = "".join(char for char, _ in letters).rstrip("\n")
    marked = {}
    for name, part in terms.items():
        if (start := text.find(part)) >= 0:
            marked |= dict.fromkeys(range(start, start + len(part)), name)
    indent = len(text) - len(text.lstrip())
    shown = ""
    for term, places in itertools.groupby(range(indent, len(text)), marked.get):
        part = ""
        for style, run in itertools.groupby(places, lambda at: letters[at][1]):
            run = html.escape("".join(text[at] for at in run), quote=False)
            part += f'<i class="{style}">{run}</i>' if style else run
        shown += f'<span data-t="{term}">{part}</span>' if term else part
    return (
        f'<span class="l" data-n="{number}" style="--i:{max(indent - dedent, 0)}">{shown}\n</span>'
    )


def line_numbers(file: str, name: str, show: str) -> list[int]:
    """The lines from A to B for "A … B"; from A to the function's end for "A …"; | joins parts."""
    node, lines, found = find(file, name), read(file).splitlines(), []
    for part in show.split(" | "):
        first, dots, last = (x.strip() for x in part.partition("…"))
        start = node.lineno
        ends = []
        for text in (first, last if dots else first):
            inside = range(start, node.end_lineno + 1)
            at = next((n for n in inside if text in lines[n - 1]), None) if text else inside[-1]
            if at is None:
                raise BuildError(f"{file}: {name} has no line with '{text}', for docs/page.html.")
            ends.append(at)
            start = at
        found += range(ends[0], ends[1] + 1)
    return found


def fill_code(attributes: dict, body: str) -> str:
    """The lines that compute an equation; the whole function is folded below them."""
    file, name = attributes.get("file", "cabins.py"), attributes["of"]
    terms = dict(pair.split(" = ", 1) for pair in attributes.get("terms", "").split("; ") if pair)
    numbers, lines = line_numbers(file, name, attributes["show"]), read(file).splitlines()
    for part in terms.values():
        if not any(part in lines[n - 1] for n in numbers):
            raise BuildError(f"{file}: {name} has no '{part}' in the lines that the page shows.")
    dedent = min(len(lines[n - 1]) - len(lines[n - 1].lstrip()) for n in numbers if lines[n - 1])
    shown = ""
    for before, number in zip([numbers[0] - 1, *numbers], numbers):
        shown += '<span class="l gap">⋯\n</span>' if number != before + 1 else ""
        shown += draw_line(file, number, dedent, terms)
    folded = whole(file, name.partition(".")[0], "all of it, with its docstring")
    return (
        f'<div class="code" data-file="{file}"><p class="where">{file} <b>{name}</b></p>'
        f"<pre><code>{shown}</code></pre>{folded}</div>"
    )


def whole(file: str, name: str, title: str) -> str:
    """A function or class as it stands, folded."""
    node = find(file, name)
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    lines = (draw_line(file, n, node.col_offset, {}) for n in range(first, node.end_lineno + 1))
    return (
        f'<details><summary><code>{name}</code>: {title}</summary><pre data-file="{file}"><code>'
        f"{''.join(lines)}</code></pre></details>"
    )


def fill_rest(attributes: dict, body: str) -> str:
    """Functions and classes of cabins.py, folded below the first line of their docstrings."""
    shown = ""
    for name in body.split():
        title = ast.get_docstring(find("cabins.py", name)).splitlines()[0]
        shown += whole("cabins.py", name, html.escape(re.sub("`", "", title)))
    return shown


# ---- Equations -----------------------------------------------------------------------------------
pending: list[tuple[str, bool]] = []


def tex(text: str, display: bool = False) -> str:
    """A placeholder for an equation, which `run_node` replaces."""
    if (text, display) not in pending:
        pending.append((text, display))
    return f"\x02{pending.index((text, display))}\x03"


def fill_eq(attributes: dict, body: str) -> str:
    """A numbered equation; below it its terms, one a line: name | TeX | meaning."""
    number, (equation, *rows) = attributes["n"], re.split(r"\n(?=\w+ \| )", body)
    items = ""
    for name, shown, meaning in (row.strip().split(" | ", 2) for row in rows):
        heard = html.escape(re.sub("<[^>]+>", "", meaning))
        items += f'<li><button type="button" data-t="{name}" aria-label="{heard}">{tex(shown)}'
        items += f"</button> <span>{meaning}</span></li>"
    display = tex(" ".join(equation.split()), True)
    return (
        f'<div class="equation" data-eq="{number}">{display}<span class="number">({number})</span>'
        f'</div><ul class="terms" aria-label="Terms of Equation {number}">{items}</ul>'
    )


# ---- Tables, from Markdown -----------------------------------------------------------------------
markdown = MarkdownIt("commonmark", {"html": True, "typographer": True})
markdown.enable(["table", "smartquotes", "replacements"])


def table(source: str, label: str, own: str = "\x00") -> str:
    """A Markdown table in a box in which it can scroll. The first cell of a row is its name."""
    text = markdown.render(source)
    text = text.replace("<table>", f'<table aria-label="{label}">')
    text = re.sub(r"<th( style[^>]*)?></th>", "<td></td>", text).replace("<th>", '<th scope="col">')
    text = re.sub(r"<tr>\n<td>(?!</td>\n<th)(.*?)</td>", r'<tr><th scope="row">\1</th>', text)
    text = text.replace(f'<tr><th scope="row">{own}<', f'<tr class="own"><th scope="row">{own}<')
    return f'<div class="scroll" role="group" tabindex="0" aria-label="{label}">{text}</div>'


def fill_table(attributes: dict, body: str) -> str:
    return table(body, attributes["label"], attributes.get("own", "\x00"))


def fill_readme(attributes: dict, body: str) -> str:
    """The first table below a heading of README.md. Rows after the first `fold` are folded."""
    heading = attributes["heading"]
    part = re.search(rf"^## {heading}$.*?(?=^## |\Z)", read("README.md"), re.DOTALL | re.MULTILINE)
    found = part and re.search(r"(?:^\|.*\n)+", part[0], re.MULTILINE)
    if not found:
        raise BuildError(f"README.md has no table below a heading '## {heading}'.")
    source = re.sub(r"\]\((?!http)([^)]+)\)", r"](../\1)", found[0]).replace("](../docs/", "](")
    head, rule, *rows = source.splitlines(keepends=True)
    if "heads" in attributes:
        head = f"| {attributes['heads'].replace('|', ' | ')} |\n"
    n, label = int(attributes.get("fold", len(rows))), attributes["label"]
    shown = table("".join([head, rule, *rows[:n]]), label)
    if rows[n:]:
        more = table("".join([head, rule, *rows[n:]]), f"{label}: the other rows")
        shown += f"<details><summary>{attributes['more']}</summary>{more}</details>"
    return shown


def fill_glossary(attributes: dict, body: str) -> str:
    """The two glossaries in cabins.py's docstring: letters that count, and the paper's symbols."""
    lines = ast.get_docstring(ast.parse(read("cabins.py"))).splitlines()
    starts = [i for i, x in enumerate(lines) if re.match(r"    (B  |code  +paper)", x)]
    if len(starts) != 2:
        raise BuildError("cabins.py's docstring lacks a glossary: lines 'B   …', 'code   paper …'.")
    letters, symbols = (list(itertools.takewhile(str.strip, lines[i:])) for i in starts)
    rows = [re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in letters]
    shown = table(
        as_markdown([["letter", "what it counts"], *rows]), "Letters that count something"
    )
    cuts = [match.start() for match in re.finditer(r"(?<!\S)\S", symbols[0])] + [None]
    rows = [symbols[0].split()]
    for line in symbols[1:]:
        marks = re.findall(r".[\u0300-\u036f]*", line)  # z̄ is two characters in one column
        rows.append(["".join(marks[a:b]).strip() for a, b in itertools.pairwise(cuts)])
        rows[-1][1] = re.sub(r"_(\w+)", r"<sub>\1</sub>", rows[-1][1])
        rows[-1][2] = rows[-1][2].replace(" x ", " × ")
    return shown + table(as_markdown(rows), "The paper’s symbols")


def as_markdown(rows: list[list[str]]) -> str:
    """Rows, of which the first is the head, as a Markdown table; first cells are code."""
    head, *rows = rows
    rows = [[f"`{name}`", *(cell.replace("|", r"\|") for cell in cells)] for name, *cells in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


# ---- Values --------------------------------------------------------------------------------------
@cache
def values() -> dict:
    """The content of demo.json and of findings.json."""
    return json.loads(read("docs/demo.json")) | json.loads(read("docs/findings.json"))


def look_up(path: str):
    found = values()
    try:
        for key in path.split("/"):
            found = found[int(key) if isinstance(found, list) else key]
    except (KeyError, IndexError):
        raise BuildError(f"docs/page.html wants {path}, which no JSON file has.") from None
    return found


def number(value: float) -> str:
    """Two digits, and powers of ten as a reader writes them."""
    if value >= 0.001:
        return f"{value:.0f}" if value >= 99.5 else f"{value:#.2g}".rstrip(".")
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}\u00a0·\u00a010<sup>−{-int(power)}</sup>"


def spread(path: str, unit: str | None = None) -> str:
    """The least and the greatest figure of the runs, or one figure if they print alike."""
    found, factor = look_up(path), {"%": 100, "mm": 1000}.get(unit, 1)
    ends = list(dict.fromkeys(number(factor * found[end]) for end in ("least", "greatest")))
    return " to ".join(ends) + (f"\u00a0{unit}" if unit else "")


def fill_values(page: str) -> str:
    def value(match: re.Match) -> str:
        kind, path, unit, style = match.groups()
        if kind == "row":  # of the ablation, for a Markdown table
            row = look_up(f"runs/paper/ablation/{path}")
            return " | ".join(f"{x['least']:.3f} to {x['greatest']:.3f}" for x in row.values())
        if kind == "range":
            return spread(path, unit)
        return html.escape(format(look_up(path), style or ""))

    macro = r"\{\{(?:(range|row) )?([^{}|:]+?)(?: \\?\| ([^{}]+))?(?::([^{}]*))?\}\}"
    return re.sub(macro, value, page)


# ---- Pictures ------------------------------------------------------------------------------------
def fill_map(attributes: dict, body: str) -> str:
    """A picture of the room with a ring at the chosen pixel. With `pad`, keys can move the ring."""
    name = attributes["picture"]
    label = f'role="img" aria-label="{attributes.get("label")}"'
    heard = 'aria-hidden="true"' if "pad" in attributes else label
    slider = 'role="slider" tabindex="0" aria-roledescription="2-D slider" aria-valuemin="0" '
    slider += f'aria-valuemax="767" aria-valuenow="0" aria-label="{attributes.get("pad")}"'
    kind = "" if name in ("image", "depth", "truth") else ' class="coarse"'
    row, column = values()["pixel"]
    return (
        f'<div class="map"><div data-pad {slider if "pad" in attributes else ""}>'
        f'<svg viewBox="0 0 128 96" {heard}><image href="{look_up("pictures/" + name)}" width="128"'
        f' height="96" preserveAspectRatio="none"{kind}/><g data-ring transform="translate('
        f'{4 * column + 1} {4 * row + 1})"><circle r="4.5"/><circle r="4.5"/></g></svg></div>'
        f"<p>{body}</p></div>"
    )


# ---- KaTeX and the first state of the widgets, by one run of node --------------------------------
# \term{name}{shown}: a part of an equation that the page links with code, text and widget
PROGRAM = r"""
const [katex, { drawings }] = [require(process.argv[1]), require(process.argv[2])];
const { pending, demo, findings } = JSON.parse(require("fs").readFileSync(0, "utf8"));
const options = { trust: true, throwOnError: true, output: "htmlAndMathml" };
options.strict = (code) => (code === "htmlExtension" ? "ignore" : "error");
const macros = () => ({ "\\term": "\\htmlData{t=#1}{#2}" });
const equation = ([text, displayMode]) =>
  katex.renderToString(text, { ...options, displayMode, macros: macros() });
const { state, draw } = drawings(demo, findings);
const first = Object.fromEntries(Object.entries(draw).map(([n, make]) => [n, make(state, 560)]));
console.log(JSON.stringify({ drawn: pending.map(equation), first }));
"""


def run_node(page: str) -> str:
    """The page with its equations drawn and its widgets in their first state."""
    node = shutil.which("node")
    if not node or not KATEX.is_dir():
        raise BuildError(f"KaTeX or node is missing: install node, and {REMEDY}.")
    command = [node, "-e", PROGRAM, str(KATEX / "katex.js"), str(DOCS / "page.js")]
    given = json.dumps({"pending": pending, "demo": values(), "findings": values()})
    done = subprocess.run(command, input=given, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise BuildError(f"node stopped: {' '.join(done.stderr.split()[-60:])}")
    found = json.loads(done.stdout)
    annotation = re.compile(r"<annotation.*?</annotation>", re.DOTALL)  # TeX, which would be heard
    drawn = [annotation.sub("", equation) for equation in found["drawn"]]
    page = re.sub(r"\x02(\d+)\x03", lambda m: drawn[int(m[1])], page)
    head, *pieces = re.split(r'(?=data-widget=")', page)
    return head + "".join(first_state(piece, found["first"]) for piece in pieces)


def first_state(piece: str, first: dict) -> str:
    """A piece of the page, from one data-widget to the next, with that widget's parts filled."""
    parts = first[re.match(r'data-widget="(\w+)"', piece)[1]]
    part = r'(<(\w+)[^>]*\sdata-part="([^"]+)"[^>]*>)(</\2>)'
    piece = re.sub(part, lambda m: f"{m[1]}{parts[m[3]]}{m[4]}", piece)
    if height := re.search(r'class="plot" data-height="(\d+)"', piece):
        box = f'class="plot" viewBox="0 0 560 {parts.get("height", height[1])}" data-height='
        piece = piece.replace('class="plot" data-height=', box)
    pad = '<div data-pad role="slider"'
    piece = piece.replace(pad, f'{pad} aria-valuetext="{parts.get("spoken")}"')
    slider = r'(<input type="range"[^>]*data-in="(\w+)")'
    return re.sub(slider, lambda m: f'{m[1]} aria-valuetext="{parts[m[2] + " out"]}"', piece)


# ---- The page ------------------------------------------------------------------------------------
def fill(page: str) -> str:
    """The template with its values, its TeX and its elements replaced, in this order."""
    names = "|".join(name[5:] for name in globals() if name.startswith("fill_"))
    page = fill_values(page)
    page = re.sub(r"(?<=[\d}])\s(?=(?:m|mm|cm|rad|%)(?![\w\"=]| \|))", "\u00a0", page)  # "10 m"
    page = re.sub(r"\$([^$\n]+)\$", lambda m: tex(m[1]), page)
    page = re.sub(r"\x02\d+\x03[,.;:)]+", r'<span class="nowrap">\g<0></span>', page)

    def replace(match: re.Match) -> str:
        attributes = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
        return globals()[f"fill_{match[1]}"](attributes, match[3].strip())

    return re.sub(rf"<x-({names})\b([^>]*)>(.*?)</x-\1>", replace, page, flags=re.DOTALL)


def inlined(path: Path) -> str:
    if not path.exists():
        raise BuildError(f"docs/{path.relative_to(DOCS)} is missing: {REMEDY}.")
    data = base64.b64encode(path.read_bytes()).decode()
    return f'url(data:font/woff2;base64,{data}) format("woff2")'


# The fonts of KaTeX that the equations need, and the page's own: family, folder, weight, style
FONTS = "Main-Regular Main-Bold Main-Italic Math-Italic Caligraphic-Regular"
FONTS = [*FONTS.split(), *(f"Size{n}-Regular" for n in (1, 2, 3, 4))]
FACES = [("Source Serif", "source-serif-4", weight, "normal") for weight in (400, 600)]
FACES += [("Source Serif", "source-serif-4", 400, "italic")]
FACES += [("Source Sans", "source-sans-3", weight, "normal") for weight in (400, 600)]
FACES += [("Source Code", "source-code-pro", 400, "normal")]
RANGES = {"latin": "U+0000-02FF,U+0304,U+2000-22FF", "greek": "U+0370-03FF"}


def fonts() -> str:
    """KaTeX's style sheet and the fonts, inlined."""

    def keep(face: re.Match) -> str:
        name = re.search(r"fonts/KaTeX_([\w-]+)\.woff2", face[0])[1]
        source = inlined(KATEX / f"fonts/KaTeX_{name}.woff2") if name in FONTS else ""
        return source and re.sub(r"src:[^;}]*", lambda _: f"src:{source}", face[0])

    sheet = (KATEX / "katex.min.css").read_text(encoding="utf-8")
    css = "/* KaTeX, MIT licence */\n" + re.sub(r"@font-face\{[^}]*\}", keep, sheet)
    for (family, folder, weight, style), (subset, span) in itertools.product(FACES, RANGES.items()):
        path = MODULES / f"@fontsource/{folder}/files/{folder}-{subset}-{weight}-{style}.woff2"
        css += f'@font-face{{font-family:"{family}";font-weight:{weight};font-style:{style};'
        css += f"src:{inlined(path)};unicode-range:{span}}}\n"
    return css


def build() -> str:
    """The page. Raises BuildError for what the template names and no source has."""
    pending.clear()
    parts = {kind: read(f"docs/page.{kind}") for kind in ("html", "css", "js")}
    page, found = run_node(fill(parts["html"])), values()
    runs = {
        name: {key: run[key] for key in ("gamma_rms", "step_share")}
        for name, run in found["runs"].items()
    }
    left_out = ("pictures", "runs", "steps", "random_widths")
    given = {name: x for name, x in found.items() if name not in left_out}
    loss = found["loss"]["pixel"] + 0.1 * found["loss"]["bins"]
    parts |= {
        "css": fonts() + parts["css"],
        "texts": " ".join(f"<span>“{text}”</span>" for text in found["texts"]),
        "tokens": " ".join(map(str, found["tokens"][2][1:-1])),
        "total": f"{loss:.2f}",
        "demo": json.dumps(given, ensure_ascii=False, separators=(",", ":")),
        "findings": json.dumps({"steps": found["steps"], "runs": runs}, separators=(",", ":")),
    }
    for name in ("texts", "tokens", "total", "css", "demo", "findings", "js"):
        page = page.replace(f"[[{name}]]", parts[name])
    if left := re.search(r"\[\[\w+\]\]|<x-[^>]*>", page):
        raise BuildError(f"docs/page.html has {left[0]}, which nothing fills.")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the companion page, docs/index.html.")
    parser.add_argument("--check", action="store_true", help="fail if the page is stale")
    args = parser.parse_args()
    try:
        page = build()
        if not args.check:
            PAGE.write_text(page, encoding="utf-8")
            print(f"{PAGE.name}: {len(page.encode()) / 1000:.0f} kB")
        elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
            raise BuildError("docs/index.html is stale: run python -m docs.build.")
    except (BuildError, OSError) as error:
        sys.exit(f"docs.build: {error}")


if __name__ == "__main__":
    main()
