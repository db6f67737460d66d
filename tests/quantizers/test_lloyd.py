"""lloyd2, lloyd3, lloyd4: levels and what they lose, against the gaussian itself; norms, and whole blocks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.caches import make_view, prefill

import qpaged

# The power of a unit gaussian that Lloyd-Max levels lose (Max 1960, table I).
LOST = {"lloyd2": 0.1175, "lloyd3": 0.03454, "lloyd4": 0.009497}


def gaussians(tokens=4096, channels=128, seed=0):
    return np.random.default_rng(seed).normal(size=(tokens, channels)).astype(np.float32)


def read(spelling, x):
    return np.asarray(jax.jit(qpaged.get_quantizer(spelling).quantize)(x).dequantize())


@pytest.mark.parametrize("spelling", LOST)
def test_levels_are_the_means_of_what_is_nearest_to_them(spelling):
    levels = np.array(qpaged.get_quantizer(spelling).magnitudes)
    edges = np.array([0, *(levels[1:] + levels[:-1]) / 2, 40])
    weight = np.array([0.5 * math.erf(edge / math.sqrt(2)) for edge in edges])
    density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    means = (density[:-1] - density[1:]) / np.diff(weight)
    np.testing.assert_allclose(levels, means, rtol=2**-7)  # bfloat16, of neighbours too


@pytest.mark.parametrize("spelling", [*LOST, *(f"{name}+rotate" for name in LOST)])
def test_little_more_of_a_gaussian_is_lost_than_by_the_best_levels(spelling):
    x = gaussians()
    lost = np.square(read(spelling, x) - x).mean()
    # A token that keeps its norm loses more than its best scale would, and its own sample of gaussians less.
    assert lost == pytest.approx(LOST[spelling.removesuffix("+rotate")], rel=0.05)


@pytest.mark.parametrize(("spelling", "off"), [("lloyd2", 0.025), ("lloyd3", 0.016), ("lloyd4", 0.009)])
def test_tokens_keep_their_norm(spelling, off):
    """As well as a scale does under which codes are chosen once more; without it, lloyd2 leaves 6 % out."""
    x = gaussians()
    ratio = np.linalg.norm(read(spelling, x), axis=1) / np.linalg.norm(x, axis=1)
    assert np.abs(ratio - 1).mean() < off


@pytest.mark.parametrize("channels", [2, 16, 96, 256, 1024])
def test_scales_follow_from_the_norm_in_whatever_order(channels):
    quantizer = qpaged.get_quantizer("lloyd4")
    x = gaussians(64, channels) * np.float32(2.0) ** np.arange(-30, 34)[:, None]
    order = np.random.default_rng(1).permutation(channels)
    scales = [np.asarray(jax.jit(quantizer.quantize)(part).scales) for part in (x, x[:, order])]
    assert (scales[0] == scales[1]).all()
    if channels > 16:
        rms = np.sqrt(np.square(x.astype(np.float64)).mean(axis=1))
        np.testing.assert_allclose(quantizer.multiplier(scales[0])[:, 0], rms, rtol=0.1)


def test_extreme_tokens_are_finite():
    for value in (2e-38, 3.4e38, 0.0):
        for x in (np.full((2, 64), value, np.float32), np.eye(2, 64, dtype=np.float32) * np.float32(value)):
            got = read("lloyd3", x)
            assert np.isfinite(got).all()
            assert (got == 0).all() == (value == 0)


def test_of_several_rows_to_one_slot_the_last_counts():
    view = make_view("lloyd3+rotate")
    config = view.metadata
    rows = gaussians(4 * config.num_kv_heads, config.kv_head_dim_size).reshape(4, config.num_kv_heads, -1)
    rows[2] *= 100
    table = np.arange(config.num_pages_per_sequence, dtype=np.int32)
    several = view.write_prefill_to_cache(rows, rows, prefill([0, 1, 1, 2], table, 4))
    last = view.write_prefill_to_cache(rows[[0, 2, 3]], rows[[0, 2, 3]], prefill([0, 1, 2], table, 3))
    for got, want in zip(*map(jax.tree_util.tree_leaves, (several, last)), strict=True):
        assert (jnp.asarray(got) == jnp.asarray(want)).all()
