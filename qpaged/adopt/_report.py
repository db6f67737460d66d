"""The report of a step: the places where it had to decode its quantized cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike


class MaterializeError(RuntimeError):
    """A strict step did something to its quantized cache for which an array had to be decoded as a whole."""


@dataclass(frozen=True)
class Materialized:
    """One place where a step decoded a quantized array as a whole.

    Attributes:
        primitive: the operation that needed the values; "return" if the step returned them decoded.
        shape: of the decoded array.
        dtype: of the decoded array.
        file: the file of the code that did it.
        line: the line in that file.
    """

    primitive: str
    shape: tuple[int, ...]
    dtype: DTypeLike
    file: str
    line: int

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded array."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        shape = ", ".join(map(str, self.shape))
        dtype = jnp.dtype(self.dtype).name
        return f"{self.primitive} {dtype}({shape}), {self.nbytes:,} bytes, at {self.file}:{self.line}"


class Report(tuple[Materialized, ...]):
    """The places where a step decoded a quantized array as a whole, in the order in which they were met."""

    def __str__(self) -> str:
        if not self:
            return "nothing was materialized"
        return "\n".join([f"{len(self)} places materialized:", *(f"    {place}" for place in self)])
