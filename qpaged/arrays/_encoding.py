"""Between values and the codes and scales of blocks: the arithmetic that writes share."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qpaged.arrays._blocks import (
    Shape,
    block_max,
    block_min,
    expand_scales,
    repeat_scales,
    split_blocks,
)
from qpaged.arrays._protocol import ArrayFormat

SMALLEST_NORMAL = float(np.finfo(np.float32).smallest_normal)
LARGE = 2.0**64  # a factor whose reciprocal is still far from the subnormal numbers


class FittedScales(NamedTuple):
    """Stored scales of blocks, and second-level ones where the format has them."""

    scales: jax.Array
    global_scale: jax.Array | None


def to_block_values(x: jax.Array, quantizer: ArrayFormat, dtype: DTypeLike, channel_axis: int) -> jax.Array:
    """Return the finite float32 values that blocks hold for ``x``, transformed where the format says so."""
    x = to_finite(x, dtype)
    if quantizer.transform is None:
        return x
    return flush_subnormals(quantizer.transform.forward(x, channel_axis))


def to_finite(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return float32 ``x`` with NaN as 0, infinities as the largest finite ``dtype``, subnormals as 0."""
    x = x.astype(jnp.float32)
    largest = np.float32(min(float(jnp.finfo(dtype).max), float(jnp.finfo(jnp.float32).max)))
    return flush_subnormals(jnp.clip(jnp.where(jnp.isnan(x), 0, x), -largest, largest))


def flush_subnormals(x: jax.Array) -> jax.Array:
    """Return ``x`` with float32 subnormals as 0.

    Backends differ in whether they flush them. Counting them as zero everywhere keeps codes the same on all.
    """
    return jnp.where(jnp.abs(x) < SMALLEST_NORMAL, 0, x)


def block_extremes(x: jax.Array, scale_shape: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """Return the least and the greatest value of each block."""
    return block_min(x, scale_shape), block_max(x, scale_shape)


def global_scale_shape(quantizer: ArrayFormat, scale_shape: Sequence[int], channel_axis: int) -> Shape | None:
    """Return the shape of second-level scales over scales of ``scale_shape``; None where there are none."""
    if quantizer.global_scale is None:
        return None
    shape = list(scale_shape)
    shape[channel_axis] = 1
    return tuple(shape)


def fit_scales(
    quantizer: ArrayFormat, low: jax.Array, high: jax.Array, global_shape: Sequence[int] | None
) -> FittedScales:
    """Return the scales of blocks with these extremes; second-level ones of ``global_shape``, if not None."""
    rule = quantizer.global_scale
    if rule is None or global_shape is None:
        return FittedScales(quantizer.fit(low, high), None)
    stored = rule.scale(block_max(jnp.maximum(-low, high), global_shape))
    factor = nonzero(repeat_scales(rule.multiplier(stored), low.shape))
    return FittedScales(quantizer.fit(low / factor, high / factor), stored)


def fit_blocks(
    quantizer: ArrayFormat, x: jax.Array, scale_shape: Sequence[int], channel_axis: int
) -> FittedScales:
    """Return the scales of the blocks of ``x``, from :func:`to_block_values`, that have this shape."""
    if quantizer.block_fit is not None and x.size:
        axes = tuple(range(1, 2 * x.ndim, 2))
        return FittedScales(quantizer.block_fit.scale(split_blocks(x, scale_shape), axes), None)
    low, high = block_extremes(x, scale_shape)
    return fit_scales(quantizer, low, high, global_scale_shape(quantizer, scale_shape, channel_axis))


def multipliers(quantizer: ArrayFormat, scales: jax.Array, global_scale: jax.Array | None) -> jax.Array:
    """Return stored scales as float32 factors, the second level included."""
    factors = quantizer.multiplier(scales)
    if quantizer.global_scale is None or global_scale is None:
        return factors
    return factors * repeat_scales(quantizer.global_scale.multiplier(global_scale), scales.shape)


def encode(
    x: jax.Array,
    quantizer: ArrayFormat,
    scales: jax.Array,
    global_scale: jax.Array | None = None,
    *,
    channel_axis: int,
) -> jax.Array:
    """Return codes, one an element, of float32 ``x`` under the stored ``scales`` of its blocks."""
    blocks = split_blocks(x, scales.shape)
    if quantizer.global_scale is not None and global_scale is not None:
        factor = repeat_scales(quantizer.global_scale.multiplier(global_scale), scales.shape)
        blocks = blocks / expand_scales(nonzero(factor))
    if quantizer.state_bits is None:
        return quantizer.encode_under(blocks, expand_scales(scales)).reshape(x.shape)
    units = quantizer.to_units(blocks, expand_scales(scales)).reshape(x.shape)
    codes = quantizer.encode(jnp.moveaxis(units, channel_axis, -1))  # of whole rows
    return jnp.moveaxis(codes, -1, channel_axis)


def in_units(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Return float32 ``x`` in units of ``factor`` (broadcast), and ``x`` itself where that is 0.

    The quotient is a product with the reciprocal. XLA makes such a product of some quotients and not of
    others, and codes must not depend on the program around them. Where the reciprocal would not be a normal
    number, both are brought down first.
    """
    down = jnp.where(jnp.abs(factor) >= LARGE, jnp.float32(1 / LARGE), jnp.float32(1))
    return (x * down) * (1 / (nonzero(factor) * down))


def nonzero(factor: jax.Array) -> jax.Array:
    """Return ``factor``, with 1 where it is 0."""
    return jnp.where(factor != 0, factor, 1)
