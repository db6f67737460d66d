"""Codes that are integers meet a bfloat16 operand as the integers they are, on CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import normal
from support.long import first_short

import qpaged
from qpaged.arrays import _integer_dot, as_slots, dot, gather_pages

HEADS, SLOTS, DIM = 2, 32, 64
QK, PV = (((2,), (2,)), ((0,), (0,))), (((2,), (1,)), ((0,), (0,)))
ROW = 0.5 / _integer_dot.UNITS_PER_ROW  # the most that an integer is off, over the largest
CODES = np.random.default_rng(0).integers(-128, 128, (HEADS, SLOTS, DIM)).astype(np.int8)


def dots(numbers):
    return jax.jit(functools.partial(_integer_dot.dot, numbers=numbers))


def rows(width):
    return jnp.asarray(normal(HEADS, 3, width, seed=2), jnp.bfloat16)


@pytest.mark.parametrize(
    ("numbers", "pairs", "axis"), [(QK, "hrd,hsd->hrs", 2), (PV, "hrs,hsd->hrd", 1)], ids=["keys", "values"]
)
def test_the_sum_is_off_by_less_than_bfloat16_would_be(numbers, pairs, axis):
    other = rows(CODES.shape[axis])
    exact = np.einsum(pairs, np.float64(other), np.float64(CODES))
    largest = np.abs(np.float64(other)).max(axis=-1, keepdims=True)
    off = np.abs(np.float64(dots(numbers)(other, CODES)) - exact)
    assert np.all(off <= ROW * largest * np.abs(np.float64(CODES)).sum(axis=axis)[:, None])
    assert off.max() > 0  # as floats, these sums would be exact


@pytest.mark.parametrize("largest", [1e-38, 1e-34, 1e30])
def test_rows_of_any_size_keep_their_precision(largest):
    other = (rows(DIM).astype(jnp.float32) * (largest / 4)).astype(jnp.bfloat16)
    exact = np.einsum("hrd,hsd->hrs", np.float64(other), np.float64(CODES))
    np.testing.assert_allclose(np.float64(dots(QK)(other, CODES)), exact, atol=1e-3 * np.abs(exact).max())


def test_other_devices_multiply_floats():
    lowered = jax.jit(functools.partial(_integer_dot.dot, numbers=QK)).trace(rows(DIM), CODES)
    text = {platform: lowered.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu")}
    assert "tensor<2x2x3x64xi8>, tensor<2x32x64xi8>" in text["cpu"]
    assert "tensor<2x3x64xbf16>, tensor<2x32x64xbf16>" in text["tpu"]


def test_derivatives_are_those_of_the_exact_dot():
    other, step = rows(DIM), rows(DIM) * 2
    _, along = jax.jvp(lambda x: _integer_dot.dot(x, CODES, QK), (other,), (step,))
    assert np.allclose(along, np.einsum("hrd,hsd->hrs", np.float64(step), np.float64(CODES)), rtol=1e-5)
    back = jax.grad(lambda x: _integer_dot.dot(x, CODES, QK).sum())(other)
    assert np.allclose(np.float64(back[:, 0]), np.float64(CODES).sum(axis=1), rtol=2.0**-8)


def test_a_row_of_zeros_stays_zero():
    assert not np.any(_integer_dot.dot(jnp.zeros((HEADS, 3, DIM), jnp.bfloat16), CODES, QK))


@pytest.mark.parametrize(
    ("format", "added"),
    [
        ("int8", 0.5),
        ("int8:token", 0.0),
        ("int4", 0.0),
        ("int8+offset", -0.5),  # of codes less 128
        ("int4:page+offset", -0.5),  # of codes less 8
        ("fp8_e4m3", None),
        ("nvfp4", None),
    ],
)
def test_what_a_format_adds_to_its_codes(format, added):
    quantizer = qpaged.get_quantizer(format)
    assert _integer_dot._added_to_integers(quantizer, jnp.dtype(quantizer.code_dtype(jnp.bfloat16))) == added


@pytest.mark.parametrize("format", first_short(1, ["int8+offset", "int4:page+offset"]))
def test_unsigned_codes_are_multiplied_as_integers_too(format):
    pool = qpaged.get_quantizer(format).quantize(normal(2, 4, 16, 32, seed=4))
    query = jnp.asarray(normal(2, 3, 32, seed=5), jnp.bfloat16)

    def scores(query, pool):
        return dot(query, as_slots(gather_pages(pool, jnp.arange(1, 2))), QK)

    assert "xi8>" in jax.jit(scores).lower(query, pool).as_text().split("dot_general", 1)[1].splitlines()[0]
    exact = np.einsum("hrd,hsd->hrs", np.float64(query), np.float64(pool.materialize()[:, 1]))
    # twice what an integer is away from its element, times codes of at most 128 in units of scales
    bound = 2 * ROW * np.abs(np.float64(query)).max(axis=-1) * 128 * 32 * float(pool.multipliers().max())
    off = np.abs(np.float64(jax.jit(scores)(query, pool)) - exact)
    assert np.all(off <= bound[..., None])


def test_a_sum_too_long_for_int32_is_of_floats():
    codes = np.full((1, 1, _integer_dot.MAX_CONTRACTED + 1), -128, np.int8)
    other = jnp.ones((1, 1, _integer_dot.MAX_CONTRACTED + 1), jnp.bfloat16)
    want = -128 * (_integer_dot.MAX_CONTRACTED + 1)
    assert _integer_dot.dot(other, codes, QK)[0, 0, 0] == pytest.approx(want, rel=1e-6)
