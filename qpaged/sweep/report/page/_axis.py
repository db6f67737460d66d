"""Logarithmic axes and sizes of the report's charts, in pixels."""

import math
from dataclasses import dataclass

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class LogAxis:
    """An axis from ``low`` at pixel ``start`` to ``high`` at ``stop``; values beyond it stand at its ends."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return round(self.start + min(share, 1.0) * (self.stop - self.start), 1)

    def decades(self) -> list[int]:
        """Return the exponents of the powers of ten on the axis."""
        first = math.ceil(math.log10(self.low) - 1e-9)
        last = math.floor(math.log10(self.high) + 1e-9)
        return list(range(first, last + 1))


@dataclass(frozen=True)
class Tick:
    """A tick of an axis.

    Attributes:
        at: its pixel.
        text: its label.
        power: an exponent in superscript after the label.
        below: a second line.
    """

    at: float
    text: str
    power: str = ""
    below: str = ""


def power_ticks(axis: LogAxis, powers: list[int]) -> list[Tick]:
    """Return a tick at each of these powers of ten."""
    return [Tick(axis(10.0**power), "10", f"{power}".replace("-", MINUS)) for power in powers]


@dataclass(frozen=True)
class Size:
    """The size of a chart and of its margins; each chart has a wide and a narrow size for phones."""

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
