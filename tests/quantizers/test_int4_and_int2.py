"""int4 and int2: the signed extreme, the floors, and how their codes lie in bytes."""

import jax
import ml_dtypes
import numpy as np
import pytest
from support.stored_codes import array_of, from_nibbles, two_to_a_byte

import qpaged
from qpaged.arrays import quantize as quantize_blocks

LARGEST = float(np.finfo(np.float32).max)
quantize = jax.jit(lambda spelling, x: qpaged.get_quantizer(spelling).quantize(x), static_argnums=0)
values = jax.jit(lambda array: array.dequantize())
unpacked = jax.jit(lambda array: array.unpacked())


def factors(array):
    """Scales, which are stored as the bits of bfloat16; float64."""
    return np.asarray(array.scales).view(ml_dtypes.bfloat16).astype(np.float64)


def away_from_zero(x):
    """float64 rounded to bfloat16 away from zero, at least the smallest normal number in magnitude."""
    x = np.copysign(np.maximum(np.abs(x), 2.0**-126), x)
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.copysign(np.ceil(np.abs(mantissa) * 2**8), mantissa), exponent - 8)


def groups():
    """Groups (n, 32), float32: gaussian in every binade, outliers, ties, constants, extremes."""
    rng = np.random.default_rng(0)
    binades = 2.0 ** np.arange(-124, 124)
    gaussian = rng.normal(size=(len(binades), 32)) * binades[:, None]
    outliers = np.where(rng.random((64, 32)) < 0.05, 100, 1) * rng.normal(size=(64, 32))
    flat = np.repeat(
        [[1.0], [-1.0], [0.1], [-0.1], [8.0], [-7.0], [LARGEST], [-LARGEST], [2.0**-126]], 32, axis=1
    )
    halves = np.arange(-16, 16) / 2  # under s = 1 every tie
    ties = np.stack([halves, -halves, halves * 0.75, np.nextafter(halves, 0), np.nextafter(halves, 9)])
    both = np.stack(
        [np.resize([a, -a, b], 32) for a, b in ((1, 0.5), (3, -2.9), (LARGEST, 0), (2.0**-126, 0))]
    )
    one = np.stack([np.where(np.arange(32) == 7, x, 0) for x in (1.0, -1.0, LARGEST, -LARGEST, 2.0**-126)])
    kinds = [
        gaussian,
        np.abs(gaussian),
        -np.abs(gaussian),
        outliers,
        flat,
        ties,
        both,
        one,
        np.zeros((1, 32)),
    ]
    x = np.concatenate(kinds).astype(np.float32)
    return np.where(np.abs(x) < 2.0**-126, 0, x)


def groups_below(largest):
    x = groups()
    return x[(np.abs(x) < largest).all(axis=1)]


def int4_oracle(x):
    """Codes and scales of groups (n, 32): c = round(x / s), s = extreme / -8 in bfloat16, away from zero."""
    low, high = x.min(axis=1).astype(np.float64), x.max(axis=1).astype(np.float64)
    extreme = np.where(high > -low, high, low)  # of the two of one magnitude, the negative
    scale = np.where(extreme == 0, 0, away_from_zero(extreme / -8))
    units = x / np.where(scale == 0, 1, scale)[:, None].astype(np.float32)
    return np.clip(np.rint(units), -8, 7).astype(int), scale


def int2_oracle(x):
    """c = floor(x / s), s = absmax / 2 in bfloat16, away from zero."""
    absmax = np.abs(x).max(axis=1).astype(np.float64)
    scale = np.where(absmax == 0, 0, away_from_zero(absmax / 2))
    units = x / np.where(scale == 0, 1, scale)[:, None].astype(np.float32)
    return np.clip(np.floor(units), -2, 1).astype(int), scale


@pytest.mark.parametrize(("spelling", "oracle"), [("int4", int4_oracle), ("int2", int2_oracle)])
def test_codes_and_scales_are_those_of_the_rule(spelling, oracle):
    x = groups_below(2.0**127)
    codes, scales = oracle(x)
    array = quantize(spelling, x)
    assert array.scales.dtype == np.uint16
    np.testing.assert_array_equal(factors(array)[:, 0], scales)
    np.testing.assert_array_equal(np.asarray(unpacked(array)), codes)


@pytest.mark.parametrize(("spelling", "oracle"), [("int4", int4_oracle), ("int2", int2_oracle)])
@pytest.mark.parametrize("largest", [2.0**127, LARGEST, -LARGEST])
def test_the_largest_numbers_have_codes_like_others(spelling, oracle, largest):
    """The reciprocal of a scale above 2^126 is no normal float32."""
    x = (np.linspace(-1, 1, 32) * largest).astype(np.float32)[None]
    codes, scales = oracle(x)
    array = quantize(spelling, x)
    np.testing.assert_array_equal(factors(array)[:, 0], scales)
    np.testing.assert_array_equal(np.asarray(unpacked(array)), codes)


@pytest.mark.parametrize(
    ("spelling", "width"), [("int4:group64", 64), ("int4:group128", 128), ("int4:token", 96)]
)
def test_every_granularity_has_the_same_rule(spelling, width):
    x = np.random.default_rng(1).normal(size=(64, width)).astype(np.float32)
    codes, scales = int4_oracle(x)
    array = quantize(spelling, x)
    np.testing.assert_array_equal(factors(array)[:, 0], scales)
    np.testing.assert_array_equal(np.asarray(unpacked(array)), codes)


def test_the_extreme_has_the_lowest_code_whatever_its_sign():
    x = np.random.default_rng(2).normal(size=(200, 32)).astype(np.float32)
    array = quantize("int4", x)
    extreme = x[np.arange(200), np.abs(x).argmax(axis=1)]
    scales = factors(array)[:, 0]
    np.testing.assert_array_equal(np.sign(scales), -np.sign(extreme))
    at = np.asarray(unpacked(array))[np.arange(200), np.abs(x).argmax(axis=1)]
    np.testing.assert_array_equal(at, -8)


def test_of_two_extremes_the_negative_decides_wherever_they_lie():
    x = np.full((4, 32), 0.25, np.float32)
    x[0, [3, 9]], x[1, [3, 9]], x[2, [0, 31]], x[3, [0, 31]] = (2, -2), (-2, 2), (2, -2), (-2, 2)
    array = quantize("int4", x)
    np.testing.assert_array_equal(factors(array), 0.25)
    codes, read = np.asarray(unpacked(array)), np.asarray(values(array))
    np.testing.assert_array_equal(codes[x == -2], -8)
    np.testing.assert_array_equal(codes[x == 2], 7)
    np.testing.assert_array_equal(read[x == 2], 1.75)


def test_ties_go_to_the_even_code():
    halves = (np.arange(-16, 16) / 2).astype(np.float32)
    for x, sign in ((halves, 1), (-halves, -1)):
        array = quantize("int4", x[None])
        assert factors(array)[0, 0] == sign
        want = np.clip(np.rint(halves), -8, 7)
        np.testing.assert_array_equal(np.asarray(unpacked(array))[0], want)


def test_the_error_is_as_stated():
    """At most s / 2 up to 7.5 s on the extreme's opposite side, x - 7 s from there on; for int2 s / 2."""
    x = groups_below(2.0**127)
    for spelling in ("int4", "int2"):
        array = quantize(spelling, x)
        s = factors(array)
        error = np.abs(np.asarray(values(array)).astype(np.float64) - x)
        units = np.where(s == 0, 0, x / np.where(s == 0, 1, s))
        allowed = np.maximum(0.5, units - 7) if spelling == "int4" else 0.5
        assert (error <= (allowed + 2.0**-18) * np.abs(s) + 2.0**-126).all()
        bound = np.asarray(jax.jit(array.quantizer.error_bound)(x, np.abs(s).astype(np.float32)))
        signed = np.asarray(jax.jit(array.quantizer.error_bound)(x, s.astype(np.float32)))
        assert (error <= np.maximum(bound, signed) + 2.0**-126).all()
        assert (error <= signed + 2.0**-126).all()


@pytest.mark.parametrize("granularity", ["page", "channel"])
def test_int4_floors(granularity):
    """c = floor(x / s), s the smallest power of two with absmax < 8 s."""
    x = np.random.default_rng(3).normal(size=(40, 8, 16)) * 2.0 ** np.arange(-80, 80, 4)[:, None, None]
    x = x.astype(np.float32)
    x[0, 0, 0], x[1] = 2.0**-40, 0
    x[2] = 4.0
    array = quantize(f"int4:{granularity}", x)
    absmax = np.abs(x).max(axis=(1, 2) if granularity == "page" else 1, keepdims=True).astype(np.float64)
    s = np.where(absmax > 0, np.ldexp(1.0, np.frexp(absmax)[1] - 3), 0)
    np.testing.assert_array_equal(np.asarray(array.multipliers()), s)
    codes = np.floor(x / np.where(s == 0, 1, s)).astype(int)
    assert codes.min() >= -8 and codes.max() <= 7
    np.testing.assert_array_equal(np.asarray(unpacked(array)), codes)
    np.testing.assert_array_equal(np.asarray(values(array)), (codes + 0.5) * s)


def test_int4_lies_two_to_a_byte_the_first_in_the_low_nibble():
    x = np.arange(-8, 8).repeat(2).reshape(1, 32)[:, np.random.default_rng(4).permutation(32)]
    array = quantize("int4", x.astype(np.float32))
    assert factors(array)[0, 0] == 1
    codes = np.asarray(array.codes)
    assert codes.dtype == np.uint8 and codes.shape == (1, 16)
    np.testing.assert_array_equal(codes, two_to_a_byte(x & 15))
    np.testing.assert_array_equal((codes & 15).astype(np.int8), x[:, 0::2] & 15)
    np.testing.assert_array_equal((codes >> 4).astype(np.int8), x[:, 1::2] & 15)
    np.testing.assert_array_equal(from_nibbles(codes), x & 15)


def test_int2_lies_four_to_a_byte_the_first_in_the_lowest_bits():
    x = np.resize([-2, -1, 0, 1, 1, 0, -2], 64).reshape(2, 32)
    array = quantize("int2", x.astype(np.float32))
    codes = np.asarray(array.codes)
    assert codes.dtype == np.uint8 and codes.shape == (2, 8)
    np.testing.assert_array_equal(factors(array), 1)
    for place in range(4):
        np.testing.assert_array_equal(codes >> 2 * place & 3, x[:, place::4] & 3)
    np.testing.assert_array_equal(np.asarray(values(array)), x + 0.5)


@pytest.mark.parametrize(("spelling", "bits"), [("int4", 4), ("int2", 2)])
def test_every_byte_holds_the_codes_that_its_bits_say(spelling, bits):
    several = 8 // bits
    packed = np.arange(256, dtype=np.uint8).reshape(-1, 32 // several)
    scales = np.ones((len(packed), 1), ml_dtypes.bfloat16).view(np.uint16)
    array = array_of(spelling, packed, scales)
    want = np.stack([packed >> bits * place & (1 << bits) - 1 for place in range(several)], axis=-1)
    want = want.reshape(len(packed), 32).astype(int)
    want = np.where(want >= 1 << bits - 1, want - (1 << bits), want)
    np.testing.assert_array_equal(np.asarray(unpacked(array)), want)


@pytest.mark.parametrize(
    ("spelling", "bits"), [("int4", 4), ("int2", 2), ("mxfp4", 4), ("int4:page+offset", 4)]
)
@pytest.mark.parametrize("axis", range(4))
def test_channels_may_lie_on_any_axis(spelling, bits, axis):
    """What is packed along one axis reads as what is packed along the last."""
    quantizer, several = qpaged.get_quantizer(spelling), 8 // bits
    x = np.random.default_rng(axis).normal(size=(2, 3, 5, 32)).astype(np.float32)
    moved = np.moveaxis(x, -1, axis)
    block = list(quantizer.block(x.shape))
    moved_block = np.moveaxis(np.empty(block), -1, axis).shape

    def both(x, moved):
        arrays = quantizer.quantize(x), quantize_blocks(moved, quantizer, moved_block, None, axis - 4)
        return arrays, [(array.unpacked(), array.dequantize()) for array in arrays]

    (last, array), ((want, want_values), (got, got_values)) = jax.jit(both)(x, moved)
    assert array.codes.shape[axis] == 32 // several
    assert array.shape == moved.shape and array.codes.dtype == np.uint8
    np.testing.assert_array_equal(np.moveaxis(np.asarray(got), axis, -1), want)
    np.testing.assert_array_equal(np.moveaxis(np.asarray(got_values), axis, -1), want_values)
    np.testing.assert_array_equal(np.moveaxis(np.asarray(array.codes), axis, -1), last.codes)
    np.testing.assert_array_equal(np.moveaxis(np.asarray(array.scales), axis, -1), last.scales)
