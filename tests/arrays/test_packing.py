"""Codes of every width, packed along every axis, and taken apart again."""

import jax.numpy as jnp
import numpy as np
import pytest

from qpaged.arrays import PLANES, extract_codes
from qpaged.arrays._packing import codes_per_byte, pack, unpack

SHAPE = (16, 32, 64)
NARROW = [bits for bits in PLANES if bits < 8]


def codes_of(bits, dtype, seed=0):
    lowest = -(2 ** (bits - 1)) if dtype == "int8" else 0
    codes = np.random.default_rng(seed).integers(lowest, lowest + 2**bits, SHAPE)
    return jnp.asarray(codes.astype(dtype))


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("axis", [-1, 0, 1])
@pytest.mark.parametrize("bits", NARROW)
def test_codes_come_back(bits, axis, dtype):
    codes = codes_of(bits, dtype)
    packed = pack(codes, bits, axis)
    assert packed.dtype == jnp.uint8 and packed.size * 8 == codes.size * bits
    np.testing.assert_array_equal(unpack(packed, bits, axis, jnp.dtype(dtype)), codes)


@pytest.mark.parametrize("of_kernels", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("bits", NARROW)
def test_codes_at_a_byte_index_are_every_nth(bits, dtype, of_kernels):
    codes = codes_of(bits, dtype)
    packed = pack(codes, bits, -1)
    packed = packed.astype(jnp.int32) if of_kernels else packed
    count = codes_per_byte(bits)
    for byte_index in range(count):
        taken = extract_codes(packed, bits, byte_index, jnp.dtype(dtype))
        assert taken.dtype == dtype
        np.testing.assert_array_equal(taken, codes[..., byte_index::count])


def test_planes_are_as_the_page_on_layout_says():
    """Of 6 bits: bytes 0 to 31 have low bits, and byte 32 + m the high bits of bytes m and m + 16."""
    codes = np.asarray(codes_of(6, "uint8"))[0, 0]
    packed = np.asarray(pack(jnp.asarray(codes), 6, -1))
    pairs = codes.reshape(32, 2)
    np.testing.assert_array_equal(packed[:32], (pairs[:, 0] & 15) | ((pairs[:, 1] & 15) << 4))
    for m in range(16):
        high = [pairs[m, 0], pairs[m, 1], pairs[m + 16, 0], pairs[m + 16, 1]]
        assert packed[32 + m] == sum(int(code >> 4) << (2 * place) for place, code in enumerate(high))
