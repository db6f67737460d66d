"""Masks and weights of rows: kept in codes and scales, with the values that plain arrays would have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.arrays import normal
from support.implicit_arrays import needs_own_implementation
from support.long import first_short

import qpaged
from qpaged.arrays import quantize
from qpaged.implicit import use_implicit_args

pytestmark = [needs_own_implementation, pytest.mark.filterwarnings("error")]
FORMATS = (
    "int8",
    "int8:token",
    "int4",
    "int4:token+rotate",
    "int4:channel",
    "mxfp8",
    "nvfp4",
    "fp8_e4m3",
    "int8:token+offset",
)
SHAPE = (3, 32, 2, 64)
MASKS = {
    "batch": jnp.array([True, False, True]).reshape(3, 1, 1, 1),
    "length": (jnp.arange(32) % 5 < 2).reshape(1, 32, 1, 1),
    "batch and length": (jnp.arange(32) < jnp.array([[3], [17], [32]])).reshape(3, 32, 1, 1),
    "heads": jnp.array([True, False]).reshape(1, 1, 2, 1),
}


CASES = [
    (name, spelling)
    for spelling in FORMATS
    for name in MASKS
    if not (spelling == "int4:channel" and "length" in name)  # there each element would have a scale
]


def quantized(spelling, seed=0):
    quantizer = qpaged.get_quantizer(spelling)
    page, channels = quantizer.block((16, SHAPE[-1]))
    return quantize(normal(*SHAPE, seed=seed), quantizer, (1, page, 1, channels))


def assert_same_as_plain(function, *arrays, exact=True):
    """Check a function of quantized arrays, eagerly and jitted, against the same of their values."""
    want = function(*[array.dequantize() for array in arrays])
    for run in (use_implicit_args(function), jax.jit(use_implicit_args(function))):
        got = run(*arrays)
        assert qpaged.arrays.is_quantized(got)
        np.testing.assert_allclose(got.dequantize(), want, rtol=0 if exact else 1e-6)


@pytest.mark.short(4)
@pytest.mark.parametrize("case", first_short(8, CASES), ids=str)
def test_where(case):
    name, spelling = case
    a, b, mask = quantized(spelling), quantized(spelling, seed=1), MASKS[name]
    assert_same_as_plain(lambda a, b: jnp.where(mask, a, b), a, b)
    assert_same_as_plain(lambda a: jnp.where(mask, a, 0), a)
    assert_same_as_plain(lambda a: jnp.where(mask, 0.0, a), a)
    assert_same_as_plain(lambda a: lax.select(jnp.broadcast_to(mask, SHAPE), jnp.zeros(SHAPE), a), a)


@pytest.mark.parametrize("spelling", first_short(2, FORMATS))
def test_where_by_one_flag(spelling):
    a = quantized(spelling)
    for flag in (True, False):
        assert_same_as_plain(lambda a, flag=flag: jnp.where(jnp.array(flag), a, 0), a)


@pytest.mark.parametrize("case", first_short(8, CASES), ids=str)
def test_weights_of_rows(case):
    name, spelling = case
    weights = jnp.where(MASKS[name], jnp.float32(0.75), 0)

    def multiplied(array):
        return array * weights

    if spelling == "nvfp4" and name != "batch":  # a scale to 16 channels: one of each row would be as many
        weights = weights[:, :1, :1]
    assert_same_as_plain(multiplied, quantized(spelling), exact=False)


def test_a_mask_of_channels_is_materialized_where_they_go_together():
    mask = jnp.arange(64) % 2 == 0
    with pytest.warns(qpaged.implicit.MaterializeWarning, match="select_n"):
        use_implicit_args(lambda a: jnp.where(mask, a, 0))(quantized("int4"))


def test_a_mask_is_materialized_where_each_element_would_have_a_scale():
    with pytest.warns(qpaged.implicit.MaterializeWarning, match="select_n"):
        use_implicit_args(lambda a: jnp.where(MASKS["length"], a, 0))(quantized("int4:channel"))


def test_a_mask_keeps_blocks_that_it_does_not_cut():
    array = quantized("int8")
    kept = use_implicit_args(lambda a: jnp.where(MASKS["batch"], a, 0))(array)
    assert (kept.quantizer, kept.block) == (array.quantizer, array.block)


def test_numbers_other_than_zero_are_materialized():
    with pytest.warns(qpaged.implicit.MaterializeWarning, match="select_n"):
        out = use_implicit_args(lambda a: jnp.where(MASKS["length"], a, 1))(quantized("int8"))
    np.testing.assert_array_equal(out[0, 3], 1)


@pytest.mark.parametrize("spelling", first_short(2, FORMATS))
@pytest.mark.parametrize("ends", [(0, 16), (0, 5), (3, 4)])
def test_padding_with_zeros(ends, spelling):
    assert_same_as_plain(lambda a: jnp.pad(a, ((1, 0), ends, (0, 0), (0, 0))), quantized(spelling))


def test_padding_and_cutting_keeps_the_blocks():
    array = quantized("int8")
    back = use_implicit_args(lambda a: jnp.pad(a, ((0, 0), (0, 16), (0, 0), (0, 0)))[:, :32])(array)
    assert back.block == array.block
    np.testing.assert_array_equal(back.codes, array.codes)


@pytest.mark.parametrize("ends", [(0, -1), (0, 0)])
def test_other_padding_is_materialized(ends):
    between = int(ends == (0, 0))
    config = ((0, 0, 0), (*ends, between), (0, 0, 0), (0, 0, 0))
    with pytest.warns(qpaged.implicit.MaterializeWarning, match="pad"):
        use_implicit_args(lambda a: lax.pad(a, jnp.float32(0), config))(quantized("int8"))


def test_attention_to_masked_values():
    array, mask = quantized("int8:token"), MASKS["batch and length"].astype(jnp.float32)
    weights = normal(3, 2, 1, 32)

    def read(weights, values):
        return jnp.einsum("bhts,bshd->bthd", weights, values * mask)

    want = read(weights, array.dequantize())
    np.testing.assert_allclose(use_implicit_args(read)(weights, array), want, rtol=1e-5, atol=1e-5)
