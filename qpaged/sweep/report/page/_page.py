"""report.html, from results.json alone."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qpaged.sweep._extras import need
from qpaged.sweep._number import small
from qpaged.sweep._reading import SURE, Run, check, closest_first, pareto_front
from qpaged.sweep._report import _distribution, _frontier
from qpaged.sweep._report._columns import COLUMNS
from qpaged.sweep._report._heat import METRICS, layer_maps, sensitivity_maps
from qpaged.sweep._verdict import FIELDS, sentences

DIRECTORY = Path(__file__).parent
RUN_FIELDS = (
    *FIELDS,
    *(column.field for column in COLUMNS),
    *(f"{metric[0]}_by_layer{suffix}" for metric in METRICS for suffix in ("", "_se")),
    "key", "value", "dtype", "kl_histogram", "tokens",
)  # fmt: skip


def write_report(results: dict[str, Any], directory: Path) -> Path:
    """Write ``report.html``: verdict, Pareto front, table, layers, distribution, tuning, how it was measured.

    One file that needs no network; it reads and prints without JavaScript, which adds cards, sorting and the
    choice of curves.

    Args:
        results: results.json.

    Raises:
        ValueError: results of another version, or without some of its fields.
        MissingExtraError: jinja2 is not installed.
    """
    check(results, RUN_FIELDS)
    path = directory / "report.html"
    path.write_text(_render(results), encoding="utf-8")
    return path


def _render(results: dict[str, Any]) -> str:
    jinja2 = need("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(DIRECTORY),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"small": small, "breakable": _breakable}
    runs = closest_first(results["runs"])
    picked = _distribution.choices(runs)
    return environment.get_template("report.html").render(
        results=results,
        runs=runs,
        sentences=sentences(results),
        front=pareto_front(runs),
        columns=COLUMNS,
        sure=SURE,
        frontiers=[_frontier.frontier_chart(runs, size) for size in _frontier.SIZES],
        layer_maps=layer_maps(runs),
        choices=picked,
        distributions=_distributions([choice.run for choice in picked]),
        tune=_tune(results),
        css=(DIRECTORY / "report.css").read_text(encoding="utf-8"),
        js=(DIRECTORY / "report.js").read_text(encoding="utf-8"),
    )


def _breakable(spelling: str) -> Any:
    """Escaped, with places where a line may break."""
    return need("markupsafe").Markup("<wbr>").join(re.split(r"(?<=[:+/])", spelling))


def _distributions(runs: Sequence[Run]) -> list[_distribution.Chart]:
    return [_distribution.distribution_chart(runs, size) for size in _distribution.SIZES] if runs else []


def _tune(results: dict[str, Any]) -> dict[str, Any] | None:
    """What the template says of the choice by layer; None where nothing was tuned."""
    tune = results.get("tune")
    if not tune:
        return None
    named = {run["format"]: run for run in results["runs"]}
    keys, values = zip(*tune["layers"], strict=True)
    return tune | {
        "maps": sensitivity_maps(tune),
        "compared": [named[name] for name in (tune["choice"], tune["best_uniform"]) if name in named],
        "parts": {"keys": _layers_by_format(keys), "values": _layers_by_format(values)},
    }


def _layers_by_format(formats: Sequence[str]) -> dict[str, str]:
    """{'int8': '0-2, 5'}: the layers of each format, runs of them joined."""
    layers: dict[str, list[str]] = {}
    first = 0
    for name, group in itertools.groupby(formats):
        last = first + len(list(group)) - 1
        layers.setdefault(name, []).append(f"{first}" if first == last else f"{first}\N{EN DASH}{last}")
        first = last + 1
    return {name: ", ".join(spans) for name, spans in layers.items()}
