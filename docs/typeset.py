"""Equations by KaTeX, and the fonts of the page, for docs/build.py. Both come from npm.

KaTeX runs once, when all equations are known: `tex` gives a placeholder, `typeset` fills them all.
"""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

MODULES = Path(__file__).parent / "node_modules"
KATEX = MODULES / "katex/dist"
REMEDY = "run npm ci --ignore-scripts in docs/"
# \sym{name}{shown} is a symbol of the glossary, which the page lights up
PROGRAM = r"""
const katex = require(process.argv[1]);
const given = JSON.parse(require("fs").readFileSync(0, "utf8"));
const options = { trust: true, strict: "error", throwOnError: true, output: "htmlAndMathml" };
options.strict = (code) => (code === "htmlExtension" ? "ignore" : "error");
const macros = () => ({ "\\sym": "\\htmlData{s=#1}{#2}" });
const draw = ([text, displayMode]) =>
  katex.renderToString(text, { ...options, displayMode, macros: macros() });
console.log(JSON.stringify(given.map(draw)));
"""
# A font of KaTeX, and the classes or commands in its HTML that need it
USES = {"Main-Regular": "katex", "Math-Italic": "mathnormal", "Main-Bold": "mathbf"}
USES |= {"Caligraphic-Regular": "mathcal", "AMS-Regular": "amsrm", "Math-BoldItalic": "boldsymbol"}
USES |= {f"Size{n}-Regular": f"size{n}" for n in (1, 2)} | {"Size3-Regular": "delimsizing size3"}
USES |= {"Size4-Regular": "delimsizing size4", "Main-Italic": "mathit"}
# Fonts of the page: family, folder, weight, style
FACES = [("Source Serif", "source-serif-4", weight, "normal") for weight in (400, 600)]
FACES += [("Source Serif", "source-serif-4", 400, "italic")]
FACES += [("Source Sans", "source-sans-3", weight, "normal") for weight in (400, 600)]
FACES += [("Source Code", "source-code-pro", weight, "normal") for weight in (400, 600)]
RANGES = {"latin": "U+0000-02FF,U+0304,U+2000-22FF", "greek": "U+0370-03FF"}

pending: list[tuple[str, bool]] = []


def tex(text: str, display: bool = False) -> str:
    """A placeholder for an equation, which `typeset` replaces."""
    if (text, display) not in pending:
        pending.append((text, display))
    return f"\x02{pending.index((text, display))}\x03"


def typeset(page: str) -> str:
    """The page with all of its equations drawn."""
    node = shutil.which("node")
    if not node or not KATEX.is_dir():
        raise FileNotFoundError(f"KaTeX or node is missing: install node, and {REMEDY}.")
    command, given = [node, "-e", PROGRAM, str(KATEX / "katex.js")], json.dumps(pending)
    done = subprocess.run(command, input=given, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise ValueError(f"KaTeX refused an equation: {done.stderr.strip().splitlines()[4:5]}.")
    drawn = json.loads(done.stdout)
    return re.sub(r"\x02(\d+)\x03", lambda m: drawn[int(m[1])], page)


def inlined(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'url(data:font/woff2;base64,{data}) format("woff2")'


def styles(page: str) -> str:
    """KaTeX's style sheet with the fonts that the page uses, and the page's own fonts."""
    licence = (MODULES / "katex/LICENSE").read_text(encoding="utf-8")
    css = f"/* KaTeX.\n{licence}*/\n" + (KATEX / "katex.min.css").read_text(encoding="utf-8")

    def keep(face: re.Match) -> str:
        name = re.search(r"fonts/KaTeX_([\w-]+)\.woff2", face[0])[1]
        if USES.get(name, "\x00") not in page:
            return ""
        source = inlined(KATEX / f"fonts/KaTeX_{name}.woff2")
        return re.sub(r"src:[^;}]*", lambda _: f"src:{source}", face[0])

    css = re.sub(r"@font-face\{[^}]*\}", keep, css)
    for family, folder, weight, style in FACES:
        for subset, span in RANGES.items():
            path = MODULES / f"@fontsource/{folder}/files/{folder}-{subset}-{weight}-{style}.woff2"
            css += f'@font-face{{font-family:"{family}";font-weight:{weight};font-style:{style};'
            css += f"src:{inlined(path)};unicode-range:{span}}}"
    return css
