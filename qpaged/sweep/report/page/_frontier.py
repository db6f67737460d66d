"""The chart of mean KL over bytes per token."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qpaged.sweep._numbers import TIMES
from qpaged.sweep.report._frontier_figure import MAX_NAMED, TICK_RATIOS, bf16_words
from qpaged.sweep.report._labels import Box, box_around, boxes_of_steps, place_names
from qpaged.sweep.report.page._axis import LogAxis, Size, Tick, power_ticks
from qpaged.sweep.results import CONFIDENT_ERRORS, RunRecord, is_broken, log_floor, noise_floor, pareto_front

SIZES = (Size("wide", 1120, 560), Size("narrow", 358, 440, left=58, right=8))
NAME_SIZE = 12.5  # pixels
CHARACTER_WIDTH = 0.602 * NAME_SIZE  # of a monospaced face
RADIUS = 5
ROOM = {"wide": 1.8, "narrow": 1.3}  # for names left of the smallest format, as a factor of its bytes
FAR = 9  # pixels that a name is moved before a line leads from it to its dot


@dataclass(frozen=True)
class Dot:
    """A format in the chart.

    Attributes:
        row: the format's row in the table.
        bar: the y of two standard errors more and less; None without standard errors.
        is_broken: the model no longer says what it did.
        name: (x, y, anchor) of the format's name; None if it is not named.
        leader: the path from the name to the dot, if it had to be moved away.
    """

    run: RunRecord
    row: int
    x: float
    y: float
    on_front: bool
    bar: tuple[float, float] | None
    is_broken: bool
    name: tuple[float, float, str] | None = None
    leader: str = ""


@dataclass(frozen=True)
class Frontier:
    """The chart at one size; its dots ascend in bytes.

    Attributes:
        floor: the y of a KL of 0.
        noise: the y of the noise floor; None where it was not measured, or lies outside.
    """

    size: Size
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    floor: float
    noise: float | None
    front: str
    dots: list[Dot]


def frontier_chart(runs: Sequence[RunRecord], size: Size) -> Frontier:
    """Return the chart of runs in the order of the table; the first is the reference."""
    floor = log_floor(run["kl_mean"] for run in runs)
    x, y = _x_axis(runs, size), _y_axis(runs, size, floor)
    front_runs = pareto_front(runs)
    dots = [_dot(run, row, x, y, floor, run in front_runs) for row, run in enumerate(runs)]
    dots.sort(key=lambda dot: (dot.x, -dot.y))
    front = [(dot.x, dot.y) for dot in dots if dot.on_front]
    return Frontier(
        size=size,
        x_ticks=_x_ticks(runs[0], x, size),
        y_ticks=_y_ticks(y, floor),
        floor=y(floor),
        noise=_noise(runs[0], y),
        front=_path(front),
        dots=_named(dots, front, size),
    )


def _x_axis(runs: Sequence[RunRecord], size: Size) -> LogAxis:
    smallest = min(run["bytes_per_token"] for run in runs)
    largest = max(run["bytes_per_token"] for run in runs)
    return LogAxis(smallest / ROOM[size.name], largest * 1.25, size.left, size.x_end)


def _y_axis(runs: Sequence[RunRecord], size: Size, floor: float) -> LogAxis:
    top = max(run["kl_mean"] for run in runs)
    return LogAxis(floor / 2, max(top, 10 * floor) * 3, size.y_end, size.top)


def _dot(run: RunRecord, row: int, x: LogAxis, y: LogAxis, floor: float, on_front: bool) -> Dot:
    mean, error = run["kl_mean"], CONFIDENT_ERRORS * (run["kl_mean_se"] or 0.0)
    bar = None
    if error:
        bar = y(max(mean - error, floor)), y(mean + error)
    return Dot(run, row, x(run["bytes_per_token"]), y(mean or floor), on_front, bar, is_broken(run))


def _x_ticks(reference: RunRecord, x: LogAxis, size: Size) -> list[Tick]:
    """Return ticks at sizes whose ratio to bfloat16 is round; only a wide chart has room for words."""
    bf16_bytes = reference["bytes_per_token"] * reference["ratio"]
    ticks = []
    for ratio in TICK_RATIOS:
        size_in_bytes = bf16_bytes / ratio
        if x.low < size_in_bytes < x.high:
            words = bf16_words(ratio) if size.name == "wide" else f"{ratio:g}{TIMES}"
            ticks.append(Tick(x(size_in_bytes), f"{size_in_bytes:,.0f}", below=words))
    return ticks


def _y_ticks(y: LogAxis, floor: float) -> list[Tick]:
    lowest = round(math.log10(floor))
    return [Tick(y(floor), "exact"), *power_ticks(y, [power for power in y.decades() if power > lowest])]


def _noise(reference: RunRecord, y: LogAxis) -> float | None:
    noise = noise_floor(reference)
    if noise is None or not y.low < noise["kl_mean"] < y.high:
        return None
    return y(noise["kl_mean"])


def _path(front: Sequence[tuple[float, float]]) -> str:
    """Return a stepped path: level to the next dot's size, then down to its KL."""
    (x, y), *rest = front
    return f"M{x:g} {y:g}" + "".join(f"H{x:g}V{y:g}" for x, y in rest)


def _named(dots: list[Dot], front: Sequence[tuple[float, float]], size: Size) -> list[Dot]:
    """Return the dots, with names where there is room."""
    candidates = [dot for dot in dots if dot.on_front or len(dots) <= MAX_NAMED]
    obstacles = [box_around(dot.x, dot.y, RADIUS + 1) for dot in dots] + boxes_of_steps(front)
    frame = Box(size.left + 4, size.top, size.x_end, size.y_end - 2)
    requests = []
    for dot in candidates:
        requests.append((dot.x, dot.y, CHARACTER_WIDTH * len(dot.run["format"]) + 2, dot.on_front))
    places = place_names(requests, obstacles, frame, 1.25 * NAME_SIZE)
    boxes = {dot.row: box for dot, box in zip(candidates, places, strict=True)}
    return [_with_name(dot, boxes.get(dot.row)) for dot in dots]


def _with_name(dot: Dot, box: Box | None) -> Dot:
    """Return a dot with its name in a box: right-aligned for a dot on the front, else left-aligned."""
    if box is None:
        return dot
    middle = (box.top + box.bottom) / 2
    if dot.on_front:
        x, anchor, edge = box.right, "end", box.top
    else:
        x, anchor, edge = box.left, "start", box.bottom
    leader = ""
    if abs(middle - dot.y) > FAR:
        nearest = min(max(dot.x, box.left), box.right)
        leader = f"M{nearest:.1f} {edge:.1f}L{dot.x:g} {dot.y:g}"
    return replace(dot, name=(round(x, 1), round(middle, 1), anchor), leader=leader)
