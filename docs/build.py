"""The companion page: paper, equations, code and a living network in one file, docs/index.html.

    pip install -r docs/requirements.txt; (cd docs && npm ci --ignore-scripts)      once
    python -m docs.build                           builds the page
    python -m docs.build --check                   fails if the page is not what would be built
    python -m docs.build --demo runs/toy/last.pt   computes docs/demo.json anew, then builds

docs/page.html is the template. In it an element such as <x-row of="bin_centers"> becomes what
`fill_row` makes of it, and {{picture}} that part. docs/sources.py reads the sources, and finds all by
name: nothing has to be changed when lines move. docs/typeset.py draws equations, docs/figure2.py
Figure 2.
"""

import argparse
import ast
import html
import json
import re
import sys
from functools import cache
from pathlib import Path

from docs import figure2
from docs.sources import (
    ROOT,
    TEX,
    BuildError,
    architectures,
    code,
    comment_notes,
    constant,
    documented,
    glossary,
    inline,
    prose,
    source,
    table_of,
)
from docs.typeset import styles, tex, typeset

DOCS = Path(__file__).parent
PAGE = DOCS / "index.html"
PARTS = ("page.html", "page.css", "widgets.css", "page.js", "widgets.js", "demo.json")


def ledger(names: set[str]) -> str:
    """The ledger's rows on these names, for the margin."""
    head, *rows = table_of("paper", "released code", "where")
    found = ""
    for title, *cells, where in rows:
        places = re.findall(r"`([\w.]+)`", where)  # with its file or without
        if not names & {*places, *(place.rpartition(".")[2] for place in places)}:
            continue
        items = zip(head[1:-1], cells)
        items = "".join(f"<dt>{a}</dt><dd>{inline(b)}</dd>" for a, b in items)
        title = inline(title.removesuffix(" *"))
        found += f'<div class="ledger" role="note" aria-label="Ledger: {title}">'
        found += f"<h4>{title}</h4><dl>{items}</dl></div>"
    return found


# ---- What stands in the template -----------------------------------------------------------------


def fill_row(attributes: dict, body: str) -> str:
    """Prose and equation on the left; code, and the widget, on the right."""
    name, file = attributes["of"], attributes.get("file", "cabins.py")
    node, left, notes = source(file).find(name), [], comment_notes(file, source(file).find(name))
    for part, docstring in documented(node):
        if part is not node:
            left.append(f"<h4><code>{part.name}</code></h4>")
        left += prose(ast.get_docstring(part), name)
    left += [paragraph for note in notes for paragraph in prose(note, name)]
    rows = ledger({name.partition(".__")[0], *attributes.get("ledger", "").split()})
    noted = [i for i, paragraph in enumerate(left) if 'class="note"' in paragraph]
    if noted and not rows:
        raise BuildError(f"{file}: {name} has a NOTE, and README's ledger has no row on it.")
    left.insert(noted[-1] + 1 if noted else len(left), rows)
    tests = "".join(fill_test(test) for test in attributes.get("tests", "").split())
    tests = f'<div class="tests"><h4>Asserted by</h4>{tests}</div>' if tests else ""
    widget = attributes.get("widget")
    if widget:
        widget = f'<figure class="widget" id="widget-{widget}" data-widget="{widget}"></figure>'
    return (
        f'<section class="row" id="{name}"><div class="left"><h3>{attributes["title"]}</h3>'
        f"{left[0] if left else ''}{body}{''.join(left[1:])}{tests}</div>"
        f'<div class="right">{code(file, name)}{widget or ""}</div></section>'
    )


def fill_test(name: str) -> str:
    if not re.search(rf"^def {name}\(", source("test_cabins.py").text, re.MULTILINE):
        raise BuildError(f"test_cabins.py has no {name}, which docs/page.html names.")
    about = ast.get_docstring(source("test_cabins.py").find(name)) or ""
    about = "".join(prose(about))
    shown = code("test_cabins.py", name)
    name = name.replace("_", "_<wbr>")
    return f"<details><summary><code>{name}</code></summary>{about}{shown}</details>"


def button(name: str) -> str:
    """A symbol that the Tab key reaches."""
    row = glossary()[name]
    spoken = html.escape(f"{row['code']}: {row['what']}")
    return (
        f'<button type="button" class="sym" data-s="{name}" aria-label="{spoken}">'
        f"{tex(TEX[name])}</button>"
    )


def fill_equation(attributes: dict, body: str) -> str:
    """A numbered equation, and its symbols with their meanings as buttons."""
    number, used = attributes["n"], dict.fromkeys(re.findall(r"\\sym\{(\w+)\}", body))
    items = "".join(f"<li>{button(s)} {glossary()[s]['what']}</li>" for s in used)
    legend = f'<ul class="legend" aria-label="Symbols of Equation {number}">{items}</ul>'
    return (
        f'<div class="equation" id="eq-{number}" data-eq="{number}">'
        f'<div class="display" tabindex="0" role="group" aria-label="Equation {number}">'
        f'{tex(body.strip(), True)}</div><span class="number">({number})</span></div>'
        f"{legend if used else ''}"
    )


def table(heads: list[str], rows: list[list[str]], label: str) -> str:
    """A table that scrolls inside itself where it must. The first cell of a row is its heading."""
    head = "".join(f'<th scope="col">{cell}</th>' if cell else "<td></td>" for cell in heads)
    body = ""
    for first, *cells in rows:
        own = ' class="own"' if first in ("CaBins", "Ours", "whole") else ""
        body += f'<tr{own}><th scope="row">{first}</th>'
        body += "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{label}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def fill_glossary(attributes: dict, body: str) -> str:
    rows = []
    for name, row in glossary().items():
        codes = ", ".join(f"<code>{part}</code>" for part in row["code"].split(", "))
        rows.append([button(name), codes, row["what"], row["shape"], row["unit"], row["section"]])
    return table(["paper", "code", "meaning", "shape", "unit", "section"], rows, "Glossary")


# ---- Tables of Sec. 4, and what was run ----------------------------------------------------------


def fill_quoted(attributes: dict, body: str) -> str:
    headings, columns = constant("HEADINGS"), constant("COLUMNS")
    columns = columns.get(attributes["of"], list(headings))
    lines = constant("QUOTED")[attributes["of"]].strip().splitlines()
    rows = [line.strip().rsplit(maxsplit=len(columns)) for line in lines]
    return table(["", *(headings[c] for c in columns)], rows, attributes["label"])


def fill_typed(attributes: dict, body: str) -> str:
    """Rows of the paper's Tables 3 and 4, which no file of the code has."""
    headings = [text for name, text in constant("HEADINGS").items() if name != "rmse_log"]
    rows = [line.rsplit(maxsplit=len(headings)) for line in body.splitlines()]
    return table(["", *headings], rows, attributes["label"])


def fill_measured(attributes: dict, body: str) -> str:
    headings, metrics = constant("HEADINGS"), demo()["silenced"]["metrics"]
    rows = [[name, *(f"{row[c]:.4f}" for c in headings)] for name, row in metrics.items()]
    return table(["", *headings.values()], rows, attributes["label"])


def fill_runs(attributes: dict, body: str) -> str:
    """README's table of what was run, and of what was not."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    part = re.search(r"## What was run.*?\n\n(.*?)(?=\n## )", text, re.DOTALL)
    if not part:
        raise BuildError("README.md has no heading 'What was run …'.")
    lines = [line.strip("|").split("|") for line in part[1].splitlines() if line[:2] == "| "]
    rows = [[inline(cell.strip()) for cell in line] for line in lines if any(line)]
    rows = [row for row in rows if any(row)]
    return f"<p>{part[1].splitlines()[0]}</p>" + table(["what", "result"], rows, "What was run")


# ---- The page ------------------------------------------------------------------------------------


@cache
def demo() -> dict:
    return json.loads((DOCS / "demo.json").read_text(encoding="utf-8"))


def fill_heading(attributes: dict, body: str) -> str:
    """The heading of a section as cabins.py has it."""
    start = attributes["of"]
    line = re.search(
        rf"^# ---- ({re.escape(start)}\b.*?)[ -]*$", source("cabins.py").text, re.MULTILINE
    )
    if not line:
        raise BuildError(f"cabins.py has no heading '# ---- {start} …'.")
    number, _, title = line[1].partition("  ")
    title = title or line[1]
    number = f"<span>{number}</span> " if title != number else ""
    title = html.escape(title, quote=False).replace("'", "’")
    title, *rest = re.split(r"(?<!Eq)(?<!Sec)\. ", title.rstrip("."), maxsplit=1)
    rest = f" <small>{rest[0]}.</small>" if rest else ""
    return f'<h2 id="{attributes["id"]}">{number}{title}{rest}</h2>'


def fill_idea(attributes: dict, body: str) -> str:
    """The second paragraph of cabins.py's docstring: the idea."""
    return prose(ast.get_docstring(source("cabins.py").tree))[1]


def fill_notation(attributes: dict, body: str) -> str:
    """What cabins.py's docstring says below the glossary."""
    paragraphs = prose(ast.get_docstring(source("cabins.py").tree))
    start = next(i for i, text in enumerate(paragraphs) if re.search("code +paper +shape", text))
    return "".join(paragraphs[start + 1 :])


def fill_ledger(attributes: dict, body: str) -> str:
    head, *rows = table_of("paper", "released code", "where")
    rows = [[inline(cell) for cell in row] for row in rows]
    return table(head, rows, "Paper, released code, and here")


def fill(template: str) -> str:
    """The template with each of its elements replaced by what fill_NAME makes of it."""

    def replace(match: re.Match) -> str:
        attributes = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
        return globals()[f"fill_{match[1]}"](attributes, match[3].strip())

    names = "|".join(name[5:] for name in globals() if name.startswith("fill_"))
    for _ in range(2):  # an equation stands inside a row
        template = re.sub(rf"<x-({names})([^>]*)>(.*?)</x-\1>", replace, template, flags=re.DOTALL)
    return re.sub(r"\$([^$\n]+)\$", lambda m: tex(m[1]), template)


def build() -> str:
    parts = {name: (DOCS / name).read_text(encoding="utf-8") for name in PARTS}
    page = fill(parts["page.html"]).replace("{{figure2}}", figure2.draw(demo(), architectures()))
    page = page.replace("{{about}}", inline(demo()["about"]))
    for name in ("picture", "depth_png", "truth_png", "shown_depth"):
        page = page.replace(f"{{{{{name}}}}}", html.escape(str(demo()[name])))
    page = page.replace("{{colors}}", ", ".join(demo()["colors"]))
    page = typeset(page)
    css = styles(page) + parts["page.css"] + parts["widgets.css"]
    data = parts["demo.json"].replace("</", "<\\/")
    for name, text in {"css": css, "demo": data, "page.js": parts["page.js"]}.items():
        page = page.replace(f"{{{{{name}}}}}", text)
    page = page.replace("{{widgets.js}}", parts["widgets.js"])
    if left := re.search(r"\{\{[\w.]+\}\}|<x-[^>]*>", page):
        raise BuildError(f"docs/page.html has {left[0]}, which nothing fills.")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the companion page, docs/index.html.")
    parser.add_argument("--check", action="store_true", help="fail if the page is stale")
    parser.add_argument("--demo", metavar="CKPT", help="first compute docs/demo.json anew")
    args = parser.parse_args()
    try:
        if args.demo:
            from docs import demo as network

            network.write(network.make(args.demo))
        page = build()
        if not args.check:
            PAGE.write_text(page, encoding="utf-8")
            print(f"{PAGE.name}: {len(page.encode()) / 1000:.0f} kB")
        elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
            raise BuildError("docs/index.html is stale: run python -m docs.build.")
    except (BuildError, OSError, ValueError) as error:
        sys.exit(f"docs.build: {error}")


if __name__ == "__main__":
    main()
