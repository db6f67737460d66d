"""What programs do to a QuantizedArray under ``use_implicit_args``, primitive by primitive.

A handler returns NotImplemented for what it cannot keep quantized; the array is then materialized, and the
user warned. Handlers take ``**params``, because primitives gain parameters over time.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import jax.numpy as jnp
from jax import lax

from qpaged.arrays import _dot, _moves, _views, _windows
from qpaged.arrays._quantized import QuantizedArray
from qpaged.arrays._repeated import Repeated
from qpaged.implicit import primitive_handler, provider

if TYPE_CHECKING:
    Operand: TypeAlias = Any
else:
    Operand = object  # what qax dispatches on as anything whatever


REPEATS = provider().name == "qpaged"  # qax does not look into arrays inside of arrays
LAST = -1  # for handlers of any operands, which must not stand in the way of others


def _lazy(moved: Any) -> Any:
    """What was moved, or NotImplemented where it cannot be without being decoded."""
    return NotImplemented if moved is None else moved


def exists(*names: str) -> list[str]:
    """Those of the primitives that this JAX has."""
    return [name for name in names if hasattr(lax, f"{name}_p")]


@primitive_handler("transpose")
def _transpose(primitive, array: QuantizedArray, *, permutation, **params):
    return _moves.transpose(array, permutation)


@primitive_handler("reshape")
def _reshape(primitive, array: QuantizedArray, *rest, new_sizes, dimensions=None, **params):
    return NotImplemented if dimensions is not None else _lazy(_moves.reshape(array, new_sizes))


@primitive_handler("broadcast_in_dim")
def _broadcast(primitive, array: QuantizedArray, *rest, shape, broadcast_dimensions, **params):
    once = [1] * len(shape)
    for axis, place in enumerate(broadcast_dimensions):
        once[place] = array.shape[axis]
    stretched = [axis for axis, n in enumerate(shape) if n != once[axis]]
    lazily = REPEATS and len(stretched) == 1 and shape[stretched[0]] > 0
    moved = _moves.broadcast_in_dim(array, once if lazily else shape, broadcast_dimensions)
    if moved is None or not lazily:
        return _lazy(moved)
    return Repeated(moved, stretched[0] - len(shape), shape[stretched[0]])


@primitive_handler("squeeze")
def _squeeze(primitive, array: QuantizedArray, *, dimensions, **params):
    return _moves.squeeze(array, dimensions)


@primitive_handler(exists("copy"))
def _copy(primitive, array: QuantizedArray, **params):
    return array


@primitive_handler("convert_element_type")
def _convert(primitive, array: QuantizedArray, *, new_dtype, **params):
    floating = jnp.issubdtype(new_dtype, jnp.floating)
    return _views.convert(array, new_dtype) if floating else NotImplemented


@primitive_handler("slice")
def _slice(primitive, array: QuantizedArray, *, start_indices, limit_indices, strides, **params):
    return _lazy(_moves.slice_(array, start_indices, limit_indices, strides))


@primitive_handler(exists("split"))
def _split(primitive, array: QuantizedArray, *, sizes, axis, **params):
    return _lazy(_moves.split(array, sizes, axis))


@primitive_handler("dynamic_slice")
def _dynamic_slice(primitive, array: QuantizedArray, *start, slice_sizes, **params):
    return _lazy(_moves.dynamic_slice(array, start, slice_sizes))


@primitive_handler("gather")
def _gather(
    primitive, array: QuantizedArray, index, *, dimension_numbers, slice_sizes, mode, fill_value, **params
):
    return _lazy(_moves.gather(array, index, dimension_numbers, slice_sizes, mode, fill_value))


@primitive_handler("concatenate", precedence=LAST)
def _concatenate(primitive, array: Operand, *rest: Operand, dimension, **params):
    arrays = (array, *rest)
    return _lazy(_moves.concatenate(arrays, dimension)) if _alike(arrays) else NotImplemented


@primitive_handler(exists("tile"))
def _tile(primitive, array: QuantizedArray, *, reps, **params):
    return NotImplemented if 0 in reps else _lazy(_moves.tile(array, reps))


@primitive_handler(exists("stack"), precedence=LAST)
def _stack(primitive, array: Operand, *rest: Operand, axis, **params):
    arrays = (array, *rest)
    return _moves.stack(arrays, axis) if _alike(arrays) else NotImplemented


@primitive_handler(exists("unstack"))
def _unstack(primitive, array: QuantizedArray, *, axis, **params):
    return _lazy(_moves.unstack(array, axis))


@primitive_handler("select_n", precedence=LAST)
def _select(primitive, which: Operand, *cases: Operand, **params):
    return _moves.select(which, cases) if jnp.ndim(which) == 0 and _alike(cases) else NotImplemented


def _alike(arrays: Sequence[Any]) -> TypeGuard[Sequence[QuantizedArray]]:
    """Whether all are quantized, in one format and dtype."""
    if not all(isinstance(array, QuantizedArray) for array in arrays):
        return False
    return len({(a.quantizer, a.dtype, a.ndim, a.channel_axis, a.offsets is None) for a in arrays}) == 1


@primitive_handler("mul")
def _multiply(primitive, array: QuantizedArray, factor: Operand, **params):
    scalar = _is_scalar(factor, array)
    return _views.scaled(array, jnp.reshape(factor, ())) if scalar else NotImplemented


@primitive_handler("div")
def _divide(primitive, array: QuantizedArray, divisor: Operand, **params):
    scalar = _is_scalar(divisor, array)
    return (
        _views.scaled(array, 1 / jnp.reshape(divisor, ()).astype(jnp.float32)) if scalar else NotImplemented
    )


@primitive_handler("neg")
def _negate(primitive, array: QuantizedArray, **params):
    return _views.scaled(array, jnp.float32(-1))


@primitive_handler("dot_general")
def _dot_left(primitive, lhs: QuantizedArray, rhs: Operand, *, dimension_numbers, **params):
    return _dot.dot_general(lhs, rhs, dimension_numbers, **params)


@primitive_handler("dot_general")
def _dot_right(primitive, lhs: Operand, rhs: QuantizedArray, *, dimension_numbers, **params):
    return _dot.dot_general(lhs, rhs, dimension_numbers, **params)


@primitive_handler("dot_general")
def _dot_both(primitive, lhs: QuantizedArray, rhs: QuantizedArray, *, dimension_numbers, **params):
    return _dot.dot_general(lhs, rhs, dimension_numbers, **params)


@primitive_handler("dynamic_update_slice")
def _update(primitive, array: QuantizedArray, update: Operand, *start: Operand, **params):
    return _lazy(_windows.dynamic_update_slice(array, update, start) if _writable(array) else None)


@primitive_handler("scatter")
def _scatter(
    primitive, array: QuantizedArray, index: Operand, updates: Operand, *, dimension_numbers, mode, **params
):
    return _lazy(
        _windows.scatter(array, index, updates, dimension_numbers, mode) if _writable(array) else None
    )


def _writable(array: QuantizedArray) -> bool:
    """Whether the array is in its format's own form, and not a view that a read made."""
    return array.quantizer.writable and array.offsets is None


def _is_scalar(factor: Operand, array: QuantizedArray) -> bool:
    """Whether a product of the two is the array, scaled."""
    if isinstance(factor, QuantizedArray):
        return False
    return jnp.ndim(factor) == 0 or (jnp.size(factor) == 1 and array.size > 1)
