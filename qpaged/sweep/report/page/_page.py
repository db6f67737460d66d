"""Renders ``report.html`` from ``results.json`` alone."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpaged._files import write_whole
from qpaged.sweep._extras import need
from qpaged.sweep._numbers import PLUS_MINUS, small
from qpaged.sweep.measure import METRICS, Metric
from qpaged.sweep.report import _verdict
from qpaged.sweep.report._table import TASK_COLUMNS, task_cells
from qpaged.sweep.report.page import _distribution, _frontier
from qpaged.sweep.report.page._heat import (
    layer_fields,
    layer_maps,
    needle_map,
    position_map,
    sensitivity_maps,
)
from qpaged.sweep.report.palette import DARK, LIGHT, css_variables
from qpaged.sweep.results import (
    BROKEN,
    CONFIDENT_ERRORS,
    Results,
    RunRecord,
    check,
    closest_first,
    noise_floor,
    pareto_front,
)

if TYPE_CHECKING:
    from markupsafe import Markup

DIRECTORY = Path(__file__).parent
COLUMNS = [metric for metric in METRICS if metric.label]
RUN_FIELDS = (
    *_verdict.FIELDS,
    *layer_fields(),
    "key", "value", "dtype", "kl_median", "kl_p99", "kl_max", "kl_histogram", "tokens",
)  # fmt: skip
"""Fields that results must have; any other metric may be missing, as in results from before it existed."""

UNKNOWN = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """A number of the table: its value for sorting, its text, and the text of its standard error."""

    value: float | None
    text: str
    error: str = ""


def write_report(results: Results, directory: Path) -> Path:
    """Write ``report.html``: verdict, Pareto front, table, layers, distribution, tuning, and conditions.

    The page is one file that needs no network. It reads and prints without JavaScript, which adds cards,
    sorting and the choice of curves.

    Raises:
        ValueError: results of another version, or without some of its fields.
        MissingExtraError: jinja2 is not installed.
    """
    check(results, RUN_FIELDS)
    path = directory / "report.html"
    write_whole(path, _render(results))
    return path


def _render(results: Results) -> str:
    jinja2 = need("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(DIRECTORY),
        autoescape=True,  # Names of models, formats and texts are the user's.
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"small": small, "breakable": _breakable, "meaning": _meaning}
    runs = closest_first(results["runs"])
    choices = _distribution.choices(runs)
    distributions = []
    if choices:
        chosen_runs = [choice.run for choice in choices]
        distributions = [_distribution.distribution_chart(chosen_runs, size) for size in _distribution.SIZES]
    return environment.get_template("report.html").render(
        results=results,
        runs=runs,
        sentences=_verdict.sentences(results),
        front=pareto_front(runs),
        columns=COLUMNS,
        cell=_cell,
        sure=CONFIDENT_ERRORS,
        broken=BROKEN,
        noise=noise_floor(runs[0]),
        frontiers=[_frontier.frontier_chart(runs, size) for size in _frontier.SIZES],
        task_columns=TASK_COLUMNS,
        task_cells=task_cells,
        positions=position_map(runs, results["settings"]["context"]),
        needles=needle_map(runs),
        layer_maps=layer_maps(runs),
        choices=choices,
        distributions=distributions,
        tune=_tune(results),
        light=css_variables(LIGHT),
        dark=css_variables(DARK),
        css=(DIRECTORY / "report.css").read_text(encoding="utf-8"),
        js=(DIRECTORY / "report.js").read_text(encoding="utf-8"),
    )


def _cell(metric: Metric, run: RunRecord) -> Cell:
    """Return a metric of a run as a cell of the table."""
    value = run.get(metric.key)
    if value is None:
        return Cell(None, UNKNOWN)
    error = run[f"{metric.key}_se"] if metric.has_error else None
    text, _, error_text = metric.number(value, error or None).partition(f" {PLUS_MINUS} ")
    return Cell(value, text, error_text)


def _meaning(metric: Metric) -> str:
    """Return a metric's meaning, and which values are better."""
    return f"{metric.meaning}; {metric.better} is better"


def _breakable(spelling: str) -> "Markup":
    """Escape a spelling, and mark where a line may break."""
    return need("markupsafe").Markup("<wbr>").join(re.split(r"(?<=[:+/])", spelling))


def _tune(results: Results) -> dict[str, Any] | None:
    """Return what the template shows of the choice by layer; None if nothing was tuned."""
    tune = results.get("tune")
    if not tune:
        return None
    runs = {run["format"]: run for run in results["runs"]}
    compared = [runs[name] for name in (tune["choice"], tune["best_uniform"]) if name in runs]
    parts = {
        "keys": _layers_by_format([key for key, _ in tune["layers"]]),
        "values": _layers_by_format([value for _, value in tune["layers"]]),
    }
    return {**tune, "maps": sensitivity_maps(tune), "compared": compared, "parts": parts}


def _layers_by_format(formats: Sequence[str]) -> dict[str, str]:
    """Return the layers of each format, with consecutive layers joined, such as {'int8': '0-2, 5'}."""
    spans: dict[str, list[str]] = {}
    first = 0
    for name, group in itertools.groupby(formats):
        last = first + len(list(group)) - 1
        span = f"{first}" if first == last else f"{first}\N{EN DASH}{last}"
        spans.setdefault(name, []).append(span)
        first = last + 1
    return {name: ", ".join(parts) for name, parts in spans.items()}
