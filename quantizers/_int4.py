"""int4: two codes to a byte."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from qpaged import Quantizer
from quantizers._bfloat16 import NAN, away_from_zero, of_word, word
from quantizers._floor import Floor

GRANULARITIES = ("group32", "group64", "group128", "token", "page", "channel")
SHARED = ("page", "channel")


def int4(granularity: str = "group32") -> Quantizer:
    """The int4 format of a granularity: floors where tokens share scales, nearest where they do not."""
    return Int4Floor(granularity) if granularity in SHARED else Int4(granularity)


@dataclass(frozen=True)
class Int4(Quantizer):
    """c = round(x / s), s = extreme / -8: the value of largest magnitude maps to -8, whatever its sign.

    All 16 codes are used, and none is spent on a magnitude that does not occur (ggml's q4_0 does the same).
    The scale is a bfloat16, stored as its bits, and carries the sign.

    4 bits an element and 16 per group or token: 4.5 at ``group32``, 4.25 at ``group64``, 4.125 at
    ``group128`` and at ``token`` with head_dim 128. The error is at most s / 2 up to 7.5 s on the extreme's
    opposite side, and x - 7 s from there on, at most s.
    """

    name: ClassVar[str] = "int4"
    granularities: ClassVar = GRANULARITIES
    bits: ClassVar[int] = 4
    scale_dtype: ClassVar[Any] = jnp.uint16
    nan_scale: ClassVar[int] = NAN
    bound: ClassVar[float] = 1.0 + 2.0**-18
    levels: ClassVar = (-8.0, 7.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity in SHARED:
            raise ValueError(f"granularity must not be {self.granularity} for Int4; that is Int4Floor.")

    def scale(self, absmax: jax.Array) -> jax.Array:
        return self.fit(-absmax, jnp.zeros_like(absmax))

    def fit(self, low: jax.Array, high: jax.Array) -> jax.Array:
        extreme = jnp.where(high > -low, high, low)
        scale = away_from_zero(extreme * jnp.float32(-1 / 8))
        return word(jnp.where(extreme == 0, 0, scale))

    def multiplier(self, scales: jax.Array) -> jax.Array:
        return of_word(scales)

    def encode(self, units: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(units), -8, 7).astype(jnp.int8)

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        return codes.astype(dtype)

    def error_bound(self, x: jax.Array, multipliers: jax.Array) -> jax.Array:
        beyond = x / jnp.where(multipliers != 0, multipliers, 1) - 7
        return jnp.abs(multipliers) * (jnp.maximum(beyond, 0.5) + 2.0**-18)


@dataclass(frozen=True)
class Int4Floor(Floor):
    """c = floor(x / s), read back as (c + 1/2) s, with s a power of two and absmax < 8 s: int8's rule.

    The same codes in whatever order tokens are written, and an error of at most s / 2; the scale is a byte.

    4 bits an element and 8 per block: 4.004 at ``page`` (16 slots of 128), 4.5 at ``channel``.
    """

    name: ClassVar[str] = "int4"
    granularities: ClassVar = GRANULARITIES
    bits: ClassVar[int] = 4
    headroom: ClassVar[int] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity not in SHARED:
            raise ValueError(
                f"granularity must be one of {', '.join(SHARED)} for Int4Floor; others are Int4."
            )
