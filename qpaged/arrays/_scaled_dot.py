"""The dot of a plain operand and codes with float32 scales: where the scales are multiplied in.

Scales vary along axes with several blocks. If those are kept by the result, or batched over, the result is
multiplied. If they are contracted, the other operand is. If there are both kinds (a scale per page and
channel, or per group of channels), or if the codes have fewer elements than what would be multiplied instead,
the codes are.

Codes are decoded in the other operand's dtype, in which they are exact; on CPU to bfloat16 by way of float32:
see :mod:`qpaged.arrays._bfloat16`.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from qpaged.arrays._bfloat16 import decode_to_bfloat16, to_bfloat16
from qpaged.arrays._blocks import expand_scales, refine, split_blocks
from qpaged.arrays._quantized import QuantizedArray
from qpaged.arrays._read_format import is_of_floats

DimensionNumbers: TypeAlias = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]
Params: TypeAlias = dict[str, Any]  # of dot_general, but for dimension numbers and preferred element type


class DotAxes(NamedTuple):
    """Which axes of two operands a dot contracts and which it batches over, pair by pair.

    ``contract`` and ``batch`` are axes of the quantized operand, ``other_contract`` and ``other_batch`` the
    axes of the plain one in the same order.
    """

    other_contract: tuple[int, ...]
    contract: tuple[int, ...]
    other_batch: tuple[int, ...]
    batch: tuple[int, ...]

    @classmethod
    def of(
        cls,
        other_contract: Iterable[int],
        contract: Iterable[int],
        other_batch: Iterable[int],
        batch: Iterable[int],
    ) -> "DotAxes":
        return cls(tuple(other_contract), tuple(contract), tuple(other_batch), tuple(batch))

    @property
    def numbers(self) -> DimensionNumbers:
        """The ``dimension_numbers`` of ``lax.dot_general``, the plain operand first."""
        return (self.other_contract, self.contract), (self.other_batch, self.batch)

    def kept(self, ndim: int) -> tuple[int, ...]:
        """Return the axes of the quantized operand that the result keeps; they come last in it."""
        return tuple(axis for axis in range(ndim) if axis not in self.contract + self.batch)


def with_operands_swapped(out: jax.Array, batch: int, kept_end: int) -> jax.Array:
    """Return a dot's result (batch, kept of the first, kept of the second) with the kept axes swapped.

    ``batch`` axes come first; those kept of the first operand end before axis ``kept_end``.
    """
    return lax.transpose(out, (*range(batch), *range(kept_end, out.ndim), *range(batch, kept_end)))


def scaled_dot(other: jax.Array, array: QuantizedArray, axes: DotAxes, params: Params) -> jax.Array:
    """Return the dot in float32, for an array from :func:`with_float_scales`, which may have offsets."""
    scaled_axes = [axis for axis, count in enumerate(array.block_scales.shape) if count != 1]
    contracted = [axis for axis in scaled_axes if axis in axes.contract]
    kept = [axis for axis in scaled_axes if axis in axes.kept(array.ndim)]
    if (contracted and kept) or _codes_are_fewer(other, array, axes, contracted + kept):
        out = _dot_scaled_codes(other, array, axes, params)
    else:
        out = (_dot_scaled_other if contracted else _scale_result)(other, array, axes, params)
    if array.offset is None:
        return out
    return out + _dot_offset(other, array, axes)


def _codes_are_fewer(
    other: jax.Array, array: QuantizedArray, axes: DotAxes, scaled_axes: Sequence[int]
) -> bool:
    """Return True if there are fewer codes to scale than elements of the other operand or of the result.

    A decode has few rows beside the codes, a long prefill more. All are counted per batch element.
    """
    rows = other.size // _count(array, axes.contract + axes.batch)
    scaled_otherwise = rows * _count(array, scaled_axes)
    return scaled_otherwise > _count(array, axes.contract + axes.kept(array.ndim))


def _count(array: QuantizedArray, axes: Sequence[int]) -> int:
    return math.prod(array.shape[axis] for axis in axes)


def _dot_codes(other: jax.Array, array: QuantizedArray, axes: DotAxes, params: Params) -> jax.Array:
    """Return the float32 dot with codes as the numbers that they stand for, without scales."""
    if other.dtype != jnp.bfloat16:
        values = array.values(other.dtype)
    elif is_of_floats(array):
        values = to_bfloat16(array.values(jnp.float32))
    else:
        values = decode_to_bfloat16(array.quantizer.decode, array.unpacked())
    return lax.dot_general(other, values, axes.numbers, preferred_element_type=jnp.float32, **params)


def _scale_result(other: jax.Array, array: QuantizedArray, axes: DotAxes, params: Params) -> jax.Array:
    """Return the dot with the codes, times the scales: [*batch, *free of the plain operand, *kept]."""
    order = (*axes.batch, *axes.kept(array.ndim))
    factors = _refine_along(array.block_scales, array, order)
    factors = lax.transpose(factors, (*order, *axes.contract))
    factors = lax.squeeze(factors, range(len(order), array.ndim))
    batch = len(axes.batch)
    other_free = other.ndim - len(axes.contract) - batch
    factors = lax.expand_dims(factors, range(batch, batch + other_free))
    return _dot_codes(other, array, axes, params) * factors


def _dot_scaled_other(other: jax.Array, array: QuantizedArray, axes: DotAxes, params: Params) -> jax.Array:
    """Return the dot of the codes and the other operand, scaled along the contracted and batch axes."""
    shared = axes.contract + axes.batch
    factors = _refine_along(array.block_scales, array, shared)
    factors = lax.squeeze(factors, axes.kept(array.ndim))
    partners = dict(zip(shared, axes.other_contract + axes.other_batch, strict=True))
    # Factors have one axis for each shared one, in the array's order: bring them to the other operand's.
    other_axes = [partners[axis] for axis in sorted(shared)]
    order = sorted(range(len(other_axes)), key=lambda position: other_axes[position])
    factors = lax.transpose(factors, order)
    factors = lax.expand_dims(factors, [axis for axis in range(other.ndim) if axis not in other_axes])
    scaled = (other.astype(jnp.float32) * factors).astype(_scaled_dtype(other))
    return _dot_codes(scaled, array, axes, params)


def _dot_scaled_codes(other: jax.Array, array: QuantizedArray, axes: DotAxes, params: Params) -> jax.Array:
    """Return the dot with the codes, scaled and rounded to the other operand's dtype first."""
    values = split_blocks(array.values(jnp.float32), array.block_scales.shape) * expand_scales(
        array.block_scales
    )
    dtype = _scaled_dtype(other)
    values = to_bfloat16(values) if dtype == jnp.bfloat16 else values.astype(dtype)
    return lax.dot_general(
        other.astype(dtype),
        values.reshape(array.shape),
        axes.numbers,
        preferred_element_type=jnp.float32,
        **params,
    )


def _scaled_dtype(other: jax.Array) -> Any:
    """Return the dtype of scaled operands: a float16 may leave its range when scaled, and becomes float32."""
    return jnp.float32 if other.dtype == jnp.float16 else other.dtype


def _dot_offset(other: jax.Array, array: QuantizedArray, axes: DotAxes) -> jax.Array:
    """Return what offsets add: the other operand, summed over each block, against the block's offset."""
    offset = array.offset
    assert offset is not None
    summed = other.astype(jnp.float32)
    for other_axis, axis in zip(axes.other_contract, axes.contract, strict=True):
        blocks = (offset.shape[axis], array.block[axis])
        summed = summed.reshape(*summed.shape[:other_axis], *blocks, *summed.shape[other_axis + 1 :])
        summed = summed.sum(other_axis + 1)
    for axis in axes.batch:
        offset = refine(offset, axis, array.block[axis])
    out = lax.dot_general(summed, offset, axes.numbers, precision="highest")
    kept = axes.kept(array.ndim)
    for position, axis in enumerate(kept):  # the elements of a block share its offset
        out = refine(out, out.ndim - len(kept) + position, array.block[axis])
    return out


def _refine_along(scales: jax.Array, array: QuantizedArray, axes: Sequence[int]) -> jax.Array:
    """Return scales repeated to one per element along ``axes``; axes with a single scale stay 1."""
    for axis in axes:
        if scales.shape[axis] != 1:
            scales = refine(scales, axis, array.block[axis])
    return scales
