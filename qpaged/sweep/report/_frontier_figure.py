"""The figure of mean KL against bytes per token, with the Pareto front."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qpaged.sweep._extras import need
from qpaged.sweep._numbers import TIMES
from qpaged.sweep.report._labels import Box, box_around, boxes_of_steps, place_names
from qpaged.sweep.report.palette import ACCENT, MUTED
from qpaged.sweep.results import (
    BROKEN,
    Results,
    RunRecord,
    is_broken,
    log_floor,
    noise_floor,
    pareto_front,
    title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIELDS = ("format", "bytes_per_token", "ratio", "kl_mean", "tokens")
TICK_RATIOS = (16, 8, 4, 2, 1, 0.5)  # to bfloat16
FRONT_LABEL = "Pareto front: none is both smaller and closer"
BROKEN_LABEL = f"broken: the model no longer says what it did (KL above {BROKEN:g})"
MAX_NAMED = 16  # where there are more dots, only those on the front are named
FONT_SIZE = 9  # points
CHARACTER_WIDTH = 0.68  # of the font's size, for a bold name, about

Point = tuple[float, float]


@dataclass(frozen=True)
class Dot:
    """A run's point in the figure; exact runs stand on the floor."""

    run: RunRecord
    x: float
    y: float
    on_front: bool


def frontier_figure(results: Results) -> "Figure":
    """Draw mean KL over bytes per token, both logarithmic; a KL of 0 is drawn at the bottom."""
    dots = _dots(results["runs"])
    figure = need("matplotlib.figure").Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    _scale_axes(axes, dots)
    if any(is_broken(dot.run) for dot in dots):
        axes.plot([], [], "x", color=MUTED, label=BROKEN_LABEL)
    _draw_front(axes, dots)
    noise = noise_floor(results["runs"][0])
    if noise is not None:
        label = f"noise: the reference against itself, {noise['conditions']}"
        axes.axhline(noise["kl_mean"], color=MUTED, lw=0.8, ls="--", label=label)
    axes.legend(loc="upper right", frameon=False)
    for dot in dots:
        color = ACCENT if dot.on_front else MUTED
        fill = ACCENT if dot.on_front else "white"
        marker = "x" if is_broken(dot.run) else "o"
        axes.plot(dot.x, dot.y, marker, color=color, mfc=fill, ms=7, zorder=3 + dot.on_front)
    axes.set_title(textwrap.fill(title(results), 90), fontsize=10, parse_math=False)
    figure.draw_without_rendering()  # The layout must be known before names are placed in points.
    _name_dots(axes, dots)
    return figure


def bf16_words(ratio: float) -> str:
    """Describe a size beside bfloat16, from bfloat16's bytes over its own."""
    if ratio == 1:
        return "as bfloat16"
    if ratio > 1:
        return f"{ratio:g}{TIMES} smaller"
    return f"{1 / ratio:g}{TIMES} larger"


def _dots(runs: Sequence[RunRecord]) -> list[Dot]:
    floor = log_floor(run["kl_mean"] for run in runs)
    front = pareto_front(runs)
    return [Dot(run, run["bytes_per_token"], run["kl_mean"] or floor, run in front) for run in runs]


def _scale_axes(axes: "Axes", dots: list[Dot]) -> None:
    """Make the axes logarithmic, with ticks at round ratios to bfloat16, at decades and at the floor."""
    smallest = min(dot.x for dot in dots)
    largest = max(dot.x for dot in dots)
    floor = log_floor(dot.run["kl_mean"] for dot in dots)
    top = 3 * max(dot.y for dot in dots)
    axes.set(xscale="log", yscale="log", xlim=(smallest / 2, largest * 1.3), ylim=(floor / 2, top))

    bf16_bytes = dots[0].x * dots[0].run["ratio"]
    ticks = [bf16_bytes / ratio for ratio in TICK_RATIOS]
    ticks = [tick for tick in ticks if smallest / 1.4 <= tick <= largest * 1.1]
    axes.set_xticks(ticks, [f"{tick:,.0f}\n{bf16_words(bf16_bytes / tick)}" for tick in ticks])
    decades = range(round(math.log10(floor)) + 1, math.ceil(math.log10(top)))
    heights = [floor, *(10.0**decade for decade in decades)]
    axes.set_yticks(heights, ["exact: 0", *(f"$10^{{{decade}}}$" for decade in decades)])
    axes.minorticks_off()
    axes.axhline(floor, color=MUTED, lw=0.8, ls=":")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("bytes per token in the cache, all layers, scales included (against bfloat16)")
    axes.set_ylabel("mean KL to the float32 cache (nats per token)")


def _draw_front(axes: "Axes", dots: list[Dot]) -> None:
    front = sorted((dot for dot in dots if dot.on_front), key=lambda dot: dot.x)
    xs = [dot.x for dot in front]
    ys = [dot.y for dot in front]
    axes.step(xs, ys, where="post", color=ACCENT, lw=1.5, label=FRONT_LABEL)


def _name_dots(axes: "Axes", dots: list[Dot]) -> None:
    """Write names where there is room, with a line to the dot where they are moved away from it."""
    points = [_in_points(axes, dot) for dot in dots]
    obstacles = [box_around(x, y, 5) for x, y in points]
    pairs = sorted(zip(dots, points, strict=True), key=lambda pair: pair[0].x)
    named = [pair for pair in pairs if pair[0].on_front or len(dots) <= MAX_NAMED]
    obstacles += boxes_of_steps([point for dot, point in named if dot.on_front])
    requests = []
    for dot, (x, y) in named:
        width = CHARACTER_WIDTH * FONT_SIZE * len(dot.run["format"])
        requests.append((x, y, width, dot.on_front))
    boxes = place_names(requests, obstacles, _frame(axes), 1.3 * FONT_SIZE)
    for (dot, point), box in zip(named, boxes, strict=True):
        if box is not None:
            _write_name(axes, dot, box, point)


def _in_points(axes: "Axes", dot: Dot) -> Point:
    """Return a dot's place in points; y grows downwards."""
    points_per_pixel = 72 / axes.figure.dpi
    x, y = axes.transData.transform((dot.x, dot.y))
    return x * points_per_pixel, -y * points_per_pixel


def _frame(axes: "Axes") -> Box:
    """Return the box of the axes in points."""
    points_per_pixel = 72 / axes.figure.dpi
    left, bottom = axes.transAxes.transform((0, 0)) * points_per_pixel
    right, top = axes.transAxes.transform((1, 1)) * points_per_pixel
    return Box(left, -top, right, -bottom)


def _write_name(axes: "Axes", dot: Dot, box: Box, point: Point) -> None:
    """Write a dot's name into a box; names on the front end at its right edge, others start at its left."""
    x, y = point
    middle = (box.top + box.bottom) / 2
    if dot.on_front:
        anchor, alignment, weight, edge = box.right, "right", "bold", 1
    else:
        anchor, alignment, weight, edge = box.left, "left", "normal", 0
    line: dict[str, object] | None = None
    if abs(middle - y) > FONT_SIZE:
        nearest = min(max((x - box.left) / (box.right - box.left), 0), 1)
        line = {"arrowstyle": "-", "lw": 0.6, "color": MUTED, "shrinkA": 0, "shrinkB": 4}
        line["relpos"] = (nearest, edge)  # the point of the name's box that the line starts from
    axes.annotate(
        dot.run["format"], (dot.x, dot.y), (anchor - x, y - middle),
        textcoords="offset points", fontsize=FONT_SIZE, fontweight=weight, va="center", ha=alignment,
        parse_math=False, arrowprops=line,
        bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.85},
    )  # fmt: skip
