"""The report of a step: the places where it had to decode its quantized cache."""

from __future__ import annotations

from qpaged.implicit import Materialization


class MaterializeError(RuntimeError):
    """A strict step did something to its quantized cache for which an array had to be decoded as a whole."""


class Report(tuple[Materialization, ...]):
    """The places where a step decoded a quantized array as a whole, in the order in which they were met."""

    def __str__(self) -> str:
        if not self:
            return "nothing was materialized"
        return "\n".join([f"{len(self)} places materialized:", *(f"    {place}" for place in self)])
