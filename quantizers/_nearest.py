"""Nearest codes under a 16-bit scale, all of which are used: of blocks that are seen whole."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from qpaged import Quantizer
from quantizers._bfloat16 import NAN, away_from_zero, of_word, word


class Nearest(Quantizer):
    """c = round(x / s), s = extreme / -h with h = 2^(bits - 1): the value of largest magnitude maps to -h.

    All 2^bits codes are used, and none is spent on a magnitude that does not occur, as in ggml's q4_0. The
    scale is a bfloat16, stored as its bits, and carries the sign.

    The error is at most s / 2 up to (h - 1/2) s on the extreme's opposite side, and x - (h - 1) s from there
    on, at most s.
    """

    scale_dtype: ClassVar[Any] = jnp.uint16
    nan_scale: ClassVar[int] = NAN
    bound: ClassVar[float] = 1.0 + 2.0**-18

    @property
    def levels(self) -> tuple[float, float]:  # type: ignore[override]  # of its bits
        """The lowest and the highest code."""
        half = 2.0 ** (self.bits - 1)
        return -half, half - 1

    def scale(self, absmax: jax.Array) -> jax.Array:
        return self.fit(-absmax, jnp.zeros_like(absmax))

    def fit(self, low: jax.Array, high: jax.Array) -> jax.Array:
        extreme = jnp.where(high > -low, high, low)
        scale = away_from_zero(extreme * jnp.float32(1 / self.levels[0]))
        return word(jnp.where(extreme == 0, 0, scale))

    def multiplier(self, scales: jax.Array) -> jax.Array:
        return of_word(scales)

    def encode(self, units: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(units), *self.levels).astype(jnp.int8)

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        return codes.astype(dtype)

    def error_bound(self, x: jax.Array, multipliers: jax.Array) -> jax.Array:
        beyond = x / jnp.where(multipliers != 0, multipliers, 1) - self.levels[1]
        return jnp.abs(multipliers) * (jnp.maximum(beyond, 0.5) + 2.0**-18)


class Whole(Nearest):
    """:class:`Nearest` where tokens share scales, of pages that are quantized once, from all their rows."""

    @property
    def growth(self) -> None:
        return None
