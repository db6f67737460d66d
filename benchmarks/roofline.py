"""Draws the times of ``cpu_attention.py`` beside the limit that memory bandwidth sets.

    python benchmarks/roofline.py

A bar is the time of a decode step. The mark on it is the time in which memory delivers the step's bytes, at
the bandwidth of the same run: a step that is bound by memory alone ends at its mark.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qpaged.sweep.report.palette import ACCENT

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu_attention.json"
PICTURE = ROOT / "docs" / "assets" / "roofline_cpu.png"
SHOWN = ("8x4k", "8x4k ragged")
PEERS = "#c08a5a"
ROOF = "#111111"


def draw(results: dict[str, Any]) -> Figure:
    """Draw a panel for each of ``SHOWN``."""
    figure = Figure(figsize=(9, 10), layout="constrained")
    panels = figure.subplots(len(SHOWN), 1)
    for axes, name in zip(panels, SHOWN, strict=True):
        draw_shape(axes, name, results["shapes"][name], results["bytes_per_second"])
    return figure


def draw_shape(axes: Axes, name: str, runs: list[dict[str, Any]], bandwidth: float) -> None:
    """Draw the bars and marks of one shape, the slowest first."""
    runs = sorted(runs, key=lambda run: -run["milliseconds"])
    colours = [ACCENT if run["name"].startswith("qpaged") else PEERS for run in runs]
    bars = range(len(runs))
    axes.barh(bars, [run["milliseconds"] for run in runs], color=colours, height=0.62)
    roofs = [1e3 * run["bytes"] / bandwidth for run in runs]
    axes.scatter(roofs, bars, marker="|", s=110, color=ROOF, linewidth=1.6, zorder=3)
    axes.set_yticks(bars, [run["name"] for run in runs], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(min(roofs) / 1.3, 1.6 * runs[0]["milliseconds"])
    axes.set_title(f"{name}: milliseconds; | what memory alone would take", fontsize=10, loc="left")
    for bar, run in zip(bars, runs, strict=True):
        axes.annotate(
            f"{run['milliseconds']:.3g}", (run["milliseconds"], bar), (4, 0),
            textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    draw(json.loads(arguments.results.read_text())).savefig(arguments.picture, dpi=110)


if __name__ == "__main__":
    main()
