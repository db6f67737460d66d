"""Heat maps: a number for every layer, colored by its logarithm."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qpaged.sweep._number import PLUS_MINUS, small
from qpaged.sweep._reading import Run


@dataclass(frozen=True)
class HeatCell:
    """Its text, the strength of its color in percent, a longer text, and whether it is marked as chosen."""

    text: str
    heat: int
    long: str
    chosen: bool = False


@dataclass(frozen=True)
class HeatMap:
    """Rows of cells, a column for each layer."""

    id: str
    label: str
    meaning: str
    rows: list[tuple[str, list[HeatCell]]]
    least: str
    most: str


def _percent(value: float) -> str:
    """A relative error in percent, of two digits."""
    value *= 100
    if not value:
        return "0"
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"


def _short(value: float) -> str:
    """A KL in the least room."""
    return small(value) if value >= 1e-3 or not value else f"{value:.0e}".replace("e-0", "e-")


ERROR = "Relative error of a layer's attention output, in percent, when only that layer's {} quantized"
METRICS = (
    ("attention_error", "error, keys and values", ERROR.format("keys and values are"), _percent),
    ("attention_error_keys", "error, keys alone", ERROR.format("keys are"), _percent),
    ("attention_error_values", "error, values alone", ERROR.format("values are"), _percent),
    (
        "attention_kl",
        "attention KL",
        "KL of a layer's attention weights, in nats, when only that layer is quantized",
        _short,
    ),
)


def layer_maps(runs: Sequence[Run]) -> list[HeatMap]:
    """A map for each metric that the layers of the model have; the reference, which is exact, is left out."""
    maps = []
    for field, label, meaning, write in METRICS:
        seen = [run for run in runs[1:] if run[f"{field}_by_layer"]]
        rows = [
            (run["format"], run[f"{field}_by_layer"], run[f"{field}_by_layer_se"] or None) for run in seen
        ]
        if rows:
            maps.append(_map(field.replace("_", "-"), label, meaning, rows, write))
    return maps


def sensitivity_maps(tune: dict[str, Any]) -> list[HeatMap]:
    """What each candidate costs in one layer's keys, and in its values; the chosen ones are marked."""
    maps = []
    for side, part in enumerate(("keys", "values")):
        layers = tune["sensitivity"][part]
        rows = [(name, [layer[i] for layer in layers], None) for i, name in enumerate(tune["candidates"])]
        meaning = f"Mean KL, in nats, when one layer's {part} alone have this format; framed: the chosen one"
        chosen = [layer[side] for layer in tune["layers"]]
        maps.append(_map(f"sensitivity-{part}", part, meaning, rows, _short, chosen))
    return maps


def _map(
    id: str,
    label: str,
    meaning: str,
    rows: Sequence[tuple[str, Sequence[float], Sequence[float] | None]],
    write: Callable[[float], str],
    chosen: Sequence[str] | None = None,
) -> HeatMap:
    values = [value for _, row, _ in rows for value in row]
    least, most = min((value for value in values if value > 0), default=1.0), max(values) or 1.0
    span = math.log(most / least) or 1.0

    def cell(name: str, layer: int, value: float, error: float | None) -> HeatCell:
        heat = round(100 * math.log(value / least) / span) if value > 0 else 0
        long = f"{write(value)} {PLUS_MINUS} {write(error)}" if error else ""
        return HeatCell(write(value), heat, long, chosen is not None and chosen[layer] == name)

    cells = [
        (name, [cell(name, i, value, errors[i] if errors else None) for i, value in enumerate(row)])
        for name, row, errors in rows
    ]
    return HeatMap(id, label, meaning, cells, write(least), write(most))
