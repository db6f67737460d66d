"""trellis2 and trellis3: what is lost of gaussians, what sums of rows keep, and channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qpaged
import quantizers
from qpaged.arrays import _trellis, quantize

# Of unit gaussians, by bits and states: paths of 128 steps that begin anywhere, with a code computed from the
# state (measured for this project by an independent program); the limit of any code is 2^(-2 bits).
LOST = {(2, 8): 0.084, (2, 10): 0.0745, (3, 8): 0.025, (3, 10): 0.021}
MIXING_OF_8 = {2: quantizers.Trellis2.mixing, 3: (10043, 20739)}  # for states of 8 bits
FORMATS = {2: quantizers.Trellis2, 3: quantizers.Trellis3}


def gaussians(tokens=2048, channels=128, seed=0):
    return np.random.default_rng(seed).normal(size=(tokens, channels)).astype(np.float32)


def read(quantizer, x):
    return np.asarray(jax.jit(quantizer.quantize)(x).dequantize())


def unstretched(bits, state_bits):
    """Return the format that loses least, whatever sums of many rows are."""
    changes = {"stretch": 1.0, "state_bits": state_bits}
    if state_bits == 8:
        changes["mixing"] = MIXING_OF_8[bits]
    return type("Nearest", (FORMATS[bits],), changes)()


def lost_of(quantizer, x):
    return np.square(read(quantizer, x) - x).mean() / np.square(x).mean()


@pytest.mark.short(2)
@pytest.mark.parametrize(("bits", "state_bits"), LOST)
def test_as_little_of_a_gaussian_is_lost_as_by_paths_that_begin_anywhere(bits, state_bits):
    # A ring stores no state to begin with, 10 bits less at most, and its seam is followed less closely.
    assert lost_of(unstretched(bits, state_bits), gaussians()) < LOST[bits, state_bits] * 1.04


def kept_by(quantizer):
    """Return what a sum of many rows keeps of its length."""
    x = gaussians()
    return float((x * read(quantizer, x)).sum() / np.square(x).sum())


@pytest.mark.short(1)
@pytest.mark.parametrize(("bits", "kept"), [(2, (0.97, 0.99)), (3, (0.99, 1.005))])
def test_sums_of_many_tokens_keep_their_length(bits, kept):
    assert kept[0] < kept_by(FORMATS[bits]()) < kept[1]
    assert kept_by(unstretched(bits, 10)) < kept[0]  # a mutant: the scale of the norm itself


def test_a_window_that_is_off_by_a_bit_loses_everything(monkeypatch):
    quantizer, x = FORMATS[2](), gaussians(64)
    stored = quantizer.quantize(jnp.asarray(x))
    right = np.asarray(stored.dequantize())
    window = _trellis._window

    def shifted(codes, bits, count, axis):
        return window(codes, bits, count + 1, axis) & 1023

    monkeypatch.setattr(_trellis, "_window", shifted)
    wrong = np.asarray(stored.dequantize())
    assert np.square(right - x).mean() < 0.1 < 1 < np.square(wrong - x).mean()


def test_states_of_another_token_lose_everything():
    quantizer, x = FORMATS[2](), gaussians(64)
    stored = quantizer.quantize(jnp.asarray(x))
    half = stored.codes.shape[1] // 2
    swapped = stored.codes.at[0, :half].set(stored.codes[1, :half]).at[1, :half].set(stored.codes[0, :half])
    wrong = np.asarray(stored.like(swapped, stored.parts).dequantize())
    of_rows = np.square(wrong - x).mean(axis=1)
    assert (of_rows[:2] > 0.5).all() and of_rows[2:].max() < 0.2


@pytest.mark.short(1)
@pytest.mark.parametrize("spelling", ["trellis2:channel", "trellis3:channel"])
def test_channels_of_every_size_and_place_lose_the_same_share(spelling):
    generator = np.random.default_rng(3)
    x = gaussians(8 * 64).reshape(8, 64, 128) * np.exp(3 * generator.normal(size=128))
    x = (x + 100 * np.std(x, axis=(0, 1)) * generator.uniform(-1, 1, 128)).astype(np.float32)
    off = np.square(read(qpaged.get_quantizer(spelling), x) - x).mean(axis=(0, 1))
    share = off / np.square(x - x.mean(axis=1, keepdims=True)).mean(axis=(0, 1))
    # An offset is a bfloat16: of a channel that is 100 deviations away it misses a fifth of one.
    assert np.median(share) < {"trellis2:channel": 0.09, "trellis3:channel": 0.03}[spelling]
    assert share.max() < 0.2


def test_extremes_of_a_channel_are_reached_with_three_bits():
    x = np.random.default_rng(4).choice([-1.0, 1.0], size=(64, 128)).astype(np.float32)
    assert lost_of(qpaged.get_quantizer("trellis3:channel"), x) < 0.02
    x = np.sin(np.random.default_rng(5).uniform(0, 2 * np.pi, size=(64, 128))).astype(np.float32)
    scalar = qpaged.get_quantizer("int3:channel+offset").of_whole_blocks
    assert lost_of(qpaged.get_quantizer("trellis3:channel"), x) < lost_of(scalar, x)


@pytest.mark.short(4)
@pytest.mark.parametrize("spelling", ["trellis2", "trellis2:channel", "trellis3:channel"])
@pytest.mark.parametrize("value", [0.0, 1e-42, 2e-38, 1.0, 3.4e38])
def test_extreme_blocks_are_finite(spelling, value):
    for x in (np.full((64, 128), value, np.float32), np.eye(64, 128, dtype=np.float32) * np.float32(value)):
        stored = jax.jit(qpaged.get_quantizer(spelling).quantize)(x)
        got = np.asarray(stored.dequantize())
        assert np.isfinite(got).all()
        if value < 2e-38:
            assert (got == 0).all() and not np.asarray(stored.scales).any()
        elif value >= 1.0 and x.all() and spelling != "trellis2":
            assert np.abs(got / np.float32(value) - 1).max() <= 2.0**-8


def test_channels_are_packed_whole():
    message = "scales of trellis2:channel are shared by several and do not grow; .*: trellis2:channel.exact1"
    config = qpaged.PagedAttentionCacheMetaData(1, 1, 4, 4, 64, 16, 2, 64, 0.5)
    with pytest.raises(ValueError, match=message):
        qpaged.PagedAttentionCache.init_cache(None, jnp.float32, config, None, "trellis2:channel")
    assert "trellis2:channel" not in qpaged.available_formats()
    assert "trellis2:channel" in qpaged.available_formats(packed=True)
    assert qpaged.get_quantizer("trellis2:channel").needs_exact_pages
    assert not qpaged.get_quantizer("trellis2").needs_exact_pages


@pytest.mark.long
def test_channels_on_another_axis_are_a_ring_too():
    quantizer, x = FORMATS[2](), gaussians(16, 64)
    last = quantize(x, quantizer, (1, 64))
    first = quantize(x.T, quantizer, (64, 1), channel_axis=-2)
    np.testing.assert_array_equal(first.dequantize().T, last.dequantize())
    assert first.codes.shape == (16, 16)
