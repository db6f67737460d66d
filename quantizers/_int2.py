"""int2: four codes to a byte."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from qpaged import Quantizer
from quantizers._bfloat16 import NAN, away_from_zero, of_word, word


@dataclass(frozen=True)
class Int2(Quantizer):
    """c = floor(x / s), read back as (c + 1/2) s, s = absmax / 2: four levels, -1.5 s to 1.5 s.

    For the far end of the curve, and with an offset (``int2+offset``, KIVI's 2 bits), since four levels are
    too few to spend any on a side where nothing lies.

    2 bits an element and a bfloat16 scale per group: 2.5 at ``group32``, 2.25 at ``group64``; with the
    offset, 3 and 2.5. The error is at most s / 2.
    """

    name: ClassVar[str] = "int2"
    granularities: ClassVar = ("group32", "group64")
    bits: ClassVar[int] = 2
    scale_dtype: ClassVar[Any] = jnp.uint16
    nan_scale: ClassVar[int] = NAN
    bound: ClassVar[float] = 0.5 + 2.0**-20
    levels: ClassVar = (-1.5, 1.5)

    def scale(self, absmax: jax.Array) -> jax.Array:
        scale = away_from_zero(absmax * jnp.float32(0.5))
        return word(jnp.where(absmax == 0, 0, scale))

    def multiplier(self, scales: jax.Array) -> jax.Array:
        return of_word(scales)

    def encode(self, units: jax.Array) -> jax.Array:
        return jnp.clip(jnp.floor(units), -2, 1).astype(jnp.int8)

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        return codes.astype(dtype) + jnp.asarray(0.5, dtype)
