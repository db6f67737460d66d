"""Floors: integer codes under shared power-of-two scales, the same in whatever order tokens are written."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from qpaged import FitAgain, PowerOfTwoQuantizer

SIGN_ONLY = 7  # a shift by so many bits leaves only the sign of 8-bit codes; a larger one is undefined


class ShiftCodes(FitAgain):
    """Growth by doublings of the scale, each of which is an arithmetic shift of the codes: exact."""

    def requantize(self, codes: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        doublings = jnp.minimum(new.astype(jnp.int32) - old.astype(jnp.int32), SIGN_ONLY)
        return (codes.astype(jnp.int32) >> jnp.maximum(doublings, 0)).astype(jnp.int8)


class Floor(PowerOfTwoQuantizer):
    """c = floor(x / s), read back as (c + 1/2) s, with s a power of two and absmax < 2^(bits - 1) s.

    Doubling s is an arithmetic shift, and floor(floor(x) / 2) = floor(x / 2): codes depend on the values
    alone, never on the order or the chunks in which they arrived. The error is at most s / 2, always.
    A block in which anything was written reads a written zero as s / 2.
    """

    granularities: ClassVar[tuple[str, ...]] = ("page", "channel")
    bound: ClassVar[float] = 0.5
    resolution: ClassVar[int] = 1

    @property
    def growth(self) -> ShiftCodes:
        return ShiftCodes(self)

    def encode(self, units: jax.Array) -> jax.Array:
        largest = 2**self.headroom
        return jnp.clip(floor_toward_negative(units), -largest, largest - 1).astype(jnp.int8)

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        return codes.astype(dtype) + jnp.asarray(0.5, dtype)


def floor_toward_negative(units: jax.Array) -> jax.Array:
    """Return floor(units), and -1 for a negative number that underflowed to -0 in a division.

    So does an arithmetic shift, which is what growth makes of codes.
    """
    return jnp.where(jnp.signbit(units), jnp.minimum(jnp.floor(units), -1), jnp.floor(units))
