"""What docs/build.py shows of the sources: code, prose, notes and tables, all found by name."""

import ast
import html
import io
import itertools
import re
import tokenize
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from pygments.lexers import PythonLexer
from pygments.token import Token

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/page.html"
MARKDOWN = MarkdownIt("commonmark", {"html": False, "typographer": True}).enable(["smartquotes"])

# The glossary's symbols in TeX. The names are those of its first column.
TEX = {"image": "I", "pyramid": r"\{\mathbf{x}_i\}", "z_bar": r"\bar{\mathbf{z}}"}
TEX |= {"z": r"\mathbf{z}", "b": r"\mathbf{b}", "c": r"c(\mathbf{b})", "m": "m_k", "w": "w_i"}
TEX |= {"e": "e_k", "prompts": r"\mathbf{p}_{1 \ldots N}", "t": r"\mathbf{t}", "s": r"\mathbf{s}"}
TEX |= {"v_post": r"\mathbf{v}_{\text{post}}", "gamma": r"\gamma", "p": r"\mathbf{p}", "d": "d_i"}
TEX |= {"target": "d^*_i", "x": "X", "g": "g_i"}

# Which names in a function's code and prose are symbols: elsewhere a letter means something else.
NAMES = {
    "ResNet": "image pyramid z_bar z",
    "AttentionPool": "z̄ z",
    "AdaptiveBins": "b z_bar z̄",
    "bin_centers": "b",
    "distance_classes": "c centers m w",
    "number_tokens": "e",
    "CLIP": "prompts",
    "ContextDecoder": "t z_bar z z̄ gamma v_post",
    "CaBins.encode_prompts": "e t prompts e_k γ",
    "cosine_similarity": "z t s",
    "DepthDecoder": "p pyramid s",
    "expected_depth": "centers p",
    "CaBins.__init__": "prompts",
    "CaBins.distribution": "image pyramid z_bar z b c e t s p",
    "CaBins.forward": "image c e s d depth",
    "Prediction": "depth centers cabins similarity",
    "silog_loss": "depth target g",
    "chamfer_loss": "c x centers target X",
    "total_loss": "target depth centers",
    "depth_metrics": "depth target",
}
ALIASES = {"centers": "c", "cabins": "e", "similarity": "s", "depth": "d", "z̄": "z_bar"}
ALIASES |= {"e_k": "e", "γ": "gamma", "X": "x"}


class BuildError(Exception):
    """One sentence that says what is missing."""


# ---- Sources: code, docstrings and notes, found by name ------------------------------------------


class Source:
    """One Python file, its lines, and its lines in colours."""

    def __init__(self, name: str):
        self.name, self.text = name, (ROOT / name).read_text(encoding="utf-8")
        self.lines, self.tree = self.text.splitlines(), ast.parse(self.text)
        self.tokens = [[]]  # of each line, from Pygments
        for kind, value in PythonLexer(stripnl=False).get_tokens(self.text):
            for part in value.splitlines(keepends=True):
                self.tokens[-1].append((kind, part.rstrip("\n")))
                if part.endswith("\n"):
                    self.tokens.append([])

    def find(self, name: str) -> ast.AST:
        """The class, function or constant of a name such as "CaBins.forward"."""
        node = self.tree
        for part in name.split("."):
            for child in node.body:
                targets = [*getattr(child, "targets", []), child]
                if part in [getattr(t, "name", getattr(t, "id", None)) for t in targets]:
                    node = child
                    break
            else:
                raise BuildError(f"{self.name} has no {name}, which docs/page.html names.")
        return node


@cache
def source(name: str) -> Source:
    return Source(name)


def documented(node: ast.AST) -> list[tuple[ast.AST, ast.Expr]]:
    """The node itself and its methods, as far as they have a docstring, each with it."""
    nodes = [node, *(n for n in getattr(node, "body", []) if isinstance(n, ast.FunctionDef))]
    return [(n, n.body[0]) for n in nodes if hasattr(n, "name") and ast.get_docstring(n)]


def ranges(node: ast.AST, lines: list[str]) -> list[tuple[int, int]]:
    """The first and last lines of the node's code without its docstrings, which become prose."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    found = []
    for _, docstring in documented(node):
        found.append((first, docstring.lineno - 1))
        first = docstring.end_lineno + 1
        first += first <= node.end_lineno and not lines[first - 1].strip()
    return [(a, b) for a, b in [*found, (first, node.end_lineno)] if a <= b]


STYLES = {Token.Comment: "c", Token.Literal.String: "s", Token.Literal.Number: "n"}
STYLES |= {Token.Keyword: "k", Token.Operator.Word: "k", Token.Name.Decorator: "k"}
STYLES |= {Token.Name.Function: "f", Token.Name.Class: "f"}


def mark(name: str, shown: str) -> str:
    return f'<span class="sym" data-s="{name}">{shown}</span>'


def code(file: str, name: str, label: str = "") -> str:
    """Code with line numbers; a gap in them is where a docstring stands."""
    own, spans = source(file), ranges(source(file).find(name), source(file).lines)
    symbols, lines = set(NAMES.get(name, "").split()), []
    for first, last in spans:
        for number in range(first, last + 1):
            shown = ""
            for kind, value in own.tokens[number - 1]:
                style = next((s for k, s in STYLES.items() if kind in k), "")
                text = html.escape(value, quote=False)
                if kind in Token.Name and value in symbols:
                    shown += mark(ALIASES.get(value, value), text)
                else:
                    shown += f'<span class="{style}">{text}</span>' if style else text
            gap = ' class="gap"' if number == first != spans[0][0] else ""
            lines.append(f'<span data-n="{number}"{gap}>{shown}\n</span>')
    where = ",".join(f"{a}-{b}" for a, b in spans)
    label = label or f"{file}, {name}"
    return (
        f'<figure class="code"><figcaption>{file} <b>{name}</b></figcaption>'
        f'<pre tabindex="0" role="group" aria-label="{label}" data-file="{file}" '
        f'data-ranges="{where}">{"".join(lines)}</pre></figure>'
    )


def comment_notes(file: str, node: ast.AST) -> list[str]:
    """The comments of a node that have a NOTE, each with the lines that go on with it."""
    notes, last = [], None
    for token in tokenize.generate_tokens(io.StringIO(source(file).text).readline):
        line = token.start[0]
        if token.type != tokenize.COMMENT or not node.lineno <= line <= node.end_lineno:
            continue
        text, alone = token.string.lstrip("# "), token.line.strip().startswith("#")
        if "NOTE(" in text:
            notes.append(text)
            last = line
        elif alone and last == line - 1:
            notes[-1] += f"\n{text}"
            last = line
    return notes


# ---- Prose: docstrings as they are, with their symbols -------------------------------------------


@cache
def rows() -> set[str]:
    """The names that have a row on the page."""
    return set(re.findall(r'<x-row of="([^"]+)"', PAGE.read_text(encoding="utf-8")))


def inline(text: str) -> str:
    """Markdown as HTML, in which a name that has a row links to it."""

    def link(match: re.Match) -> str:
        name = next((n for n in (match[1], f"{match[1]}.__init__") if n in rows()), None)
        return f'<a class="eq" href="#{name}">{match[0]}</a>' if name else match[0]

    return re.sub(r"<code>([\w.]+)</code>", link, MARKDOWN.renderInline(text))


SHAPE = re.compile(r"\([A-Z\d…][\w/²+]*(,[\w /²+…]*)+\)")  # "(B, n_bins)"


def unbroken(match: re.Match) -> str:
    return match[0].replace(" ", "\u00a0")


def prose(text: str, name: str = "") -> list[str]:
    """The paragraphs of a docstring as HTML; notes and examples are told apart."""
    names = set(NAMES.get(name, "").split()) - {"x"}  # in prose, x is "times"
    names = sorted(names, key=lambda n: (-len(n), n))
    unit = r"(?<!\d )"  # "10 m" is no symbol
    words = "|".join(unit * (n == "m") + re.escape(n) for n in names) or "(?!)"
    pattern = re.compile(rf"(?<![\w'’.<&/\u0304-])(?:{words})(?![\w\u0304′]|[.(]\w)(?![^<]*>)")
    found = []
    text = re.sub(r"\n(?=NOTE\()", "\n\n", text)
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if paragraph.startswith(">>>"):
            found.append(f'<pre tabindex="0" class="example">{html.escape(paragraph)}</pre>')
            continue
        note = "NOTE(" in paragraph
        shown = SHAPE.sub(unbroken, inline(paragraph).replace("\n", " "))
        shown = pattern.sub(lambda m: mark(ALIASES.get(m[0], m[0]), m[0]), shown)
        shown = re.sub(r"(Eq\. (\d))", r'<a class="eq" href="#eq-\2">\1</a>', shown)
        shown = re.sub(r"\d (m|cm|%)(?=[\s,.;])", unbroken, shown)
        shown = re.sub(r"(NOTE\([\w ]+\)):?", r'<b class="tag">\1</b>', shown)
        found.append(f'<p class="{"note" if note else "doc"}">{shown}</p>')
    return found


def tables_of_readme() -> list[list[list[str]]]:
    """README's tables, each a list of rows, each a list of cells in Markdown."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    split = [[line.strip("|").split("|") for line in table.splitlines()] for table in tables]
    return [[[cell.strip() for cell in row] for row in t if "---" not in row] for t in split]


def table_of(*headings: str) -> list[list[str]]:
    for table in tables_of_readme():
        if all(heading in " | ".join(table[0]) for heading in headings):
            return table
    raise BuildError(f"README.md has no table with the columns {', '.join(headings)}.")


@cache
def glossary() -> dict[str, dict]:
    """The glossary in cabins.py's docstring, by symbols."""
    lines = ast.get_docstring(source("cabins.py").tree).splitlines()
    start = next((i for i, x in enumerate(lines) if re.match(r"\s*code +paper +shape", x)), None)
    if start is None:
        raise BuildError("cabins.py's docstring has no glossary: a line 'code paper shape …'.")
    heads = re.findall(r"\S+", lines[start])
    cuts = [lines[start].index(head) for head in heads] + [999]
    rows = []
    for line in lines[start + 1 : lines.index("", start)]:
        letters = re.findall(r".[\u0300-\u036f]*", line)  # z̄ is two characters in one column
        cells = ["".join(letters[a:b]).strip() for a, b in itertools.pairwise(cuts)]
        if cells[0]:
            rows.append(dict(zip(heads, cells)))
        else:
            for head, cell in zip(heads, cells):
                rows[-1][head] = f"{rows[-1][head]} {cell}".strip()
    found = {}
    for row in rows:
        names = [name for name in row["code"].split(", ") if name in TEX]
        if not names:
            raise BuildError(f"docs/build.py has no TeX for the glossary's {row['code']}.")
        for i, name in enumerate(names):
            own = dict(row, unit="metres" if re.search("metres|depths", row["what"]) else "none")
            if len(names) > 1:  # symbols that share a row
                own["code"], own["shape"] = name, re.split(r"(?<=\)), ", row["shape"])[i]
                own["what"] = row["what"].split(", and ")[i] + f", of {names[0]}" * (i > 0)
            own["what"] = own["what"].replace(", metres", "")
            found[name] = own
    return found


def constant(name: str) -> dict:
    """A dictionary of literals in eval.py, from its assignment and what is joined to it below."""
    found = {}
    for node in source("eval.py").tree.body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if name in [getattr(target, "id", None) for target in targets]:
            found |= ast.literal_eval(node.value)
    if not found:
        raise BuildError(f"eval.py has no {name}.")
    return found


def architectures() -> dict[str, dict]:
    """cabins.BACKBONES, each with its sizes by their names."""
    own = source("cabins.py")
    fields = [node.target.id for node in own.find("Architecture").body if hasattr(node, "target")]
    backbones = own.find("BACKBONES").value
    return {
        ast.literal_eval(name): dict(zip(fields, map(ast.literal_eval, call.args)))
        for name, call in zip(backbones.keys, backbones.values)
    }
