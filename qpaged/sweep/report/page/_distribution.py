"""The chart of the share of tokens that have a KL above each value."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from qpaged.sweep.report.page._axis import LogAxis, Size, Tick, power_ticks
from qpaged.sweep.report.palette import CURVES
from qpaged.sweep.results import RunRecord, pareto_front

SIZES = (Size("wide", 1120, 420, bottom=70), Size("narrow", 358, 380, left=62, right=8, bottom=70))
FIRST_SHOWN = 5  # curves that are shown before the reader chooses
MOST_TOKENS = 0.98  # The axis begins where some format still has this share of its tokens above.
GAP = 17.0  # pixels between the numbers of two curves
DASHES = 4  # kinds of dashes in report.css


@dataclass(frozen=True)
class Curve:
    """The share of tokens whose KL is at least x, at one size.

    Attributes:
        path: of the curve, as SVG.
        x, y: the pixel where the curve ends, at the worst token.
        at: the x of the curve's number, which a line leads to.
    """

    path: str
    x: float
    y: float
    at: float


@dataclass(frozen=True)
class Chart:
    """The axes and the curves at one size."""

    size: Size
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    curves: list[Curve]


@dataclass(frozen=True)
class Choice:
    """A format that the reader can show or hide: its number, and whether it is shown at first."""

    run: RunRecord
    number: int
    shown: bool

    @property
    def style(self) -> str:
        """The CSS classes of its color and its dashes."""
        return f"c{(self.number - 1) % CURVES} d{(self.number - 1) % DASHES}"


def choices(runs: Sequence[RunRecord]) -> list[Choice]:
    """Return the formats of the Pareto front, largest first; some, evenly spaced, are shown at first."""
    front = [run for run in reversed(pareto_front(runs)) if run["kl_max"] > 0]
    last = len(front) - 1
    shown = {round(i * last / (FIRST_SHOWN - 1)) for i in range(FIRST_SHOWN)}
    return [Choice(run, number, number - 1 in shown) for number, run in enumerate(front, 1)]


def distribution_chart(runs: Sequence[RunRecord], size: Size) -> Chart:
    """Return the chart of the runs of :func:`choices`, in their order."""
    shares = [_shares(run) for run in runs]
    least_share = min(1 / run["tokens"] for run in runs)
    x = LogAxis(
        min(_axis_start(curve) for curve in shares),
        max(run["kl_max"] for run in runs) * 1.6,
        size.left,
        size.x_end,
    )
    y = LogAxis(least_share, 1.0, size.y_end, size.top)
    number_places = _spread([x(run["kl_max"]) for run in runs], size)
    curves = []
    for run, curve, at in zip(runs, shares, number_places, strict=True):
        curves.append(Curve(_path(curve, x, y), x(run["kl_max"]), y(1 / run["tokens"]), at))
    y_ticks = [Tick(y(10.0**power), f"{100 * 10.0**power:g} %") for power in y.decades()]
    return Chart(size, power_ticks(x, x.decades()), y_ticks, curves)


def _axis_start(curve: Sequence[tuple[float, float]]) -> float:
    """Return the largest KL that :data:`MOST_TOKENS` of the tokens have."""
    return max((kl for kl, share in curve if share >= MOST_TOKENS), default=curve[0][0])


def _shares(run: RunRecord) -> list[tuple[float, float]]:
    """Return (KL, share of the tokens with at least that KL), down to the single worst token."""
    histogram, tokens = run["kl_histogram"], run["tokens"]
    edges, counts = histogram["log10_edges"], histogram["counts"]
    above = list(itertools.accumulate(reversed(counts)))[::-1]
    points = []
    for edge, count in zip(edges[:-1], above, strict=True):
        if count and 10.0**edge < run["kl_max"]:
            points.append((10.0**edge, count / tokens))
    points.append((run["kl_max"], 1 / tokens))
    return points


def _path(points: Sequence[tuple[float, float]], x: LogAxis, y: LogAxis) -> str:
    """Return an SVG path through the points that the axis shows."""
    return "M" + "L".join(f"{x(kl):.0f} {y(share):.0f}" for kl, share in points if kl >= x.low)


def _spread(places: Sequence[float], size: Size) -> list[float]:
    """Move places apart until they are :data:`GAP` apart, in the same order and inside the chart."""
    order = sorted(range(len(places)), key=places.__getitem__)
    spread, limit = list(places), float(size.left)
    for i in order:
        spread[i] = max(places[i], limit)
        limit = spread[i] + GAP
    limit = size.x_end - GAP / 2
    for i in reversed(order):
        spread[i] = min(spread[i], limit)
        limit = spread[i] - GAP
    return [round(place, 1) for place in spread]
