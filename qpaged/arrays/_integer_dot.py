"""Dots of codes that are integers, as the integers they are.

XLA on CPU widens narrow integers before a bfloat16 dot, one by one, which takes longer than the dot; for a
dot of 8-bit integers it uses the processor's own instructions. So the other operand is written as integers,
too: in units of 1 / 16319 of each row's largest element, as 128 high + low, both of 8 bits. That is closer to
it than bfloat16 is to what was rounded to it: the error of an element is at most half a unit. An infinity
makes its row NaN.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qpaged._compat import outside_of_meshes
from qpaged.arrays._encoding import LARGE, nonzero
from qpaged.arrays._protocol import ArrayFormat
from qpaged.arrays._quantized import BlockParts, QuantizedArray
from qpaged.arrays._read_format import ReadFormat, stored_bits, with_integer_codes

LOW_BITS = 7
UNITS_PER_ROW = 127 * 2**LOW_BITS + 2 ** (LOW_BITS - 1) - 1  # the largest integer that high and low can write
MAX_CONTRACTED = 2**16  # products of two 8-bit integers that int32 holds the sum of, with room to spare


def as_integers(array: QuantizedArray) -> QuantizedArray:
    """Return ``array``, whose scales are float32, with signed integers for codes; itself where it has others.

    The number that its format adds to every code goes to the offsets.
    """
    added = _added_to_integers(array.quantizer, array.codes.dtype)
    if added is None:
        return array
    offset = array.offset
    if added:
        of_codes = array.block_scales * jnp.float32(added)
        offset = of_codes if offset is None else offset + of_codes
    codes = _to_signed(array.codes, _middle_code(array.quantizer))
    return with_integer_codes(array, codes, BlockParts(array.scales, None, offset))


def is_integers(array: QuantizedArray) -> bool:
    """Return True if :func:`as_integers` made the array."""
    return isinstance(array.quantizer, ReadFormat) and array.quantizer.integer_codes


def _to_signed(codes: jax.Array, middle: int) -> jax.Array:
    """Return int8 codes as they are, and uint8 ones less the ``middle`` of them."""
    if codes.dtype == jnp.int8:
        return codes
    return lax.bitcast_convert_type(codes - jnp.uint8(middle), jnp.int8)


def _middle_code(quantizer: ArrayFormat) -> int:
    return 2 ** (stored_bits(quantizer) - 1)


@functools.lru_cache
def _added_to_integers(quantizer: ArrayFormat, dtype: Any) -> float | None:
    """Return what a format adds to signed codes to decode those stored as ``dtype``; None if that varies."""
    if dtype not in (jnp.int8, jnp.uint8):
        return None
    middle = _middle_code(quantizer)
    every_code = np.arange(-128, 128) if dtype == jnp.int8 else np.arange(2 * middle)
    with outside_of_meshes():
        codes = jnp.asarray(every_code.astype(dtype))
        decoded = np.asarray(quantizer.decode(codes, jnp.float32))
        added = decoded - np.asarray(_to_signed(codes, middle))
    return float(added[0]) if np.all(added == added[0]) else None


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def dot(other: jax.Array, codes: jax.Array, numbers: Any) -> jax.Array:
    """Return ``lax.dot_general`` of floats, which count as bfloat16, and int8 codes; float32."""
    (_, codes_contract), _ = numbers
    if math.prod(codes.shape[axis] for axis in codes_contract) > MAX_CONTRACTED:
        return _dot_as_floats(other, codes, numbers)
    return lax.platform_dependent(
        other,
        codes,
        cpu=functools.partial(_dot_as_integers, numbers=numbers),
        default=functools.partial(_dot_as_floats, numbers=numbers),
    )


@dot.defjvp
def _(numbers, primals, tangents):
    return dot(*primals, numbers), _dot_as_floats(tangents[0], primals[1], numbers)


def _dot_as_floats(other: jax.Array, codes: jax.Array, numbers: Any) -> jax.Array:
    other, codes = other.astype(jnp.bfloat16), codes.astype(jnp.bfloat16)
    return lax.dot_general(other, codes, numbers, preferred_element_type=jnp.float32)


def _dot_as_integers(other: jax.Array, codes: jax.Array, numbers: Any) -> jax.Array:
    """Return the dot by two integer dots, of the high and the low parts of the other operand's elements."""
    (contract, codes_contract), (batch, codes_batch) = numbers
    other = other.astype(jnp.float32)
    row_max = jnp.abs(other).max(axis=contract, keepdims=True)
    up = jnp.where(row_max < 1 / LARGE, jnp.float32(LARGE), jnp.float32(1))  # or units would be subnormal
    unit = nonzero(row_max * up) / UNITS_PER_ROW
    integers = jnp.round(other * up / unit).astype(jnp.int32)
    high = (integers + 2 ** (LOW_BITS - 1)) >> LOW_BITS
    low = integers - (high << LOW_BITS)
    high_and_low = jnp.stack([high, low]).astype(jnp.int8)  # one dot for both, with a free axis in front
    stacked_contract = tuple(axis + 1 for axis in contract)
    stacked_batch = tuple(axis + 1 for axis in batch)
    stacked_numbers = (stacked_contract, codes_contract), (stacked_batch, codes_batch)
    out = lax.dot_general(high_and_low, codes, stacked_numbers, preferred_element_type=jnp.int32)
    high_out = lax.index_in_dim(out, 0, len(batch), keepdims=False).astype(jnp.float32)
    low_out = lax.index_in_dim(out, 1, len(batch), keepdims=False).astype(jnp.float32)
    sums = high_out * 2**LOW_BITS + low_out

    free = [axis for axis in range(other.ndim) if axis not in batch + contract]

    def beside_sums(per_row: jax.Array) -> jax.Array:
        """Return a number per row of ``other`` in the axis order of the result, to broadcast against it."""
        per_row = lax.transpose(per_row, (*batch, *free, *contract))
        rows_shape = per_row.shape[: len(batch) + len(free)]
        return per_row.reshape(*rows_shape, *[1] * (sums.ndim - len(rows_shape)))

    return sums * beside_sums(unit) * beside_sums(1 / up)
