"""+offset: one offset per block, for values that do not lie around zero (KIVI, Liu et al. 2024)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from qpaged import PowerOfTwoQuantizer, Quantizer, Wrapper
from quantizers._bfloat16 import NAN, away_from_zero, first_of, paired, second_of, toward_zero
from quantizers._floor import Floor, floors

OFFSET_BITS = 8
REACH = 128  # multiples of g, to either side
LARGEST = float(jnp.finfo(jnp.float32).max)
FURTHEST = 2.0**30  # beyond any place of a window, and within int32


def offset(inner: Quantizer) -> Quantizer:
    """The inner format with an offset: floors where tokens share scales, nearest where they do not.

    A rotation stays outermost: the offsets are those of rotated values either way.
    """
    if isinstance(inner, Wrapper) and inner.transforms:
        return replace(inner, inner=offset(inner.inner))
    return OffsetFloor(inner=inner) if isinstance(inner, Floor) else Offset(inner=inner)


@dataclass(frozen=True)
class Offset(Wrapper):
    """x̂ = c s + o with the inner format's codes c, whose levels just cover the block's values.

    s = (max - min) / (levels - 1) and o = min + |lowest code| s.

    Both are bfloat16, in one 32-bit word: the offset is rounded first and the scale then made to cover the
    block around it, upward, so that nothing is clipped. 32 bits per block: ``int8:token+offset`` has 8.25 at
    head_dim 128, ``int4+offset`` 5 and ``int2+offset`` 3 at their groups of 32. The error is at most s / 2,
    beside float32 roundings.

    Attention adds o times the sum of what it multiplies the block with; nothing is decoded for it.
    """

    name: ClassVar[str] = "offset"
    scale_dtype: ClassVar[Any] = jnp.uint32
    bound: ClassVar[float] = 0.5 + 2.0**-12
    shareable: ClassVar[bool] = False
    past_end: ClassVar[int] = NAN << 16

    def check(self) -> None:
        if self.inner.levels is None or self.inner.scale_dtype is None or self.inner.outer_dtype is not None:
            raise ValueError(
                f"+offset goes with formats of evenly spaced codes and one scale per block, as int8, int4 "
                f"and int2, but {self.inner} is none."
            )

    def fit(self, low: jax.Array, high: jax.Array) -> jax.Array:
        assert self.inner.levels is not None  # as checked
        lowest, highest = self.inner.levels
        share = jnp.float32(-lowest / (highest - lowest))
        down = jnp.where(jnp.maximum(-low, high) > 1, jnp.float32(0.25), jnp.float32(1))  # no sum overflows
        low, high = low * down, high * down
        center = toward_zero(low + (high - low) * share)
        above, below = (high - center) * jnp.float32(1 / highest), (low - center) * jnp.float32(1 / lowest)
        return paired(away_from_zero(jnp.maximum(above, below) / down), center / down)

    def multiplier(self, scales: jax.Array) -> jax.Array:
        return first_of(scales)

    def shift(self, scales: jax.Array) -> jax.Array:
        return second_of(scales)

    def encode_under(self, x: jax.Array, scales: jax.Array) -> jax.Array:
        down = jnp.where(self.multiplier(scales) > 1, jnp.float32(0.25), jnp.float32(1))  # no sum overflows
        return self.encode(self.in_units(x * down - self.shift(scales) * down, scales) / down)

    def error_bound(self, x: jax.Array, multipliers: jax.Array) -> jax.Array:
        return self.bound * multipliers + jnp.abs(x) * 2.0**-20


@dataclass(frozen=True)
class OffsetFloor(Wrapper):
    """n = floor(x / s), c = n - z + 1, read back as (n + 1/2) s: a window of codes that begins at z s.

    s is a power of two and z a multiple of g, a quarter of the codes. Of the scales whose window, begun at
    the multiple below the block's least value, reaches the greatest, and whose offset byte reaches them all,
    a block has the smallest: a rule of the values alone. Doubling s halves n and z with the floor, exactly;
    so codes, scales and offsets are the same in whatever order tokens are written, and the error is at most
    s / 2, as without the offset (beside the largest float32, where the middle of a window is none, half a
    window more). Code 0 is a slot to which nothing was written, and reads as (z - 1/2) s.

    A scale byte and an offset byte (z / g) per block: ``int8:channel+offset`` has 9 bits at 16 tokens a page
    and 8.5 at 32, ``int4:channel+offset`` 5 and 4.5. The offset byte reaches 128 g, so that s is at least
    |x| / (128 g): 2^-13 of the block's largest magnitude in 8 bits, and 2^-9 in 4.
    """

    name: ClassVar[str] = "offset"
    scale_dtype: ClassVar[Any] = jnp.uint16
    past_end: ClassVar[int] = PowerOfTwoQuantizer.past_end << OFFSET_BITS
    levels: ClassVar[None] = None

    @property
    def codes(self) -> int:
        """One more than the greatest code."""
        return 2**self.inner.bits

    @property
    def granule(self) -> int:
        """What offsets are multiples of, in units of the scale."""
        return self.codes // 4

    def check(self) -> None:
        if not isinstance(self.inner, Floor):
            raise ValueError(f"inner must be a format of floors for OffsetFloor, but is {self.inner}.")

    def code_dtype(self, dtype: Any) -> Any:
        return jnp.uint8

    def fit(self, low: jax.Array, high: jax.Array) -> jax.Array:
        return self._smallest(low, high, _least_exponent(self.inner.scale, low, high))

    def refit(self, scales: jax.Array, codes: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        # What the block holds, to within its scale, which is all that larger scales tell apart.
        factor, begin = self.multiplier(scales), self._begin(scales)
        last = begin + jnp.maximum(codes.astype(jnp.int32), 1) - 1
        low = jnp.minimum(low, jnp.maximum(begin.astype(jnp.float32) * factor, -LARGEST))
        high = jnp.maximum(high, last.astype(jnp.float32) * factor)
        exponent = jnp.maximum(_exponent(scales), _least_exponent(self.inner.scale, low, high))
        return self._smallest(low, high, exponent)

    def holds(self, scales: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        return self._covers(scales, low, high)

    def multiplier(self, scales: jax.Array) -> jax.Array:
        return self.inner.multiplier(_exponent(scales).astype(jnp.uint8))

    def shift(self, scales: jax.Array) -> jax.Array:
        middle = (self._begin(scales) + self.codes // 2).astype(jnp.float32)
        return jnp.clip(middle * self.multiplier(scales), -LARGEST, LARGEST)

    def encode_under(self, x: jax.Array, scales: jax.Array) -> jax.Array:
        # Of floors, not of differences: x - z s would round where x is small beside z s.
        codes = self._places(x, scales) - self._begin(scales) + 1
        kept = jnp.where(scales == 0, 0, jnp.clip(codes, 1, self.codes - 1))
        return kept.astype(jnp.uint8)

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        # In two steps, each exact in bfloat16.
        return codes.astype(dtype) - jnp.asarray(self.codes // 2, dtype) - jnp.asarray(0.5, dtype)

    def grow(self, codes: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        places = self._begin(old) + codes.astype(jnp.int32) - 1
        doublings = jnp.clip(_exponent(new) - _exponent(old), 0, 31)
        grown = (places >> doublings) - self._begin(new) + 1
        return jnp.where(codes == 0, 0, grown).astype(jnp.uint8)

    def error_bound(self, x: jax.Array, multipliers: jax.Array) -> jax.Array:
        edge = jnp.abs(x) > LARGEST - self.codes * multipliers
        return multipliers * jnp.where(edge, self.bound + self.codes / 2, self.bound)

    def _begin(self, scales: jax.Array) -> jax.Array:
        """z, the first place of the window, int32."""
        unsigned = scales.astype(jnp.int32) & 0xFF
        return jnp.where(unsigned < REACH, unsigned, unsigned - 2 * REACH) * self.granule

    def _covers(self, scales: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        """Whether both are in the window, and in reach: of two values either may come first, and alone."""
        begin, last = self._begin(scales), self._places(high, scales)
        window = (self._places(low, scales) >= begin) & (last - begin <= self.codes - 2)
        return window & (last < REACH * self.granule)

    def _smallest(self, low: jax.Array, high: jax.Array, exponent: jax.Array) -> jax.Array:
        """What is stored for the smallest scale from ``exponent`` on whose window covers both.

        It is that exponent or the next.
        """
        small, large = (self._window(low, at) for at in (exponent, exponent + 1))
        reached = self._places(low, small) >= -REACH * self.granule
        return jnp.where(reached & self._covers(small, low, high), small, large)

    def _window(self, low: jax.Array, exponent: jax.Array) -> jax.Array:
        """What is stored for a window under this scale that begins at or below ``low``."""
        scales = exponent.astype(jnp.uint16) << OFFSET_BITS
        begin = self._places(low, scales) // self.granule
        return scales | (begin & 0xFF).astype(jnp.uint16)

    def _places(self, x: jax.Array, scales: jax.Array) -> jax.Array:
        """floor(x / s), int32."""
        return jnp.clip(floors(self.in_units(x, scales)), -FURTHEST, FURTHEST).astype(jnp.int32)


def _exponent(scales: jax.Array) -> jax.Array:
    return scales.astype(jnp.int32) >> OFFSET_BITS


def _least_exponent(scale: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> jax.Array:
    """The stored exponent below which no window covers both; the next one's does.

    ``scale`` stores the exponent of the scale that its argument is less than 2^(bits - 1) times of. Of
    half the span that is the scale that the span is less than 2^bits times of; and the offset byte reaches
    128 granules of 2^(bits - 2).
    """
    span = scale(high / 2 - low / 2).astype(jnp.int32)
    reach = scale(jnp.maximum(-low, high)).astype(jnp.int32) - 7
    return jnp.maximum(jnp.maximum(span, reach), 1)
