"""+offset: one offset per block, for values that do not lie around zero (KIVI, Liu et al. 2024)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from qpaged import Wrapper
from quantizers._bfloat16 import NAN, away_from_zero, first_of, paired, second_of, toward_zero


class OffsetInLowerHalf:
    """The offset in the lower half of a stored word; the scale is in its upper half."""

    def from_scales(self, scales: jax.Array) -> jax.Array:
        """Return the float32 offsets of stored ``scales``."""
        return second_of(scales)


def covering(low: jax.Array, high: jax.Array, lowest: float, highest: float) -> jax.Array:
    """Return the smallest scale, and its offset, under which ``lowest`` to ``highest`` cover a block.

    Args:
        low, high: float32; the least and the greatest value of blocks.
        lowest, highest: what codes reach, in units of the scale.
    """
    share_below = jnp.float32(-lowest / (highest - lowest))
    absmax = jnp.maximum(-low, high)
    down = jnp.where(absmax > 1, jnp.float32(0.25), jnp.float32(1))  # so that no sum overflows
    low, high = low * down, high * down
    # The maximum changes no number. It keeps compilers from fusing the product and the sum, which would
    # round once instead of twice, and in some programs only.
    center = toward_zero(low + jnp.maximum((high - low) * share_below, 0))
    above = (high - center) * jnp.float32(1 / highest)
    below = (low - center) * jnp.float32(1 / lowest)
    return paired(away_from_zero(jnp.maximum(above, below) / down), center / down)


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
    nan_scale: ClassVar[int] = NAN << 16
    growth: ClassVar[None] = None
    offset: ClassVar[OffsetInLowerHalf] = OffsetInLowerHalf()

    def check(self) -> None:
        one_scale = self.inner.scale_dtype is not None and self.inner.global_scale is None
        if self.inner.levels is None or self.inner.block_fit is not None or not one_scale:
            raise ValueError(
                f"+offset goes with formats of evenly spaced codes and one scale per block, as int8, int4 "
                f"and int2, but {self.inner} is not one of these."
            )

    def fit(self, low: jax.Array, high: jax.Array) -> jax.Array:
        assert self.inner.levels is not None  # as checked
        return covering(low, high, *self.inner.levels)

    def multiplier(self, scales: jax.Array) -> jax.Array:
        return first_of(scales)

    def to_units(self, x: jax.Array, scales: jax.Array) -> jax.Array:
        down = jnp.where(self.multiplier(scales) > 1, jnp.float32(0.25), jnp.float32(1))
        difference = x * down - self.offset.from_scales(scales) * down
        return self.in_units(difference, scales) / down

    def encode_under(self, x: jax.Array, scales: jax.Array) -> jax.Array:
        return self.encode(self.to_units(x, scales))

    def error_bound(self, x: jax.Array, multipliers: jax.Array) -> jax.Array:
        return self.bound * multipliers + jnp.abs(x) * 2.0**-20
