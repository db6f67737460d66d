"""The chart of mean KL over bytes per token."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qpaged.sweep._figure import MOST_NAMES, RATIOS, TIMES, beside_bf16, steps
from qpaged.sweep._labels import Box, around, place_names
from qpaged.sweep._reading import SURE, Run, floor_of, pareto_front
from qpaged.sweep._report._axis import LogAxis, Size, Tick, power_ticks

SIZES = (Size("wide", 1120, 560), Size("narrow", 358, 440, left=58, right=8))
NAME_SIZE = 12.5  # pixels
WIDE = 0.602 * NAME_SIZE  # a character of a name, set in a monospaced face
RADIUS = 5
ROOM = {"wide": 1.8, "narrow": 1.3}  # for names left of the smallest, as a factor of its bytes
FAR = 9  # pixels that a name is moved before a line leads from it to its dot


@dataclass(frozen=True)
class Dot:
    """A format in the chart.

    Attributes:
        row: of the format in the table.
        bar: the y of two standard errors more and less; None where there are none.
        name: (x, y, anchor) of the format's name; None where it is not named.
        leader: the path from the name to a dot it had to be moved away from.
    """

    run: Run
    row: int
    x: float
    y: float
    on_front: bool
    bar: tuple[float, float] | None
    name: tuple[float, float, str] | None = None
    leader: str = ""


@dataclass(frozen=True)
class Frontier:
    """The chart at one size; dots ascend in bytes."""

    size: Size
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    floor: float
    front: str
    dots: list[Dot]


def frontier_chart(runs: Sequence[Run], size: Size) -> Frontier:
    """``runs`` in the order of the table; the first is the reference."""
    x, y, floor = *_axes(runs, size), floor_of(run["kl_mean"] for run in runs)
    on_front = pareto_front(runs)
    dots = [_dot(run, row, x, y, floor, run in on_front) for row, run in enumerate(runs)]
    dots.sort(key=lambda dot: (dot.x, -dot.y))
    front = [(dot.x, dot.y) for dot in dots if dot.on_front]
    ticks = _x_ticks(runs[0], x, size), _y_ticks(y, floor)
    return Frontier(size, *ticks, y(floor), _path(front), _named(dots, front, size))


def _axes(runs: Sequence[Run], size: Size) -> tuple[LogAxis, LogAxis]:
    small, large = (f(run["bytes_per_token"] for run in runs) for f in (min, max))
    top, floor = max(run["kl_mean"] for run in runs), floor_of(run["kl_mean"] for run in runs)
    x = LogAxis(small / ROOM[size.name], large * 1.25, size.left, size.x_end)
    return x, LogAxis(floor / 2, max(top, 10 * floor) * 3, size.y_end, size.top)


def _dot(run: Run, row: int, x: LogAxis, y: LogAxis, floor: float, on_front: bool) -> Dot:
    mean, error = run["kl_mean"], SURE * (run["kl_mean_se"] or 0.0)
    bar = (y(max(mean - error, floor)), y(mean + error)) if error else None
    return Dot(run, row, x(run["bytes_per_token"]), y(mean or floor), on_front, bar)


def _x_ticks(reference: Run, x: LogAxis, size: Size) -> list[Tick]:
    """Sizes whose ratio to bfloat16 is round; the words have room on a wide chart only."""
    bf16 = reference["bytes_per_token"] * reference["ratio"]
    inside = [ratio for ratio in RATIOS if x.low < bf16 / ratio < x.high]
    below = beside_bf16 if size.name == "wide" else (lambda ratio: f"{ratio:g}{TIMES}")
    return [Tick(x(bf16 / ratio), f"{bf16 / ratio:,.0f}", below=below(ratio)) for ratio in inside]


def _y_ticks(y: LogAxis, floor: float) -> list[Tick]:
    lowest = round(math.log10(floor))
    return [Tick(y(floor), "exact"), *power_ticks(y, [power for power in y.decades() if power > lowest])]


def _path(front: Sequence[tuple[float, float]]) -> str:
    """Level to the next dot's size, then down to its KL."""
    (x, y), *rest = front
    return f"M{x:g} {y:g}" + "".join(f"H{x:g}V{y:g}" for x, y in rest)


def _named(dots: list[Dot], front: Sequence[tuple[float, float]], size: Size) -> list[Dot]:
    asked = [dot for dot in dots if dot.on_front or len(dots) <= MOST_NAMES]
    obstacles = [*(around(dot.x, dot.y, RADIUS + 1) for dot in dots), *steps(front)]
    frame = Box(size.left + 4, size.top, size.x_end, size.y_end - 2)
    sizes = [(dot.x, dot.y, WIDE * len(dot.run["format"]) + 2, dot.on_front) for dot in asked]
    places = place_names(sizes, obstacles, frame, 1.25 * NAME_SIZE)
    boxes = {dot.row: box for dot, box in zip(asked, places, strict=True) if box is not None}
    return [_with_name(dot, boxes[dot.row]) if dot.row in boxes else dot for dot in dots]


def _with_name(dot: Dot, box: Box) -> Dot:
    middle = (box.top + box.bottom) / 2
    side, anchor, edge = (box.right, "end", box.top) if dot.on_front else (box.left, "start", box.bottom)
    near = min(max(dot.x, box.left), box.right)
    leader = f"M{near:.1f} {edge:.1f}L{dot.x:g} {dot.y:g}" if abs(middle - dot.y) > FAR else ""
    return replace(dot, name=(round(side, 1), round(middle, 1), anchor), leader=leader)
