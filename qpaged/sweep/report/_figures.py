"""Writes the figures of a sweep as PNG and SVG."""

from pathlib import Path
from typing import TYPE_CHECKING

from qpaged.sweep._extras import need
from qpaged.sweep.report import _frontier_figure, _layers_figure
from qpaged.sweep.results import Results, check

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_figures(results: Results, directory: Path) -> list[Path]:
    """Write ``frontier`` and, if the layers' errors are known, ``layers``: a PNG and an SVG of each.

    Raises:
        ValueError: results of another version.
        MissingExtraError: matplotlib is not installed.
    """
    check(results, (*_frontier_figure.FIELDS, *_layers_figure.FIELDS))
    paths = _save(_frontier_figure.frontier_figure(results), directory, "frontier")
    if any(run["attention_error_by_layer"] for run in results["runs"][1:]):
        paths += _save(_layers_figure.layers_figure(results), directory, "layers")
    return paths


def _save(figure: "Figure", directory: Path, name: str) -> list[Path]:
    """Save a figure; text in SVG stays text, and the bytes are the same each time."""
    png, svg = directory / f"{name}.png", directory / f"{name}.svg"
    with need("matplotlib").rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(png, dpi=150)
        figure.savefig(svg, dpi=150, metadata={"Date": None})
    return [png, svg]
