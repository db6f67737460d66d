"""Logarithmic axes of the report's charts, in pixels."""

import math
from dataclasses import dataclass

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class LogAxis:
    """``low`` stands at pixel ``start`` and ``high`` at ``stop``; what is beyond is drawn at the ends."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return round(self.start + min(share, 1.0) * (self.stop - self.start), 1)

    def decades(self) -> list[int]:
        """Powers of ten from end to end."""
        low, high = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        return list(range(low, high + 1))


@dataclass(frozen=True)
class Tick:
    """A place on an axis and what stands there: with a second line, or a power in superscript."""

    at: float
    text: str
    power: str = ""
    below: str = ""


def power_ticks(axis: LogAxis, powers: list[int]) -> list[Tick]:
    """A tick at each of these powers of ten."""
    return [Tick(axis(10.0**power), "10", f"{power}".replace("-", MINUS)) for power in powers]


@dataclass(frozen=True)
class Size:
    """Of a chart, in pixels, and of its margins; text is as large on a phone as on a desk."""

    name: str
    width: int
    height: int
    left: int = 64
    right: int = 14
    top: int = 12
    bottom: int = 58

    @property
    def x_end(self) -> int:
        return self.width - self.right

    @property
    def y_end(self) -> int:
        return self.height - self.bottom
