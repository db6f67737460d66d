"""Reads of parts of arrays with exact pages: of sequences with all their tokens, or of some tokens.

Those of some tokens have no exact pages: they are chosen from codes and rows, which is deferred to the dot
that reads them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import GatherDimensionNumbers, GatherScatterMode

from qpaged._compat import Primitive, operand_batching_dims
from qpaged.arrays._exact_places import NO_PAGE
from qpaged.arrays._exact_reads import axes_of_one, bind_lazily, move
from qpaged.arrays._explicit import array_handler
from qpaged.arrays._indices import clip_to_int32
from qpaged.arrays._lazily import lazily
from qpaged.arrays._partly_exact import PartlyExact
from qpaged.implicit import ImplicitArray

if TYPE_CHECKING:
    Operand: TypeAlias = Any
else:
    Operand = object  # what qax dispatches on as anything whatever


@array_handler("slice")
def _slice(primitive, array: PartlyExact, *, start_indices, limit_indices, strides, **params):
    tokens = array.tokens
    steps = strides or (1,) * array.ndim
    bounds = start_indices[tokens], limit_indices[tokens], steps[tokens]
    starts, limits, whole_steps = list(start_indices), list(limit_indices), list(steps)
    keeps_beginning = bounds[0] == 0 and bounds[2] == 1
    if not keeps_beginning:
        starts[tokens], limits[tokens], whole_steps[tokens] = 0, array.shape[tokens], 1
    moved = {"start_indices": tuple(starts), "limit_indices": tuple(limits), "strides": tuple(whole_steps)}
    part = move(primitive, array, moved | params)
    if keeps_beginning:
        return part
    codes = lazily(lambda codes: lax.slice_in_dim(codes, *bounds, axis=tokens))(part.codes)
    return _choose(part, jnp.arange(*bounds, dtype=jnp.int32), codes)


@array_handler("dynamic_slice")
def _dynamic_slice(primitive, array: PartlyExact, *start, slice_sizes, **params):
    tokens, count = array.tokens, slice_sizes[array.tokens]
    sizes, starts = list(slice_sizes), list(start)
    sizes[tokens], starts[tokens] = array.shape[tokens], jnp.zeros_like(start[tokens])
    part = _slice_sequences(primitive, array, starts, sizes, params)
    if count == array.shape[tokens]:
        return part
    begin = jnp.clip(clip_to_int32(start[tokens]), 0, array.shape[tokens] - count)
    codes = lazily(lambda codes: lax.dynamic_slice_in_dim(codes, begin, count, axis=tokens))(part.codes)
    return _choose(part, begin + jnp.arange(count, dtype=jnp.int32), codes)


def _slice_sequences(
    primitive: Primitive,
    array: PartlyExact,
    starts: Sequence[jax.Array],
    sizes: Sequence[int],
    params: Mapping[str, Any],
) -> PartlyExact:
    """Return what lies from ``starts`` on, with all tokens."""

    def cut(part: Operand, starts: Sequence[jax.Array], sizes: Sequence[int]) -> Any:
        return bind_lazily(primitive, [part, *starts], {"slice_sizes": tuple(sizes), **params})

    rows_sizes = list(sizes)
    rows_sizes[array.tokens] = array.rows.shape[array.tokens]
    page_starts, page_sizes = list(starts), list(sizes)
    for axis in axes_of_one(array):
        page_starts[axis], page_sizes[axis] = jnp.zeros_like(starts[axis]), array.page.shape[axis]
    return array.like(
        cut(array.codes, starts, sizes),
        cut(array.rows, starts, rows_sizes),
        cut(array.page, page_starts, page_sizes),
    )


def _choose(array: PartlyExact, token: jax.Array, codes: Operand) -> Any:
    """Return the tokens of an array whose numbers are ``token``, one axis of which are ``codes``."""
    places, axis = array.places, array.tokens
    page, place, row = places.of_token(token)
    number = lax.expand_dims(page, [other for other in range(array.ndim) if other != axis])
    is_exact = jnp.take(array.page, place, axis=axis) == number
    rows = lazily(lambda rows: jnp.take(rows, row, axis=axis))(array.rows)
    return _select(is_exact, rows, codes)


@lazily
def _select(is_exact: jax.Array, rows: Operand, codes: Operand) -> Any:
    return lax.select(jnp.broadcast_to(is_exact, codes.shape), rows, codes)


@array_handler("gather")
def _gather(primitive, array: PartlyExact, index: Operand, *, dimension_numbers, slice_sizes, **params):
    tokens, numbers = array.tokens, dimension_numbers
    removed = {*numbers.collapsed_slice_dims, *operand_batching_dims(numbers)}
    named = {*numbers.start_index_map, *removed}
    lanes = [axis for axis in axes_of_one(array) if axis != tokens]
    if isinstance(index, ImplicitArray) or named.intersection(lanes):
        return NotImplemented

    def gather(part: Operand, index: jax.Array, whole: Sequence[int] = ()) -> Any:
        sizes = [part.shape[axis] if axis in whole else size for axis, size in enumerate(slice_sizes)]
        given = {"dimension_numbers": numbers, "slice_sizes": tuple(sizes), **params}
        if part is array.page:
            given["fill_value"] = NO_PAGE
        return bind_lazily(primitive, [part, index], given)

    if tokens in numbers.start_index_map and tokens in removed:
        return _gather_tokens(gather, array, index, numbers, params["mode"])
    if tokens in named or slice_sizes[tokens] != array.shape[tokens]:
        return NotImplemented
    windows = [axis for axis in range(array.ndim) if axis not in removed]
    return array.like(
        gather(array.codes, index),
        gather(array.rows, index, [tokens]),
        gather(array.page, index, [tokens, *lanes]),
        numbers.offset_dims[windows.index(tokens)],
    )


def _gather_tokens(
    gather: Callable[..., Any],
    array: PartlyExact,
    index: jax.Array,
    numbers: GatherDimensionNumbers,
    mode: GatherScatterMode,
) -> Any:
    """Return single tokens: ``gather(part, index)`` with what says where each part has them."""
    places, column = array.places, numbers.start_index_map.index(array.tokens)
    index = clip_to_int32(index)
    token = index[..., column]
    if mode == GatherScatterMode.CLIP:
        token = jnp.clip(token, 0, places.length - 1)
    page, place, row = places.of_token(token)
    codes = gather(array.codes, index)
    rows = gather(array.rows, index.at[..., column].set(row))
    lanes = [axis for axis in axes_of_one(array) if axis != array.tokens]
    held = gather(array.page, index.at[..., column].set(place), lanes)
    page = lax.expand_dims(page, numbers.offset_dims)
    return _select((held == page) & (page >= 0), rows, codes)
