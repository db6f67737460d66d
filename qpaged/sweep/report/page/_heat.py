"""Heat maps: a number for every layer, colored by its logarithm, and what is found at depths of a text."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qpaged.sweep._numbers import PLUS_MINUS, small
from qpaged.sweep.results import Results, RunRecord


@dataclass(frozen=True)
class HeatCell:
    """One number of a map.

    Attributes:
        text: the number.
        heat: the strength of its color in percent.
        long: the number with its standard error; empty if that is unknown.
        chosen: True if the cell is framed.
    """

    text: str
    heat: int
    long: str
    chosen: bool = False


@dataclass(frozen=True)
class HeatMap:
    """Rows of cells.

    Attributes:
        corner: what columns are.
        columns: their names.
    """

    id: str
    label: str
    meaning: str
    corner: str
    columns: Sequence[str]
    rows: list[tuple[str, list[HeatCell]]]
    least: str
    most: str


@dataclass(frozen=True)
class Row:
    """The numbers of a map's row: one for each layer, with standard errors where they are known."""

    name: str
    values: Sequence[float]
    errors: Sequence[float | None] | None = None


def _percent(value: float) -> str:
    """Return a relative error in percent, with two digits."""
    value *= 100
    if not value:
        return "0"
    if value >= 9.95:
        return f"{value:.0f}"
    if value >= 0.995:
        return f"{value:.1f}"
    return f"{value:.2f}"


def _short(value: float) -> str:
    """Return a KL in as few characters as possible."""
    if value >= 1e-3 or not value:
        return small(value)
    return f"{value:.0e}".replace("e-0", "e-")


ERROR_MEANING = (
    "Relative error of a layer's attention output, in percent, when only that layer's {} quantized"
)
KL_MEANING = "KL of a layer's attention weights, in nats, when only that layer is quantized"

# (name of the field, without _by_layer; label; meaning; number format)
LAYER_METRICS = (
    ("attention_error", "error, keys and values", ERROR_MEANING.format("keys and values are"), _percent),
    ("attention_error_keys", "error, keys alone", ERROR_MEANING.format("keys are"), _percent),
    ("attention_error_values", "error, values alone", ERROR_MEANING.format("values are"), _percent),
    ("attention_kl", "attention KL", KL_MEANING, _short),
)


def layer_fields() -> list[str]:
    """Return the fields of a run that the maps read."""
    fields = []
    for field, *_ in LAYER_METRICS:
        fields += [f"{field}_by_layer", f"{field}_by_layer_se"]
    return fields


def layer_maps(runs: Sequence[RunRecord]) -> list[HeatMap]:
    """Return a map for each metric that the results have by layer, without the reference, which is exact."""
    maps = []
    for field, label, meaning, number in LAYER_METRICS:
        rows = []
        for run in runs[1:]:
            values = run[f"{field}_by_layer"]
            if values:
                rows.append(Row(run["format"], values, run[f"{field}_by_layer_se"] or None))
        if rows:
            maps.append(_map(field.replace("_", "-"), label, meaning, rows, number))
    return maps


def sensitivity_maps(tune: Results) -> list[HeatMap]:
    """Return maps of each candidate's cost in one layer's keys, and values; the chosen ones are framed."""
    maps = []
    for side, part in enumerate(("keys", "values")):
        layers = tune["sensitivity"][part]
        rows = [Row(name, [layer[i] for layer in layers]) for i, name in enumerate(tune["candidates"])]
        meaning = f"Mean KL, in nats, when one layer's {part} alone have this format; framed: the chosen one"
        chosen = [layer[side] for layer in tune["layers"]]
        maps.append(_map(f"sensitivity-{part}", part, meaning, rows, _short, chosen))
    return maps


def position_map(runs: Sequence[RunRecord], context: int) -> HeatMap | None:
    """Return the KL of each format by the positions of tokens; None if no run has it."""
    rows = [
        Row(run["format"], run["kl_by_position"], run["kl_by_position_se"])
        for run in runs[1:]
        if run.get("kl_by_position")
    ]
    if not rows:
        return None
    parts = np.array_split(np.arange(context), len(rows[0].values))
    columns = [f"{part[0]:,} to {part[-1]:,}" for part in parts]
    meaning = "Mean KL, in nats, of the tokens at these positions of a sequence"
    by_layer = _map("positions", "positions", meaning, rows, _short)
    return dataclasses.replace(by_layer, corner="tokens", columns=columns)


def needle_map(runs: Sequence[RunRecord]) -> HeatMap | None:
    """Return what each format finds of hidden numbers, the reference first; None if none were hidden."""
    asked = [run for run in runs if run.get("needles")]
    if not asked:
        return None
    columns, rows = [], []
    for score in asked[0]["needles"]:
        last = len(score["by_depth"]) - 1
        columns += [f"{score['length']:,}: {100 * depth // last} %" for depth in range(last + 1)]
    for run in asked:
        shares = [share for score in run["needles"] for share in score["by_depth"]]
        rows.append(
            (
                run["format"],
                [HeatCell(f"{100 * share:.0f}", round(100 * (1 - share)), "") for share in shares],
            )
        )
    meaning = "Found, in percent, by the tokens of the text, and by how much of it stands before the number"
    return HeatMap("needles", "needles", meaning, "tokens: depth", columns, rows, "all", "none")


def _map(
    map_id: str,
    label: str,
    meaning: str,
    rows: Sequence[Row],
    number: Callable[[float], str],
    chosen: Sequence[str] | None = None,
) -> HeatMap:
    """Return a map; ``chosen`` names the row of each layer's framed cell."""
    values = [value for row in rows for value in row.values]
    least = min((value for value in values if value > 0), default=1.0)
    most = max(values) or 1.0

    def cell(row: Row, layer: int) -> HeatCell:
        value = row.values[layer]
        long = ""
        if row.errors is not None:
            error = row.errors[layer]
            if error:
                long = f"{number(value)} {PLUS_MINUS} {number(error)}"
        is_chosen = chosen is not None and chosen[layer] == row.name
        return HeatCell(number(value), _heat(value, least, most), long, is_chosen)

    cells = [(row.name, [cell(row, layer) for layer in range(len(row.values))]) for row in rows]
    layers = [str(layer) for layer in range(len(rows[0].values))]
    return HeatMap(map_id, label, meaning, "layer", layers, cells, number(least), number(most))


def _heat(value: float, least: float, most: float) -> int:
    """Return the strength of a value's color in percent, by its logarithm."""
    if value <= 0:
        return 0
    span = math.log(most / least) or 1.0
    return round(100 * math.log(value / least) / span)
