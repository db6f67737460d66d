"""nvfp4: both levels of scales, from an independent implementation."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest
from support.stored_codes import from_nibbles

import qpaged

E4M3 = ml_dtypes.float8_e4m3fn
E2M1 = np.arange(8).astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
SCALES = np.arange(0x7F).astype(np.uint8).view(E4M3).astype(np.float64)  # 0 to 448, ascending
LEAST = 2.0**-116
LARGEST = float(np.finfo(np.float32).max)
NVFP4 = qpaged.get_quantizer("nvfp4")
quantize = jax.jit(NVFP4.quantize)
values = jax.jit(lambda array: array.dequantize())


def nearest(size, numbers):
    """Indices of the nearest of ``numbers``, a tie to the even one; saturating."""
    middles = (numbers[1:] + numbers[:-1]) / 2
    up, even = np.searchsorted(middles, size, side="right"), np.searchsorted(middles, size, side="left")
    return np.where(up == even, up, up - up % 2)


def powers_of_two(tokens):
    """g of each token: the smallest power of two above absmax / (6 · 448); float64."""
    absmax = np.abs(tokens).max(axis=-1).astype(np.float64)
    exponent = np.frexp(absmax / 2688)[1]  # what it multiplies the power of two of is in [0.5, 1)
    return np.where(absmax > 0, np.maximum(np.ldexp(1.0, exponent), LEAST), 0)


def oracle(tokens):
    """Codes (n, channels), scales (n, blocks) and powers of two (n,) of tokens (n, channels)."""
    g = powers_of_two(tokens)
    factor = np.where(g > 0, g, 1)[:, None]
    parts = tokens.reshape(len(tokens), -1, 16).astype(np.float64)
    block = np.abs(parts).max(axis=-1) / factor
    # The product with a float32 sixth, as the quotient is taken; beside ties it may be one float away.
    sixth = (block.astype(np.float32) * np.float32(1 / 6)).astype(np.float64)
    scales = nearest(np.clip(sixth, 2.0**-9, 448), SCALES)
    units = parts / (SCALES[scales] * factor)[..., None]
    codes = nearest(np.abs(units), E2M1) | np.signbit(units) << 3
    return codes.reshape(tokens.shape), scales, g


def agree(tokens):
    """The format's array of ``tokens``, after comparing all its parts."""
    tokens = tokens.astype(np.float32)
    array = quantize(tokens)
    codes, scales, g = oracle(np.where(np.abs(tokens) < 2.0**-126, 0, tokens))
    outer = np.asarray(array.global_scale)[:, 0]
    np.testing.assert_array_equal(np.asarray(NVFP4.global_scale.multiplier(array.global_scale))[:, 0], g)
    np.testing.assert_array_equal(outer == 0, g == 0)
    np.testing.assert_array_equal(np.asarray(array.scales), scales)
    got = from_nibbles(array.codes)
    same = (got == codes) | ((got & 7 == 0) & (codes & 7 == 0))
    assert same.all(), (tokens[~same][:5], got[~same][:5], codes[~same][:5])
    return array


def test_gaussian_tokens_of_every_binade():
    rng = np.random.default_rng(0)
    binades = 2.0 ** np.arange(-125, 124).repeat(4)
    agree(rng.normal(size=(len(binades), 64)) * binades[:, None])


def test_blocks_of_very_different_magnitudes_in_a_token():
    rng = np.random.default_rng(1)
    spread = 2.0 ** rng.integers(-30, 1, (2000, 4)).repeat(16, axis=1)
    agree(rng.normal(size=(2000, 64)) * spread * 2.0 ** rng.integers(-80, 100, (2000, 1)))


def test_every_scale_and_the_ties_between_them():
    """A token whose largest value makes g a power of two known; the second block's largest is swept."""
    numbers = SCALES[1:]
    marks = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2]) * 6
    marks = marks.astype(np.float32)
    up, down = (np.nextafter(marks, np.float32(to)) for to in (np.inf, 0))
    largest = np.concatenate([marks, up, down])
    largest = largest[largest < 2688]
    tokens = np.zeros((len(largest), 32), np.float32)
    tokens[:, 0] = 2688 * 0.999
    tokens[:, 16] = largest
    tokens[:, 17] = -largest / 7
    array = agree(tokens)
    np.testing.assert_array_equal(np.asarray(array.global_scale), 127)  # g is 1
    exact = nearest(np.clip(largest.astype(np.float64) / 6, 2.0**-9, 448), SCALES)
    got = np.asarray(array.scales)[:, 1].astype(int)
    assert (np.abs(got - exact) <= 1).all()
    on_marks = np.isin(largest, marks)
    np.testing.assert_array_equal(got[on_marks], exact[on_marks])


def test_every_element_and_the_ties_between_them():
    marks = np.concatenate([E2M1, (E2M1[1:] + E2M1[:-1]) / 2, E2M1 * 2])
    marks = np.concatenate([marks, -marks]).astype(np.float32)
    near = np.concatenate(
        [marks, np.nextafter(marks, np.float32(9e9)), np.nextafter(marks, np.float32(-9e9))]
    )
    near = near[np.abs(near) <= 6]
    near = np.pad(near, (0, -len(near) % 15)).reshape(-1, 15)
    tokens = np.concatenate([np.full((len(near), 1), 6, np.float32), near], axis=1)  # t is 1 where g is
    tokens = np.concatenate([tokens, np.zeros_like(tokens)], axis=1)
    tokens[:, 16] = 2688 * 0.999
    array = agree(tokens)
    np.testing.assert_array_equal(np.asarray(array.multipliers())[:, 0], 1)


@pytest.mark.parametrize("exponent", [-100, -20, -3, 0, 1, 17, 100])
def test_at_and_beside_the_largest_that_a_power_of_two_takes(exponent):
    """absmax / (6 · 448) < g is strict: 2688 · 2^k has g = 2^(k + 1)."""
    at = np.float32(2688 * 2.0**exponent)
    beside = np.float32([np.nextafter(at, np.float32(0)), at, np.nextafter(at, np.float32(np.inf))])
    tokens = np.zeros((3, 16), np.float32)
    tokens[:, 3] = beside
    got = np.asarray(NVFP4.global_scale.multiplier(quantize(tokens).global_scale))[:, 0]
    np.testing.assert_array_equal(got, 2.0**exponent * np.array([1, 2, 2]))


def test_zeros_tiny_and_huge():
    rng = np.random.default_rng(2)
    kinds = [
        np.zeros(32),
        np.full(32, LARGEST),
        np.full(32, -LARGEST),
        np.full(32, 2.0**-126),
        np.full(32, 1e-45),
    ]
    kinds += [np.where(np.arange(32) == 5, size, 0) for size in (LARGEST, 2.0**-126, 2.0**-120, 1.0)]
    kinds += [rng.normal(size=32) * 2.0**-118, np.where(np.arange(32) < 16, LARGEST, 2.0**-126)]
    tokens = np.stack(kinds).astype(np.float32)
    array = agree(tokens)
    read = np.asarray(values(array))
    assert np.isfinite(read).all()
    assert not read[0].any() and not np.asarray(array.global_scale)[0].any()


def relative_error(x):
    read = np.asarray(values(quantize(x.astype(np.float32))))
    return np.sqrt(np.mean((read - x) ** 2) / np.mean(x**2))


@functools.cache
def gaussian():
    return np.random.default_rng(3).normal(size=(256, 128))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-6, 1e-3, 1e3, 1e30])
def test_a_layer_of_small_values_keeps_its_accuracy(scale):
    assert relative_error(gaussian() * scale) < 0.1


def test_a_power_of_two_changes_nothing():
    x = gaussian().astype(np.float32)
    one, other = quantize(x), quantize(x * np.float32(2.0**-40))
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_array_equal(one.scales, other.scales)
    np.testing.assert_array_equal(np.asarray(one.global_scale) - 40, other.global_scale)


@pytest.mark.parametrize("ratio", [2.0**-5, 2.0**-10, 2.0**-13])
def test_small_blocks_keep_their_accuracy_beside_large_ones(ratio):
    """While t is a normal number of E4M3, that is."""
    x = gaussian().copy()
    x[:, 16:] *= ratio
    read = np.asarray(values(quantize(x.astype(np.float32))))
    small = x[:, 16:]
    assert np.sqrt(np.mean((read[:, 16:] - small) ** 2) / np.mean(small**2)) < 0.11


def test_blocks_far_below_the_largest_are_within_the_stated_bound():
    """t is at least 2^-9: what is smaller than t g / 4 reads as zero, what is larger within 3 t g."""
    x = gaussian().astype(np.float32)
    x[:, 16:] *= 2.0 ** np.random.default_rng(4).uniform(-24, -10, (256, 1)).astype(np.float32)
    array = quantize(x)
    scale = np.repeat(np.asarray(array.multipliers()), 16, axis=1)
    bound = np.asarray(jax.jit(NVFP4.error_bound)(x, scale))
    error = np.abs(np.asarray(values(array)).astype(np.float64) - x)
    assert (error <= bound).all() and (error <= 3 * scale).all()
    assert (error <= np.maximum(np.abs(x) / 4, scale / 4) + np.maximum(0, np.abs(x) - 6 * scale)).all()
    saturated = np.abs(x) > 6 * scale
    normal = scale >= 2.0**-6 * np.asarray(NVFP4.global_scale.multiplier(array.global_scale))
    assert (np.abs(x) - 6 * scale <= 2.0**-4 * np.abs(x))[saturated & normal].all()
