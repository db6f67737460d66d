"""Draws the documentation's figures as SVG: ``python docs/figures/draw.py`` rewrites them in this folder.

Pages include them inline, so that stylesheets/extra.css gives them the page's colours, light or dark.
"""

import ast
import html
import textwrap
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CELL = 26
LINE = 15  # pixels from one line of a note to the next
NOTE_CHARACTER = 6.9  # pixels, at most, of an average character of a note


def rect(x: float, y: float, width: float, height: float, style: str) -> str:
    """Return a rectangle whose colours are those of a class of the stylesheet."""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" class="{style}"/>'


def text(x: float, y: float, words: object, style: str = "label", anchor: str = "middle") -> str:
    """Return a line of text."""
    return f'<text x="{x}" y="{y}" class="{style}" text-anchor="{anchor}">{words}</text>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """Return an arrow from the first point to the second."""
    return f'<path d="M{x1} {y1} L{x2} {y2}" class="arrow" marker-end="url(#head)"/>'


def figure(width: int, height: int, title: str, parts: list[str]) -> str:
    """Return an inline SVG, without blank lines, which would end the HTML block that holds it."""
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0 L8 4 L0 8 z" class="head"/></marker></defs>'
    )
    opening = (
        f'<svg class="figure" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'style="max-width: {width}px" role="img" aria-label="{title}">'
    )
    return "\n".join([opening, f"<title>{title}</title>", head, *parts, "</svg>"]) + "\n"


def lookup() -> str:
    """Draw how position 9 of a sequence leads through the page table to a slot of the pool."""
    parts = [text(10, 20, "positions of one sequence", anchor="start")]
    for position in range(11):
        x = 10 + CELL * position + 8 * (position // 4)
        parts += [rect(x, 30, CELL, CELL, "hit" if position == 9 else "a"), text(x + 13, 48, position)]
    parts += [text(10, 105, "page_table", anchor="start")]
    for index, page in enumerate(("5", "2", "6", "8")):
        x = 105 + 44 * index
        parts += [rect(x, 88, 44, CELL, "hit" if index == 2 else "empty"), text(x + 22, 106, page)]
    parts += [text(290, 105, "8 = no page", "note", "start")]
    parts += [text(10, 165, "pool of one layer: 8 pages of 4 slots, for each KV head", anchor="start")]
    used_slots = {5: 4, 2: 4, 6: 3}  # by page
    for page in range(8):
        x = 10 + 68 * page
        parts.append(text(x + 31, 190, f"page {page}", "note"))
        for slot in range(4):
            style = "a" if slot < used_slots.get(page, 0) else "empty"
            if (page, slot) == (6, 1):
                style = "hit"
            parts.append(rect(x + 15.5 * slot, 198, 15.5, CELL, style))
    parts += [arrow(10 + CELL * 9 + 29, 57, 213, 86), text(255, 76, "9 // 4 = 2", "note", "start")]
    parts += [
        arrow(215, 115, 10 + 68 * 6 + 23, 176),
        text(340, 139, "page 6, slot 9 mod 4 = 1", "note", "start"),
    ]
    return figure(560, 236, "Position 9 lies in slot 1 of page 6, the third entry of the page table", parts)


def granularities() -> str:
    """Draw which elements of one page share a scale."""
    shown = (("page", "1 scale"), ("token", "4 scales"), ("channel", "8 scales"))
    parts = []
    for index, (name, count) in enumerate(shown):
        left = 34 + 186 * index
        parts += [text(left + 72, 18, name), text(left + 72, 126, count, "note")]
        for slot in range(4):
            for channel in range(8):
                block = {"page": 0, "token": slot, "channel": channel}[name]
                style = "ab"[block % 2]  # neighbouring blocks differ in colour
                parts.append(rect(left + 18 * channel, 30 + 20 * slot, 18, 20, style))
    parts += [text(20, 74, "slots", "note turned"), text(106, 144, "channels of a head", "note")]
    return figure(580, 152, "One page of one head: a block is the page, a slot or a channel", parts)


def doubling() -> str:
    """Draw floors under s and under 2s: cells merge in pairs, and no value leaves its pair."""
    parts = []
    rows = (("scale s", 60, range(-4, 4), -3), ("scale 2s", 120, range(-2, 2), -2))
    for row, (name, width, codes, code_of_x) in enumerate(rows):
        top = 26 + 62 * row
        parts.append(text(70, top + 18, name, anchor="end"))
        for index, code in enumerate(codes):
            x = 84 + width * index
            style = "hit" if code == code_of_x else "ab"[code % 2]
            parts += [rect(x, top, width, CELL, style), text(x + width / 2, top + 18, code)]
    parts += ['<path d="M156 8 L156 122" class="value"/>', text(162, 12, "x = -2.8 s", "note", "start")]
    parts += [
        text(84, 138, "floor(-2.8) = -3", "note", "start"),
        text(84, 156, "-3 &gt;&gt; 1 = -2 = floor(-2.8 / 2)", "note", "start"),
    ]
    return figure(580, 166, "Doubling the scale joins neighbouring cells in pairs", parts)


def architecture() -> str:
    """Draw the layers of import-linter's contract, each with the first line of its module's docstring."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = {contract["id"]: contract for contract in config["tool"]["importlinter"]["contracts"]}
    width, right = 470, 530
    parts, top = [], 6.0
    beside_top = top
    layers = contracts["layers"]["layers"]
    for index, layer in enumerate(layers):
        modules = layer.split(" | ")
        box_width = (width - 12 * (len(modules) - 1)) / len(modules)
        height = max(box_height(summary(module), box_width) for module in modules)
        for column, module in enumerate(modules):
            left = 6 + (box_width + 12) * column
            parts += box(left, top, box_width, height, module, summary(module), "a")
        if "qpaged.formats" in modules:
            beside_top = top
        top += height
        if index + 1 < len(layers):
            parts.append(arrow(6 + width / 2, top, 6 + width / 2, top + 16))
            top += 16
    rules = [contracts[name]["name"] for name in ("registry", "formats")]
    words = f"{summary('quantizers')} {rules[0]}. {rules[1]}."
    height = box_height(words, 204)
    parts += box(right, beside_top, 204, height, "quantizers", words, "b")
    path = f"M{6 + width} {beside_top + 20} L{right} {beside_top + 20}"
    parts.append(f'<path d="{path}" class="value" marker-end="url(#head)"/>')
    parts.append(text((6 + width + right) / 2, beside_top + 14, "names", "note"))
    return figure(740, round(top) + 6, "The layers of qpaged: imports point down", parts)


def summary(module: str) -> str:
    """Return the first line of a module's docstring, without its backquotes."""
    path = ROOT / module.replace(".", "/")
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(source.read_text())) or ""
    return docstring.partition("\n")[0].replace("`", "")


def box(left: float, top: float, width: float, height: float, name: str, words: str, style: str) -> list[str]:
    """Return a box with a name and, beneath it, words in as many lines as they need."""
    parts = [rect(left, top, width, height, style), text(left + 8, top + 17, name, "name", "start")]
    for number, line in enumerate(wrapped(words, width)):
        parts.append(text(left + 8, top + 34 + LINE * number, html.escape(line), "note", "start"))
    return parts


def box_height(words: str, width: float) -> float:
    return 27 + LINE * len(wrapped(words, width))


def wrapped(words: str, width: float) -> list[str]:
    return textwrap.wrap(words, int((width - 16) / NOTE_CHARACTER))


FIGURES = {
    "lookup.svg": lookup,
    "granularities.svg": granularities,
    "doubling.svg": doubling,
    "architecture.svg": architecture,
}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (HERE / name).write_text(draw())
