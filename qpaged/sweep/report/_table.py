"""The table of a sweep, for a terminal or a pipe."""

import os
from typing import Any

from qpaged.sweep._extras import need
from qpaged.sweep._number import PLUS_MINUS
from qpaged.sweep._reading import Run, pareto_front, title
from qpaged.sweep._verdict import verdict

ROOMY = 90  # columns that have room for two spaces between columns
WIDE = 118  # columns that have room for all that the table has to say
NARROWEST = 72  # columns below which there is room for the least only
PIPE_WIDTH = 132  # columns where nothing says how many there are

COLUMNS = {
    "format": "format",
    "bytes": "bytes/\ntoken",
    "ratio": "ratio",
    "perplexity": "perplexity\nratio - 1",
    "kl": "KL\nmean",
    "tail": "KL\n99.9 %",
    "same": "same\ntop-1",
    "attention": "attn\nerror",
    "greedy": "greedy\ntokens",
    "change": "RMS\n\N{GREEK CAPITAL LETTER DELTA}p",
    "step": "ms/\nstep",
}
NARROW = tuple(COLUMNS)[:9]
LEAST = ("format", "ratio", "kl", "same")

LEGEND = (
    "KL in nats a token, to {plain} ({reference}). ratio: bfloat16 bytes over these. attn error: worst "
    "layer, relative. greedy: tokens until a continuation differs, of {generated}. "
    "* Pareto front: none is both smaller and closer."
)
BARS = f" {PLUS_MINUS} standard errors over sequences."


def print_table(results: dict[str, Any], console: Any = None) -> None:
    """One row per format, in the order they were asked for; and below them the verdict.

    Args:
        results: results.json.
    """
    console, runs, escape = console or _console(), results["runs"], need("rich.markup").escape
    wide = console.width >= WIDE
    table = need("rich.table").Table(
        title=escape(title(results)),
        caption=LEGEND.format(
            plain=escape(runs[0]["format"]),
            reference=results["reference"],
            generated=results["settings"]["generated"],
        )
        + (BARS if wide else ""),
        box=need("rich.box").SIMPLE_HEAD,
        padding=(0, 1 if console.width >= ROOMY else 0, 0, 0),
        caption_justify="left",
        title_justify="left",
    )
    shown = tuple(COLUMNS) if wide else NARROW if console.width >= NARROWEST else LEAST
    table.add_column(COLUMNS[shown[0]], overflow="fold", vertical="bottom")
    for name in shown[1:]:
        table.add_column(COLUMNS[name], justify="right", no_wrap=True)
    front = pareto_front(runs)
    for run in runs:
        cells = _cells(run, run in front, wide)
        table.add_row(*(cells[name] for name in shown), style="bold" if run in front else None)
    console.print(table, highlight=False)
    console.print(f"{verdict(results)}\n", highlight=False, markup=False)


def _cells(run: Run, on_front: bool, bars: bool) -> dict[str, str]:
    exact, worst, step = run["kl_max"] == 0, run["attention_error"], run["decode_seconds_per_step"]
    return {
        "format": need("rich.markup").escape(run["format"]) + (" *" if on_front else ""),
        "bytes": f"{run['bytes_per_token']:,.0f}",
        "ratio": f"{run['ratio']:.2f}",
        "perplexity": "0"
        if exact
        else _estimate(run["perplexity_ratio"] - 1, run["perplexity_ratio_se"], bars, "+"),
        "kl": "0" if exact else _estimate(run["kl_mean"], run["kl_mean_se"], bars),
        "tail": "0" if exact else f"{run['kl_p999']:.1e}",
        "same": f"{run['same_top']:.2%}",
        "attention": "" if worst is None else f"{worst:.1%}",
        "greedy": f"{run['greedy_first_difference']:.1f}",
        "change": "0" if exact else f"{run['probability_change_rms']:.1e}",
        "step": "" if step is None else f"{1e3 * step:.1f}",
    }


def _estimate(value: float, error: float | None, bars: bool, sign: str = "") -> str:
    """``1.2e-04 ±3e-06``."""
    return f"{value:{sign}.1e}" + (f" {PLUS_MINUS}{error:.0e}" if bars and error is not None else "")


def _console() -> Any:
    """Standard output: as wide as the terminal, or wide enough where there is none."""
    console = need("rich.console").Console()
    if not console.is_terminal and not os.environ.get("COLUMNS"):
        console.width = PIPE_WIDTH
    return console
