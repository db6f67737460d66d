"""Packing: codes of fewer than 8 bits, several to a byte along one axis, the first in the lowest bits.

Codes of 3, 5 and 6 bits are stored in two planes, one behind the other along that axis: their low 2 or 4
bits are packed as codes of so many bits are, and so are their high bits. Where a byte of the high plane has
r times as many codes as one of the low plane, which has w bytes, byte m of the high plane holds the high bits
of the codes in bytes m, m + w / r, and so on, of the low one: no single code moves when they are unpacked.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

BYTE = 8
PLANES = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}
"""Bits of the planes of a code, by its bits; the low plane first."""


def codes_per_byte(bits: int) -> int:
    """Return how many codes a byte of the low plane has."""
    return BYTE // PLANES[bits][0]


def codes_together(bits: int) -> int:
    """Return of how many codes, along the axis that is packed, there must be a multiple."""
    return BYTE // PLANES[bits][-1]


def has_planes(bits: int) -> bool:
    """Return True if codes are stored in several planes."""
    return len(PLANES[bits]) > 1


def stored_length(bits: int, length: int) -> int:
    """Return the bytes that ``length`` codes of fewer than 8 bits take; of 8 bits or more, the elements."""
    return length * bits // BYTE


def logical_length(bits: int, stored: int) -> int:
    """Return of how many codes :func:`stored_length` is ``stored``."""
    return stored * BYTE // bits


def pack(codes: jax.Array, bits: int, axis: int) -> jax.Array:
    """Return codes, one an element, packed into uint8 along ``axis``; those of 8 bits as they are."""
    if bits == BYTE:
        return codes
    axis %= codes.ndim
    codes = codes.astype(jnp.uint8)
    low, *high = PLANES[bits]
    low_plane = _pack_plane(codes, low, axis)
    if not high:
        return low_plane
    runs = codes_together(bits) // codes_per_byte(bits)
    high_codes = _interleave_bytes(codes >> jnp.uint8(low), runs, bits, axis)
    return lax.concatenate([low_plane, _pack_plane(high_codes, high[0], axis)], axis)


def unpack(packed: jax.Array, bits: int, axis: int, dtype: DTypeLike) -> jax.Array:
    """Return the codes that :func:`pack` took, in the 8-bit ``dtype``, with their sign if that has one."""
    if bits == BYTE:
        return packed
    axis %= packed.ndim
    low, *high = PLANES[bits]
    low_plane, high_plane = split_planes(packed, bits, axis)
    codes = _unpack_plane(low_plane, low, axis)
    if high:
        high_codes = _unpack_plane(high_plane, high[0], axis)
        runs = codes.shape[axis] // codes_together(bits)
        codes = codes | (_interleave_bytes(high_codes, runs, bits, axis) << jnp.uint8(low))
    return _with_sign(codes, bits, dtype)


def extract_codes(
    packed: jax.Array, bits: int, byte_index: int, dtype: DTypeLike, axis: int = -1, slots: int = 1
) -> jax.Array:
    """Return the code at ``byte_index`` (0 is the lowest) of each byte, with its sign if ``dtype`` has one.

    Args:
        packed: uint8; or int32 with a byte in each, since kernels shift 32-bit integers alone.
        bits: of a code.
        byte_index: which code of a byte of the low plane.
        dtype: of the result.
        axis: along which planes lie behind each other, where codes have several.
        slots: how many slots lie behind each other along ``axis``, each with planes of its own.
    """
    if not has_planes(bits):
        return _extract(packed, bits, byte_index, dtype)
    axis %= packed.ndim
    low, high = PLANES[bits]
    low_parts, high_parts = [], []
    for slot in range(slots):
        low_plane, high_plane = split_planes(packed, bits, axis, slot, slots)
        low_parts.append(_extract_low(low_plane, low, byte_index))
        for index in range(byte_index, BYTE // high, codes_per_byte(bits)):
            high_parts.append(_extract_low(high_plane, high, index))
    codes, high_codes = lax.concatenate(low_parts, axis), lax.concatenate(high_parts, axis)
    return _with_sign(codes | (high_codes << jnp.asarray(low, packed.dtype)), bits, dtype)


def join_planes(
    low_plane: jax.Array, high_plane: jax.Array, bits: int, byte_index: int, run: int, dtype: DTypeLike
) -> jax.Array:
    """Return the code at ``byte_index`` of each byte in one run of the low plane.

    Args:
        low_plane: that run, as long as the high plane; uint8, or int32 as :func:`extract_codes` takes it.
        high_plane: of the same slots, whole.
        bits: of a code.
        byte_index: which code of a byte of the low plane.
        run: which run; the first is 0.
        dtype: of the result.
    """
    low, high = PLANES[bits]
    codes = _extract_low(low_plane, low, byte_index)
    high_codes = _extract_low(high_plane, high, byte_index + run * codes_per_byte(bits))
    return _with_sign(codes | (high_codes << jnp.asarray(low, codes.dtype)), bits, dtype)


def place_codes(codes: jax.Array, bits: int, byte_index: int, slots: int = 1) -> jax.Array:
    """Return bytes with ``codes`` at ``byte_index``, and zeros beside them, which :func:`extract_codes` took.

    Args:
        codes: int32, of which the low ``bits`` count; the channels of ``slots`` slots along the last axis.
        bits: of a code.
        byte_index: which code of a byte of the low plane.
        slots: how many slots lie behind each other, each with planes of its own.

    Returns:
        int32 with a byte in each.
    """
    codes &= (1 << bits) - 1
    if not has_planes(bits):
        return lax.shift_left(codes, bits * byte_index)
    low, high = PLANES[bits]
    width = codes.shape[-1] // slots
    indices = range(byte_index, BYTE // high, codes_per_byte(bits))
    run = width // len(indices)  # of codes whose high bits have the same place in the bytes of the high plane
    low_codes = lax.shift_left(codes & ((1 << low) - 1), low * byte_index)
    high_codes = lax.shift_right_logical(codes, low)
    planes = []
    for start in range(0, codes.shape[-1], width):
        planes.append(low_codes[..., start : start + width])
        placed = jnp.zeros((*codes.shape[:-1], run), codes.dtype)
        for index in indices:
            placed |= lax.shift_left(high_codes[..., start : start + run], high * index)
            start += run
        planes.append(placed)
    return lax.concatenate(planes, codes.ndim - 1)


def _extract(packed: jax.Array, bits: int, byte_index: int, dtype: DTypeLike) -> jax.Array:
    width = BYTE * packed.dtype.itemsize
    top = lax.shift_left(packed, jnp.asarray(width - bits * (byte_index + 1), packed.dtype))
    return _from_top(top, bits, dtype)


def _extract_low(packed: jax.Array, bits: int, byte_index: int) -> jax.Array:
    """Return the code at ``byte_index`` of each byte, in the dtype of ``packed`` and without sign."""
    down = lax.shift_right_logical(packed, jnp.asarray(bits * byte_index, packed.dtype))
    return down & jnp.asarray((1 << bits) - 1, packed.dtype)


def _with_sign(codes: jax.Array, bits: int, dtype: DTypeLike) -> jax.Array:
    """Return codes of so many low bits as ``dtype``, with their sign if that has one."""
    width = BYTE * codes.dtype.itemsize
    return _from_top(lax.shift_left(codes, jnp.asarray(width - bits, codes.dtype)), bits, dtype)


def _from_top(top: jax.Array, bits: int, dtype: DTypeLike) -> jax.Array:
    """Return the codes in the highest bits of integers as ``dtype``; the shift down extends their sign."""
    width = BYTE * top.dtype.itemsize
    if width == BYTE:
        top = top.astype(dtype)  # int8, if the shift down is to extend the sign
    shift_right = lax.shift_right_logical
    if jnp.issubdtype(dtype, jnp.signedinteger):
        shift_right = lax.shift_right_arithmetic
    return shift_right(top, jnp.asarray(width - bits, top.dtype)).astype(dtype)


def insert_codes(packed: jax.Array, codes: jax.Array, byte_index: jax.Array, bits: int) -> jax.Array:
    """Return ``packed``, of one plane, with the code at ``byte_index`` (0 is the lowest) of each replaced."""
    position = byte_index.astype(jnp.uint8) * jnp.uint8(bits)
    mask = jnp.uint8((1 << bits) - 1)
    return (packed & ~(mask << position)) | ((codes.astype(jnp.uint8) & mask) << position)


def _pack_plane(codes: jax.Array, bits: int, axis: int) -> jax.Array:
    """Return the low ``bits`` of uint8 codes, packed."""
    per_byte = BYTE // bits
    shape = (*codes.shape[:axis], codes.shape[axis] // per_byte, per_byte, *codes.shape[axis + 1 :])
    low_bits = codes & jnp.uint8((1 << bits) - 1)
    shifted = low_bits.reshape(shape) << _bit_positions(bits, axis + 1, len(shape))
    return lax.reduce(shifted, jnp.uint8(0), lax.bitwise_or, (axis + 1,))


def _unpack_plane(packed: jax.Array, bits: int, axis: int) -> jax.Array:
    """Return the uint8 codes, without sign, that :func:`_pack_plane` took."""
    positions = _bit_positions(bits, axis + 1, packed.ndim + 1)
    codes = (jnp.expand_dims(packed, axis + 1) >> positions) & jnp.uint8((1 << bits) - 1)
    length = packed.shape[axis] * (BYTE // bits)
    return codes.reshape(*packed.shape[:axis], length, *packed.shape[axis + 1 :])


def split_planes(
    packed: jax.Array, bits: int, axis: int, slot: int = 0, slots: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Return the planes, low and high, of one of the slots that lie behind each other along ``axis``."""
    width = packed.shape[axis] // slots
    start, end = slot * width, (slot + 1) * width
    high_start = start + width * PLANES[bits][0] // bits
    low = lax.slice_in_dim(packed, start, high_start, axis=axis)
    return low, lax.slice_in_dim(packed, high_start, end, axis=axis)


def _interleave_bytes(codes: jax.Array, runs: int, bits: int, axis: int) -> jax.Array:
    """Return codes along ``axis`` with ``runs`` runs of the low plane's bytes in turns, byte by byte."""
    in_byte, length = codes_per_byte(bits), codes.shape[axis]
    shape = (*codes.shape[:axis], runs, length // in_byte // runs, in_byte, *codes.shape[axis + 1 :])
    return jnp.swapaxes(codes.reshape(shape), axis, axis + 1).reshape(codes.shape)


def _bit_positions(bits: int, axis: int, ndim: int) -> jax.Array:
    """Return where each code of a byte begins, along ``axis`` of ``ndim`` axes."""
    shape = [1] * ndim
    shape[axis] = BYTE // bits
    return (jnp.arange(BYTE // bits, dtype=jnp.uint8) * jnp.uint8(bits)).reshape(shape)
