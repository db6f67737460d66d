"""Transforms along the channels, and one after another."""

from dataclasses import dataclass

import jax

from qpaged.arrays import TransformRule


@dataclass(frozen=True)
class ChainedTransform:
    """One transform after another.

    Attributes:
        first: what is applied to the values.
        second: what is applied to its result.
    """

    first: TransformRule
    second: TransformRule

    def forward(self, x: jax.Array, axis: int) -> jax.Array:
        return self.second.forward(self.first.forward(x, axis), axis)

    def inverse(self, x: jax.Array, axis: int) -> jax.Array:
        return self.first.inverse(self.second.inverse(x, axis), axis)
