"""The figure of a sweep: divergence against bytes, with the Pareto front."""

import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpaged.sweep._extras import need
from qpaged.sweep._result import SweepResult, pareto_front
from qpaged.sweep._run import Run
from qpaged.sweep._table import title

RATIOS = (16, 8, 4, 2, 1, 0.5)
FRONT, REST = "#1f4e8c", "#7a7a7a"
LINE = 1.35  # height of a label, in font sizes
FRONT_LABEL = "Pareto front: none is both smaller and closer"
TIMES = "\N{MULTIPLICATION SIGN}"
MOST_NAMES = 16  # where there are more dots, those on the front are named
COLUMN = 90  # points (1/72 inch): labels of dots this close in x stand in one column


@dataclass(frozen=True)
class Dot:
    """A run's place in the figure; what is exact stands on the floor."""

    run: Run
    x: float
    y: float
    on_front: bool


def write_figure(result: SweepResult, directory: Path) -> Path:
    """Write ``frontier.png``: mean KL over bytes per token, both logarithmic; KL 0 is drawn at the bottom."""
    dots = _dots(result.runs)
    figure = need("matplotlib.figure").Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    _scale_axes(axes, dots)
    _draw_front(axes, dots)
    for dot in dots:
        color = FRONT if dot.on_front else REST
        axes.plot(dot.x, dot.y, "o", color=color, mfc=color if dot.on_front else "white", ms=7, zorder=3)
    axes.set_title(textwrap.fill(title(result), 90), fontsize=10)
    figure.draw_without_rendering()  # so that places are known in points
    _label(axes, dots if len(dots) <= MOST_NAMES else [dot for dot in dots if dot.on_front])
    path = directory / "frontier.png"
    figure.savefig(path, dpi=150)
    return path


def floor_of(values: Sequence[float]) -> float:
    """Where 0 is drawn on a logarithmic axis: a decade below the least value that has a place there."""
    positive = [value for value in values if value > 0]
    return 10.0 ** (math.floor(math.log10(min(positive))) - 1) if positive else 1e-6


def _dots(runs: tuple[Run, ...]) -> list[Dot]:
    floor, front = floor_of([run.accuracy.kl_mean for run in runs]), pareto_front(runs)
    return [Dot(run, run.bytes_per_token, run.accuracy.kl_mean or floor, run in front) for run in runs]


def _scale_axes(axes: Any, dots: list[Dot]) -> None:
    """Logarithmic axes; ticks where the ratio to bfloat16 is round, and at every decade and the floor."""
    small, large = min(dot.x for dot in dots), max(dot.x for dot in dots)
    bf16 = dots[0].x * dots[0].run.ratio
    floor, top = floor_of([dot.run.accuracy.kl_mean for dot in dots]), max(dot.y for dot in dots)
    axes.set(xscale="log", yscale="log", xlim=(small / 1.12, large * 1.3), ylim=(floor / 2, top * 3))
    axes.set_xticks(ticks := [bf16 / ratio for ratio in RATIOS if small / 1.1 <= bf16 / ratio <= large * 1.1])
    axes.set_xticklabels([f"{tick:,.0f}\n{_beside_bf16(bf16 / tick)}" for tick in ticks])
    decades = range(round(math.log10(floor)) + 1, math.ceil(math.log10(top * 3)))
    axes.set_yticks([floor, *(10.0**decade for decade in decades)])
    axes.set_yticklabels(["exact: 0", *(f"$10^{{{decade}}}$" for decade in decades)])
    axes.minorticks_off()
    axes.axhline(floor, color=REST, lw=0.8, ls=":")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("bytes per token in the cache, all layers, scales included (against bfloat16)")
    axes.set_ylabel("mean KL to the float32 cache (nats per token)")


def _beside_bf16(ratio: float) -> str:
    if ratio == 1:
        return "as bfloat16"
    return f"{ratio:g}{TIMES} smaller" if ratio > 1 else f"{1 / ratio:g}{TIMES} larger"


def _draw_front(axes: Any, dots: list[Dot]) -> None:
    front = sorted((dot for dot in dots if dot.on_front), key=lambda dot: dot.x)
    steps = [dot.x for dot in front], [dot.y for dot in front]
    axes.step(*steps, where="post", color=FRONT, lw=1.5, label=FRONT_LABEL)
    axes.legend(loc="upper right", frameon=False)


def _label(axes: Any, dots: list[Dot]) -> None:
    """Names in columns right of the dots, moved apart where they would touch, with a line to the dot."""
    scale = 72 / axes.figure.dpi  # pixels to points
    place = {id(dot): axes.transData.transform((dot.x, dot.y)) * scale for dot in dots}
    for column in _columns(sorted(dots, key=lambda dot: dot.x), lambda dot: place[id(dot)][0]):
        column.sort(key=lambda dot: (round(place[id(dot)][1] / 9), -dot.x))  # so that lines do not cross
        left = max(place[id(dot)][0] for dot in column) + 16
        heights = spread_apart([place[id(dot)][1] for dot in column], 9 * LINE)
        for dot, height in zip(column, heights, strict=True):
            x, y = place[id(dot)]
            axes.annotate(
                dot.run.format, (dot.x, dot.y), (left - x, height - y), textcoords="offset points",
                fontsize=9, fontweight="bold" if dot.on_front else "normal", va="center",
                arrowprops={"arrowstyle": "-", "lw": 0.6, "color": REST, "shrinkB": 4, "relpos": (0, 0.5)},
                bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.85},
            )  # fmt: skip


def _columns(dots: list[Dot], x: Any) -> list[list[Dot]]:
    """Dots, ascending in x, cut where the next one is further than :data:`COLUMN`."""
    far = [i for i in range(1, len(dots)) if x(dots[i]) - x(dots[i - 1]) > COLUMN]
    return [dots[start:stop] for start, stop in itertools.pairwise([0, *far, len(dots)])]


def spread_apart(places: Sequence[float], gap: float) -> list[float]:
    """``places``, about ascending, moved as little as keeps them ``gap`` apart: groups about their mean."""
    groups: list[tuple[float, int]] = []  # mean place, members
    for place in places:
        group = (place, 1)
        while groups and group[0] - groups[-1][0] < gap * (group[1] + groups[-1][1]) / 2:
            (mean, count), (last, size) = groups.pop(), group
            group = (mean * count + last * size) / (count + size), count + size
        groups.append(group)
    return [mean + gap * (i - (count - 1) / 2) for mean, count in groups for i in range(count)]
