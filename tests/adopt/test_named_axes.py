"""The caller names the axes of a cache, among arguments of other shapes."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from qpaged.adopt import CacheNotFoundError, find_cache, quantize_cache

LENGTH = 32
AXES = ("batch", "pair", "length", "heads", "head_dim")


def step(weights, x, position, cache):
    """Attention over keys and values in one array."""
    new = jnp.einsum("btc,chd->bthd", x, weights)
    start = (0, position, 0, 0)
    keys = lax.dynamic_update_slice(cache[:, 0], new, start)
    values = lax.dynamic_update_slice(cache[:, 1], new, start)
    seen = jnp.arange(LENGTH) <= position + jnp.arange(x.shape[1])[:, None]
    scores = jnp.where(seen, jnp.einsum("bthd,bshd->bhts", new, keys) / 16, -jnp.inf)
    out = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), values)
    return out, jnp.stack((keys, values), axis=1)


def arguments(count):
    """Return the arguments of a step with a prompt of ``count`` tokens at the beginning of a cache."""
    weights = jax.random.normal(jax.random.key(0), (8, 2, 16))
    x = jax.random.normal(jax.random.key(1), (2, count, 8))
    return weights, x, jnp.int32(0), jnp.zeros((2, 2, LENGTH, 2, 16))


def test_named_axes_settle_a_cache_that_the_example_fills():
    with pytest.raises(CacheNotFoundError, match=r"written whole .* name the axes with axes="):
        find_cache(step, *arguments(LENGTH))
    (leaf,) = find_cache(step, *arguments(LENGTH), axes=AXES).leaves
    assert (leaf.path, leaf.role, leaf.axes) == ("cache", "key and value", AXES)


def test_names_are_for_arrays_that_are_written_and_read():
    (named,) = find_cache(step, *arguments(1), axes=AXES).leaves
    (inferred,) = find_cache(step, *arguments(1)).leaves
    assert named == inferred
    with pytest.raises(ValueError, match="each of the 5 axes of cache"):
        find_cache(step, *arguments(1), axes=AXES[1:])


@pytest.mark.parametrize("spelling", ["int8", "int8:token"])
def test_a_prompt_may_fill_the_cache(spelling):
    run = quantize_cache(step, spelling, example=arguments(1), strict=True)
    weights, x, position, cache = arguments(LENGTH)
    out, cache = jax.jit(run)(weights, x, position, run.init(cache))
    expected, written = jax.jit(step)(*arguments(LENGTH))
    assert jnp.max(jnp.abs(cache.materialize() - written)) < 0.02 * jnp.max(jnp.abs(written))
    assert jnp.max(jnp.abs(out - expected)) < 0.05 * jnp.max(jnp.abs(expected))
    assert not run.report()
