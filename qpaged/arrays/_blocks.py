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
    """Extent of one block along each axis; an empty axis counts as blocks of one."""
    return tuple(max(1, length // max(1, count)) for length, count in zip(shape, scale_shape, strict=True))


def check_block(shape: Sequence[int], block: Sequence[int]) -> None:
    """ValueError unless ``block`` tiles ``shape``."""
    if len(shape) != len(block) or any(b < 1 or length % b for length, b in zip(shape, block, strict=True)):
        raise ValueError(
            f"block must divide the array along every axis, but block {tuple(block)} does not tile an array "
            f"of shape {tuple(shape)}; choose a block whose extents divide it."
        )


def counts(shape: Sequence[int], block: Sequence[int]) -> Shape:
    """Number of blocks along each axis: the shape of the scales."""
    return tuple(length // b for length, b in zip(shape, block, strict=True))


def blocked(array: jax.Array, scale_shape: Sequence[int]) -> jax.Array:
    """View (L0, L1, ...) as (n0, b0, n1, b1, ...)."""
    block = block_shape(array.shape, scale_shape)
    return array.reshape([extent for pair in zip(scale_shape, block, strict=True) for extent in pair])


def beside(scales: jax.Array) -> jax.Array:
    """View scales (n0, n1, ...) as (n0, 1, n1, 1, ...), to broadcast against :func:`blocked`."""
    return jnp.expand_dims(scales, tuple(range(1, 2 * scales.ndim, 2)))


def block_max(array: jax.Array, scale_shape: Sequence[int]) -> jax.Array:
    """Largest element of each block, in the shape of the scales; 0 where a block is empty."""
    return _of_blocks(jnp.max, array, scale_shape)


def block_min(array: jax.Array, scale_shape: Sequence[int]) -> jax.Array:
    """Least element of each block, in the shape of the scales; 0 where a block is empty."""
    return _of_blocks(jnp.min, array, scale_shape)


def _of_blocks(reduce: Callable[..., jax.Array], array: jax.Array, scale_shape: Sequence[int]) -> jax.Array:
    if array.size == 0:
        return jnp.zeros(scale_shape, array.dtype)
    return reduce(blocked(array, scale_shape), axis=tuple(range(1, 2 * array.ndim, 2)))


def refine(scales: jax.Array, axis: int, factor: int) -> jax.Array:
    """Cut every block along ``axis`` into ``factor`` equal ones, which repeats their scales."""
    return scales if factor == 1 else jnp.repeat(scales, factor, axis=axis)


def spread(scales: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The scales of larger blocks on the grid ``shape`` of smaller ones."""
    for axis, (length, count) in enumerate(zip(shape, scales.shape, strict=True)):
        scales = refine(scales, axis, length // max(1, count))
    return scales
