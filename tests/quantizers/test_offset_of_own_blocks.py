"""An offset in blocks that no two tokens share: what it covers, and how closely."""

import functools

import jax
import numpy as np
import pytest

import qpaged

LEVELS = {
    "int8:token+offset": (-127, 127),
    "int4+offset": (-8, 7),
    "int4:token+offset": (-8, 7),
    "int4:group64+offset": (-8, 7),
    "int2+offset": (-1.5, 1.5),
}
every_spelling = pytest.mark.parametrize("spelling", LEVELS)
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = 2.0**-126
CHANNELS = 64
quantize = jax.jit(lambda spelling, x: qpaged.get_quantizer(spelling).quantize(x), static_argnums=0)
values = jax.jit(lambda array: array.dequantize())


def ordinary():
    rng = np.random.default_rng(0)
    shape = (120, CHANNELS)
    each = rng.normal(size=shape)
    size = 2.0 ** rng.uniform(-100, 100, (120, 1))
    return np.concatenate(
        [
            each * size,
            (each * 10.0 ** rng.uniform(-7, 1, (120, 1)) + rng.choice([-1, 1], (120, 1))) * size,
            np.abs(each) * size,
            np.where(rng.random(shape) < 0.05, 1e4, 1) * each,
            10.0 ** rng.uniform(-37, 37, shape) * np.sign(each),
            np.where(np.arange(CHANNELS) == 5, each, 0) * size,
            np.repeat(rng.normal(size=(60, 1)) * 10.0 ** rng.uniform(-37, 37, (60, 1)), CHANNELS, axis=1),
            np.repeat([[1.0], [-1.0], [100.0], [0.0], [SMALLEST], [-SMALLEST], [1e-38]], CHANNELS, axis=1),
        ]
    )


def huge():
    ends = [(-1, 1), (-1, 0.5), (-0.5, 1), (0, 1), (-1, 0), (0.99, 1), (-1, -0.99), (1, 1), (-1, -1)]
    return np.stack([np.linspace(low, high, CHANNELS) for low, high in ends]) * LARGEST


@functools.cache
def parts(spelling, kind):
    """Of a kind's blocks: values, codes, scales, offsets, what is read back; float64 (blocks, ...)."""
    x = np.clip(ordinary() if kind == "ordinary" else huge(), -LARGEST, LARGEST).astype(np.float32)
    array = quantize(spelling, x)
    assert array.scales.dtype == np.uint32
    x = np.where(np.abs(x) < SMALLEST, 0, x)
    words, width = np.asarray(array.scales).reshape(-1, 1), array.block[1]
    scale, offset = (words & 0xFFFF0000).view(np.float32), (words << 16).view(np.float32)
    codes = np.asarray(array.unpacked())
    rest = [part.reshape(-1, width).astype(np.float64) for part in (x, codes, np.asarray(values(array)))]
    return rest[0], rest[1], scale.astype(np.float64), offset.astype(np.float64), rest[2]


def up(x):
    """float64 above zero, rounded up to bfloat16."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.ceil(mantissa * 2**8), exponent - 8)


def toward_zero(x):
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.trunc(mantissa * 2**8), exponent - 8)


@pytest.mark.parametrize("kind", ["ordinary", "huge"])
@every_spelling
def test_scales_and_offsets_are_those_of_the_rule(spelling, kind):
    """To what float32 leaves open: o = min + |lowest| s, and the least s that covers the block around it."""
    lowest, highest = LEVELS[spelling]
    x, _, scale, offset, _ = parts(spelling, kind)
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    center = (low * highest - high * lowest) / (highest - lowest)
    slack = np.maximum(np.abs(low), np.abs(high)) * 2.0**-22
    least, most = toward_zero(center - slack), toward_zero(center + slack)
    assert ((least - SMALLEST <= offset) & (offset <= most + SMALLEST)).all()
    needed = np.maximum((high - offset) / highest, (low - offset) / lowest)
    assert (scale >= np.maximum(up(needed * (1 - 2.0**-22)), SMALLEST)).all()
    assert (scale <= np.maximum(up(needed * (1 + 2.0**-22)), SMALLEST)).all()


@pytest.mark.parametrize("kind", ["ordinary", "huge"])
@every_spelling
def test_codes_are_the_nearest_and_none_is_clipped(spelling, kind):
    lowest, highest = LEVELS[spelling]
    x, codes, scale, offset, read = parts(spelling, kind)
    numbers = codes + 0.5 if spelling.startswith("int2") else codes
    units = (x - offset) / scale
    # A difference from the offset may be subnormal, and be flushed.
    slack = 2.0**-18 + (np.maximum(np.abs(x), np.abs(offset)) * 2.0**-22 + SMALLEST) / scale
    assert (units >= lowest - slack).all() and (units <= highest + slack).all()
    assert (np.abs(units - numbers) <= 0.5 + slack).all()
    exact = np.clip(numbers * scale + offset, -LARGEST, LARGEST)
    tolerance = np.maximum(np.abs(exact), np.abs(offset)) * 2.0**-23 + SMALLEST
    assert (np.abs(read - exact) <= tolerance).all()


@pytest.mark.parametrize("kind", ["ordinary", "huge"])
@every_spelling
def test_the_error_is_half_a_scale(spelling, kind):
    x, _, scale, offset, read = parts(spelling, kind)
    roundings = np.maximum(np.abs(x), np.abs(offset)) * 2.0**-22 + SMALLEST
    assert np.isfinite(read).all()
    assert (np.abs(read - x) <= scale / 2 + roundings + scale * 2.0**-18).all()


@every_spelling
def test_constants_that_bfloat16_holds_are_exact(spelling):
    constants = np.array([0, 1, -1, 0.5, 3, -7, 100, -0.1015625, 2.0**-60, 1.5 * 2.0**80], np.float32)
    x = np.repeat(constants[:, None], CHANNELS, axis=1)
    read = np.asarray(values(quantize(spelling, x)))
    np.testing.assert_allclose(read, x, rtol=0, atol=SMALLEST)


@every_spelling
def test_other_constants_lose_what_the_offset_is_short_of(spelling):
    """The offset is within 2^-7 of them, and the codes are there for the rest."""
    x = np.repeat(np.random.default_rng(1).normal(size=(200, 1)).astype(np.float32), CHANNELS, axis=1)
    highest = LEVELS[spelling][1]
    error = np.abs(np.asarray(values(quantize(spelling, x))) - x)
    assert (error <= np.abs(x) * (2.0**-7 / highest / 2 * 1.01 + 2.0**-22)).all()


@every_spelling
def test_an_offset_takes_away_what_all_have_in_common(spelling):
    """Values between 2 and 3 are coded about as well as those between 0 and 1, and better than without."""
    x = np.random.default_rng(2).uniform(0, 1, (64, CHANNELS)).astype(np.float32)

    def rms(spelling, x):
        return np.sqrt(np.mean((np.asarray(values(quantize(spelling, x))) - x) ** 2))

    assert rms(spelling, x + 2) < 1.2 * rms(spelling, x)
    assert rms(spelling, x + 2) < 0.6 * rms(spelling.removesuffix("+offset"), x + 2)
