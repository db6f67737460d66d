"""The report of a step: the places where it had to decode its quantized cache."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from qpaged.implicit import Materialization


class MaterializeError(RuntimeError):
    """A strict step did something to its quantized cache for which an array had to be decoded as a whole."""


class Report(tuple[Materialization, ...]):
    """The places where a step decoded a quantized array as a whole, in the order in which they were met.

    Attributes:
        quantized: a line that says what of the cache is quantized, with its bytes before and after.
    """

    def __new__(cls, places: Iterable[Materialization], quantized: str) -> Report:
        report = super().__new__(cls, places)
        report.quantized = quantized
        return report

    quantized: str

    def __reduce__(self) -> tuple[type[Report], tuple[tuple[Materialization, ...], str]]:
        return Report, (tuple(self), self.quantized)  # to copy and pickle it

    def __str__(self) -> str:
        return "\n".join([self.quantized, listed(self)])


def listed(places: Collection[Materialization]) -> str:
    """Return the places one to a line, under a heading."""
    if not places:
        return "nothing was materialized"
    heading = "1 place materialized:" if len(places) == 1 else f"{len(places)} places materialized:"
    return "\n".join([heading, *(f"    {place}" for place in places)])
