"""The companion page: the paper's story, its equations, the code and a living network in one file.

    (cd docs && npm ci --ignore-scripts)     once: KaTeX and the fonts
    python -m docs.build                     builds docs/index.html
    python -m docs.build --check             fails if the page is not what would be built
    python -m docs.demo runs/toy/last.pt     computes docs/demo.json anew, from a trained demo

docs/page.html is the template. In it `{{loss.pixel:.2f}}` is a number of docs/demo.json, `$…$` is
TeX, and an element such as <x-code of="bin_centers"> becomes what `fill_code` makes of it. Code is
found by the names of functions and by the text of its lines, so it cannot go stale: what is not
found stops the build with one sentence.
"""

import argparse
import ast
import base64
import html
import io
import itertools
import json
import keyword
import re
import shutil
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGE = DOCS / "index.html"
MODULES = DOCS / "node_modules"
KATEX = MODULES / "katex/dist"
REMEDY = "run npm ci --ignore-scripts in docs/"


class BuildError(Exception):
    """One sentence that says what is missing."""


# ---- Code of the sources -------------------------------------------------------------------------


@cache
def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def find(file: str, name: str) -> ast.AST:
    """The class, function or constant of a name such as "CaBins.forward"."""
    node = ast.parse(read(file))
    for part in name.split("."):
        for child in node.body:
            targets = [*getattr(child, "targets", []), getattr(child, "target", None), child]
            if part in [getattr(t, "name", getattr(t, "id", None)) for t in targets]:
                node = child
                break
        else:
            raise BuildError(f"{file} has no {name}, which docs/page.html shows.")
    return node


@cache
def styles_of(file: str) -> dict[tuple[int, int], str]:
    """The class of each character that has one: comment, string, keyword, number or defined name."""
    kinds = {tokenize.COMMENT: "c", tokenize.STRING: "s", tokenize.NUMBER: "n"}
    found, before, lines = {}, "", read(file).splitlines()
    for token in tokenize.generate_tokens(io.StringIO(read(file)).readline):
        kind = kinds.get(token.type)
        if token.type == tokenize.NAME:
            named = "f" if before in ("def", "class") else None
            kind = "k" if keyword.iskeyword(token.string) else named
        before = token.string
        (row, start), (last, end) = token.start, token.end
        for line in range(row, last + 1) if kind else ():
            first = start if line == row else 0
            until = end if line == last else len(lines[line - 1])
            found |= dict.fromkeys(((line, at) for at in range(first, until)), kind)
    return found


def draw_line(file: str, number: int, dedent: int, terms: dict[str, str]) -> str:
    """One line in colours, as an element that wraps under its own indent, with its terms marked."""
    text, styles = read(file).splitlines()[number - 1], styles_of(file)
    marked = {}
    for name, part in terms.items():
        if (start := text.find(part)) >= 0:
            marked |= dict.fromkeys(range(start, start + len(part)), name)
    indent = len(text) - len(text.lstrip())
    shown = ""
    for term, places in itertools.groupby(range(indent, len(text)), marked.get):
        part = ""
        for style, run in itertools.groupby(places, lambda at: styles.get((number, at))):
            run = html.escape("".join(text[at] for at in run), quote=False)
            part += f'<i class="{style}">{run}</i>' if style else run
        shown += f'<span data-t="{term}">{part}</span>' if term else part
    return (
        f'<span class="l" data-n="{number}" style="--i:{max(indent - dedent, 0)}">{shown}\n</span>'
    )


def spans(file: str, name: str, show: str) -> list[tuple[int, int]]:
    """Ranges of lines: "A … B" is from the line with A to that with B; "A …" to the function's end."""
    node, lines, found = find(file, name), read(file).splitlines(), []
    for part in show.split(" | "):
        first, dots, last = (x.strip() for x in part.partition("…"))
        ends, start = [], node.lineno
        for text in (first, last or (first if not dots else None)):
            at = node.end_lineno
            if text is not None:
                inside = range(start, node.end_lineno + 1)
                at = next((n for n in inside if text in lines[n - 1]), None)
            if at is None:
                raise BuildError(f"{file}: {name} has no line with '{text}', for docs/page.html.")
            ends.append(at)
            start = at
        found.append(tuple(ends))
    return found


def fill_code(attributes: dict, body: str) -> str:
    """The lines that compute an equation; the whole function is folded below them."""
    file, name = attributes.get("file", "cabins.py"), attributes["of"]
    terms = dict(pair.split(" = ", 1) for pair in attributes.get("terms", "").split("; ") if pair)
    ranges = spans(file, name, attributes["show"])
    numbers = [n for first, last in ranges for n in range(first, last + 1)]
    lines = read(file).splitlines()
    for part in terms.values():
        if not any(part in lines[n - 1] for n in numbers):
            raise BuildError(f"{file}: {name} has no '{part}' in the lines that the page shows.")
    dedent = min(len(lines[n - 1]) - len(lines[n - 1].lstrip()) for n in numbers if lines[n - 1])
    shown = ""
    for at, number in enumerate(numbers):
        gap = at and number != numbers[at - 1] + 1
        shown += '<span class="l gap">⋯\n</span>' if gap else ""
        shown += draw_line(file, number, dedent, terms)
    node = find(file, name.partition(".")[0])
    return (
        f'<div class="code" data-file="{file}"><p class="where">{file} <b>{name}</b></p>'
        f"<pre><code>{shown}</code></pre>{whole(file, node)}</div>"
    )


def whole(file: str, node: ast.AST, title: str = "") -> str:
    """A function or class as it stands, folded."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    lines = (draw_line(file, n, node.col_offset, {}) for n in range(first, node.end_lineno + 1))
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    title = title or f"the whole {kind}, with its docstring"
    return (
        f'<details><summary>{title}</summary><pre data-file="{file}"><code>{"".join(lines)}'
        "</code></pre></details>"
    )


def fill_whole(attributes: dict, body: str) -> str:
    file, name = attributes.get("file", "cabins.py"), attributes["of"]
    return whole(file, find(file, name), f"{body} <code>{name}</code>")


# ---- Equations -----------------------------------------------------------------------------------

# \term{name}{shown}: a part of an equation that the page links with code, text and widget
PROGRAM = r"""
const katex = require(process.argv[1]);
const given = JSON.parse(require("fs").readFileSync(0, "utf8"));
const options = { trust: true, throwOnError: true, output: "htmlAndMathml" };
options.strict = (code) => (code === "htmlExtension" ? "ignore" : "error");
const macros = () => ({ "\\term": "\\htmlData{t=#1}{#2}" });
const draw = ([text, displayMode]) =>
  katex.renderToString(text, { ...options, displayMode, macros: macros() });
console.log(JSON.stringify(given.map(draw)));
"""
pending: list[tuple[str, bool]] = []


def tex(text: str, display: bool = False) -> str:
    """A placeholder for an equation, which `typeset` replaces."""
    if (text, display) not in pending:
        pending.append((text, display))
    return f"\x02{pending.index((text, display))}\x03"


def typeset(page: str) -> str:
    """The page with all of its equations drawn, by one run of KaTeX."""
    node = shutil.which("node")
    if not node or not KATEX.is_dir():
        raise BuildError(f"KaTeX or node is missing: install node, and {REMEDY}.")
    command, given = [node, "-e", PROGRAM, str(KATEX / "katex.js")], json.dumps(pending)
    done = subprocess.run(command, input=given, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise BuildError(f"KaTeX refused an equation: {done.stderr.strip().splitlines()[4:5]}.")
    drawn = json.loads(done.stdout)
    return re.sub(r"\x02(\d+)\x03", lambda m: drawn[int(m[1])], page)


def fill_eq(attributes: dict, body: str) -> str:
    """A numbered equation; below it its terms, one a line: name | TeX | meaning."""
    number, (equation, *rows) = attributes["n"], re.split(r"\n(?=\w+ \| )", body)
    items = ""
    for name, shown, meaning in (row.split(" | ", 2) for row in rows):
        spoken = html.escape(re.sub(r"<[^>]+>|[$\\{}]|textstyle", "", meaning.strip()))
        label = f'<button type="button" data-t="{name}" aria-label="{spoken}">'
        label += f"${shown.strip()}$</button>"
        items += f"<li>{label} <span>{meaning.strip()}</span></li>"
    display = tex(" ".join(equation.split()), True)
    return (
        f'<div class="equation" data-eq="{number}">{display}<span class="number">({number})</span>'
        f'</div><ul class="terms" aria-label="Terms of Equation {number}">{items}</ul>'
    )


# ---- Tables --------------------------------------------------------------------------------------


def inline(text: str) -> str:
    """The little Markdown that README's tables use: code, bold and links."""
    text = html.escape(text.strip(), quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"(?<=\w)([._])(?=\w+[\w.]*</code>)", r"\1<wbr>", text)  # long names may break
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    text = re.sub(r"\[([^\]]+)\]\((https?://[^)]+)\)", r'<a href="\2">\1</a>', text)
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)
    text = re.sub(r'(?<![\w"=])"([^"<>]+)"', r"“\1”", text)
    text = re.sub(r"->|(?<=\w) - (?=\w)", lambda m: " − " if " " in m[0] else "→", text)
    return "–" if text == "-" else text.replace("'", "’")


def section_of_readme(heading: str) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the first table below a heading of README.md, as HTML."""
    part = re.search(rf"^## {heading}.*?(?=^## |\Z)", read("README.md"), re.DOTALL | re.MULTILINE)
    table = part and re.search(r"(?:^\|.*\n)+", part[0], re.MULTILINE)
    if not table:
        raise BuildError(f"README.md has no table below a heading '## {heading}'.")
    rows = [line.strip().strip("|").split("|") for line in table[0].splitlines()]
    head, *rows = [[inline(cell) for cell in row] for row in rows if "---" not in "".join(row)]
    return head, rows


def table(heads: list[str], rows: list[list[str]], label: str) -> str:
    """A table; on narrow pages each cell carries its column's name, in data-h."""
    head = "".join(f'<th scope="col">{cell}</th>' if cell else "<td></td>" for cell in heads)
    named = [re.sub(r"<[^>]+>", "", cell) for cell in heads]
    body = ""
    for first, *cells in rows:
        own = ' class="own"' if first in ("CaBins", "Ours", "whole") else ""
        body += f'<tr{own}><th scope="row">{first}</th>'
        body += "".join(f'<td data-h="{h}">{cell}</td>' for h, cell in zip(named[1:], cells))
        body += "</tr>"
    return (
        f'<table aria-label="{label}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    )


def fill_readme(attributes: dict, body: str) -> str:
    head, rows = section_of_readme(attributes["heading"])
    if "heads" in attributes:
        head = attributes["heads"].split("|")
    rows = [row for row in rows if any(row)]
    return table(head, rows, attributes["label"])


def constant(name: str) -> dict:
    """A dictionary of literals in eval.py, with what is joined to it below."""
    found = {}
    for node in ast.parse(read("eval.py")).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if name in [getattr(target, "id", None) for target in targets]:
            found |= ast.literal_eval(node.value)
    if not found:
        raise BuildError(f"eval.py has no {name}.")
    return found


def fill_quoted(attributes: dict, body: str) -> str:
    """A table of the paper. The row of CaBins must be the one that eval.py quotes."""
    headings, name = constant("HEADINGS"), attributes["of"]
    columns = constant("COLUMNS").get(name, list(headings))
    if name not in constant("QUOTED"):  # Tables 3 and 4
        columns = [column for column in headings if column != "rmse_log"]
    elif body.splitlines()[-1] != f"CaBins {constant('QUOTED')[name]}":
        raise BuildError(f"The last row of {name} is not the one in eval.QUOTED.")
    rows = [line.rsplit(maxsplit=len(columns)) for line in body.splitlines()]
    return table(["", *(heading(headings[c]) for c in columns)], rows, attributes["label"])


def heading(text: str) -> str:
    """A metric's name as the paper writes it, which may break on a phone."""
    return text.replace("RMSElog", "RMSE log").replace("d<", "δ&nbsp;&lt; ")


def fill_ablation(attributes: dict, body: str) -> str:
    headings, rows = constant("HEADINGS"), demo()["ablation"]
    shown = ["abs_rel", "rmse", "d1"]
    rows = [[name, *(f"{row[c]:.3f}" for c in shown)] for name, row in rows.items()]
    return table(["", *(heading(headings[c]) for c in shown)], rows, attributes["label"])


def fill_gradients(attributes: dict, body: str) -> str:
    """Norms of gradients, by part, of Σ s² and of the loss."""
    rows = []
    for part in ("bins", "prompts p", "γ", "TransDecoder", "z"):
        cells = [demo()["gradients"][what][part] for what in ("s", "loss")]
        rows.append([part, *("<b>none</b>" if c is None else number(c) for c in cells)])
    return table(["gradient at", "of Σ s²", "of the loss"], rows, attributes["label"])


def number(value: float) -> str:
    """Two digits, and powers of ten as a reader writes them."""
    if 0.01 <= abs(value) < 1000:
        return f"{value:.2g}"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits} · 10<sup>{int(power)}</sup>".replace("<sup>-", "<sup>−")


def fill_glossary(attributes: dict, body: str) -> str:
    """The glossary in cabins.py's docstring: a head 'code paper shape …', and aligned columns."""
    lines = ast.get_docstring(ast.parse(read("cabins.py"))).splitlines()
    start = next((i for i, x in enumerate(lines) if re.match(r"\s*code +paper\b", x)), None)
    if start is None:
        raise BuildError("cabins.py's docstring has no glossary: a line 'code  paper  …'.")
    heads = re.split(r"\s{2,}", lines[start].strip())
    cuts = [re.search(rf"(?<!\S){re.escape(head)}", lines[start]).start() for head in heads] + [999]
    rows = []
    for line in itertools.takewhile(str.strip, lines[start + 1 :]):
        letters = re.findall(r".[\u0300-\u036f]*", line)  # z̄ is two characters in one column
        cells = ["".join(letters[a:b]).strip() for a, b in itertools.pairwise(cuts)]
        if not cells[0] or any(
            a.endswith(",") and b for a, b in zip(rows[-1] if rows else (), cells)
        ):
            goes_on = [not cells[0] or before.endswith(",") for before in rows[-1]]
            rows[-1] = [f"{a} {b}".strip() if g else a for a, b, g in zip(rows[-1], cells, goes_on)]
            cells = [cell * (not g) for cell, g in zip(cells, goes_on)]
        if cells[0]:
            rows.append(cells)
    rows = [[f"<code>{name}</code>", *map(inline, cells)] for name, *cells in rows]
    for row in rows:
        row[1] = re.sub(r"_(\w+)", r"<sub>\1</sub>", row[1])
        row[2:] = [re.sub(r" x (?=[\dHWw])", " × ", cell) for cell in row[2:]]
    return table(heads, rows, "Glossary")


# ---- The page ------------------------------------------------------------------------------------


@cache
def demo() -> dict:
    return json.loads((DOCS / "demo.json").read_text(encoding="utf-8"))


def value(match: re.Match) -> str:
    """A number of the demo: {{loss.pixel:.2f}}, {{cabins.2:.4f}}, {{rms.γ:~}} as a power of ten."""
    found = demo()
    for key in match[1].split("."):
        found = found[int(key) if isinstance(found, list) else key]
    if match[2] == "~":
        return number(found)
    return html.escape(format(found, match[2] or ""))


def fill(page: str) -> str:
    """The template with its elements, numbers and TeX replaced."""
    names = "|".join(name[5:] for name in globals() if name.startswith("fill_"))
    page = re.sub(r"(?<=[\d}])\s(?=(?:m|mm|cm|rad|%)(?![\w\"=]| \|))", "\u00a0", page)  # "10 m"

    def replace(match: re.Match) -> str:
        attributes = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
        return globals()[f"fill_{match[1]}"](attributes, match[3].strip())

    page = re.sub(rf"<x-({names})\b([^>]*)>(.*?)</x-\1>", replace, page, flags=re.DOTALL)
    page = re.sub(r"\{\{([^}:]+):?([^}]*)\}\}", value, page)
    return re.sub(r"\$([^$\n]+)\$", lambda m: tex(m[1]), page)


def inlined(path: Path) -> str:
    if not path.exists():
        raise BuildError(f"docs/{path.relative_to(DOCS)} is missing: {REMEDY}.")
    data = base64.b64encode(path.read_bytes()).decode()
    return f'url(data:font/woff2;base64,{data}) format("woff2")'


# A font of KaTeX, and a class in its HTML that needs it
USES = {"Main-Regular": "katex", "Math-Italic": "mathnormal", "Main-Bold": "mathbf"}
USES |= {"Caligraphic-Regular": "mathcal", "Main-Italic": "mathit", "Size1-Regular": "size1"}
USES |= {"Size2-Regular": "size2", "Size3-Regular": "size3", "Size4-Regular": "size4"}
# Fonts of the page: family, folder, weight, style
FACES = [("Source Serif", "source-serif-4", weight, "normal") for weight in (400, 600)]
FACES += [("Source Serif", "source-serif-4", 400, "italic")]
FACES += [("Source Sans", "source-sans-3", weight, "normal") for weight in (400, 600)]
FACES += [("Source Code", "source-code-pro", 400, "normal")]
RANGES = {"latin": "U+0000-02FF,U+0304,U+2000-22FF", "greek": "U+0370-03FF"}


def fonts(page: str) -> str:
    """KaTeX's style sheet with the fonts that the page uses, and the page's own fonts."""
    css = (KATEX / "katex.min.css").read_text(encoding="utf-8")

    def keep(face: re.Match) -> str:
        name = re.search(r"fonts/KaTeX_([\w-]+)\.woff2", face[0])[1]
        if USES.get(name, "\x00") not in page:
            return ""
        source = inlined(KATEX / f"fonts/KaTeX_{name}.woff2")
        return re.sub(r"src:[^;}]*", lambda _: f"src:{source}", face[0])

    css = "/* KaTeX, MIT licence */\n" + re.sub(r"@font-face\{[^}]*\}", keep, css)
    for family, folder, weight, style in FACES:
        for subset, span in RANGES.items():
            path = MODULES / f"@fontsource/{folder}/files/{folder}-{subset}-{weight}-{style}.woff2"
            css += f'@font-face{{font-family:"{family}";font-weight:{weight};font-style:{style};'
            css += f"src:{inlined(path)};unicode-range:{span}}}\n"
    return css


def build() -> str:
    parts = {p: (DOCS / f"page.{p}").read_text(encoding="utf-8") for p in ("html", "css", "js")}
    page = typeset(fill(parts["html"]))
    data = json.dumps(demo(), ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    parts |= {"css": fonts(page) + parts["css"], "demo": data}
    for name in ("css", "demo", "js"):
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
