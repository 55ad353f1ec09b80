"""Figure 2 of the paper, drawn anew as SVG, for docs/build.py: for wide pages and for phones.

Boxes link to the rows of the page. An edge has a symbol, its shape for two networks, and may have
a gradient that flows back along it. CSS shows what the switches beside the figure choose.
"""

import html
import re

# name of a box: (title, second line, row of the page, sign)
BOXES = {
    "encoder": ("Image encoder", "ResNet", "ResNet", ""),
    "bins": ("Bin MLP", "AdaptiveBins", "AdaptiveBins", ""),
    "eq1": ("Bin centres", "Eq. 1", "bin_centers", ""),
    "cabins": ("CaBins", "Eq. 2", "distance_classes", ""),
    "digits": ("Digits", "number_tokens", "number_tokens", ""),
    "prompts": ("Prompts", "learnable", "CaBins.encode_prompts", ""),
    "text": ("Text encoder", "CLIP, frozen", "CLIP", "frozen"),
    "context": ("TransDecoder", "Eq. 3", "ContextDecoder", ""),
    "cosine": ("Similarity", "Eq. 4", "cosine_similarity", ""),
    "decoder": ("Depth decoder", "DepthDecoder", "DepthDecoder", ""),
    "eq5": ("Mean of bins", "Eq. 5", "expected_depth", ""),
    "loss": ("Loss", "Eq. 6, 7, 8", "total_loss", ""),
}
# name of an edge: (label, glossary symbols, shape, whether a gradient flows back)
EDGES = {
    "image": ("I", "image", "image", "none"),
    "z_bar": ("z̄", "z_bar", "D", "back"),
    "b": ("b", "b", "n", "back"),
    "c": ("c(b)", "c", "n", "none"),
    "c5": ("c(b)", "c", "", "back"),
    "c7": ("c(b)", "c", "", "back"),
    "e": ("e_k", "e", "K", "cut"),
    "ids": ("ids", "", "ids", "none"),
    "prompts": ("p", "prompts", "prompts", "back"),
    "t": ("t", "t", "t", "back"),
    "zz": ("z̄, z", "z", "z", "back"),
    "t3": ("t", "t", "", "back"),
    "z": ("z", "z", "", "back"),
    "x": ("x_1 … x_4", "pyramid", "x", "back"),
    "s": ("s", "s", "s", "back"),
    "p": ("p", "p", "p", "back"),
    "d": ("d", "d", "d", "back"),
    "d8": ("d", "d", "", "back"),
    "target": ("d*", "target", "", "none"),
}
WIDE = {
    "size": (1180, 500),
    "boxes": {
        "encoder": (250, 235, 130, 170),
        "bins": (400, 70, 122, 58),
        "eq1": (572, 70, 122, 58),
        "cabins": (744, 70, 122, 58),
        "digits": (916, 70, 122, 58),
        "prompts": (916, 160, 122, 50),
        "text": (1104, 70, 138, 58),
        "context": (1104, 222, 138, 58),
        "cosine": (1104, 326, 138, 58),
        "decoder": (1104, 432, 138, 62),
        "eq5": (572, 446, 122, 58),
        "loss": (250, 446, 122, 58),
    },
    "pictures": {
        "picture": (0, 193, 112),
        "depth_png": (344, 404, 112),
        "truth_png": (0, 404, 112),
    },
    # points of the edge, then where its label stands
    "edges": {
        "image": ("112,235 185,235", (147, 224)),
        "z_bar": ("250,150 250,70 339,70", (296, 59)),
        "b": ("461,70 511,70", (486, 59)),
        "c": ("633,70 683,70", (658, 59)),
        "c5": ("572,99 572,417", (604, 170)),
        "c7": ("572,352 250,352 250,417", (410, 341)),
        "e": ("805,70 855,70", (830, 59)),
        "ids": ("977,70 1035,70", (1006, 59)),
        "prompts": ("977,160 1075,160 1075,99", (1022, 149)),
        "t": ("1118,99 1118,193", (1146, 142)),
        "zz": ("315,205 1035,205", (410, 194)),
        "t3": ("1104,251 1104,297", (1122, 280)),
        "z": ("315,250 1008,250 1008,326 1035,326", (410, 239)),
        "x": ("315,300 985,300 985,418 1035,418", (410, 289)),
        "s": ("1104,355 1104,401", (1134, 374)),
        "p": ("1035,450 633,450", (834, 439)),
        "d": ("511,446 458,446", (485, 435)),
        "d8": ("344,446 313,446", (329, 435)),
        "target": ("112,446 187,446", (150, 435)),
    },
}
TALL = {
    "size": (360, 1190),
    "boxes": {
        "encoder": (180, 150, 150, 56),
        "bins": (180, 242, 150, 50),
        "eq1": (180, 332, 150, 50),
        "cabins": (180, 422, 150, 50),
        "digits": (180, 512, 150, 50),
        "prompts": (72, 604, 84, 50),
        "text": (205, 604, 130, 50),
        "context": (180, 696, 150, 50),
        "cosine": (180, 786, 150, 50),
        "decoder": (180, 876, 150, 50),
        "eq5": (180, 966, 150, 50),
        "loss": (180, 1160, 150, 50),
    },
    "pictures": {"picture": (130, 4, 100), "depth_png": (130, 1026, 100)},
    "edges": {
        "image": ("180,81 180,122", (190, 106)),
        "z_bar": ("180,178 180,217", (190, 202)),
        "b": ("180,267 180,307", (190, 292)),
        "c": ("180,357 180,397", (190, 382)),
        "c5": ("105,332 18,332 18,966 105,966", (46, 321)),
        "c7": ("18,960 18,1160 105,1160", (46, 1149)),
        "e": ("180,447 180,487", (198, 472)),
        "ids": ("180,537 180,579", (190, 562)),
        "prompts": ("114,604 140,604", (34, 646)),
        "t": ("192,629 192,671", (202, 655)),
        "zz": ("255,164 286,164 286,696 255,696", (258, 690)),
        "t3": ("180,721 180,761", (190, 746)),
        "z": ("255,150 310,150 310,786 255,786", (276, 780)),
        "x": ("255,136 334,136 334,876 255,876", (262, 869)),
        "s": ("180,811 180,851", (190, 836)),
        "p": ("180,901 180,941", (190, 927)),
        "d": ("180,991 180,1024", (190, 1012)),
        "d8": ("180,1101 180,1135", (190, 1122)),
        "target": ("330,1160 255,1160", (290, 1149)),
    },
}


def shapes(sizes: dict, height: int, width: int, digits: int) -> dict[str, str]:
    """The shape on each edge for one image of H x W, for the sizes of one Architecture."""
    h, w = height // 32, width // 32
    channels = [4 * sizes["width"] * 2**i for i in range(4)]
    return {
        "image": f"3×{height}×{width}",
        "D": f"{sizes['embed_dim']}",
        "n": "256",
        "K": "8",
        "ids": f"8×{digits}",
        "prompts": f"8×{sizes['text_width']}",
        "t": f"8×{sizes['embed_dim']}",
        "z": f"{sizes['embed_dim']}×{h}×{w}",
        "x": f"{channels[0]} … {channels[3]} ch.",
        "s": f"8×{h}×{w}",
        "p": f"256×{height // 2}×{width // 2}",
        "d": f"{height // 2}×{width // 2}",
    }


def label(text: str) -> str:
    """A symbol with what follows its underscore lowered: "e_k"."""
    low = '<tspan class="low" dy="3">\\1</tspan><tspan dy="-3">\u200b</tspan>'
    return re.sub(r"_(\w)", low, text)


def draw_line(name: str, layout: dict, arrow: str) -> str:
    """An edge: with its arrow forward, and backward where a gradient flows."""
    flow, points = EDGES[name][3], layout["edges"][name][0]
    out = f'<g class="edge {flow}"><polyline class="halo" points="{points}"/>'
    out += f'<polyline class="fwd" points="{points}" marker-end="url(#{arrow})"/>'
    if flow == "back":
        out += f'<polyline class="bwd" points="{points}" marker-start="url(#{arrow}-back)"/>'
    return out + "</g>"


def draw_name(name: str, layout: dict, variants: dict[str, dict]) -> str:
    """The symbol of an edge, and its shape for each of the networks."""
    (text, symbol, key, _), (x, y) = EDGES[name], layout["edges"][name][1]
    own = f'class="name sym" data-s="{symbol}"' if symbol else 'class="name"'
    out = f'<text class="on-edge" x="{x}" y="{y}"><tspan {own}>{label(text)}</tspan>'
    for kind, shape in variants.items() if key else ():
        at = f'x="{x}" dy="23"' if layout is WIDE or name in ("zz", "x") else 'dx="6"'
        out += f'<tspan class="shape {kind}" {at}>{shape[key]}</tspan>'
    return out + "</text>"


def draw_one(layout: dict, kind: str, pictures: dict, variants: dict[str, dict]) -> str:
    width, height = layout["size"]
    arrow = f"arrow-{kind}"
    out = f'<svg class="figure2 {kind}" viewBox="0 0 {width} {height}" role="group" '
    out += f'aria-label="Figure 2, the network, {kind}"><defs>'
    for name in (arrow, f"{arrow}-back"):
        out += f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        out += 'markerHeight="7" orient="auto-start-reverse"><path d="M0 0 8 4 0 8z"/></marker>'
    out += "</defs>"
    out += "".join(draw_line(name, layout, arrow) for name in layout["edges"])
    out += "".join(draw_name(name, layout, variants) for name in layout["edges"])
    for name, (x, y, w, h) in layout["boxes"].items():
        title, second, row, sign = BOXES[name]
        dy = 3 if name != "encoder" or h < 100 else 0
        out += f'<a href="#{row}" class="box {sign}"><rect x="{x - w / 2}" y="{y - h / 2}" '
        out += f'width="{w}" height="{h}" rx="5"/><text x="{x}" y="{y - 6 + dy}">{title}</text>'
        out += f'<text class="second" x="{x}" y="{y + 12 + dy}">{second}</text></a>'
    for name, (x, y, w) in layout["pictures"].items():
        what = {"picture": "image I", "depth_png": "depth d", "truth_png": "true depth d*"}[name]
        out += f'<image x="{x}" y="{y}" width="{w}" height="{w * 3 / 4}" '
        out += f'href="{html.escape(pictures[name])}"><title>{what}</title></image>'
    x, y = layout["edges"]["e"][1]
    cut = (x, y + 11) if layout is WIDE else (180, y - 5)
    out += f'<g class="scissors"><circle cx="{cut[0]}" cy="{cut[1]}" r="9"/>'
    out += f'<path d="M{cut[0] - 4} {cut[1] - 4}l8 8m0 -8l-8 8"/></g>'
    return out + "</svg>"


def draw(demo: dict, architectures: dict[str, dict]) -> str:
    """Both drawings. `architectures` has the sizes of each of cabins.BACKBONES."""
    variants = {
        "rn101": shapes(architectures["RN101"], 480, 640, 9),
        "tiny": shapes(architectures["tiny"], *demo["size"], 9),
    }
    return "".join(draw_one(a, b, demo, variants) for a, b in ((WIDE, "wide"), (TALL, "tall")))
