"""Draws the results of ``stress.py``: bits against attention KL, with the Pareto front of each case.

    python benchmarks/stress_figure.py

Where page sizes differ, a number in brackets is the page size.
"""

import argparse
import json
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qpaged.sweep.report.palette import ACCENT, MUTED

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "stress.json"
PICTURE = ROOT / "docs" / "assets" / "stress.png"
SHOWN = ("gaussian", "bias_slow", "bias_fast")
MOST_BITS = 10  # where the axis ends
LABEL_BITS = 2.4  # how much of the axis a label takes
LABEL_HEIGHT = 11  # points (1/72 inch) from one label to the next


@dataclass(frozen=True)
class Dot:
    """A format at a page size."""

    name: str
    bits: float
    kl: float


def dots_of(results: dict[str, Any], case: str) -> list[Dot]:
    """Return the dots of a case that fit the axes; page sizes with the same outcome share a dot."""
    joined: dict[tuple[str, float, float], list[dict[str, Any]]] = {}
    for run in results["runs"]:
        bits, kl = run["key_bits"], run["losses"][case]["attention_kl"]
        if kl and bits <= MOST_BITS:
            joined.setdefault((run["format"], round(bits, 1), kl), []).append(run)
    sizes = len({run["page_size"] for run in results["runs"]})
    return [
        Dot(_name(spelling, [run["page_size"] for run in runs], sizes), runs[0]["key_bits"], kl)
        for (spelling, _, kl), runs in joined.items()
    ]


def _name(spelling: str, page_sizes: list[int], sizes: int) -> str:
    if len(page_sizes) == sizes:
        return spelling
    return f"{spelling} ({', '.join(map(str, page_sizes))})"


def front_of(dots: list[Dot]) -> list[Dot]:
    """Return the Pareto front, fewest bits first: no dot of as few bits, to a tenth, has a lower KL."""
    front: list[Dot] = []
    for dot in sorted(dots, key=lambda dot: (round(dot.bits, 1), dot.kl)):
        if not front or dot.kl < front[-1].kl:
            front.append(dot)
    return front


def draw(results: dict[str, Any]) -> Figure:
    """Draw a panel for each of ``SHOWN``."""
    figure = Figure(figsize=(8, 11), layout="constrained")
    panels = figure.subplots(len(SHOWN), sharex=True)
    cases = [dots_of(results, case) for case in SHOWN]
    for axes, case, dots in zip(panels, SHOWN, cases, strict=True):
        draw_case(axes, dots)
        title = f"{case}: {results['cases'][case]['what']}"
        axes.set_title(textwrap.fill(title, 95), fontsize=10, loc="left")
    fewest = min(dot.bits for dots in cases for dot in dots)
    panels[-1].set(xlim=(fewest - LABEL_BITS, MOST_BITS + 0.2), xticks=range(int(fewest), MOST_BITS + 1))
    panels[-1].set_xlabel("bits an element of the keys, scales included (in brackets: page size)")
    figure.draw_without_rendering()  # so that labels can be placed in points
    for axes, dots in zip(panels, cases, strict=True):
        label(axes, front_of(dots))
    return figure


def draw_case(axes: Axes, dots: list[Dot]) -> None:
    """Draw the dots of a case and the steps of its front."""
    front = front_of(dots)
    bits = [dot.bits for dot in front]
    kl = [dot.kl for dot in front]
    axes.plot([dot.bits for dot in dots], [dot.kl for dot in dots], "o", color=MUTED, mfc="white", ms=5)
    axes.step(bits, kl, where="post", color=ACCENT, lw=1.5)
    axes.plot(bits, kl, "o", color=ACCENT, ms=6)
    bottom = math.floor(math.log10(front[-1].kl))
    top = math.ceil(math.log10(max(dot.kl for dot in dots)))
    axes.set(yscale="log", ylim=(10.0 ** (bottom - 0.5), 2 * 10.0**top), ylabel="attention KL (nats)")
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def label(axes: Axes, front: list[Dot]) -> None:
    """Write the names left of and below the front, where the axes are empty, each below the one before."""
    points_per_pixel = 72 / axes.figure.dpi
    bottom = math.inf  # of the label before
    line = {"arrowstyle": "-", "lw": 0.6, "color": MUTED, "shrinkA": 0, "shrinkB": 3, "relpos": (1, 0.5)}
    for dot in front:
        y = axes.transData.transform((dot.bits, dot.kl))[1] * points_per_pixel
        half = LABEL_HEIGHT * (1 + dot.name.count("\n")) / 2
        height = min(y - LABEL_HEIGHT / 2, bottom - half)
        bottom = height - half
        axes.annotate(
            dot.name, (dot.bits, dot.kl), (-10, height - y), textcoords="offset points", fontsize=8,
            ha="right", va="center", arrowprops=line,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    draw(json.loads(arguments.results.read_text())).savefig(arguments.out, dpi=150)


if __name__ == "__main__":
    main()
