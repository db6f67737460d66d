"""Dots of codes that are whole numbers, as the integers they are.

XLA on CPU widens narrow integers before a bfloat16 dot, one by one, which takes longer than the dot; of
8-bit integers it makes the processor's own instructions. So the other operand is written as integers, too: in
units of 1 / 16319 of each row's largest element, as 128 high + low, both of 8 bits. That is closer to it than
bfloat16 is to what was rounded to it: the error of an element is at most half a unit. An infinity makes its
row NaN.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qpaged.arrays._quantized import LARGE, QuantizedArray, nonzero
from qpaged.arrays._views import View

LOW_BITS = 7
LONGEST = 2**16  # products of two 8-bit integers that int32 holds the sum of, with room to spare
LARGEST = 127 * 2**LOW_BITS + 2 ** (LOW_BITS - 1) - 1


@dataclass(frozen=True)
class Whole(View):
    """A view of codes that are read as the integers they are."""

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        return codes.astype(dtype)


def whole(array: QuantizedArray) -> QuantizedArray:
    """A :class:`Whole` view of ``array``, whose scales are factors; itself where its codes are no integers.

    What its format adds to every code goes to the offsets.
    """
    added = _added(array.quantizer, array.codes.dtype)
    if added is None:
        return array
    offsets = array.offsets
    if added:
        offsets = array.scales * added if offsets is None else offsets + array.scales * added
    codes = _signed(array.codes, _middle(array.quantizer))
    return array.like(codes, array.scales, offsets, quantizer=Whole(array.quantizer))


def _signed(codes: jax.Array, middle: int) -> jax.Array:
    """int8 codes as they are, and uint8 ones less the ``middle`` of them."""
    return codes if codes.dtype == jnp.int8 else lax.bitcast_convert_type(codes - jnp.uint8(middle), jnp.int8)


def _middle(quantizer: Any) -> int:
    while isinstance(quantizer, View):  # which may count a code of 4 bits as one of 8
        quantizer = quantizer.quantizer
    return 2 ** (quantizer.bits - 1)


@functools.lru_cache
def _added(quantizer: Any, dtype: Any) -> float | None:
    """What a format adds to signed codes to decode those stored as ``dtype``; None if it varies."""
    if dtype not in (jnp.int8, jnp.uint8):
        return None
    middle = _middle(quantizer)
    stored = np.arange(-128, 128) if dtype == jnp.int8 else np.arange(2 * middle)
    with jax.ensure_compile_time_eval():
        codes = jnp.asarray(stored.astype(dtype))
        added = np.asarray(quantizer.decode(codes, jnp.float32)) - np.asarray(_signed(codes, middle))
    return float(added[0]) if np.all(added == added[0]) else None


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def dot(other: jax.Array, codes: jax.Array, numbers: Any) -> jax.Array:
    """``lax.dot_general`` of floats, which count as bfloat16, and int8 codes; float32."""
    if math.prod(codes.shape[axis] for axis in numbers[0][1]) > LONGEST:
        return _in_floats(other, codes, numbers)
    return lax.platform_dependent(
        other,
        codes,
        cpu=functools.partial(_in_integers, numbers=numbers),
        default=functools.partial(_in_floats, numbers=numbers),
    )


@dot.defjvp
def _(numbers, primals, tangents):
    return dot(*primals, numbers), _in_floats(tangents[0], primals[1], numbers)


def _in_floats(other: jax.Array, codes: jax.Array, numbers: Any) -> jax.Array:
    other, codes = (part.astype(jnp.bfloat16) for part in (other, codes))
    return lax.dot_general(other, codes, numbers, preferred_element_type=jnp.float32)


def _in_integers(other: jax.Array, codes: jax.Array, numbers: Any) -> jax.Array:
    (contract, codes_contract), (batch, codes_batch) = numbers
    other = other.astype(jnp.float32)
    largest = jnp.abs(other).max(axis=contract, keepdims=True)
    up = jnp.where(largest < 1 / LARGE, jnp.float32(LARGE), jnp.float32(1))  # or units would be subnormal
    other, unit = other * up, nonzero(largest * up) / LARGEST
    integers = jnp.round(other / unit).astype(jnp.int32)
    high = (integers + 2 ** (LOW_BITS - 1)) >> LOW_BITS
    halves = jnp.stack([high, integers - (high << LOW_BITS)]).astype(jnp.int8)
    later = [tuple(axis + 1 for axis in axes) for axes in (contract, batch)]
    numbers = (later[0], codes_contract), (later[1], codes_batch)
    out = lax.dot_general(halves, codes, numbers, preferred_element_type=jnp.int32)
    high, low = (lax.index_in_dim(out, half, len(batch), keepdims=False) for half in (0, 1))
    order = (*batch, *(axis for axis in range(other.ndim) if axis not in batch + contract))

    def beside_rows(x: jax.Array) -> jax.Array:
        x = lax.transpose(x, (*order, *contract))
        return x.reshape(*x.shape[: len(order)], *[1] * (high.ndim - len(order)))

    sums = high.astype(jnp.float32) * 2**LOW_BITS + low.astype(jnp.float32)
    return sums * beside_rows(unit) * beside_rows(1 / up)
