"""Packing: codes of 4 or 2 bits, several to a byte along one axis, the first in the lowest bits."""

from typing import Any

import jax
import jax.numpy as jnp

BYTE = 8


def pack(codes: jax.Array, bits: int, axis: int) -> jax.Array:
    """Codes, one an element, as uint8 with 8 / ``bits`` of them in each; ``axis`` shrinks by as much."""
    if bits == BYTE:
        return codes
    axis %= codes.ndim
    several = BYTE // bits
    shape = (*codes.shape[:axis], codes.shape[axis] // several, several, *codes.shape[axis + 1 :])
    apart = (codes.astype(jnp.uint8) & jnp.uint8((1 << bits) - 1)).reshape(shape)
    apart = apart << _shifts(bits, axis + 1, len(shape))
    return jax.lax.reduce(apart, jnp.uint8(0), jax.lax.bitwise_or, (axis + 1,))


def unpack(packed: jax.Array, bits: int, axis: int, dtype: Any) -> jax.Array:
    """The inverse of :func:`pack`: codes of the 8-bit ``dtype``, with their sign if that has one."""
    if bits == BYTE:
        return packed
    axis %= packed.ndim
    shifts = _shifts(bits, axis + 1, packed.ndim + 1)
    # Each code is brought to the top of its byte and from there down, which brings its sign along.
    high = jnp.expand_dims(packed, axis + 1) << (jnp.uint8(BYTE - bits) - shifts)
    apart = high.astype(dtype) >> jnp.asarray(BYTE - bits, dtype)
    length = packed.shape[axis] * (BYTE // bits)
    return apart.reshape(*packed.shape[:axis], length, *packed.shape[axis + 1 :])


def unpack_place(packed: jax.Array, bits: int, place: int, dtype: Any) -> jax.Array:
    """Of each byte the code number ``place`` (0 is the lowest), with its sign if ``dtype`` has one."""
    high = packed << jnp.uint8(BYTE - bits * (place + 1))
    return high.astype(dtype) >> jnp.asarray(BYTE - bits, dtype)


def merge(packed: jax.Array, codes: jax.Array, place: jax.Array, bits: int) -> jax.Array:
    """Bytes ``packed`` whose code number ``place`` (0 is the lowest) has become ``codes``."""
    shift = place.astype(jnp.uint8) * jnp.uint8(bits)
    mask = jnp.uint8((1 << bits) - 1)
    return (packed & ~(mask << shift)) | ((codes.astype(jnp.uint8) & mask) << shift)


def _shifts(bits: int, axis: int, ndim: int) -> jax.Array:
    shape = [1] * ndim
    shape[axis] = BYTE // bits
    return (jnp.arange(BYTE // bits, dtype=jnp.uint8) * jnp.uint8(bits)).reshape(shape)
