"""Norms, means and deviations of blocks, from sums of integers: the same in every program (law 2)."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from qpaged import in_units
from quantizers._bfloat16 import LARGEST, away_from_zero

VALUE_BITS = 11  # at most, of values whose squares are summed in 32
SMALLEST_NORM = 2.0**-110  # of a block that is not all zeros; a part of it is a normal number, too


class _SpreadCodes(Protocol):
    """A format whose scale is ``spread`` times a block's root mean square."""

    @property
    def spread(self) -> float: ...

    def scale(self, absmax: jax.Array) -> jax.Array: ...


@dataclass(frozen=True)
class NormFit:
    """Fits a block's scale to its norm."""

    quantizer: _SpreadCodes

    def scale(self, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        return self.quantizer.scale(root_mean_square(x, axes) * self.quantizer.spread)


class Moments(NamedTuple):
    """Of blocks, float32 and without the axes of the block.

    Attributes:
        mean: of the values.
        deviation: at least the precision of the mean.
        is_zero: True where all values are 0.
    """

    mean: jax.Array
    deviation: jax.Array
    is_zero: jax.Array


class _Integers(NamedTuple):
    """Values of blocks as integers.

    Attributes:
        values: int32, in the shape of the values.
        unit: float32; what 2^bits of them stand for in each block.
        bits: static.
        of_block: static; values of a block.
    """

    values: jax.Array
    unit: jax.Array
    bits: int
    of_block: int


def root_mean_square(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Return the root mean square along ``axes`` of float32 ``x``; 0 for zeros alone."""
    values, unit, bits, count = _integers(x, axes)
    root = unit * (_root_of_mean_square(values, axes, count) * 2.0**-bits)
    return jnp.where(jnp.any(x != 0, axes, keepdims=True), jnp.maximum(root, SMALLEST_NORM), 0).squeeze(axes)


def moments(x: jax.Array, axes: tuple[int, ...]) -> Moments:
    """Return mean and standard deviation along ``axes`` of float32 ``x``."""
    values, unit, bits, count = _integers(x, axes)
    mean = values.sum(axis=axes, keepdims=True, dtype=jnp.int32) // count
    root = jnp.maximum(_root_of_mean_square(values - mean, axes, count), 1)
    deviation = jnp.maximum(unit * (root * 2.0**-bits), SMALLEST_NORM)
    is_zero = jnp.all(x == 0, axes, keepdims=True)
    means = jnp.clip(unit * (mean.astype(jnp.float32) * 2.0**-bits), -LARGEST, LARGEST)
    return Moments(*(part.squeeze(axes) for part in (means, deviation, is_zero)))


def _integers(x: jax.Array, axes: tuple[int, ...]) -> _Integers:
    largest = jnp.abs(x).max(axis=axes, keepdims=True)
    count = x.size // largest.size
    bits = min(VALUE_BITS, (30 - (count - 1).bit_length()) // 2)  # differences reach twice as far
    unit = jnp.minimum(away_from_zero(largest), LARGEST)
    values = jnp.round(in_units(x, unit) * 2.0**bits).astype(jnp.int32)
    return _Integers(values, unit, bits, count)


def _root_of_mean_square(values: jax.Array, axes: tuple[int, ...], count: int) -> jax.Array:
    power = jnp.square(values).astype(jnp.uint32).sum(axis=axes, keepdims=True, dtype=jnp.uint32)
    return jnp.sqrt(power.astype(jnp.float32) / count)
