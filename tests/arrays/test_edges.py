"""Corners of lazy programs: narrow floats, empty axes, indices that wrap, what is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.arrays import multipliers, normal, quantized
from support.formats import FEW

import qpaged
from qpaged.implicit import use_implicit_args

SCALED = [format for format in FEW if format != "raw"]


def lazily(program, *arguments):
    out = jax.jit(use_implicit_args(program))(*arguments)
    return out.materialize() if isinstance(out, qpaged.QuantizedArray) else out


@pytest.mark.parametrize("format", SCALED)
def test_float16_weights_keep_small_scales(format):
    slots = 4096
    values = (normal(16, slots // 16, 32) * 3e-4 + 3e-4).astype(jnp.float16)
    array = qpaged.get_quantizer(format).quantize(values)
    weights = jnp.full((1, slots), 1 / slots, jnp.float16)
    out = lazily(lambda p, v: p @ v.reshape(slots, 32), weights, array)
    want = np.asarray(weights, np.float64) @ np.asarray(array.dequantize(), np.float64).reshape(slots, 32)
    np.testing.assert_allclose(out, want, rtol=2e-3)


@pytest.mark.parametrize("format", FEW)
def test_a_window_that_covers_the_array_may_be_out_of_range(format):
    array = qpaged.get_quantizer(format).quantize(normal(1, 32))
    rows = jnp.stack([normal(32, seed=1), normal(32, seed=2)])
    out = lazily(lambda a: a.at[jnp.array([0, 1])].set(rows, mode="drop"), array)
    assert jnp.abs(out[0] - rows[0]).max() <= 0.5 * jnp.abs(rows[0]).max()  # the coarsest format
    untouched = lazily(lambda a: a.at[jnp.array([1, 2])].set(rows, mode="drop"), array)
    np.testing.assert_array_equal(untouched, array.materialize())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_a_converted_array_reads_nan_past_the_end(dtype):
    array = quantized("raw", dtype=jnp.bfloat16)

    def program(a):
        return jnp.take(a.astype(dtype), jnp.array([0, 9]), axis=1, mode="fill")

    np.testing.assert_array_equal(lazily(program, array), program(array.materialize()))


@pytest.mark.short(2)
@pytest.mark.parametrize("format", FEW)
def test_large_indices_do_not_wrap(format):
    array = quantized(format)

    def program(a):
        start = [jnp.uint32(at) for at in (0, 3_000_000_000, 0, 0)]
        return lax.dynamic_slice(a, start, (2, 1, 16, 32))

    np.testing.assert_array_equal(lazily(program, array), array.materialize()[:, -1:])


@pytest.mark.parametrize("format", FEW)
def test_dots_over_nothing(format):
    array = quantized(format)
    for program in (
        lambda a: jnp.einsum("hd,hpsd->hps", normal(2, 32), a[:, :0]),
        lambda a: jnp.einsum("hs,hpsd->hpd", normal(2, 0), a[:, :, :0]),
        lambda a: a[:, :0] * 2.0,
    ):
        want = program(array.materialize())
        out = lazily(program, array)
        assert out.shape == want.shape
        np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("program", [lambda a: -a, lambda a: a * 0.5, lambda a: a.astype(jnp.bfloat16)])
def test_raw_keeps_what_is_not_finite(program):
    values = jnp.array([[np.inf, -np.inf, np.nan, 1.0]], jnp.float32)
    array = qpaged.get_quantizer("raw").quantize(values)
    got, want = (x.astype(jnp.float32) for x in (lazily(program, array), program(values)))
    np.testing.assert_array_equal(got, want)


@pytest.mark.short(2)
@pytest.mark.parametrize("format", FEW)
def test_narrow_logical_dtypes(format):
    values = normal(2, 4, 32).astype(jnp.float8_e4m3fn)
    array = qpaged.get_quantizer(format).quantize(values)
    got, want = np.asarray(array.materialize(), np.float32), np.asarray(values, np.float32)
    assert np.isfinite(got).all()
    bound = np.asarray(array.quantizer.error_bound(want, multipliers(array)))
    assert (np.abs(got - want) <= bound + 0.25).all()  # the logical dtype's own rounding of values up to 4
