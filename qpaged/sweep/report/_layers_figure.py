"""The figure of attention's error by layer: a heat map with a row for each format."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qpaged.sweep._extras import need
from qpaged.sweep.report.palette import HEAT_MAP
from qpaged.sweep.results import Results, closest_first, log_floor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

FIELDS = ("format", "bytes_per_token", "kl_mean", "attention_error_by_layer")
FONT_SIZE = 9  # points
MAX_NUMBERED = 24  # layers for which each cell has room for a number


def layers_figure(results: Results) -> "Figure":
    """Draw the error of each layer's attention by itself, a row for each format, the closest first."""
    runs = [run for run in closest_first(results["runs"])[1:] if run["attention_error_by_layer"]]
    errors = [run["attention_error_by_layer"] for run in runs]
    layers = len(errors[0])
    floor = log_floor(error for row in errors for error in row)
    # A logarithmic color scale has no place for 0: exact layers take the color of the floor.
    positive = [[max(error, floor) for error in row] for row in errors]
    width = 3 + max(3.5, 0.45 * min(layers, MAX_NUMBERED))
    height = 1.2 + 0.24 * len(runs)
    figure = need("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    scale = need("matplotlib.colors").LogNorm()
    image = axes.imshow(positive, HEAT_MAP, aspect="auto", norm=scale)
    axes.set_xlabel("layer")
    axes.set_xticks(range(0, layers, math.ceil(layers / MAX_NUMBERED)))
    axes.set_yticks(range(len(runs)), [run["format"] for run in runs], fontsize=FONT_SIZE, parse_math=False)
    axes.set_title(f"relative error of attention\n{results['model']['name']}", fontsize=10, parse_math=False)
    if layers <= MAX_NUMBERED:
        _write_numbers(axes, errors, scale)
    figure.colorbar(image, ax=axes, shrink=min(1.0, 3 / height), format=_percent_label)
    return figure


def _percent_label(value: float, position: int | None = None) -> str:
    return f"{100 * value:g} %"


def _write_numbers(axes: "Axes", errors: Sequence[Sequence[float]], scale: "Normalize") -> None:
    """Write each error in percent into its cell, in white on dark cells."""
    for row, layers in enumerate(errors):
        for layer, error in enumerate(layers):
            is_dark = error > 0 and scale(error) > 0.6
            axes.text(
                layer, row, f"{100 * error:.2g}", ha="center", va="center", fontsize=7,
                color="white" if is_dark else "black",
            )  # fmt: skip
