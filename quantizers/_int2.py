"""int2: four codes to a byte, for the far end of the curve."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from qpaged import Quantizer
from quantizers._bfloat16 import NAN, away_from_zero, of_word, word
from quantizers._int import OfGrowingBlocks, by_granularity, check_not_shared, check_shared

GRANULARITIES = ("group32", "group64", "token", "page", "channel")


class FourLevels(Quantizer):
    """c = floor(x / s), read back as (c + 1/2) s, s = absmax / 2: none of four levels is spent on zero."""

    scale_dtype: ClassVar[Any] = jnp.uint16
    nan_scale: ClassVar[int] = NAN
    bound: ClassVar[float] = 0.5 + 2.0**-20
    levels: ClassVar = (-1.5, 1.5)
    bits: ClassVar[int] = 2
    granularities: ClassVar = GRANULARITIES

    def scale(self, absmax: jax.Array) -> jax.Array:
        scale = away_from_zero(absmax * jnp.float32(0.5))
        return word(jnp.where(absmax == 0, 0, scale))

    def multiplier(self, scales: jax.Array) -> jax.Array:
        return of_word(scales)

    def encode(self, units: jax.Array) -> jax.Array:
        return jnp.clip(jnp.floor(units), -2, 1).astype(jnp.int8)

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        return codes.astype(dtype) + jnp.asarray(0.5, dtype)


@dataclass(frozen=True)
class Int2(FourLevels):
    """c = floor(x / s), read back as (c + 1/2) s, s = absmax / 2: four levels, -1.5 s to 1.5 s.

    For the far end of the curve, and with an offset (``int2+offset``, KIVI's 2 bits), since four levels are
    too few to spend any on a side where nothing lies.

    2 bits an element and a bfloat16 scale per group or token: 2.5 at ``group32``, 2.25 at ``group64``, 2.125
    at ``token`` with head_dim 128; with the offset, 3 and 2.5. The error is at most s / 2.
    """

    name: ClassVar[str] = "int2"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_shared(self)


@dataclass(frozen=True)
class Int2Whole(FourLevels):
    """What :class:`Int2` does with a group, for a page or a channel of it that is quantized once.

    2 bits an element and 16 per block: 3 at ``channel`` and 16 tokens a page, 2.25 at 64.
    """

    whole: bool = field(default=True, init=False)

    name: ClassVar[str] = "int2"
    growth: ClassVar[None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shared(self)


@dataclass(frozen=True)
class Int2Floor(OfGrowingBlocks):
    """c = floor(x / s), read back as (c + 1/2) s, with s a power of two and absmax < 2 s: int8's rule.

    2 bits an element and 8 per block: 2.004 at ``page`` (16 slots of 128), 2.5 at ``channel``.
    """

    name: ClassVar[str] = "int2"
    granularities: ClassVar = GRANULARITIES
    bits: ClassVar[int] = 2
    headroom: ClassVar[int] = 1

    @property
    def of_whole_blocks(self) -> Int2Whole:
        return Int2Whole(self.granularity)


int2 = by_granularity(Int2, Int2Whole, Int2Floor)
