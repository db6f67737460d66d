"""Steps that tell unwritten slots by exact zeros get a format that keeps them, or an error that names one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_find_cache import CACHE, X, attend, step, written

from qpaged import adopt


def write(x, position, cache):
    return {name: written(array, x, position) for name, array in cache.items()}


def scores_of(x, cache):
    return jnp.einsum("bthd,bshd->bhts", x, cache["k"])


def attended(mask, scores, cache):
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, cache["v"])


def scores_compared(x, position, cache):
    cache = write(x, position, cache)
    scores = scores_of(x, cache) / 4
    return attended(scores != 0.0, scores, cache), cache


def keys_compared(x, position, cache):
    cache = write(x, position, cache)
    used = (cache["k"] == jnp.zeros((16,))).all(axis=-1)  # (batch, length, heads)
    return attended(~used.transpose(0, 2, 1)[:, :, None], scores_of(x, cache), cache), cache


def compared_in_a_jitted_function(x, position, cache):
    cache = write(x, position, cache)
    mask = jax.jit(lambda scores: scores != 0)
    scores = scores_of(x, cache)
    return attended(mask(scores), scores, cache), cache


def compared_in_a_branch(x, position, cache):
    cache = write(x, position, cache)
    scores = scores_of(x, cache)
    mask = lax.cond(position > 0, lambda s: s != 0, lambda s: s == s, scores)
    return attended(mask, scores, cache), cache


STEPS = {
    "scores": (scores_compared, "cache/k"),
    "keys": (keys_compared, "cache/k"),
    "in a jitted function": (compared_in_a_jitted_function, "cache/k"),
    "in a branch": (compared_in_a_branch, "cache/k"),
}


def adopted(step, quantizer):
    return adopt.quantize_cache(step, quantizer, example=(X, jnp.int32(0), CACHE))


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(
    ("quantizer", "advice"),
    [("int8", "int8:token"), ("int8:channel", "int8:token"), ("int4:page+offset", "int4:token")],
)
def test_a_format_without_zeros_is_refused(name, quantizer, advice):
    masked, path = STEPS[name]
    with pytest.raises(ValueError, match=rf"\({path}, (ne|eq) at .*take a format .* as {advice}"):
        adopted(masked, quantizer)


@pytest.mark.short(5)
@pytest.mark.filterwarnings("ignore::qpaged.implicit.MaterializeWarning")  # keys are decoded to be compared
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("quantizer", ["int8:token", "int4:token", "fp8_e4m3", "raw", "int8:token/int8"])
def test_formats_with_zeros_see_the_same_slots(name, quantizer):
    masked, _ = STEPS[name]
    run = adopted(masked, quantizer)
    cache = run.init(CACHE)
    for position in range(3):
        x = jax.random.normal(jax.random.key(position), X.shape)
        out, cache = jax.jit(run)(x, jnp.int32(position), cache)
    decoded = {key: array.dequantize() for key, array in cache.items()}
    visible = jnp.arange(32) <= 2
    want = attended(visible, scores_of(x, decoded) / (4 if name == "scores" else 1), decoded)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


def test_other_comparisons_are_not_minded():
    def guarded(x, position, cache):
        out, cache = step(x, position, cache)
        total = jnp.abs(out).sum(axis=-1, keepdims=True)
        out = jnp.where(total == 0, 0.0, out / jnp.where(total == 0, 1.0, total))
        masked = attend(x, cache["k"], cache["v"]) * (x != 0).astype(x.dtype)
        return out + masked, cache

    assert all(leaf.zero_test is None for leaf in adopted(guarded, "int8").found.leaves)
