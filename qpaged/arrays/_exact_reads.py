"""Handlers of JAX primitives for arrays with exact pages: what is done to the codes is done to the rows.

What mixes tokens has no handler, and decodes the array. Reads of some tokens are in
:mod:`qpaged.arrays._exact_tokens`, dots in :mod:`qpaged.arrays._exact_dot`.
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from qpaged._compat import Primitive, operand_batching_dims, reshard_primitives
from qpaged._promotion import promoting_ranks
from qpaged.arrays import _one_hot, _windows
from qpaged.arrays._along_axis import axis_after, params_of_piece
from qpaged.arrays._exact_places import NO_PAGE
from qpaged.arrays._explicit import array_handler, on_explicit_meshes
from qpaged.arrays._lazily import lazily
from qpaged.arrays._partly_exact import PartlyExact
from qpaged.arrays._placement import sharding_of_part
from qpaged.arrays._quantized import QuantizedArray
from qpaged.arrays._reshape import axis_groups
from qpaged.arrays._rows import add_rows
from qpaged.implicit import ImplicitArray, materialize_nested, primitive_handler
from qpaged.implicit._origins import unstretched

if TYPE_CHECKING:
    Operand: TypeAlias = Any
else:
    Operand = object  # what qax dispatches on as anything whatever

BEFORE_JOINED = 4
ARITHMETIC = ["add", "div", "max", "min", "mul", "sub"]


def bind_lazily(primitive: Primitive, operands: Sequence[Operand], params: Mapping[str, Any]) -> Any:
    """Return a primitive's result for operands some of which may be implicit, by their handlers."""
    return lazily(lambda *operands: primitive.bind(*operands, **params))(*operands)


# Moves


@array_handler(["convert_element_type", "neg", "squeeze", "transpose"])
def _move(primitive, array: PartlyExact, **params):
    return move(primitive, array, params)


@array_handler(["broadcast_in_dim", "reshape"])
def _resize(primitive, array: PartlyExact, *rest, **params):
    return NotImplemented if rest else move(primitive, array, params)


def move(primitive: Primitive, array: PartlyExact, params: Mapping[str, Any]) -> Any:
    """Return what a primitive of one operand makes of codes and rows; NotImplemented if it mixes tokens."""
    name, tokens = primitive.name, array.tokens
    after = (
        tokens if _keeps_beginning(name, params, tokens) else axis_after(name, params, array.shape, tokens)
    )
    dtype = params.get("new_dtype", array.dtype)
    if after is None or not jnp.issubdtype(dtype, jnp.floating):
        return NotImplemented
    rows_params = params_of_piece(name, params, after, array.rows.shape[tokens])
    codes = bind_lazily(primitive, [array.codes], params)
    rows = bind_lazily(primitive, [array.rows], rows_params)
    move_page = _PAGE_MOVES.get(name)
    page = array.page if move_page is None else move_page(array, params, after)
    return array.like(codes, rows, page, after)


def _keeps_beginning(name: str, params: Mapping[str, Any], tokens: int) -> bool:
    """Return True for a slice whose tokens are the first ones of the array."""
    if name != "slice":
        return False
    stride = 1 if params["strides"] is None else params["strides"][tokens]
    return (params["start_indices"][tokens], stride) == (0, 1)


def _transpose_page(array: PartlyExact, params: Mapping[str, Any], after: int) -> jax.Array:
    return lax.transpose(array.page, params["permutation"])


def _squeeze_page(array: PartlyExact, params: Mapping[str, Any], after: int) -> jax.Array:
    return lax.squeeze(array.page, params["dimensions"])


def _broadcast_page(array: PartlyExact, params: Mapping[str, Any], after: int) -> jax.Array:
    shape = [1] * len(params["shape"])
    for length, axis in zip(array.page.shape, params["broadcast_dimensions"], strict=True):
        shape[axis] = length
    return lax.broadcast_in_dim(array.page, shape, params["broadcast_dimensions"])


def _reshape_page(array: PartlyExact, params: Mapping[str, Any], after: int) -> jax.Array:
    page, shape = array.page, list(params["new_sizes"])
    shape[after] = page.shape[array.axis]
    for old_axes, new_axes in axis_groups(array.shape, params["new_sizes"]):
        if all(page.shape[axis] == 1 for axis in old_axes):
            for axis in new_axes:
                shape[axis] = 1
        elif array.tokens not in old_axes:
            whole = [array.shape[axis] if axis in old_axes else page.shape[axis] for axis in range(page.ndim)]
            page = jnp.broadcast_to(page, whole)
    return page.reshape(shape)


def _slice_page(array: PartlyExact, params: Mapping[str, Any], after: int) -> jax.Array:
    start, limit = list(params["start_indices"]), list(params["limit_indices"])
    strides = list(params["strides"] or [1] * array.ndim)
    for axis in axes_of_one(array):
        start[axis], limit[axis], strides[axis] = 0, array.page.shape[axis], 1
    return lax.slice(array.page, start, limit, strides)


@primitive_handler(reshard_primitives())
def _reshard(primitive, array: PartlyExact, *, dst_sharding, **params):
    """Place the array on the mesh as it is from here on; if tokens go to several devices, decoded."""
    if (*dst_sharding.spec, *[None] * array.ndim)[array.tokens] is not None:
        return NotImplemented

    def put(part: Operand) -> Any:
        sharding = sharding_of_part(dst_sharding, part.shape)
        return bind_lazily(primitive, [part], {"dst_sharding": sharding, **params})

    return array.like(put(array.codes), put(array.rows), put(array.page))


@array_handler("pad")
def _pad(primitive, array: PartlyExact, value: Operand, *, padding_config, **params):
    """Put zeros behind the tokens."""
    _, behind, between = padding_config[array.tokens]
    widths = [(0, behind if axis == array.tokens else 0, 0) for axis in range(array.ndim)]
    if isinstance(value, ImplicitArray) or between or behind < 0 or list(padding_config) != widths:
        return NotImplemented
    codes = bind_lazily(primitive, [array.codes, value], {"padding_config": padding_config, **params})
    # Pages that were cut off, or cut apart, before are of zeros from here on.
    is_whole = array.page < array.places.length // array.places.page_size
    return array.like(codes, array.rows, jnp.where(is_whole, array.page, NO_PAGE))


_PAGE_MOVES: dict[str, Callable[[PartlyExact, Mapping[str, Any], int], jax.Array]] = {
    "broadcast_in_dim": _broadcast_page,
    "reshape": _reshape_page,
    "slice": _slice_page,
    "squeeze": _squeeze_page,
    "transpose": _transpose_page,
}


def axes_of_one(array: PartlyExact) -> list[int]:
    """Return the axes along which page numbers are the same, and that of the tokens."""
    return [
        axis
        for axis, (count, length) in enumerate(zip(array.page.shape, array.shape, strict=True))
        if axis == array.tokens or count != length
    ]


@on_explicit_meshes
def concatenate(primitive: Primitive, *arrays: PartlyExact, dimension: int) -> Any:
    """Return arrays joined along an axis that is not that of the tokens, part by part."""
    first = arrays[0]
    if not _hold_alike(arrays):
        return NotImplemented
    join = lazily(lambda *parts: lax.concatenate(parts, dimension))
    codes, rows, pages = _parts_of(arrays)
    page = _common_pages(pages) if dimension in axes_of_one(first) else lax.concatenate(pages, dimension)
    return first.like(join(*codes), join(*rows), page, first.tokens)


@on_explicit_meshes
def stack(primitive: Primitive, *arrays: PartlyExact, axis: int, **params: Any) -> Any:
    """Return arrays stacked along a new axis, part by part."""
    if not _hold_alike(arrays):
        return NotImplemented
    first = arrays[0]
    codes, rows, page = [bind_lazily(primitive, part, {"axis": axis, **params}) for part in _parts_of(arrays)]
    return first.like(codes, rows, page, first.tokens + (axis <= first.tokens))


def _hold_alike(arrays: Sequence[PartlyExact]) -> bool:
    """Return True if arrays hold their exact pages at the same places, on the same axes."""
    return len({(array.places, array.axis, array.ndim, tuple(axes_of_one(array))) for array in arrays}) == 1


def _parts_of(arrays: Sequence[PartlyExact]) -> tuple[list[Any], list[Any], list[jax.Array]]:
    """Return codes, rows and page numbers of arrays."""
    return (
        [array.codes for array in arrays],
        [array.rows for array in arrays],
        [array.page for array in arrays],
    )


def _common_pages(pages: Sequence[jax.Array]) -> jax.Array:
    """Return the page numbers that are the same in all arrays, and that of no page where they differ."""
    is_same = functools.reduce(operator.and_, [pages[0] == page for page in pages])
    return jnp.where(is_same, pages[0], NO_PAGE)


# Arithmetic


@array_handler(ARITHMETIC, precedence=BEFORE_JOINED)
def _arithmetic_left(primitive, left: PartlyExact, right: Operand, **params):
    cleared = _write_one_hot(primitive.name, left, right)
    return arithmetic(primitive, [left, right], params) if cleared is None else cleared


@array_handler(ARITHMETIC, precedence=BEFORE_JOINED)
def _arithmetic_right(primitive, left: Operand, right: PartlyExact, **params):
    return arithmetic(primitive, [left, right], params)


@array_handler(ARITHMETIC, precedence=BEFORE_JOINED)
def _arithmetic_both(primitive, left: PartlyExact, right: PartlyExact, **params):
    return arithmetic(primitive, [left, right], params)


def _write_one_hot(name: str, array: PartlyExact, other: Operand) -> Any:
    """Return a row written by arithmetic over all of the array; None where that is not what it does."""
    if _stretches(other, array) or jnp.ndim(other) == 0 or name not in ("add", "mul"):
        return None
    return _one_hot.add(array, other) if name == "add" else _one_hot.multiply(array, other)


def arithmetic(primitive: Primitive, operands: Sequence[Operand], params: Mapping[str, Any]) -> Any:
    """Return what an elementwise primitive makes of codes and of rows; NotImplemented if it stretches them.

    Where operands hold other pages as exact ones, the result holds those that all of them do.
    """
    arrays = [operand for operand in operands if isinstance(operand, PartlyExact)]
    first = arrays[0]
    alike = all(
        (array.shape, array.axis, array.places) == (first.shape, first.axis, first.places) for array in arrays
    )
    others = [operand for operand in operands if not isinstance(operand, PartlyExact)]
    if not alike or any(isinstance(other, ImplicitArray) for other in others):
        return NotImplemented
    if any(_stretches(other, first) for other in others):
        return NotImplemented
    codes = [operand.codes if isinstance(operand, PartlyExact) else operand for operand in operands]
    rows = [
        operand.rows if isinstance(operand, PartlyExact) else _rows_of(first, operand) for operand in operands
    ]
    pages = [array.page for array in arrays]
    return first.like(
        bind_lazily(primitive, codes, params), bind_lazily(primitive, rows, params), _common_pages(pages)
    )


def _stretches(other: jax.Array, array: PartlyExact) -> bool:
    """Return True unless a plain operand is a scalar, or as long as the array or 1 along each axis."""
    if jnp.ndim(other) == 0:
        return False
    return other.ndim != array.ndim or jnp.broadcast_shapes(other.shape, array.shape) != array.shape


def _rows_of(array: PartlyExact, operand: jax.Array) -> jax.Array:
    """Return a plain operand of the array's shape, or of none, at the rows."""
    if jnp.ndim(operand) == 0:
        return operand
    once = unstretched(operand)
    if once.shape[array.tokens] != 1:
        once = array.at_rows(once)
    return jnp.broadcast_to(once, array.rows.shape)


@promoting_ranks
@on_explicit_meshes
def select(primitive: Primitive, which: Operand, *cases: Operand, **params: Any) -> Any:
    """Return what ``select_n`` makes of arrays some of which have exact pages."""
    written = _one_hot.select(which, cases)
    if written is not None:
        return written
    if all(isinstance(case, PartlyExact) for case in cases):
        return _select_sequences(which, cases)
    return arithmetic(primitive, [which, *cases], params)


def _select_sequences(which: jax.Array, cases: Sequence[PartlyExact]) -> Any:
    """Return one of several arrays; for each sequence, but not for each token, another."""
    first = cases[0]
    once = unstretched(which)
    if jnp.ndim(once) and any(once.shape[axis] != 1 for axis in axes_of_one(first)):
        return NotImplemented

    def select(parts: Sequence[jax.Array]) -> jax.Array:
        return lax.select_n(jnp.broadcast_to(once, parts[0].shape), *parts)

    if not _hold_alike(cases):
        return NotImplemented
    return first.like(*[lazily(select)(part) for part in _parts_of(cases)])


# Writes


@array_handler("dynamic_update_slice")
def _update(primitive, array: PartlyExact, update: Operand, *start: Operand, **params):
    if isinstance(update, PartlyExact) and _is_of_whole_sequences(array, update):
        return _update_sequences(array, update, start)
    update = _plain_or_quantized(update)
    written = _windows.dynamic_update_slice(array, update, start)
    return NotImplemented if written is None else written


def _is_of_whole_sequences(array: PartlyExact, update: PartlyExact) -> bool:
    """Return True if an update holds its exact pages as the array does, with all tokens and channels."""
    alike = update.places == array.places and update.axis == array.axis and update.ndim == array.ndim
    return alike and all(update.shape[axis] == array.shape[axis] for axis in axes_of_one(array))


def _plain_or_quantized(update: Operand) -> Operand:
    """Return rows that are written, computed if they are deferred."""
    if isinstance(update, QuantizedArray) or not isinstance(update, ImplicitArray):
        return update
    return materialize_nested(update, full=True)


def _update_sequences(array: PartlyExact, update: PartlyExact, start: Sequence[jax.Array]) -> Any:
    """Return ``array`` with whole sequences put, which keep their exact pages."""
    starts = list(start)
    for axis in axes_of_one(array):
        starts[axis] = jnp.zeros_like(starts[axis])
    shape = list(update.shape)
    for axis in axes_of_one(array):
        shape[axis] = array.page.shape[axis]
    page = jnp.broadcast_to(update.page, shape)
    put = lazily(lax.dynamic_update_slice)
    return array.like(
        put(array.codes, update.codes, start),
        put(array.rows, update.rows, start),
        lax.dynamic_update_slice(array.page, page, starts),
    )


@array_handler("scatter")
def _scatter(primitive, array: PartlyExact, index: Operand, updates: Operand, **params):
    numbers, mode = params["dimension_numbers"], params["mode"]
    if isinstance(updates, PartlyExact):
        put = _scatter_sequences(primitive, array, index, updates, params)
        if put is not NotImplemented:
            return put
    written = _windows.scatter(array, index, _plain_or_quantized(updates), numbers, mode)
    return NotImplemented if written is None else written


def _scatter_sequences(
    primitive: Primitive,
    array: PartlyExact,
    index: jax.Array,
    updates: PartlyExact,
    params: Mapping[str, Any],
) -> Any:
    """Return ``array`` with whole sequences put at ``index``, which keep their exact pages."""
    numbers = params["dimension_numbers"]
    without_window = {*numbers.inserted_window_dims, *operand_batching_dims(numbers)}
    named = {*numbers.scatter_dims_to_operand_dims, *without_window}
    if named & set(axes_of_one(array)) or updates.places != array.places:
        return NotImplemented
    windows = [axis for axis in range(array.ndim) if axis not in without_window]
    update_axis = dict(zip(windows, numbers.update_window_dims, strict=True))
    covers = all(updates.shape[update_axis[axis]] == array.shape[axis] for axis in axes_of_one(array))
    if update_axis[array.tokens] != updates.tokens or not covers:
        return NotImplemented
    parts = []
    for name in ("codes", "rows", "page"):
        operands = [getattr(array, name), index, getattr(updates, name)]
        parts.append(bind_lazily(primitive, operands, params))
    return array.like(*parts)


@array_handler("scatter_add")
def _scatter_add(primitive, array: PartlyExact, index: Operand, updates: Operand, **params):
    if isinstance(updates, ImplicitArray):
        return NotImplemented
    numbers, mode = params["dimension_numbers"], params["mode"]
    written = _windows.scatter(array, index, updates, numbers, mode, put=add_rows)
    return NotImplemented if written is None else written
