"""Handlers of JAX primitives that join several arrays of a cache, or take one apart."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
from jax import lax

from qpaged._promotion import promoting_ranks
from qpaged.arrays import _exact_reads, _moves
from qpaged.arrays._deferred import Deferred, defer
from qpaged.arrays._explicit import on_explicit_meshes
from qpaged.arrays._handlers import LAST, are_alike, if_it_exists, or_not_implemented
from qpaged.arrays._joined import Joined, part_by_part
from qpaged.arrays._lazily import LAZILY, lazily
from qpaged.arrays._partly_exact import PartlyExact
from qpaged.arrays._quantized import QuantizedArray
from qpaged.arrays._repeated import Repeated
from qpaged.implicit import ImplicitArray, primitive_handler

if TYPE_CHECKING:
    Operand: TypeAlias = Any
else:
    Operand = object  # what qax dispatches on as anything whatever


@primitive_handler("concatenate", precedence=LAST)
def _concatenate(primitive, array: Operand, *rest: Operand, dimension, **params):
    arrays = (array, *rest)
    if are_alike(arrays):
        whole = _concatenate_codes(primitive, *arrays, dimension=dimension)
        if whole is not NotImplemented:
            return whole
    if _mixes_pieces(arrays, dimension):
        return defer(primitive, arrays, {"dimension": dimension})
    if all(isinstance(array, Joined) for array in arrays):
        return part_by_part(primitive, arrays, {"dimension": dimension})
    if all(isinstance(array, PartlyExact) and array.tokens != dimension for array in arrays):
        return _exact_reads.concatenate(primitive, *arrays, dimension=dimension)
    lazy = QuantizedArray | PartlyExact | Repeated | Joined | Deferred
    others = [array for array in arrays if not isinstance(array, lazy)]
    if not LAZILY or any(isinstance(other, ImplicitArray) for other in others):
        return NotImplemented
    return Joined(arrays, dimension - array.ndim)


def _mixes_pieces(arrays: Sequence[Operand], dimension: int) -> bool:
    """Return True if arrays are joined along channels, or another axis along which none is cut."""
    for array in arrays:
        if isinstance(array, Deferred):
            return dimension != array.axis % array.ndim
    return all(isinstance(array, QuantizedArray) and dimension == array.channels for array in arrays)


@promoting_ranks
@on_explicit_meshes
def _concatenate_codes(primitive: Any, *arrays: QuantizedArray, dimension: int) -> Any:
    return or_not_implemented(_moves.concatenate(arrays, dimension))


@primitive_handler(if_it_exists("stack"), precedence=LAST)
def _stack(primitive, array: Operand, *rest: Operand, axis, **params):
    arrays = (array, *rest)
    if are_alike(arrays):
        return _stack_codes(primitive, *arrays, axis=axis)
    if all(isinstance(array, PartlyExact) for array in arrays):
        return _exact_reads.stack(primitive, *arrays, axis=axis, **params)
    return defer(primitive, arrays, {"axis": axis, **params})


@on_explicit_meshes
def _stack_codes(primitive: Any, *arrays: QuantizedArray, axis: int) -> Any:
    return _moves.stack(arrays, axis)


@primitive_handler(if_it_exists("split"))
def _split(primitive, array: QuantizedArray | PartlyExact | Joined | Deferred, *, sizes, axis, **params):
    return _slices(array, sizes, axis)


@primitive_handler(if_it_exists("unstack"))
def _unstack(primitive, array: QuantizedArray | PartlyExact | Joined | Deferred, *, axis, **params):
    return _elements(array, axis)


@lazily
def _slices(array: jax.Array, sizes: Sequence[int], axis: int) -> list[jax.Array]:
    ends = list(itertools.accumulate(sizes))
    starts = [0, *ends[:-1]]
    return [lax.slice_in_dim(array, *bounds, axis=axis) for bounds in zip(starts, ends, strict=True)]


@lazily
def _elements(array: jax.Array, axis: int) -> list[jax.Array]:
    return [lax.squeeze(element, (axis,)) for element in _slices(array, [1] * array.shape[axis], axis)]
