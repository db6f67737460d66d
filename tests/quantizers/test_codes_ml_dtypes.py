"""Codes of the float formats against ml_dtypes: every code, and every tie with its neighbours."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from support.stored_codes import array_of, from_nibbles, two_to_a_byte

import qpaged

E4M3, E5M2, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float4_e2m1fn
OF = {
    "mxfp8": E4M3,
    "mxfp4": E2M1,
    "nvfp4": E2M1,
    "fp8_e4m3:token": E4M3,
    "fp8_e5m2:token": E5M2,
}
# For each format a value that brings the scale of its block to 1, where one does.
UNIT = {"mxfp8": 510.0, "mxfp4": 7.75, "fp8_e4m3:token": 255.0, "fp8_e5m2:token": 28672.0}
FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def codes_of(element):
    """Every code of the element, uint8."""
    return np.arange(16 if element is E2M1 else 256).astype(np.uint8)


def numbers_of(element):
    """What ml_dtypes reads every code as, float32."""
    return codes_of(element).view(element).astype(np.float32)


def sweep(element, beyond=2.0):
    """float32: every number, every middle of two neighbours, the floats next to these, and bfloat16's all."""
    finite = numbers_of(element)
    finite = np.unique(finite[np.isfinite(finite)]).astype(np.float64)
    marks = np.concatenate([finite, (finite[1:] + finite[:-1]) / 2, finite * beyond]).astype(np.float32)
    near = [marks, np.nextafter(marks, np.float32(np.inf)), np.nextafter(marks, np.float32(-np.inf))]
    for steps in (3, 100, 4095):  # ties that a detour through a 16-bit float would make
        near += [marks * np.float32(1 + steps * 2.0**-23), marks * np.float32(1 - steps * 2.0**-23)]
    coarse = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    coarse = coarse[np.isfinite(coarse) & (np.abs(coarse) <= beyond * finite.max())]
    values = np.concatenate([*near, coarse])
    return np.where(
        np.abs(values) < 2.0**-126, np.copysign(0, values), values
    )  # float32 subnormals count as zero


def cast(values, element):
    """Codes by ml_dtypes' cast of the values, clipped to the largest number; from float32."""
    largest = np.float32(ml_dtypes.finfo(element).max)
    return np.clip(values, -largest, largest).astype(element).view(np.uint8)


@pytest.mark.parametrize("spelling", OF)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_code_reads_as_ml_dtypes_says(spelling, dtype):
    element = OF[spelling]
    quantizer = qpaged.get_quantizer(spelling)
    got = jax.jit(lambda codes: quantizer.decode(codes, dtype))(codes_of(element))
    assert got.dtype == dtype
    want = numbers_of(element).astype(dtype)  # exact: every number is one of the three
    np.testing.assert_array_equal(np.asarray(got).astype(np.float32), want.astype(np.float32))


@pytest.mark.parametrize("spelling", OF)
def test_every_value_gets_the_code_that_ml_dtypes_gives(spelling):
    element = OF[spelling]
    values = sweep(element)
    got = np.asarray(jax.jit(qpaged.get_quantizer(spelling).encode)(values)).astype(np.uint8)
    want = cast(values, element)
    wrong = np.flatnonzero(got != want)
    assert not wrong.size, [(values[i].item().hex(), got[i], want[i]) for i in wrong[:5]]


@pytest.mark.parametrize("spelling", OF)
def test_signs_of_zero_and_what_is_beyond_the_largest(spelling):
    element, encode = OF[spelling], jax.jit(qpaged.get_quantizer(spelling).encode)
    largest = np.float32(ml_dtypes.finfo(element).max)
    values = np.array([0.0, -0.0, largest, -largest, 1e30, -1e30, largest * 1.0625], np.float32)
    np.testing.assert_array_equal(np.asarray(encode(values)).astype(np.uint8), cast(values, element))


@pytest.mark.parametrize("spelling", UNIT)
@pytest.mark.parametrize("dtype", FLOATS)
def test_arrays_hold_those_codes(spelling, dtype):
    """One value of each block brings its scale to 1; the others are swept."""
    element, unit = OF[spelling], UNIT[spelling]
    values = sweep(element)
    values = values[np.abs(values) <= unit].astype(dtype).astype(np.float32)
    values = np.pad(values, (0, -len(values) % 31)).reshape(-1, 31)
    values = np.concatenate([values, np.full((len(values), 1), unit, np.float32)], axis=1)
    array = jax.jit(qpaged.get_quantizer(spelling).quantize)(values.astype(dtype))
    np.testing.assert_array_equal(np.asarray(array.multipliers()), 1)
    codes = from_nibbles(array.codes) if element is E2M1 else np.asarray(array.codes)
    want = cast(values, element)
    same = (codes == want) | ((values == 0) & (codes & (len(codes_of(element)) // 2 - 1) == 0))
    assert same.all(), [
        (values[at].item().hex(), codes[at], want[at]) for at in zip(*np.nonzero(~same), strict=True)
    ][:5]
    read = np.asarray(jax.jit(lambda array: array.materialize())(array)).astype(np.float32)
    np.testing.assert_array_equal(read, want.view(element).astype(np.float32))


@pytest.mark.parametrize("spelling", ["mxfp8", "mxfp4", "nvfp4"])
def test_arrays_of_every_code_read_as_ml_dtypes_says(spelling):
    """Under scales of 1, and under -- for the bits of E8M0 and E4M3 -- every other one."""
    element = OF[spelling]
    codes = np.tile(codes_of(element), (256, 1))
    if spelling == "nvfp4":
        scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], codes.shape[1] // 16, axis=1)
        outer, factors = np.full((256, 1), 127, np.uint8), scales.view(E4M3).astype(np.float32)
    else:
        codes = codes if element is E4M3 else np.tile(codes, (1, 2))
        scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], codes.shape[1] // 32, axis=1)
        outer, factors = None, scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
        factors = np.where(scales == 0, 0, factors)  # the byte of a block of zeros
    packed = two_to_a_byte(codes) if element is E2M1 else codes
    array = array_of(spelling, packed, scales, outer)
    np.testing.assert_array_equal(np.asarray(array.multipliers()), factors)
    each = np.repeat(factors, codes.shape[1] // factors.shape[1], axis=1).astype(np.float64)
    with np.errstate(invalid="ignore"):
        want = codes.view(element).astype(np.float64) * each
    got = np.asarray(jax.jit(lambda array: array.materialize())(array))
    largest = np.finfo(np.float32).max
    want = np.where(np.isnan(want), np.nan, np.clip(want, -largest, largest)).astype(np.float32)
    flushed = np.abs(want) < 2.0**-126
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_array_equal(got[~flushed], want[~flushed])
    assert (np.abs(got[flushed]) <= 2.0**-126).all()
