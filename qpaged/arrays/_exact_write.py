"""Writes to arrays with exact pages: each page that is written to is quantized anew, from all its rows."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qpaged._promotion import promoting_ranks
from qpaged.arrays._indices import clip_to_int32
from qpaged.arrays._partly_exact import PartlyExact, quantize_written
from qpaged.arrays._quantize import quantize
from qpaged.arrays._quantized import QuantizedArray
from qpaged.arrays._scatter import (
    Axes,
    gather_blocks,
    gather_rows,
    group_by_block,
    scatter_blocks,
    scatter_rows,
)
from qpaged.arrays._writes import is_writable, rows_at
from qpaged.implicit import ImplicitArray

MOST_ROWS = 128  # of one turn: each row may be in a page of its own, all of which is read and written


def takes_exact_rows(array: PartlyExact, axes: Sequence[int]) -> bool:
    """Return True if rows that name a coordinate along each of ``axes`` can be written."""
    parts = array.codes, array.rows
    if not all(isinstance(part, QuantizedArray) and is_writable(part) for part in parts):
        return False
    lanes = [axis for axis in axes if axis != array.tokens]
    of_lanes = all(array.page.shape[axis] == array.shape[axis] for axis in lanes)
    return of_lanes and array.places.length % array.places.page_size == 0


@promoting_ranks
def write_exact_rows(
    array: PartlyExact, axes: Sequence[int], coordinates: Sequence[jax.Array], rows: Any
) -> PartlyExact:
    """Return ``array`` with rows written at ``coordinates`` along ``axes``; those out of range are dropped.

    Args:
        array: one that :func:`takes_exact_rows` along ``axes``.
        axes: the indexed axes, ascending.
        coordinates: one (rows,) integer array for each of ``axes``.
        rows: (rows, *extents of the other axes in order), plain or implicit.

    A page to which rows go is exact from then on, in place of the one that was held there; what it held
    before is read from the codes if it was not exact. Pages that stay zeros do not count as written.
    """
    if isinstance(rows, ImplicitArray):
        rows = rows.materialize()
    rows = lax.stop_gradient(jnp.asarray(rows)).astype(array.dtype)
    index = jnp.stack([clip_to_int32(along_axis) for along_axis in coordinates], axis=-1)
    axes = tuple(axes)
    if array.tokens not in axes:
        axes, index, rows = _token_by_token(array, axes, index, rows)
    count = rows.shape[0]
    if not isinstance(count, int) or 0 < count <= MOST_ROWS:  # a symbol, of an exported program, is one turn
        return _write(array, axes, index, rows)
    turns = -(-count // MOST_ROWS)
    missing = turns * MOST_ROWS - count
    index = jnp.pad(index, [(0, missing), (0, 0)], constant_values=np.iinfo(np.int32).max)
    rows = jnp.pad(rows, [(0, missing), *[(0, 0)] * (rows.ndim - 1)])
    turn_of = [part.reshape(turns, MOST_ROWS, *part.shape[1:]) for part in (index, rows)]

    def turn(array: PartlyExact, part: Sequence[jax.Array]) -> tuple[PartlyExact, None]:
        return _write(array, axes, *part), None

    return lax.scan(turn, array, turn_of)[0]


def read_exact_rows(array: PartlyExact, axes: Axes, index: jax.Array) -> jax.Array:
    """Return the values at ``index`` along ``axes``, that of the tokens included, as :func:`rows_at` does."""
    places, column = array.places, axes.index(array.tokens)
    page, place, row = places.of_token(index[:, column])
    row_index = index.at[:, column].set(row)
    held = gather_rows(array.page, axes, index.at[:, column].set(place))
    return jnp.where(
        held == page.reshape(-1, *[1] * (held.ndim - 1)),
        rows_at(array.rows, axes, row_index).dequantize(),
        rows_at(array.codes, axes, index).dequantize(),
    )


def _token_by_token(
    array: PartlyExact, axes: Axes, index: jax.Array, rows: jax.Array
) -> tuple[Axes, jax.Array, jax.Array]:
    """Return rows that hold all tokens as one row for each token."""
    before = sum(axis < array.tokens for axis in axes)
    length, count = array.places.length, rows.shape[0]
    rows = jnp.moveaxis(rows, 1 + array.tokens - before, 1)
    index = jnp.repeat(index, length, axis=0)
    index = jnp.insert(index, before, jnp.tile(jnp.arange(length, dtype=jnp.int32), count), axis=1)
    return (*axes[:before], array.tokens, *axes[before:]), index, rows.reshape(-1, *rows.shape[2:])


def _write(array: PartlyExact, axes: Axes, index: jax.Array, rows: jax.Array) -> PartlyExact:
    """Return ``array`` with a few rows written, whose pages are read, changed and quantized."""
    tokens, places, column = array.tokens, array.places, axes.index(array.tokens)
    codes, exact, page = array.codes, array.rows, array.page
    grid = tuple(places.length // places.page_size if axis == tokens else codes.shape[axis] for axis in axes)
    page_of_index = index.at[:, column].set(index[:, column] // places.page_size)
    page_index, page_of_row = group_by_block(page_of_index, grid)
    number = page_index[:, column]
    is_inside = page_index[:, 0] < grid[0]
    place_index = page_index.at[:, column].set(jnp.where(is_inside, places.of_page(number), places.num_pages))

    # One page each [pages, *shape], with 1 along the indexed axes but that of the tokens.
    numbers = number.reshape(-1, *[1] * array.ndim)
    is_held = gather_blocks(page, axes, [1] * array.ndim, place_index) == numbers
    before = jnp.where(
        is_held, _pages_at(exact, array, axes, place_index), _pages_at(codes, array, axes, page_index)
    )
    where = [jnp.zeros_like(page_of_row)] * len(axes)
    where[column] = index[:, column] % places.page_size
    axes_of_pages = (0, *(axis + 1 for axis in axes))
    contents = scatter_rows(before, axes_of_pages, jnp.stack([page_of_row, *where], axis=-1), rows)

    is_written = _any_of_each(contents != 0)
    is_used = is_inside & (is_written | _any_of_each(is_held))
    is_kept = is_used & _is_newest(is_used, place_index, number)
    kept_index = jnp.where(is_kept[:, None], place_index, _shape_along(page, axes))
    # Pages that were zeros and stay so are left alone. Not for their sake: XLA would copy all codes if it did
    # not see that what reads them comes before what writes them.
    is_changed = is_written | _any_of_each(before != 0)
    changed_index = jnp.where(is_changed[:, None], page_index, _shape_along(codes, axes))
    new_codes = quantize_written(contents, codes.quantizer, (1, *codes.block), codes.channel_axis)
    new_exact = quantize(contents, exact.quantizer, [1] * contents.ndim)
    return array.like(
        _with_pages(codes, array, axes, changed_index, new_codes),
        _with_pages(exact, array, axes, kept_index, new_exact),
        scatter_blocks(page, axes, [1] * array.ndim, kept_index, jnp.broadcast_to(numbers, is_held.shape)),
    )


def _shape_along(array: jax.Array | QuantizedArray, axes: Axes) -> jax.Array:
    """Return an index past the end of an array."""
    return jnp.array([array.shape[axis] for axis in axes], jnp.int32)


def _pages_at(part: QuantizedArray, array: PartlyExact, axes: Axes, index: jax.Array) -> jax.Array:
    """Return the pages of a part of ``array`` at ``index``, decoded: [pages, *shape]."""

    def gather(leaf: jax.Array) -> jax.Array:
        return gather_blocks(leaf, axes, _page_extents(leaf, part, array), index)

    return part.like(gather(part.codes), part.parts.map(gather)).dequantize(array.dtype)


def _with_pages(
    part: QuantizedArray, array: PartlyExact, axes: Axes, index: jax.Array, new: QuantizedArray
) -> QuantizedArray:
    """Return a part of ``array`` with the pages at ``index`` replaced."""

    def scatter(leaf: jax.Array, new: jax.Array) -> jax.Array:
        return scatter_blocks(leaf, axes, _page_extents(leaf, part, array), index, new)

    return part.like(scatter(part.codes, new.codes), part.parts.map(scatter, new.parts))


def _page_extents(leaf: jax.Array, part: QuantizedArray, array: PartlyExact) -> list[int]:
    """Return how much of codes or scales a page has along each indexed axis: 1, but of the tokens."""
    extents = [1] * array.ndim
    tokens = array.tokens
    extents[tokens] = array.places.page_size * leaf.shape[tokens] // part.shape[tokens]
    return extents


def _is_newest(is_used: jax.Array, place_index: jax.Array, number: jax.Array) -> jax.Array:
    """Return True for pages than which no later one that is used is held at the same place."""
    same_place = (place_index[:, None] == place_index[None]).all(axis=-1)
    later = number[None] > number[:, None]
    return ~(same_place & later & is_used[None]).any(axis=1)


def _any_of_each(rows: jax.Array) -> jax.Array:
    """Return for each row whether anything in it is True."""
    return rows.reshape(rows.shape[0], -1).any(axis=1)
