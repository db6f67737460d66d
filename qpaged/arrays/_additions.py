"""Additions to rows: what lies there is read, and the sum is written."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qpaged.arrays._indices import clip_to_int32
from qpaged.arrays._quantized import QuantizedArray
from qpaged.arrays._scatter import gather_rows, group_by_block
from qpaged.arrays._writes import channel_axis_of_rows, write_rows


def add_rows(
    array: QuantizedArray, axes: Sequence[int], coordinates: Sequence[jax.Array], rows: jax.Array
) -> QuantizedArray:
    """Return ``array`` with ``rows`` added at ``coordinates``, as :func:`write_rows` takes them.

    Rows that go to one place are all added; those out of range are dropped.
    """
    axes = tuple(axes)
    index = jnp.stack([clip_to_int32(along_axis) for along_axis in coordinates], axis=-1)
    _, place = group_by_block(index, tuple(array.shape[axis] for axis in axes))
    total = jax.ops.segment_sum(rows.astype(jnp.float32), place, rows.shape[0])[place]
    return write_rows(array, axes, coordinates, _read_rows(array, axes, index) + total)


def _read_rows(array: QuantizedArray, axes: tuple[int, ...], index: jax.Array) -> jax.Array:
    """Return the values at ``index``, float32 [rows, *extents of the other axes]."""
    block = jnp.array([array.block[axis] for axis in axes], jnp.int32)
    parts = array.parts.map(lambda part: gather_rows(part, axes, index // block))
    codes = gather_rows(array.codes, axes, index)
    return array.like(codes, parts, channel_axis=channel_axis_of_rows(array, axes)).dequantize()
