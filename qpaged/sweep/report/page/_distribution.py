"""The chart of how many tokens have a KL above each value."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from qpaged.sweep._reading import Run, pareto_front
from qpaged.sweep._report._axis import LogAxis, Size, Tick, power_ticks

SIZES = (Size("wide", 1120, 420, bottom=70), Size("narrow", 358, 380, left=62, right=8, bottom=70))
SHOWN = 5  # curves at first
MOSTLY = 0.98  # of the tokens: the axis begins where any format has so many of them above
GAP = 17.0  # pixels between the numbers of two curves
COLORS, DASHES = 6, 4  # report.css has so many


@dataclass(frozen=True)
class Curve:
    """The share of tokens whose KL is at least x, at one size; its number stands at (x, y)."""

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
    """A format that can be shown: its number, and whether it is at first."""

    run: Run
    number: int
    shown: bool

    @property
    def style(self) -> str:
        """Classes of its color and its dashes."""
        return f"c{(self.number - 1) % COLORS} d{(self.number - 1) % DASHES}"


def choices(runs: Sequence[Run]) -> list[Choice]:
    """The front's formats, largest first; :data:`SHOWN` of them, evenly spaced, are shown at first."""
    front = [run for run in pareto_front(runs)[::-1] if run["kl_max"] > 0]
    last = len(front) - 1
    shown = {round(i * last / (SHOWN - 1)) for i in range(SHOWN)}
    return [Choice(run, number, number - 1 in shown) for number, run in enumerate(front, 1)]


def distribution_chart(runs: Sequence[Run], size: Size) -> Chart:
    """Of the formats of :func:`choices`, in their order."""
    shares = [_shares(run) for run in runs]
    least = min(1 / run["tokens"] for run in runs)
    low = min(max((kl for kl, share in curve if share >= MOSTLY), default=curve[0][0]) for curve in shares)
    x = LogAxis(low, max(run["kl_max"] for run in runs) * 1.6, size.left, size.x_end)
    y = LogAxis(least, 1.0, size.y_end, size.top)
    ends = _spread([x(run["kl_max"]) for run in runs], size)
    curves = [
        Curve(_path(curve, x, y), x(run["kl_max"]), y(1 / run["tokens"]), end)
        for run, curve, end in zip(runs, shares, ends, strict=True)
    ]
    ticks = [Tick(y(10.0**power), f"{100 * 10.0**power:g} %") for power in y.decades()]
    return Chart(size, power_ticks(x, x.decades()), ticks, curves)


def _shares(run: Run) -> list[tuple[float, float]]:
    """(KL, share of the tokens with at least that), down to the one token with the most."""
    histogram, tokens = run["kl_histogram"], run["tokens"]
    edges, counts = histogram["log10_edges"], histogram["counts"]
    above = list(itertools.accumulate(reversed(counts)))[::-1]
    points = [(10.0**edge, count / tokens) for edge, count in zip(edges, above, strict=False) if count]
    inside = [point for point in points if point[0] < run["kl_max"]]
    return [*inside, (run["kl_max"], 1 / tokens)]


def _path(points: Sequence[tuple[float, float]], x: LogAxis, y: LogAxis) -> str:
    visible = [point for point in points if point[0] >= x.low]
    return "M" + "L".join(f"{x(kl):.0f} {y(share):.0f}" for kl, share in visible)


def _spread(places: Sequence[float], size: Size) -> list[float]:
    """Where the numbers stand: in the order of the curves' ends, :data:`GAP` apart, inside the chart."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    found, limit = list(places), float(size.left)
    for i in order:
        found[i] = max(places[i], limit)
        limit = found[i] + GAP
    limit = size.x_end - GAP / 2
    for i in reversed(order):
        found[i] = min(found[i], limit)
        limit = found[i] - GAP
    return [round(place, 1) for place in found]
