"""Blocks: the boxes of elements that share one scale.

An array of shape (L0, L1, ...) with scales of shape (n0, n1, ...) has blocks of shape
(L0 / n0, L1 / n1, ...). The block is read off the two shapes and never stored, so it stays right under
vmap, scan and shard_map, which change both shapes together.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]


def block_shape(shape: Sequence[int], scale_shape: Sequence[int]) -> Shape:
    """Return the extent of one block along each axis; an empty axis counts as blocks of one."""
    return tuple(_extent(length, count) for length, count in zip(shape, scale_shape, strict=True))


def _extent(length: int, count: int) -> int:
    if length == count:  # all that can be said of lengths that are symbols, as in an exported program
        return 1
    return max(1, length // max(1, count))


def check_block(shape: Sequence[int], block: Sequence[int]) -> None:
    """Raise ValueError unless ``block`` tiles ``shape``."""
    tiles = len(shape) == len(block)
    tiles = tiles and all(
        extent >= 1 and length % extent == 0 for length, extent in zip(shape, block, strict=True)
    )
    if not tiles:
        raise ValueError(
            f"block must divide the array along every axis, but block {tuple(block)} does not tile an array "
            f"of shape {tuple(shape)}; choose a block whose extents divide it."
        )


def scale_shape(shape: Sequence[int], block: Sequence[int]) -> Shape:
    """Return the number of blocks along each axis, which is the shape of the scales."""
    return tuple(length // extent for length, extent in zip(shape, block, strict=True))


def split_blocks(array: jax.Array, scale_shape: Sequence[int]) -> jax.Array:
    """Return (L0, L1, ...) as (n0, b0, n1, b1, ...), with each block's extents on axes of their own."""
    block = block_shape(array.shape, scale_shape)
    return array.reshape([extent for pair in zip(scale_shape, block, strict=True) for extent in pair])


def expand_scales(scales: jax.Array) -> jax.Array:
    """Return scales (n0, n1, ...) as (n0, 1, n1, 1, ...), to broadcast against :func:`split_blocks`."""
    return jnp.expand_dims(scales, tuple(range(1, 2 * scales.ndim, 2)))


def block_max(array: jax.Array, scale_shape: Sequence[int]) -> jax.Array:
    """Return the largest element of each block, in the shape of the scales; 0 where a block is empty."""
    return _reduce_blocks(jnp.max, array, scale_shape)


def block_min(array: jax.Array, scale_shape: Sequence[int]) -> jax.Array:
    """Return the least element of each block, in the shape of the scales; 0 where a block is empty."""
    return _reduce_blocks(jnp.min, array, scale_shape)


def _reduce_blocks(
    reduce: Callable[..., jax.Array], array: jax.Array, scale_shape: Sequence[int]
) -> jax.Array:
    if array.size == 0:
        return jnp.zeros(scale_shape, array.dtype)
    return reduce(split_blocks(array, scale_shape), axis=tuple(range(1, 2 * array.ndim, 2)))


def refine(scales: jax.Array, axis: int, factor: int) -> jax.Array:
    """Return the scales of blocks cut into ``factor`` along ``axis``; the pieces keep their scale."""
    if factor == 1:
        return scales
    return jnp.repeat(scales, factor, axis=axis)


def repeat_scales(scales: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Return scales of larger blocks repeated to ``shape``, that of the scales of smaller ones."""
    for axis, (length, count) in enumerate(zip(shape, scales.shape, strict=True)):
        if length != count:
            scales = refine(scales, axis, length // max(1, count))
    return scales
