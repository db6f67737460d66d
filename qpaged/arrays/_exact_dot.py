"""Dots of arrays with exact pages: of the codes and of the rows, each with the tokens that it holds.

An array is not decoded because some of its pages are exact, and these cost what they have of tokens.
"""

from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from qpaged.arrays._dtypes import are_floats, common_dtype
from qpaged.arrays._explicit import array_handler
from qpaged.arrays._lazily import lazily
from qpaged.arrays._partly_exact import PartlyExact
from qpaged.arrays._scaled_dot import DotAxes, with_operands_swapped
from qpaged.implicit import ImplicitArray

if TYPE_CHECKING:
    Operand: TypeAlias = Any
else:
    Operand = object  # what qax dispatches on as anything whatever

BEFORE_JOINED = 4


@array_handler("dot_general", precedence=BEFORE_JOINED)
def _dot_left(primitive, lhs: PartlyExact, rhs: Operand, *, dimension_numbers, **params):
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    out = _dot(rhs, lhs, DotAxes.of(rhs_contract, lhs_contract, rhs_batch, lhs_batch), **params)
    if out is NotImplemented:
        return out
    return with_operands_swapped(out, len(rhs_batch), jnp.ndim(rhs) - len(rhs_contract))


@array_handler("dot_general", precedence=BEFORE_JOINED)
def _dot_right(primitive, lhs: Operand, rhs: PartlyExact, *, dimension_numbers, **params):
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    return _dot(lhs, rhs, DotAxes.of(lhs_contract, rhs_contract, lhs_batch, rhs_batch), **params)


@array_handler("dot_general", precedence=BEFORE_JOINED)
def _dot_both(primitive, lhs: PartlyExact, rhs: PartlyExact, *, dimension_numbers, **params):
    return NotImplemented


def _dot(
    other: Operand, array: PartlyExact, axes: DotAxes, *, preferred_element_type: Any = None, **params: Any
) -> Any:
    """Return the dot of a plain operand and an array with exact pages, in that order."""
    tokens, kept = array.tokens, axes.kept(array.ndim)
    # Page numbers must be the same along all that is summed into one score, or read with one weight.
    one_for_all = kept if tokens in axes.contract else [axis for axis in axes.contract if axis != tokens]
    differ = any(array.page.shape[axis] != 1 for axis in one_for_all)
    if isinstance(other, ImplicitArray) or tokens in axes.batch or differ or not are_floats(other, array):
        return NotImplemented
    dtype = preferred_element_type or common_dtype(other.dtype, array.dtype)

    def dot(other: jax.Array, part: Operand, dtype: Any) -> jax.Array:
        numbers = axes.numbers
        take = lazily(lambda x: lax.dot_general(other, x, numbers, preferred_element_type=dtype, **params))
        out: jax.Array = take(part)
        return out

    if tokens in kept:
        from_codes, from_rows = dot(other, array.codes, dtype), dot(other, array.rows, dtype)
        after = from_codes.ndim - len(kept) + kept.index(tokens)
        return jnp.where(
            _of_scores(array, axes, from_codes.ndim), array.places.spread(from_rows, after), from_codes
        )
    partner = axes.other_contract[axes.contract.index(tokens)]
    is_exact, nothing = _of_weights(array, axes, other.ndim), jnp.zeros((), other.dtype)
    weights_of_rows = array.places.collect(jnp.where(is_exact, other, nothing), partner)
    wide = common_dtype(dtype, jnp.float32)  # in which both are added, to be rounded once
    from_codes = dot(jnp.where(is_exact, nothing, other), array.codes, wide)
    return (from_codes + dot(weights_of_rows, array.rows, wide)).astype(dtype)


def _of_scores(array: PartlyExact, axes: DotAxes, ndim: int) -> jax.Array:
    """Return which tokens are exact in a result with ``ndim`` axes that keeps them: True where they are."""
    kept, batch, contract = axes.kept(array.ndim), len(axes.batch), len(axes.contract)
    is_exact = lax.transpose(array.is_exact(), (*axes.batch, *axes.contract, *kept))
    is_exact = lax.squeeze(is_exact, range(batch, batch + contract))
    return lax.expand_dims(is_exact, range(batch, batch + ndim - is_exact.ndim))


def _of_weights(array: PartlyExact, axes: DotAxes, ndim: int) -> jax.Array:
    """Return which tokens are exact in the other operand, with ``ndim`` axes: True where they are."""
    partner = dict(zip(axes.other_batch + axes.other_contract, axes.batch + axes.contract, strict=True))
    is_exact = lax.squeeze(array.is_exact(), axes.kept(array.ndim))
    left = sorted(partner.values())  # the axes that are left, in order
    is_exact = lax.transpose(is_exact, [left.index(partner[axis]) for axis in sorted(partner)])
    return lax.expand_dims(is_exact, [axis for axis in range(ndim) if axis not in partner])
