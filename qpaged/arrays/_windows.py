"""dynamic_update_slice and scatter, brought to rows: each writes windows of an operand.

A window covers each axis wholly, or from a start known only at run time. Axes of the second kind are
indexed: every element of the window along them becomes a row of its own.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qpaged.arrays import _moves
from qpaged.arrays._indices import clipped
from qpaged.arrays._moves import clamped
from qpaged.arrays._quantized import QuantizedArray
from qpaged.arrays._writes import overwrite, takes_rows, write_rows


def dynamic_update_slice(array: QuantizedArray, update: Any, start: Sequence[Any]) -> QuantizedArray | None:
    """``lax.dynamic_update_slice``: quantizes what it writes; the start is clamped, as there.

    None where the format cannot be written to in such windows.
    """
    if update.shape == array.shape:
        return overwrite(array, update)
    starts = jnp.stack(clamped(start, array.shape, update.shape))[None]
    return _write_windows(array, starts, _reshape(update, (1, *update.shape)))


def scatter(
    array: QuantizedArray, index: jax.Array, updates: Any, numbers: Any, mode: Any
) -> QuantizedArray | None:
    """``lax.scatter``, windows and batching dimensions included.

    None where the format cannot be written to in such windows.
    """
    batched = tuple(getattr(numbers, "operand_batching_dims", ()))
    missing = sorted((*numbers.inserted_window_dims, *batched))
    scatter_dims = [axis for axis in range(updates.ndim) if axis not in numbers.update_window_dims]
    count = int(np.prod([updates.shape[axis] for axis in scatter_dims]))
    window = [updates.shape[axis] for axis in numbers.update_window_dims]
    for axis in missing:
        window.insert(axis, 1)
    order = (*scatter_dims, *numbers.update_window_dims)

    starts = jnp.zeros((*index.shape[:-1], array.ndim), jnp.int32)
    for position, axis in enumerate(numbers.scatter_dims_to_operand_dims):
        starts = starts.at[..., axis].set(clipped(index[..., position]))
    for axis, of in zip(batched, getattr(numbers, "scatter_indices_batching_dims", ()), strict=True):
        starts = starts.at[..., axis].set(lax.broadcasted_iota(jnp.int32, index.shape[:-1], of))
    starts = _in_bounds(starts.reshape(count, array.ndim), array.shape, window, mode)

    return _write_windows(array, starts, _reshape(_transpose(updates, order), (count, *window)))


def _in_bounds(starts: jax.Array, shape: Sequence[int], window: Sequence[int], mode: Any) -> jax.Array:
    """Starts clamped or, where any is out of range, moved past the end along every axis."""
    tops = jnp.array([length - size for length, size in zip(shape, window, strict=True)], jnp.int32)
    if mode == lax.GatherScatterMode.CLIP:
        return jnp.clip(starts, 0, tops)
    inside = jnp.all((starts >= 0) & (starts <= tops), axis=-1, keepdims=True)
    return jnp.where(inside, starts, jnp.array(shape, jnp.int32))


def _write_windows(array: QuantizedArray, starts: jax.Array, windows: Any) -> QuantizedArray | None:
    """``windows`` (count, *window) written at ``starts`` (count, ndim)."""
    window = windows.shape[1:]
    # Where a window covers the array, the first axis is indexed all the same: it may still be out of range.
    indexed = [axis for axis in range(array.ndim) if window[axis] != array.shape[axis]] or [0]
    if not takes_rows(array, indexed):
        return None
    whole = [axis for axis in range(array.ndim) if axis not in indexed]
    sizes = [window[axis] for axis in indexed]
    coordinates = []
    for position, axis in enumerate(indexed):
        along = starts[:, axis].reshape(-1, *[1] * len(indexed))
        along = along + lax.broadcasted_iota(jnp.int32, (1, *sizes), position + 1)
        coordinates.append(jnp.broadcast_to(along, (len(starts), *sizes)).reshape(-1))
    order = (0, *(axis + 1 for axis in (*indexed, *whole)))
    rows = _reshape(_transpose(windows, order), (len(coordinates[0]), *(window[axis] for axis in whole)))
    return write_rows(array, indexed, coordinates, rows)


def _transpose(array: Any, order: Sequence[int]) -> Any:
    return (_moves if isinstance(array, QuantizedArray) else lax).transpose(array, order)


def _reshape(array: Any, shape: Sequence[int]) -> Any:
    if not isinstance(array, QuantizedArray):
        return lax.reshape(array, shape)
    moved = _moves.reshape(array, shape)
    return lax.reshape(array.materialize(), shape) if moved is None else moved
