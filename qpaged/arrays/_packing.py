"""Packing: codes of 4 or 2 bits, several to a byte along one axis, the first in the lowest bits."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

BYTE = 8


def pack(codes: jax.Array, bits: int, axis: int) -> jax.Array:
    """Return codes, one an element, packed into uint8 with 8 / ``bits`` in each, along ``axis``."""
    if bits == BYTE:
        return codes
    axis %= codes.ndim
    codes_per_byte = BYTE // bits
    shape = (
        *codes.shape[:axis],
        codes.shape[axis] // codes_per_byte,
        codes_per_byte,
        *codes.shape[axis + 1 :],
    )
    low_bits = codes.astype(jnp.uint8) & jnp.uint8((1 << bits) - 1)
    shifted = low_bits.reshape(shape) << _bit_positions(bits, axis + 1, len(shape))
    return lax.reduce(shifted, jnp.uint8(0), lax.bitwise_or, (axis + 1,))


def unpack(packed: jax.Array, bits: int, axis: int, dtype: Any) -> jax.Array:
    """Return the codes that :func:`pack` took, in the 8-bit ``dtype``, with their sign if that has one."""
    if bits == BYTE:
        return packed
    axis %= packed.ndim
    positions = _bit_positions(bits, axis + 1, packed.ndim + 1)
    # Each code is shifted to the top of its byte and from there down, which extends its sign.
    top = jnp.expand_dims(packed, axis + 1) << (jnp.uint8(BYTE - bits) - positions)
    codes = top.astype(dtype) >> jnp.asarray(BYTE - bits, dtype)
    length = packed.shape[axis] * (BYTE // bits)
    return codes.reshape(*packed.shape[:axis], length, *packed.shape[axis + 1 :])


def extract_codes(packed: jax.Array, bits: int, byte_index: int, dtype: Any) -> jax.Array:
    """Return the code at ``byte_index`` (0 is the lowest) of each byte, with its sign if ``dtype`` has one.

    Args:
        packed: uint8; or int32 with a byte in each, since kernels shift 32-bit integers alone.
    """
    width = BYTE * packed.dtype.itemsize
    top = lax.shift_left(packed, jnp.asarray(width - bits * (byte_index + 1), packed.dtype))
    if width == BYTE:
        top = top.astype(dtype)  # int8, if the shift down is to extend the sign
    shift_right = lax.shift_right_logical
    if jnp.issubdtype(dtype, jnp.signedinteger):
        shift_right = lax.shift_right_arithmetic
    return shift_right(top, jnp.asarray(width - bits, top.dtype)).astype(dtype)


def insert_codes(packed: jax.Array, codes: jax.Array, byte_index: jax.Array, bits: int) -> jax.Array:
    """Return ``packed`` with the code at ``byte_index`` (0 is the lowest) of each byte replaced."""
    position = byte_index.astype(jnp.uint8) * jnp.uint8(bits)
    mask = jnp.uint8((1 << bits) - 1)
    return (packed & ~(mask << position)) | ((codes.astype(jnp.uint8) & mask) << position)


def _bit_positions(bits: int, axis: int, ndim: int) -> jax.Array:
    """Return where each code of a byte begins, along ``axis`` of ``ndim`` axes."""
    shape = [1] * ndim
    shape[axis] = BYTE // bits
    return (jnp.arange(BYTE // bits, dtype=jnp.uint8) * jnp.uint8(bits)).reshape(shape)
