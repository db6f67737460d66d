"""Scales that are powers of two, stored as one byte: they grow without rounding."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from qpaged.formats._contract import Quantizer

BIAS = 126  # the byte b means 2 ** (b - BIAS), but 0 an empty block and 255 NaN
NAN_SCALE = 255
FLOAT32_BIAS = 127
MANTISSA_BITS = 23


class PowerOfTwoQuantizer(Quantizer):
    """A quantizer whose scale is the smallest power of two s with absmax < 2 ** headroom · s.

    The exponent is read off the float's bits, since log2 and exp2 are not exact at powers of two, and the
    inequality is strict, so that no power of two needs the code one past the largest.
    """

    granularities: ClassVar[tuple[str, ...]] = ("page", "token", "channel")
    scale_dtype = jnp.uint8
    nan_scale = NAN_SCALE
    headroom: ClassVar[int]
    """Values in units of the scale stay below 2 ** headroom in magnitude."""
    resolution: ClassVar[int]
    """2 ** -resolution is the smallest nonzero value in units of the scale; times s it stays normal."""

    def scale(self, absmax: jax.Array) -> jax.Array:
        biased = (lax.bitcast_convert_type(absmax, jnp.uint32) >> MANTISSA_BITS).astype(jnp.int32)
        exponent = biased - FLOAT32_BIAS + 1 - self.headroom
        smallest = 1 - FLOAT32_BIAS + self.resolution
        stored = jnp.maximum(jnp.maximum(exponent, smallest) + BIAS, 1)
        return jnp.where(absmax > 0, stored, 0).astype(jnp.uint8)

    def multiplier(self, scales: jax.Array) -> jax.Array:
        bits = (scales.astype(jnp.uint32) + (FLOAT32_BIAS - BIAS)) << MANTISSA_BITS
        factor = lax.bitcast_convert_type(bits, jnp.float32)
        return jnp.where(scales == NAN_SCALE, jnp.nan, jnp.where(scales == 0, 0.0, factor))
