"""Draws the figures of the documentation as SVG: ``python docs/figures/draw.py`` rewrites them here.

The pages hold them inline, so that they take the page's colours, light or dark: see stylesheets/extra.css.
"""

from pathlib import Path

HERE = Path(__file__).parent
CELL = 26


def rect(x, y, w, h, kind):
    return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" class="{kind}"/>'


def text(x, y, words, kind="label", anchor="middle"):
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def arrow(x1, y1, x2, y2):
    return f'<path d="M{x1} {y1} L{x2} {y2}" class="arrow" marker-end="url(#head)"/>'


def figure(width, height, title, parts):
    """An inline SVG; no blank lines, which would end the HTML block that holds it."""
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0 L8 4 L0 8 z" class="head"/></marker></defs>'
    )
    opening = (
        f'<svg class="figure" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'style="max-width: {width}px" role="img" aria-label="{title}">'
    )
    return "\n".join([opening, f"<title>{title}</title>", head, *parts, "</svg>"]) + "\n"


def lookup():
    """Position 9 of a sequence, through its page table, to a slot of the pool."""
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
    used = {5: 4, 2: 4, 6: 3}
    for page in range(8):
        x = 10 + 68 * page
        parts.append(text(x + 31, 190, f"page {page}", "note"))
        for slot in range(4):
            kind = "hit" if (page, slot) == (6, 1) else "a" if slot < used.get(page, 0) else "empty"
            parts.append(rect(x + 15.5 * slot, 198, 15.5, CELL, kind))
    parts += [arrow(10 + CELL * 9 + 29, 57, 213, 86), text(255, 76, "9 // 4 = 2", "note", "start")]
    parts += [
        arrow(215, 115, 10 + 68 * 6 + 23, 176),
        text(340, 139, "page 6, slot 9 mod 4 = 1", "note", "start"),
    ]
    return figure(560, 236, "Position 9 lies in slot 1 of page 6, the third entry of the page table", parts)


def granularities():
    """Which elements of one page share a scale."""
    shown = (("page", "1 scale", lambda slot, channel: 0), ("token", "4 scales", lambda slot, channel: slot),
             ("channel", "8 scales", lambda slot, channel: channel))  # fmt: skip
    parts = []
    for index, (name, count, block) in enumerate(shown):
        left = 34 + 186 * index
        parts += [text(left + 72, 18, name), text(left + 72, 126, count, "note")]
        for slot in range(4):
            for channel in range(8):
                kind = "ab"[block(slot, channel) % 2]
                parts.append(rect(left + 18 * channel, 30 + 20 * slot, 18, 20, kind))
    parts += [text(20, 74, "slots", "note turned"), text(106, 144, "channels of a head", "note")]
    return figure(580, 152, "One page of one head: a block is the page, a slot or a channel", parts)


def doubling():
    """Floors under s and under 2s: cells join in pairs, and no value changes sides."""
    parts = []
    for row, (name, width, codes) in enumerate(
        (("scale s", 60, range(-4, 4)), ("scale 2s", 120, range(-2, 2)))
    ):
        top = 26 + 62 * row
        parts.append(text(70, top + 18, name, anchor="end"))
        for index, code in enumerate(codes):
            x = 84 + width * index
            kind = "hit" if code == (-3 if row == 0 else -2) else "ab"[code % 2]
            parts += [rect(x, top, width, CELL, kind), text(x + width / 2, top + 18, code)]
    parts += ['<path d="M156 8 L156 122" class="value"/>', text(162, 12, "x = -2.8 s", "note", "start")]
    parts += [
        text(84, 138, "floor(-2.8) = -3", "note", "start"),
        text(84, 156, "-3 &gt;&gt; 1 = -2 = floor(-2.8 / 2)", "note", "start"),
    ]
    return figure(580, 166, "Doubling the scale joins neighbouring cells in pairs", parts)


FIGURES = {"lookup.svg": lookup, "granularities.svg": granularities, "doubling.svg": doubling}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (HERE / name).write_text(draw())
