"""Rounding to bfloat16 by hand, on CPU, is rounding to the nearest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qpaged
from qpaged.arrays._bfloat16 import decode_to_bfloat16, to_bfloat16
from qpaged.implicit import use_implicit_args

BYTES = np.arange(256, dtype=np.uint8)


def test_it_is_the_nearest():
    bits = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32)
    x = bits[bits & 0xFFFF != 0x8000].view(np.float32)
    x = x[np.abs(x) >= np.finfo(np.float32).tiny]  # subnormals may be flushed, and NaN is no number
    x = np.append(x, np.float32([0, -0.0, np.inf, -np.inf, 3.4e38]))
    np.testing.assert_array_equal(jax.jit(to_bfloat16)(x), x.astype(jnp.bfloat16))


def test_ties_go_away_from_zero():
    x = np.float32([1 + 2**-8, -1 - 2**-8, 1 + 3 * 2**-8])
    assert to_bfloat16(x).astype(np.float32).tolist() == [1 + 2**-7, -1 - 2**-7, 1 + 2**-6]


@pytest.mark.parametrize("nan", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001])
def test_any_nan_stays_one(nan):
    assert np.isnan(jax.jit(to_bfloat16)(np.uint32([nan]).view(np.float32)))


def test_its_derivative_is_that_of_a_cast():
    assert jax.grad(lambda x: to_bfloat16(x * 3).astype(jnp.float32))(jnp.float32(1.3)) == 3


def every_code(quantizer):
    """Return what a format decodes: its codes, or its states."""
    if quantizer.state_bits:
        return np.arange(2**quantizer.state_bits, dtype=np.int32)
    return BYTES[: 2**quantizer.bits].view(quantizer.code_dtype(jnp.bfloat16))


@pytest.mark.parametrize("name", sorted(set(qpaged.available_formats()) - {"raw"}))
def test_codes_become_what_their_format_says(name):
    quantizer = qpaged.get_quantizer(name)
    codes = every_code(quantizer)
    decoded = jax.jit(decode_to_bfloat16, static_argnums=0)(quantizer.decode, codes)
    assert decoded.dtype == jnp.bfloat16
    want = quantizer.decode(codes, jnp.bfloat16)
    np.testing.assert_array_equal(decoded.astype(np.float32), want.astype(np.float32))


def test_floats_that_are_no_bfloat16_are_rounded_to_the_nearest():
    pool = qpaged.get_quantizer("raw").quantize(jax.random.normal(jax.random.key(0), (2, 4, 16, 32)))

    @use_implicit_args
    def dot(query, array):
        return jnp.einsum("hd,hpsd->hps", query, (array * 2).astype(jnp.bfloat16))

    query = jnp.ones((2, 32), jnp.bfloat16)
    np.testing.assert_array_equal(jax.jit(dot)(query, pool), jax.jit(dot)(query, pool.materialize()))


def test_other_devices_decode_to_bfloat16_at_once():
    traced = jax.jit(decode_to_bfloat16, static_argnums=0).trace(qpaged.get_quantizer("int8").decode, BYTES)
    text = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu")}
    assert "f32" in text["cpu"] and "f32" not in text["tpu"]
