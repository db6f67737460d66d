"""mxfp8 and mxfp4: the scale rule of OCP MX v1.0, from an independent implementation."""

import math

import jax
import ml_dtypes
import numpy as np
import pytest
from support.stored_codes import from_nibbles

import qpaged

ELEMENT = {"mxfp8": ml_dtypes.float8_e4m3fn, "mxfp4": ml_dtypes.float4_e2m1fn}
EMAX = {"mxfp8": 8, "mxfp4": 2}
LARGEST = float(np.finfo(np.float32).max)
quantize = jax.jit(lambda spelling, x: qpaged.get_quantizer(spelling).quantize(x), static_argnums=0)
values = jax.jit(lambda array: array.dequantize())


def rule(absmax, emax):
    """X = 2^(floor(log2 absmax) - emax), at least 2^-126; 0 for a block of zeros."""
    if absmax < 2.0**-126:  # float32 subnormals count as zero
        return 0.0
    return math.ldexp(1.0, max(math.frexp(absmax)[1] - 1 - emax, -126))


def maxima():
    """Largest magnitudes: in every binade its power of two, the floats beside it, and some between."""
    powers = 2.0 ** np.arange(-126, 128)
    powers = powers.astype(np.float32)
    below, above = (np.nextafter(powers, np.float32(to)) for to in (0, np.inf))
    between = [powers * np.float32(mantissa) for mantissa in (1.25, 1.5, 1.75, 1.9375, 1.999)]
    return np.concatenate([powers, below, above, *between, np.float32([0, LARGEST, 1e-45])])


def blocks(spelling):
    """Blocks (n, 32) of either sign whose largest magnitude is known, the largest at any place."""
    largest = maxima()
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (len(largest), 32)) * largest[:, None].astype(np.float64)
    x = x.astype(np.float32)
    rows = np.arange(len(largest))
    x[rows, rows % 32] = np.where(rows % 3 == 0, -largest, largest)
    return x


@pytest.mark.parametrize("spelling", EMAX)
def test_scales_and_codes_are_those_of_the_specification(spelling):
    x = blocks(spelling)
    array = quantize(spelling, x)
    assert array.scales.shape == (len(x), 1) and array.scales.dtype == np.uint8
    want = np.array([rule(float(np.abs(row).max()), EMAX[spelling]) for row in x])
    scales = np.asarray(array.scales)[:, 0]
    empty = want == 0
    np.testing.assert_array_equal(
        scales[~empty].view(ml_dtypes.float8_e8m0fnu).astype(np.float64), want[~empty]
    )
    np.testing.assert_array_equal(scales[empty], 0)
    np.testing.assert_array_equal(np.asarray(array.multipliers())[:, 0], want)

    element = ELEMENT[spelling]
    largest = float(ml_dtypes.finfo(element).max)
    counted = np.where(np.abs(x) < 2.0**-126, 0, x).astype(np.float64)
    units = counted / np.where(empty, 1, want)[:, None]
    rounded = np.clip(units, -largest, largest).astype(np.float32).astype(element)
    codes = np.asarray(array.codes) if spelling == "mxfp8" else from_nibbles(array.codes)
    # A quotient may be subnormal and be flushed with its sign; that is not told apart.
    np.testing.assert_array_equal(
        codes.view(element).astype(np.float32), rounded.astype(np.float32), err_msg="codes"
    )


@pytest.mark.parametrize("spelling", EMAX)
def test_values_are_off_by_half_a_spacing_at_most(spelling):
    x = blocks(spelling)
    array = quantize(spelling, x)
    read = np.asarray(values(array)).astype(np.float64)
    scale = np.asarray(array.multipliers()).astype(np.float64)
    size, mantissa = np.abs(x.astype(np.float64)), 3 if spelling == "mxfp8" else 1
    largest = float(ml_dtypes.finfo(ELEMENT[spelling]).max)
    smallest = float(ml_dtypes.finfo(ELEMENT[spelling]).smallest_subnormal)
    half = np.maximum(size * 2.0 ** -(mantissa + 1), smallest / 2 * scale)
    allowed = np.maximum(half, size - largest * scale) + 2.0**-126
    assert (np.abs(read - x) <= allowed).all()


@pytest.mark.parametrize("spelling", EMAX)
def test_blocks_are_of_32_channels_each_by_itself(spelling):
    x = np.ones((2, 3, 96), np.float32)
    x[..., 32:64] = 2.0**20
    x[..., 64:] = 2.0**-40
    array = quantize(spelling, x)
    assert array.scales.shape == (2, 3, 3)
    np.testing.assert_array_equal(values(array), x)
