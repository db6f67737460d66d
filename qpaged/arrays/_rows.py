"""Rows that are put into or added to arrays of a cache, quantized ones with exact pages or without."""

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from qpaged.arrays._exact_write import read_exact_rows, takes_exact_rows, write_exact_rows
from qpaged.arrays._indices import clip_to_int32
from qpaged.arrays._partly_exact import PartlyExact
from qpaged.arrays._quantized import QuantizedArray
from qpaged.arrays._scatter import group_by_block
from qpaged.arrays._writes import rows_at, takes_rows, write_rows
from qpaged.implicit import ImplicitArray

CacheArray: TypeAlias = QuantizedArray | PartlyExact
Rows: TypeAlias = jax.Array | ImplicitArray


def may_put_rows(array: CacheArray, axes: Sequence[int]) -> bool:
    """Return True if rows that name a coordinate along each of ``axes`` can be put."""
    return takes_exact_rows(array, axes) if isinstance(array, PartlyExact) else takes_rows(array, axes)


def put_rows(
    array: CacheArray, axes: Sequence[int], coordinates: Sequence[jax.Array], rows: Rows
) -> CacheArray:
    """Return ``array`` with rows put, as :func:`write_rows` takes them."""
    if isinstance(array, PartlyExact):
        return write_exact_rows(array, axes, coordinates, rows)
    written: QuantizedArray = write_rows(array, axes, coordinates, rows)
    return written


def add_rows(
    array: CacheArray, axes: Sequence[int], coordinates: Sequence[jax.Array], rows: jax.Array
) -> CacheArray:
    """Return ``array`` with ``rows`` added at ``coordinates``, as :func:`write_rows` takes them.

    Rows that go to one place are all added; those out of range are dropped.
    """
    axes = tuple(axes)
    index = jnp.stack([clip_to_int32(along_axis) for along_axis in coordinates], axis=-1)
    _, place = group_by_block(index, tuple(array.shape[axis] for axis in axes))
    total = jax.ops.segment_sum(rows.astype(jnp.float32), place, rows.shape[0])[place]
    return put_rows(array, axes, coordinates, _read_rows(array, axes, index) + total)


def _read_rows(array: CacheArray, axes: tuple[int, ...], index: jax.Array) -> jax.Array:
    """Return the values at ``index``, float32 [rows, *extents of the other axes]."""
    if isinstance(array, PartlyExact):
        return read_exact_rows(array, axes, index)
    return rows_at(array, axes, index).dequantize()
