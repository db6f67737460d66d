"""Handlers of JAX primitives for QuantizedArray under ``use_implicit_args``.

A handler returns NotImplemented for what it cannot keep quantized; the array is then materialized, and the
user warned. Handlers take ``**params``, because primitives gain parameters over time.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from qpaged._compat import primitive_exists, reshard_primitives
from qpaged._promotion import promoting_ranks
from qpaged.arrays import (
    _dot,
    _exact_reads,
    _masks,
    _moves,
    _one_hot,
    _placement,
    _read_format,
    _windows,
)
from qpaged.arrays._deferred import defer
from qpaged.arrays._explicit import array_handler, on_explicit_meshes
from qpaged.arrays._gather import gather
from qpaged.arrays._lazily import LAZILY
from qpaged.arrays._partly_exact import PartlyExact
from qpaged.arrays._quantized import QuantizedArray
from qpaged.arrays._repeated import Repeated, stretched_axes
from qpaged.arrays._reshape import reshape
from qpaged.arrays._rows import add_rows
from qpaged.arrays._writes import is_writable
from qpaged.implicit import ImplicitArray, default_handler, primitive_handler
from qpaged.implicit._origins import is_zeros, unstretched

if TYPE_CHECKING:
    Operand: TypeAlias = Any
else:
    Operand = object  # what qax dispatches on as anything whatever


F = TypeVar("F", bound=Callable[..., Any])

LAST = -1  # the precedence of handlers of any operands, which must not stand in the way of others


def _deferring_handler(primitives: Any) -> Callable[[F], F]:
    """Register a function as `array_handler` does; what it leaves is deferred, where that can be."""

    def decorate(function: F) -> F:
        handle = promoting_ranks(on_explicit_meshes(function))

        @functools.wraps(function)
        def handle_or_defer(primitive: Any, *operands: Any, **params: Any) -> Any:
            out = handle(primitive, *operands, **params)
            return defer(primitive, operands, params) if out is NotImplemented else out

        primitive_handler(primitives)(handle_or_defer)
        return function

    return decorate


def if_it_exists(name: str) -> list[str]:
    """Return the primitive's name in a list, which is empty where this JAX has no such primitive."""
    return [name] if primitive_exists(name) else []


def or_not_implemented(moved: Any) -> Any:
    """Return what a move made, or NotImplemented where it could not without decoding."""
    return NotImplemented if moved is None else moved


@array_handler("transpose")
def _transpose(primitive, array: QuantizedArray, *, permutation, **params):
    return _moves.transpose(array, permutation)


@_deferring_handler("reshape")
def _reshape(primitive, array: QuantizedArray, *rest, new_sizes, dimensions=None, **params):
    if dimensions is not None:
        return NotImplemented
    return or_not_implemented(reshape(array, new_sizes))


@array_handler("broadcast_in_dim")
def _broadcast(primitive, array: QuantizedArray, *rest, shape, broadcast_dimensions, **params):
    unstretched, stretched = stretched_axes(array, shape, broadcast_dimensions)
    if not LAZILY or len(stretched) != 1 or shape[stretched[0]] == 0:
        return or_not_implemented(_moves.broadcast_in_dim(array, shape, broadcast_dimensions))
    once = _moves.broadcast_in_dim(array, unstretched, broadcast_dimensions)
    if once is None:
        return NotImplemented
    return Repeated(once, stretched[0] - len(shape), shape[stretched[0]])


@array_handler("squeeze")
def _squeeze(primitive, array: QuantizedArray, *, dimensions, **params):
    return _moves.squeeze(array, dimensions)


@array_handler(if_it_exists("copy"))
def _copy(primitive, array: QuantizedArray, **params):
    return array


@array_handler(if_it_exists("sharding_constraint"))
def _constrain(primitive, array: QuantizedArray, *, sharding, **params):
    return or_not_implemented(_placement.place(array, sharding, lax.with_sharding_constraint))


@primitive_handler(reshard_primitives())
def _reshard(primitive, array: QuantizedArray, *, dst_sharding, **params):
    """Place the array on the mesh as it is from here on: where `auto_axes` begins or ends, say."""

    def put(part: jax.Array, sharding: Any) -> jax.Array:
        return default_handler(primitive, part, dst_sharding=sharding, **params)

    return or_not_implemented(_placement.place(array, dst_sharding, put))


@array_handler(if_it_exists("device_put"))
def _device_put(primitive, array: QuantizedArray, *rest: Operand, devices=(), **params):
    if rest or len(devices) != 1:
        return NotImplemented
    placed = _placement.place(array, devices[0], jax.device_put)
    return NotImplemented if placed is None else [placed]


@array_handler(if_it_exists("reduce_precision"))
def _reduce_precision(primitive, array: QuantizedArray, *, exponent_bits, mantissa_bits, **params):
    """Convert to the dtype of that precision and back, which leaves codes and scales."""
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        info = jnp.finfo(dtype)
        if (info.nexp, info.nmant) == (exponent_bits, mantissa_bits):
            return _read_format.convert(_read_format.convert(array, dtype), array.dtype)
    return NotImplemented


@array_handler("rev")
def _reverse(primitive, array: QuantizedArray, *, dimensions, **params):
    return or_not_implemented(_moves.reverse(array, dimensions))


@array_handler("pad")
def _pad(primitive, array: QuantizedArray, value: Operand, *, padding_config, **params):
    if not any(any(widths) for widths in padding_config):
        return array
    return or_not_implemented(_moves.pad(array, padding_config)) if is_zeros(value) else NotImplemented


@array_handler("convert_element_type")
def _convert(primitive, array: QuantizedArray, *, new_dtype, **params):
    if not jnp.issubdtype(new_dtype, jnp.floating):
        return NotImplemented
    return _read_format.convert(array, new_dtype)


@_deferring_handler("slice")
def _slice(primitive, array: QuantizedArray, *, start_indices, limit_indices, strides, **params):
    return or_not_implemented(_moves.slice_(array, start_indices, limit_indices, strides))


@array_handler("dynamic_slice")
def _dynamic_slice(primitive, array: QuantizedArray, *start, slice_sizes, **params):
    return or_not_implemented(_moves.dynamic_slice(array, start, slice_sizes))


@array_handler("gather")
def _gather(
    primitive, array: QuantizedArray, index, *, dimension_numbers, slice_sizes, mode, fill_value, **params
):
    return or_not_implemented(gather(array, index, dimension_numbers, slice_sizes, mode, fill_value))


@array_handler(if_it_exists("tile"))
def _tile(primitive, array: QuantizedArray, *, reps, **params):
    if 0 in reps:
        return NotImplemented
    return or_not_implemented(_moves.tile(array, reps))


@primitive_handler("select_n", precedence=LAST)
def _select(primitive, which: Operand, *cases: Operand, **params):
    if any(isinstance(case, PartlyExact) for case in cases):
        return _exact_reads.select(primitive, which, *cases, **params)
    out = _select_codes(primitive, which, *cases)
    return defer(primitive, (which, *cases), params) if out is NotImplemented else out


@promoting_ranks
@on_explicit_meshes
def _select_codes(primitive, which: Operand, *cases: Operand):
    if not are_alike(cases):
        kept = _keep_or_zero(which, cases)
        return or_not_implemented(_one_hot.select(which, cases) if kept is None else kept)
    if jnp.ndim(which) == 0:
        return _moves.select(which, cases)
    return or_not_implemented(_masks.select(unstretched(which), cases))


def _keep_or_zero(which: Operand, cases: Sequence[Operand]) -> QuantizedArray | None:
    """Return the one case that is quantized where ``which`` chooses it, and zeros where it chooses others."""
    quantized = [index for index, case in enumerate(cases) if isinstance(case, QuantizedArray)]
    others = [case for case in cases if not isinstance(case, QuantizedArray)]
    if len(quantized) != 1 or not all(map(is_zeros, others)):
        return None
    (index,) = quantized
    mask = unstretched(which).astype(jnp.int32) == index
    if jnp.ndim(mask) == 0:
        mask = jnp.reshape(mask, (1,) * cases[index].ndim)
    return _masks.keep(cases[index], mask)


def are_alike(arrays: Sequence[Any]) -> TypeGuard[Sequence[QuantizedArray]]:
    """Return True if all are quantized, in one format and dtype."""
    kinds = set()
    for array in arrays:
        if not isinstance(array, QuantizedArray):
            return False
        kinds.add((array.quantizer, array.dtype, array.ndim, array.channel_axis, array.offset is None))
    return len(kinds) == 1


@_deferring_handler("mul")
def _multiply(primitive, array: QuantizedArray, factor: Operand, **params):
    if _is_scalar(factor, array):
        return _read_format.multiply_by_scalar(array, jnp.reshape(factor, ()))
    if _stretches(factor, array):
        return NotImplemented
    cleared = _one_hot.multiply(array, factor)
    if cleared is not None:
        return cleared
    if isinstance(factor, ImplicitArray):
        return NotImplemented
    return or_not_implemented(_masks.multiply(array, unstretched(factor)))


@_deferring_handler("add")
def _add(primitive, array: QuantizedArray, row: Operand, **params):
    return NotImplemented if _stretches(row, array) else or_not_implemented(_one_hot.add(array, row))


@_deferring_handler("div")
def _divide(primitive, array: QuantizedArray, divisor: Operand, **params):
    if not _is_scalar(divisor, array):
        return NotImplemented
    factor = 1 / jnp.reshape(divisor, ()).astype(jnp.float32)
    return _read_format.multiply_by_scalar(array, factor)


@primitive_handler(["max", "min", "sub"])
def _arithmetic_left(primitive, array: QuantizedArray, other: Operand, **params):
    return defer(primitive, (array, other), params)


@primitive_handler(["div", "sub"])
def _arithmetic_right(primitive, other: Operand, array: QuantizedArray, **params):
    return defer(primitive, (other, array), params)


@primitive_handler(["div", "sub"])
def _arithmetic_both(primitive, array: QuantizedArray, other: QuantizedArray, **params):
    return defer(primitive, (array, other), params)


@array_handler("neg")
def _negate(primitive, array: QuantizedArray, **params):
    return _read_format.multiply_by_scalar(array, jnp.float32(-1))


@array_handler("dot_general")
def _dot_left(primitive, lhs: QuantizedArray, rhs: Operand, *, dimension_numbers, **params):
    return _dot.dot_general(lhs, rhs, dimension_numbers, **params)


@array_handler("dot_general")
def _dot_right(primitive, lhs: Operand, rhs: QuantizedArray, *, dimension_numbers, **params):
    return _dot.dot_general(lhs, rhs, dimension_numbers, **params)


@array_handler("dot_general")
def _dot_both(primitive, lhs: QuantizedArray, rhs: QuantizedArray, *, dimension_numbers, **params):
    return _dot.dot_general(lhs, rhs, dimension_numbers, **params)


@array_handler("dynamic_update_slice")
def _update(primitive, array: QuantizedArray, update: Operand, *start: Operand, **params):
    if not is_writable(array):
        return NotImplemented
    return or_not_implemented(_windows.dynamic_update_slice(array, update, start))


@array_handler("scatter")
def _scatter(
    primitive, array: QuantizedArray, index: Operand, updates: Operand, *, dimension_numbers, mode, **params
):
    if not is_writable(array):
        return NotImplemented
    return or_not_implemented(_windows.scatter(array, index, updates, dimension_numbers, mode))


@array_handler("scatter_add")
def _scatter_add(
    primitive, array: QuantizedArray, index: Operand, updates: Operand, *, dimension_numbers, mode, **params
):
    if isinstance(updates, ImplicitArray) or not is_writable(array):
        return NotImplemented
    return or_not_implemented(_windows.scatter(array, index, updates, dimension_numbers, mode, put=add_rows))


def _is_scalar(factor: Operand, array: QuantizedArray) -> bool:
    """Return True if a product with ``factor`` has the array's shape and one factor for all elements."""
    if isinstance(factor, QuantizedArray):
        return False
    return jnp.ndim(factor) == 0 or (jnp.size(factor) == 1 and array.size > 1)


def _stretches(other: Operand, array: QuantizedArray) -> bool:
    """Return True if arithmetic with ``other`` repeats an array that is 1 long along an axis."""
    return jnp.broadcast_shapes(array.shape, jnp.shape(other)) != array.shape
