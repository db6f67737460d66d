"""dynamic_update_slice and scatter, brought to rows: each writes windows of an operand.

A window covers each axis wholly, or from a start known only at run time. Axes of the second kind are
indexed: every element of the window along them becomes a row of its own.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import GatherScatterMode, ScatterDimensionNumbers

from qpaged._compat import operand_batching_dims, scatter_indices_batching_dims
from qpaged.arrays import _moves, _reshape
from qpaged.arrays._indices import clip_to_int32
from qpaged.arrays._moves import clamp_start
from qpaged.arrays._quantize import overwrite
from qpaged.arrays._quantized import QuantizedArray
from qpaged.arrays._rows import CacheArray, may_put_rows, put_rows

Update = jax.Array | QuantizedArray
Put: TypeAlias = Callable[..., CacheArray]
"""put(array, axes, coordinates, rows): what is done with rows, ``put_rows`` or ``add_rows``."""


def dynamic_update_slice(array: CacheArray, update: Update, start: Sequence[jax.Array]) -> CacheArray | None:
    """Return ``lax.dynamic_update_slice``, which quantizes what it writes; the start is clamped, as there.

    None where the format cannot be written to in such windows.
    """
    if update.shape == array.shape and isinstance(array, QuantizedArray):
        return overwrite(array, update)
    starts = jnp.stack(clamp_start(start, array.shape, update.shape))[None]
    return _write_windows(array, starts, _reshape_update(update, (1, *update.shape)))


def scatter(
    array: CacheArray,
    index: jax.Array,
    updates: Update,
    numbers: ScatterDimensionNumbers,
    mode: GatherScatterMode,
    put: Put = put_rows,
) -> CacheArray | None:
    """Return ``lax.scatter``, windows and batching dimensions included; with ``add_rows``, ``scatter_add``.

    None where the format cannot be written to in such windows.
    """
    batching = operand_batching_dims(numbers)
    scatter_dims = [axis for axis in range(updates.ndim) if axis not in numbers.update_window_dims]
    count = math.prod(updates.shape[axis] for axis in scatter_dims)
    window = [updates.shape[axis] for axis in numbers.update_window_dims]
    for axis in sorted((*numbers.inserted_window_dims, *batching)):
        window.insert(axis, 1)

    starts = jnp.zeros((*index.shape[:-1], array.ndim), jnp.int32)
    for column, axis in enumerate(numbers.scatter_dims_to_operand_dims):
        starts = starts.at[..., axis].set(clip_to_int32(index[..., column]))
    for axis, index_axis in zip(batching, scatter_indices_batching_dims(numbers), strict=True):
        along = lax.broadcasted_iota(jnp.int32, index.shape[:-1], index_axis)
        starts = starts.at[..., axis].set(along)
    starts = _in_bounds(starts.reshape(count, array.ndim), array.shape, window, mode)

    windows_last = _transpose_update(updates, (*scatter_dims, *numbers.update_window_dims))
    return _write_windows(array, starts, _reshape_update(windows_last, (count, *window)), put)


def _in_bounds(
    starts: jax.Array,  # [count, ndim]
    shape: Sequence[int],
    window: Sequence[int],
    mode: GatherScatterMode,
) -> jax.Array:
    """Return starts clamped or, where any is out of range, moved past the end along every axis."""
    last_start = jnp.array([length - size for length, size in zip(shape, window, strict=True)], jnp.int32)
    if mode == GatherScatterMode.CLIP:
        return jnp.clip(starts, 0, last_start)
    inside = jnp.all((starts >= 0) & (starts <= last_start), axis=-1, keepdims=True)
    return jnp.where(inside, starts, jnp.array(shape, jnp.int32))


def _write_windows(
    array: CacheArray,
    starts: jax.Array,  # [count, ndim]
    windows: Update,  # [count, *window]
    put: Put = put_rows,
) -> CacheArray | None:
    """Return ``array`` with ``windows`` written at ``starts``; None where the format cannot be."""
    window = windows.shape[1:]
    # Where a window covers the array, the first axis is indexed all the same: it may still be out of range.
    indexed = [axis for axis in range(array.ndim) if window[axis] != array.shape[axis]] or [0]
    if not may_put_rows(array, indexed):
        return None
    kept = [axis for axis in range(array.ndim) if axis not in indexed]
    sizes = [window[axis] for axis in indexed]
    coordinates = []
    for column, axis in enumerate(indexed):
        begin = starts[:, axis].reshape(-1, *[1] * len(indexed))
        along = begin + lax.broadcasted_iota(jnp.int32, (1, *sizes), column + 1)
        coordinates.append(jnp.broadcast_to(along, (starts.shape[0], *sizes)).reshape(-1))
    order = (0, *(axis + 1 for axis in (*indexed, *kept)))
    row_shape = (coordinates[0].shape[0], *(window[axis] for axis in kept))
    rows = _reshape_update(_transpose_update(windows, order), row_shape)
    return put(array, indexed, coordinates, rows)


def _transpose_update(update: Update, order: Sequence[int]) -> Update:
    if isinstance(update, QuantizedArray):
        return _moves.transpose(update, order)
    return lax.transpose(update, order)


def _reshape_update(update: Update, shape: Sequence[int]) -> Update:
    if not isinstance(update, QuantizedArray):
        return lax.reshape(update, shape)
    reshaped = _reshape.reshape(update, shape)
    return lax.reshape(update.materialize(), shape) if reshaped is None else reshaped
