"""Deferred: arithmetic with a quantized array that is done when a piece of its result is read.

What models make of keys that they store before the rotary embedding: half of the channels times a cosine,
less the other half times a sine. A dot reads it a piece of the length at a time, so that the array is never
decoded whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import PyTreeDef

from qpaged._compat import Location, Primitive, source_line
from qpaged.arrays import _moves
from qpaged.arrays._along_axis import ELEMENTWISE, axis_after, params_of_piece
from qpaged.arrays._dot import Cut, dot_in_pieces, length_of_pieces
from qpaged.arrays._dtypes import are_floats, common_dtype
from qpaged.arrays._explicit import are_explicit
from qpaged.arrays._lazily import LAZILY
from qpaged.arrays._quantized import QuantizedArray
from qpaged.arrays._repeated import Repeated, stretched_axes
from qpaged.arrays._scaled_dot import DotAxes, with_operands_swapped
from qpaged.implicit import ImplicitArray, aux_field, default_handler, primitive_handler
from qpaged.implicit._origins import unstretched

if TYPE_CHECKING:
    Operand: TypeAlias = Any
else:
    Operand = object  # what qax dispatches on as anything whatever

BEFORE_QUANTIZED = 1
MOST_STEPS = 64  # of one array: what is used twice is done twice, and would soon be done thousands of times


@dataclass(frozen=True)
class Operation:
    """A primitive with its parameters, by name, and the line of code that it stands in."""

    primitive: Primitive
    params: tuple[tuple[str, Any], ...]
    location: Location | None = field(compare=False)


@dataclass(eq=False)
class Deferred(ImplicitArray):
    """A primitive's result, held as its operands.

    Attributes:
        leaves: the arrays of which the operands are made: codes, scales and what else the primitive takes.
        structure: static; the tree of the operands, each plain, quantized or deferred.
        operation: static; does the same to each piece of an axis.
        axis_of_operands: static; that axis, counted from the end.
        axis: static; the axis of the result on which the pieces lie, counted from the end.
        steps: static; how many primitives are deferred, those of the operands included.
    """

    leaves: tuple[jax.Array, ...]
    structure: PyTreeDef = aux_field()  # noqa: RUF009 - a dataclass field
    operation: Operation = aux_field()  # noqa: RUF009
    axis_of_operands: int = aux_field()
    axis: int = aux_field()
    steps: int = aux_field()

    def __post_init__(self) -> None:
        """Nothing to infer: shape and dtype are given."""

    @property
    def length(self) -> int:
        """The length of the axis."""
        length: int = self.shape[self.axis]
        return length

    def materialize(self) -> jax.Array:
        """Return the whole result, all operands decoded."""
        return self.piece(0, self.length)

    def piece(self, start: int | jax.Array, length: int) -> jax.Array:
        """Return what lies from ``start`` on along the axis, ``length`` long."""
        operands = jax.tree_util.tree_unflatten(self.structure, self.leaves)
        pieces = [_piece(operand, self.axis_of_operands, start, length) for operand in operands]
        primitive, params = self.operation.primitive, dict(self.operation.params)
        params = params_of_piece(primitive.name, params, self.axis % self.ndim, length)
        return _bind(primitive, pieces, params)

    def deferred(self) -> tuple[str, Location | None]:
        return self.operation.primitive.name, self.operation.location


def _piece(operand: Operand, axis: int, start: int | jax.Array, length: int) -> jax.Array:
    """Return a piece of an operand, decoded; one that is 1 long along the axis is there for every piece."""
    ndim = jnp.ndim(operand)
    if ndim == 0 or operand.shape[axis] in (1, length):
        return operand.materialize() if isinstance(operand, ImplicitArray) else operand
    if isinstance(operand, Deferred):
        return operand.piece(start, length)
    if not isinstance(operand, QuantizedArray):
        return lax.dynamic_slice_in_dim(operand, start, length, axis % ndim)
    starts, sizes = [jnp.int32(0)] * ndim, list(operand.shape)
    starts[axis], sizes[axis] = jnp.asarray(start, jnp.int32), length
    piece = _moves.dynamic_slice(operand, starts, sizes)
    assert piece is not None  # the axis is not that of the channels
    return piece.materialize()


def _bind(primitive: Primitive, operands: Sequence[jax.Array], params: Mapping[str, Any]) -> jax.Array:
    if primitive.name in ELEMENTWISE:
        shape = jnp.broadcast_shapes(*map(jnp.shape, operands))
        operands = [jnp.broadcast_to(operand, shape) for operand in operands]
    out: jax.Array = default_handler(primitive, *operands, **params)
    return out


def defer(primitive: Primitive, operands: Sequence[Operand], params: Mapping[str, Any]) -> Any:
    """Return a primitive's result, deferred; NotImplemented where it is not made piece by piece."""
    lazy = [operand for operand in operands if isinstance(operand, QuantizedArray | Deferred)]
    known = len(lazy) == sum(isinstance(operand, ImplicitArray) for operand in operands)
    if not LAZILY or not known or are_explicit(operands) or not are_floats(*lazy):
        return NotImplemented
    steps = 1 + sum(operand.steps for operand in lazy if isinstance(operand, Deferred))
    if steps > MOST_STEPS:
        return NotImplemented
    axis, fixed = _cut_axis(lazy), _hashable(params)
    if axis is None or fixed is None:
        return NotImplemented
    after = axis_after(primitive.name, params, lazy[0].shape, axis)
    if after is None:
        return NotImplemented
    structs = [jax.ShapeDtypeStruct(jnp.shape(operand), operand.dtype) for operand in operands]
    jaxpr, out = jax.make_jaxpr(lambda *xs: _bind(primitive, xs, params), return_shape=True)(*structs)
    if out.size == 0 or not jnp.issubdtype(out.dtype, jnp.floating):
        return NotImplemented
    if primitive.name in ELEMENTWISE and all(array.shape == out.shape for array in lazy):
        operands = [x if isinstance(x, ImplicitArray) else unstretched(x) for x in operands]
    leaves, structure = jax.tree_util.tree_flatten(list(operands))
    return Deferred(
        tuple(leaves),
        structure,
        Operation(primitive, fixed, source_line(jaxpr.eqns[-1]) if jaxpr.eqns else None),
        axis_of_operands=axis - lazy[0].ndim,
        axis=after - len(out.shape),
        steps=steps,
        shape=out.shape,
        dtype=out.dtype,
    )


def _cut_axis(arrays: Sequence[QuantizedArray | Deferred]) -> int | None:
    """Return the axis along which arrays are cut: that of deferred ones, else the longest but the channels.

    None where they cannot all be cut along it.
    """
    first = arrays[0]
    channels = {array.channels for array in arrays if isinstance(array, QuantizedArray)}
    axes = {array.axis % array.ndim for array in arrays if isinstance(array, Deferred)}
    if not axes:
        known = {axis for axis, length in enumerate(first.shape) if isinstance(length, int)}  # not a symbol
        axes = set(sorted(known - channels, key=lambda axis: first.shape[axis])[-1:])
    if len(axes) != 1 or axes <= channels:
        return None
    (axis,) = axes
    return axis if len({array.shape[axis] for array in arrays}) == 1 else None


def _hashable(params: Mapping[str, Any]) -> tuple[tuple[str, Any], ...] | None:
    """Return parameters as static data of a tree; None if they cannot be."""
    fixed = tuple(sorted(params.items()))
    try:
        hash(fixed)
    except TypeError:
        return None
    return fixed


@primitive_handler(["convert_element_type", "neg", "slice", "squeeze", "transpose"])
def _unary(primitive, deferred: Deferred, **params):
    return defer(primitive, [deferred], params)


@primitive_handler("reshape")
def _reshape(primitive, deferred: Deferred, *rest, **params):
    return NotImplemented if rest else defer(primitive, [deferred], params)


@primitive_handler("broadcast_in_dim")
def _broadcast_in_dim(primitive, deferred: Deferred, *rest, shape, broadcast_dimensions, **params):
    lengths, stretched = stretched_axes(deferred, shape, broadcast_dimensions)
    if rest or len(stretched) > 1 or 0 in shape:
        return NotImplemented
    params |= {"shape": tuple(lengths), "broadcast_dimensions": broadcast_dimensions}
    once = defer(primitive, [deferred], params)
    if once is NotImplemented or not stretched:
        return once
    return Repeated(once, stretched[0] - len(shape), shape[stretched[0]])


@primitive_handler(["add", "div", "max", "min", "mul", "sub"], precedence=BEFORE_QUANTIZED)
def _left(primitive, left: Deferred, right: Operand, **params):
    return defer(primitive, [left, right], params)


@primitive_handler(["div", "sub", "add", "max", "min", "mul"], precedence=BEFORE_QUANTIZED)
def _right(primitive, left: Operand, right: Deferred, **params):
    return defer(primitive, [left, right], params)


@primitive_handler(["add", "div", "max", "min", "mul", "sub"], precedence=BEFORE_QUANTIZED)
def _both(primitive, left: Deferred, right: Deferred, **params):
    return defer(primitive, [left, right], params)


@primitive_handler("dot_general", precedence=BEFORE_QUANTIZED)
def _dot_left(primitive, lhs: Deferred, rhs: Operand, *, dimension_numbers, **params):
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    out = _dot(rhs, lhs, DotAxes.of(rhs_contract, lhs_contract, rhs_batch, lhs_batch), **params)
    if out is NotImplemented:
        return out
    return with_operands_swapped(out, len(rhs_batch), jnp.ndim(rhs) - len(rhs_contract))


@primitive_handler("dot_general", precedence=BEFORE_QUANTIZED)
def _dot_right(primitive, lhs: Operand, rhs: Deferred, *, dimension_numbers, **params):
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    return _dot(lhs, rhs, DotAxes.of(lhs_contract, rhs_contract, lhs_batch, rhs_batch), **params)


@primitive_handler("dot_general", precedence=BEFORE_QUANTIZED)
def _dot_both(primitive, lhs: Deferred, rhs: Deferred, *, dimension_numbers, **params):
    return NotImplemented


def _dot(
    other: Operand, deferred: Deferred, axes: DotAxes, *, preferred_element_type: Any = None, **params: Any
) -> Any:
    """Return the dot of a plain operand and a deferred one, in that order, a piece at a time."""
    if isinstance(other, ImplicitArray) or not are_floats(other):
        return NotImplemented
    dtype = preferred_element_type or common_dtype(other.dtype, deferred.dtype)
    piece_length = length_of_pieces(deferred.shape, deferred.axis % deferred.ndim)
    wide = common_dtype(dtype, jnp.float32)  # in which sums are added, to be rounded once

    def dot_of_piece(start: int | jax.Array, other_piece: jax.Array, length: int) -> jax.Array:
        piece = deferred.piece(start, length).astype(wide)  # XLA's CPU has not all dots of bfloat16
        return lax.dot_general(
            other_piece.astype(wide), piece, axes.numbers, preferred_element_type=wide, **params
        )

    if deferred.length < 2 * piece_length:
        return dot_of_piece(0, other, deferred.length).astype(dtype)
    cut = Cut(deferred.ndim, deferred.axis % deferred.ndim, deferred.length, piece_length)
    return dot_in_pieces(other, axes, cut, dot_of_piece).astype(dtype)
