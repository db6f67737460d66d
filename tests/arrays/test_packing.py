"""Codes of every width, packed along every axis, and taken apart again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from support.arrays import normal
from support.caches import dense
from support.implicit_arrays import needs_own_implementation

import qpaged
from qpaged.arrays import PLANES, extract_codes
from qpaged.arrays._packing import codes_per_byte, pack, unpack
from qpaged.implicit import use_implicit_args

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


PACKED = ("int3", "int4:token", "int5:channel", "int6:token")


def assert_close(out, want):
    """Check two results, of which dots add up to 128 float32 terms in another order."""
    np.testing.assert_allclose(out, want, rtol=0, atol=8 * 2.0**-24 * np.abs(want).max())


JOINS = {
    "concatenate": lambda x: jnp.concatenate([x, x], -1),
    "tile": lambda x: jnp.tile(x, (1, 1, 2)),
    "of transposed": lambda x: jnp.concatenate([x.transpose(2, 0, 1)] * 2, 0),
    "dot": lambda x: jnp.einsum("hsd,d->hs", jnp.concatenate([x, x], -1), jnp.arange(128.0)),
}


@pytest.mark.short(5)
@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("spelling", PACKED)
def test_channels_that_are_joined_are_those_of_plain_arrays(spelling, join):
    array = qpaged.get_quantizer(spelling).quantize(normal(2, 16, 64))
    out = use_implicit_args(JOINS[join])(array)
    assert_close(dense(out), JOINS[join](array.dequantize()))


@pytest.mark.short(2)
@needs_own_implementation
@pytest.mark.filterwarnings("ignore::qpaged.implicit.MaterializeWarning")
@pytest.mark.parametrize(
    "spelling", ["int3", "int4:token", "int5:channel", "int6:token", "int8:token+rotate"]
)
def test_channels_are_divided_between_devices_as_those_of_plain_arrays(spelling):
    array = qpaged.get_quantizer(spelling).quantize(normal(2, 16, 64))
    mesh = Mesh(np.array(jax.devices()[:2]), "t")
    channels = PartitionSpec(None, None, "t")

    def total(x):
        return jax.lax.psum(jnp.einsum("hsd,d->hs", x, jnp.arange(float(x.shape[-1]))), "t")

    for body, in_specs, out_specs in (
        (total, channels, PartitionSpec()),
        (lambda x: x, PartitionSpec(), channels),
    ):
        function = jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        want = function(array.dequantize())
        assert_close(dense(use_implicit_args(function)(array)), want)
