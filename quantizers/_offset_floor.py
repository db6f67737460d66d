"""The ``+offset`` wrapper of floor formats: each block has a window of codes, found from its values alone."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from qpaged import PowerOfTwoQuantizer, Quantizer, Wrapper
from quantizers._floor import Floor, floor_toward_negative
from quantizers._offset import Offset

OFFSET_BITS = 8
REACH = 128  # an offset byte holds z / g, from -128 to 127
REACH_DOUBLINGS = 6  # from the reach of the codes, 2^(bits - 1) s, to that of the byte, 128 granules
LARGEST_FLOAT32 = float(jnp.finfo(jnp.float32).max)
LARGEST_QUOTIENT = 2.0**30  # beyond any window, and within int32


def offset(inner: Quantizer) -> Quantizer:
    """Return the inner format with an offset: floors where tokens share scales, nearest where they do not.

    A rotation stays outermost: the offsets are those of rotated values either way.
    """
    if isinstance(inner, Wrapper) and inner.transform is not None:
        return replace(inner, inner=offset(inner.inner))
    return OffsetFloor(inner=inner) if isinstance(inner, Floor) else Offset(inner=inner)


@dataclass(frozen=True)
class OffsetFloor(Wrapper):
    """c = floor(x / s) - z + 1, read back as (z + c - 1/2) s: a window of codes that begins at z s.

    s is a power of two and z a multiple of g, a quarter of the codes. A block has the smallest s for which
    one window, begun at the multiple of g at or below its least value's quotient, reaches its greatest value,
    and for which the offset byte reaches both: a rule of the values alone. Doubling s halves quotients and z
    with the floor, exactly; so codes, scales and offsets are the same in whatever order tokens are written,
    and the error is at most s / 2, as without the offset (beside the largest float32, where the middle of a
    window is none, half a window more). Code 0 is a slot to which nothing was written, and reads as z s or
    half a step below.

    A *stored scale* is two bytes: the exponent of s, and z / g.

    A scale byte and an offset byte (z / g) per block: ``int8:channel+offset`` has 9 bits at 16 tokens a page
    and 8.5 at 32, ``int4:channel+offset`` 5 and 4.5. The offset byte reaches 128 g, so that s is at least
    |x| / (128 g): 2^-13 of the block's largest magnitude in 8 bits, and 2^-9 in 4.
    """

    name: ClassVar[str] = "offset"
    scale_dtype: ClassVar[Any] = jnp.uint16
    nan_scale: ClassVar[int] = PowerOfTwoQuantizer.nan_scale << OFFSET_BITS
    levels: ClassVar[None] = None

    @property
    def of_whole_blocks(self) -> Offset:
        return Offset(inner=self.inner.of_whole_blocks)

    @property
    def growth(self) -> "GrowWindows":
        return GrowWindows(self)

    @property
    def offset(self) -> "MiddleOfWindow":
        return MiddleOfWindow(self)

    @property
    def num_codes(self) -> int:
        """One more than the greatest code."""
        return 2**self.inner.bits

    @property
    def granule(self) -> int:
        """g, the step between the starts of windows, in units of the scale."""
        return self.num_codes // 4

    def check(self) -> None:
        if not isinstance(self.inner, Floor):
            raise ValueError(f"inner must be a format of floors for OffsetFloor, but is {self.inner}.")

    def code_dtype(self, dtype: Any) -> Any:
        return jnp.uint8

    def fit(self, low: jax.Array, high: jax.Array) -> jax.Array:
        return self.smallest_from(low, high, self.least_exponent(low, high))

    def multiplier(self, scales: jax.Array) -> jax.Array:
        return self.inner.multiplier(exponent_of(scales).astype(jnp.uint8))

    def encode_under(self, x: jax.Array, scales: jax.Array) -> jax.Array:
        # The difference of floors, since x - z s itself would round where x is small beside z s.
        codes = self.quotient(x, scales) - self.window_start(scales) + 1
        clipped = jnp.clip(codes, 1, self.num_codes - 1)
        return jnp.where(scales == 0, 0, clipped).astype(jnp.uint8)

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        # In two steps, each exact in bfloat16 for codes from 1 on; code 0 of 8 bits stands for no value.
        return codes.astype(dtype) - jnp.asarray(self.num_codes // 2, dtype) - jnp.asarray(0.5, dtype)

    def error_bound(self, x: jax.Array, multipliers: jax.Array) -> jax.Array:
        beside_largest = jnp.abs(x) > LARGEST_FLOAT32 - self.num_codes * multipliers
        return multipliers * jnp.where(beside_largest, self.bound + self.num_codes / 2, self.bound)

    def window_start(self, scales: jax.Array) -> jax.Array:
        """Return z, the first quotient of the window, int32."""
        unsigned = scales.astype(jnp.int32) & 0xFF  # whose highest bit is the sign
        return jnp.where(unsigned < REACH, unsigned, unsigned - 2 * REACH) * self.granule

    def quotient(self, x: jax.Array, scales: jax.Array) -> jax.Array:
        """Return floor(x / s), int32."""
        floors = floor_toward_negative(self.in_units(x, scales))
        return jnp.clip(floors, -LARGEST_QUOTIENT, LARGEST_QUOTIENT).astype(jnp.int32)

    def in_window(self, scales: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        """Return True where the window covers both values, and the offset byte reaches both.

        The window's start alone is not enough: if ``high`` is written first, by itself, a window starts at
        it, and the scale must not depend on the order of writes.
        """
        start, last = self.window_start(scales), self.quotient(high, scales)
        in_window = (self.quotient(low, scales) >= start) & (last - start <= self.num_codes - 2)
        return in_window & (last < REACH * self.granule)

    def least_exponent(self, low: jax.Array, high: jax.Array) -> jax.Array:
        """Return the exponent below which no window covers both values; that one's does, or the next one's.

        ``inner.scale(m)`` is the exponent of the smallest s with m < 2^(bits - 1) s. The span must be less
        than 2^bits s, which is the rule for half the span. The larger value must be within 128 granules of
        2^(bits - 2) s: 2^REACH_DOUBLINGS times what the rule for it asks. One more is taken off, since a
        negative value may be that exactly, where the rule asks for less.
        """
        for_span = self.inner.scale(high / 2 - low / 2).astype(jnp.int32)
        for_reach = self.inner.scale(jnp.maximum(-low, high)).astype(jnp.int32) - (REACH_DOUBLINGS + 1)
        return jnp.maximum(jnp.maximum(for_span, for_reach), 1)

    def smallest_from(self, low: jax.Array, high: jax.Array, exponent: jax.Array) -> jax.Array:
        """Return the stored scale of ``exponent`` or the next, the first whose window covers both values."""
        smaller, larger = self._window_at(low, exponent), self._window_at(low, exponent + 1)
        reached = self.quotient(low, smaller) >= -REACH * self.granule
        return jnp.where(reached & self.in_window(smaller, low, high), smaller, larger)

    def _window_at(self, low: jax.Array, exponent: jax.Array) -> jax.Array:
        """Return the stored scale of ``exponent`` with the window that begins at or below ``low``.

        It wraps where the offset byte does not reach; :meth:`smallest_from` checks that.
        """
        scales = exponent.astype(jnp.uint16) << OFFSET_BITS
        granules = self.quotient(low, scales) // self.granule
        return scales | (granules & 0xFF).astype(jnp.uint16)


@dataclass(frozen=True)
class MiddleOfWindow:
    """The offset of a window: the value of its middle, to which ``decode`` adds codes less half of them."""

    quantizer: OffsetFloor

    def from_scales(self, scales: jax.Array) -> jax.Array:
        """Return the float32 offsets of stored ``scales``."""
        start = self.quantizer.window_start(scales)
        middle = (start + self.quantizer.num_codes // 2).astype(jnp.float32)
        return jnp.clip(middle * self.quantizer.multiplier(scales), -LARGEST_FLOAT32, LARGEST_FLOAT32)


@dataclass(frozen=True)
class GrowWindows:
    """Growth of windows: their scale doubles until they cover the new values, and codes are shifted."""

    quantizer: OffsetFloor

    def covers(self, scales: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        """Return True where the block's window covers the extremes ``low`` and ``high``."""
        return self.quantizer.in_window(scales, low, high)

    def grown_scale(
        self, scales: jax.Array, greatest_code: jax.Array, low: jax.Array, high: jax.Array
    ) -> jax.Array:
        """Return the stored scales of blocks that do not cover new extremes."""
        # The block's own extremes as its codes tell them. Larger scales give these the same window as the
        # true ones.
        factor, start = self.quantizer.multiplier(scales), self.quantizer.window_start(scales)
        last = start + jnp.maximum(greatest_code.astype(jnp.int32), 1) - 1
        low = jnp.minimum(low, jnp.maximum(start.astype(jnp.float32) * factor, -LARGEST_FLOAT32))
        high = jnp.maximum(high, last.astype(jnp.float32) * factor)
        exponent = jnp.maximum(exponent_of(scales), self.quantizer.least_exponent(low, high))
        return self.quantizer.smallest_from(low, high, exponent)

    def requantize(self, codes: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        """Return ``codes`` under ``old`` stored scales as codes under larger ``new`` ones (broadcast)."""
        quotients = self.quantizer.window_start(old) + codes.astype(jnp.int32) - 1
        doublings = jnp.clip(exponent_of(new) - exponent_of(old), 0, 31)
        grown = (quotients >> doublings) - self.quantizer.window_start(new) + 1
        return jnp.where(codes == 0, 0, grown).astype(jnp.uint8)


def exponent_of(scales: jax.Array) -> jax.Array:
    """Return the scale byte of stored scales, int32."""
    return scales.astype(jnp.int32) >> OFFSET_BITS
