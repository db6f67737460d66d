"""The figures of a sweep: divergence against bytes with the Pareto front, and attention's error by layer."""

import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpaged.sweep._extras import need
from qpaged.sweep._labels import Box, around, place_names
from qpaged.sweep._reading import Run, check, closest_first, floor_of, pareto_front, title

RATIOS = (16, 8, 4, 2, 1, 0.5)
FRONT, REST = "#1f4e8c", "#7a7a7a"
FRONT_LABEL = "Pareto front: none is both smaller and closer"
TIMES = "\N{MULTIPLICATION SIGN}"
MOST_NAMES = 16  # where there are more dots, those on the front are named
FONT = 9  # points
WIDE = 0.68  # of the font's size: a character of a bold name, about
MOST_NUMBERS = 24  # layers that have room for a number in each cell
FRONTIER_FIELDS = ("format", "bytes_per_token", "ratio", "kl_mean", "tokens")
LAYERS_FIELDS = ("format", "bytes_per_token", "kl_mean", "attention_error_by_layer")


@dataclass(frozen=True)
class Dot:
    """A run's place in the figure; what is exact stands on the floor."""

    run: Run
    x: float
    y: float
    on_front: bool


def write_figures(results: dict[str, Any], directory: Path) -> list[Path]:
    """Write ``frontier`` and, where the layers' errors are known, ``layers``: a PNG and an SVG of each.

    Args:
        results: results.json.

    Raises:
        ValueError: results of another version.
        MissingExtraError: matplotlib is not installed.
    """
    check(results, (*FRONTIER_FIELDS, *LAYERS_FIELDS))
    drawn = {"frontier": frontier_figure(results)}
    if any(run["attention_error_by_layer"] for run in results["runs"][1:]):
        drawn["layers"] = layers_figure(results)
    return [_save(figure, directory / name) for stem, figure in drawn.items() for name in _names(stem)]


def frontier_figure(results: dict[str, Any]) -> Any:
    """Mean KL over bytes per token, both logarithmic; KL 0 is drawn at the bottom."""
    dots = _dots(results["runs"])
    figure = need("matplotlib.figure").Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    _scale_axes(axes, dots)
    _draw_front(axes, dots)
    for dot in dots:
        color, fill = (FRONT, FRONT) if dot.on_front else (REST, "white")
        axes.plot(dot.x, dot.y, "o", color=color, mfc=fill, ms=7, zorder=3 + dot.on_front)
    axes.set_title(textwrap.fill(title(results), 90), fontsize=10, parse_math=False)
    figure.draw_without_rendering()  # so that places are known in points
    _name(axes, dots)
    return figure


def layers_figure(results: dict[str, Any]) -> Any:
    """The error of each layer's attention by itself, a row for each format, the closest first."""
    runs = [run for run in closest_first(results["runs"])[1:] if run["attention_error_by_layer"]]
    errors = [run["attention_error_by_layer"] for run in runs]
    layers, floor = len(errors[0]), floor_of(error for row in errors for error in row)
    size = 3 + max(3.5, 0.45 * min(layers, MOST_NUMBERS)), 1.2 + 0.24 * len(runs)
    figure = need("matplotlib.figure").Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    scale = need("matplotlib.colors").LogNorm()
    image = axes.imshow([[max(x, floor) for x in row] for row in errors], "Blues", aspect="auto", norm=scale)
    axes.set_xlabel("layer")
    axes.set_xticks(range(0, layers, math.ceil(layers / MOST_NUMBERS)))
    axes.set_yticks(range(len(runs)), [run["format"] for run in runs], fontsize=FONT, parse_math=False)
    axes.set_title(f"relative error of attention\n{results['model']['name']}", fontsize=10, parse_math=False)
    if layers <= MOST_NUMBERS:
        _write_numbers(axes, errors, scale)
    figure.colorbar(image, ax=axes, shrink=min(1.0, 3 / size[1]), format=lambda x, _: f"{100 * x:g} %")
    return figure


def _names(stem: str) -> list[str]:
    return [f"{stem}.png", f"{stem}.svg"]


def _save(figure: Any, path: Path) -> Path:
    """Write it, text in SVG as text, the same bytes each time."""
    with need("matplotlib").rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def _dots(runs: Sequence[Run]) -> list[Dot]:
    floor, front = floor_of(run["kl_mean"] for run in runs), pareto_front(runs)
    return [Dot(run, run["bytes_per_token"], run["kl_mean"] or floor, run in front) for run in runs]


def _scale_axes(axes: Any, dots: list[Dot]) -> None:
    """Logarithmic axes; ticks where the ratio to bfloat16 is round, and at every decade and the floor."""
    small, large = min(dot.x for dot in dots), max(dot.x for dot in dots)
    bf16 = dots[0].x * dots[0].run["ratio"]
    floor, top = floor_of(dot.run["kl_mean"] for dot in dots), max(dot.y for dot in dots)
    axes.set(xscale="log", yscale="log", xlim=(small / 2, large * 1.3), ylim=(floor / 2, top * 3))
    axes.set_xticks(ticks := [bf16 / ratio for ratio in RATIOS if small / 1.4 <= bf16 / ratio <= large * 1.1])
    axes.set_xticklabels([f"{tick:,.0f}\n{beside_bf16(bf16 / tick)}" for tick in ticks])
    decades = range(round(math.log10(floor)) + 1, math.ceil(math.log10(top * 3)))
    axes.set_yticks([floor, *(10.0**decade for decade in decades)])
    axes.set_yticklabels(["exact: 0", *(f"$10^{{{decade}}}$" for decade in decades)])
    axes.minorticks_off()
    axes.axhline(floor, color=REST, lw=0.8, ls=":")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("bytes per token in the cache, all layers, scales included (against bfloat16)")
    axes.set_ylabel("mean KL to the float32 cache (nats per token)")


def beside_bf16(ratio: float) -> str:
    """A size in words, from bfloat16 bytes over its own."""
    if ratio == 1:
        return "as bfloat16"
    return f"{ratio:g}{TIMES} smaller" if ratio > 1 else f"{1 / ratio:g}{TIMES} larger"


def _draw_front(axes: Any, dots: list[Dot]) -> None:
    front = sorted((dot for dot in dots if dot.on_front), key=lambda dot: dot.x)
    steps = [dot.x for dot in front], [dot.y for dot in front]
    axes.step(*steps, where="post", color=FRONT, lw=1.5, label=FRONT_LABEL)
    axes.legend(loc="upper right", frameon=False)


def _name(axes: Any, dots: list[Dot]) -> None:
    """Names where there is room, with a line to the dot where they are moved away from it."""
    scale = 72 / axes.figure.dpi  # pixels to points
    place = {id(dot): axes.transData.transform((dot.x, dot.y)) * (scale, -scale) for dot in dots}
    (left, bottom), (right, top) = axes.transAxes.transform([(0, 0), (1, 1)]) * (scale, -scale)
    named = sorted((dot for dot in dots if dot.on_front or len(dots) <= MOST_NAMES), key=lambda dot: dot.x)
    asked = [(*place[id(dot)], WIDE * FONT * len(dot.run["format"]), dot.on_front) for dot in named]
    obstacles = [around(x, y, 5) for x, y in place.values()]
    front = [place[id(dot)] for dot in named if dot.on_front]
    boxes = place_names(asked, [*obstacles, *steps(front)], Box(left, top, right, bottom), 1.3 * FONT)
    for dot, box in zip(named, boxes, strict=True):
        if box is not None:
            _write_name(axes, dot, box, place[id(dot)])


def _write_name(axes: Any, dot: Dot, box: Box, place: tuple[float, float]) -> None:
    x, y = place
    height, from_left = (box.top + box.bottom) / 2, (x - box.left) / (box.right - box.left)
    nearest = min(max(from_left, 0), 1), 1 if dot.on_front else 0
    line = {"arrowstyle": "-", "lw": 0.6, "color": REST, "shrinkA": 0, "shrinkB": 4, "relpos": nearest}
    axes.annotate(
        dot.run["format"], (dot.x, dot.y), ((box.right if dot.on_front else box.left) - x, y - height),
        textcoords="offset points", fontsize=FONT, fontweight="bold" if dot.on_front else "normal",
        va="center", ha="right" if dot.on_front else "left", parse_math=False,
        arrowprops=line if abs(height - y) > FONT else None,
        bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.85},
    )  # fmt: skip


def steps(front: Sequence[tuple[float, float]]) -> list[Box]:
    """The line of a front, as boxes that names keep clear of; from places ascending in x."""
    boxes = []
    for (x, y), (next_x, next_y) in itertools.pairwise(front):
        boxes += [Box(x, y - 1, next_x, y + 1), Box(next_x - 1, y, next_x + 1, next_y)]
    return boxes


def _write_numbers(axes: Any, errors: Sequence[Sequence[float]], scale: Any) -> None:
    for row, layers in enumerate(errors):
        for layer, error in enumerate(layers):
            dark = error > 0 and scale(error) > 0.6
            axes.text(
                layer, row, f"{100 * error:.2g}", ha="center", va="center", fontsize=7,
                color="white" if dark else "black",
            )  # fmt: skip
