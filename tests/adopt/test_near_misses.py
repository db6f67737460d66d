"""The error shows why the cache of a step cannot be adopted."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from qpaged.adopt import CacheNotFoundError, find_cache

SHAPE = (2, 32, 16)
X, CACHE = jnp.ones((2, 1, 16)), (jnp.zeros(SHAPE), jnp.zeros(SHAPE))


def attend(update):
    """Return a step whose keys and values are written by ``update``."""

    def step(x, position, cache):
        keys = update(cache[0], x, position)
        values = update(cache[1], x, position)
        scores = jnp.einsum("btd,bsd->bts", x, keys)
        return jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores), values), (keys, values)

    return step


def selected(array, x, position):
    return jnp.where((jnp.arange(32) >= position)[:, None], x, array)


def blended(array, x, position):
    return 0.9 * array + 0.1 * x


def added(array, x, position):
    return array + x


def joined(array, x, position):
    return jnp.concatenate([array, x], 1)


def shifted(array, x, position):
    return jnp.concatenate([array[:, 1:], x], 1)


@pytest.mark.parametrize(
    ("update", "primitive"),
    [
        (selected, "select_n"),
        (blended, "mul"),
        (added, "add"),
        (joined, "concatenate"),
        (shifted, "concatenate"),
    ],
)
def test_caches_that_are_rebuilt_are_near_misses(update, primitive):
    with pytest.raises(CacheNotFoundError) as error:
        find_cache(attend(update), X, jnp.int32(3), CACHE)
    line = inspect.getsourcelines(update)[1] + len(inspect.getsourcelines(update)[0]) - 1
    for path in ("cache/0", "cache/1"):
        assert f"{path} float32{SHAPE}: returned as made anew by {primitive} at {__file__}:{line};" in str(
            error.value
        )
    assert "by lax.dynamic_update_slice or .at[...].set" in str(error.value)


def test_weights_are_no_near_misses():
    def step(weights, x):
        return jnp.einsum("btd,de->bte", x, weights * 2), weights

    with pytest.raises(CacheNotFoundError, match="Give the step that decodes, cache included") as error:
        find_cache(step, jnp.ones((16, 16)), X)
    assert "weights" not in str(error.value)


def test_the_evidence_names_lines_of_the_model():
    def update(array, x, position):
        return lax.dynamic_update_slice_in_dim(array, x, position, 1)

    (found, _) = find_cache(attend(update), X, jnp.int32(3), CACHE).leaves
    assert all(__file__ in line for line in found.evidence[:-1])


def test_what_a_call_knows_of_its_operands_is_forgotten_in_the_next():
    put = jax.jit(lambda mask, x, array: jnp.where(mask, x, array))

    def step(x, position, cache):
        slots = lax.broadcasted_iota(jnp.int32, SHAPE, 1)
        keys, values = put(slots == position, x, cache[0]), put(slots >= position, x, cache[1])
        scores = jnp.einsum("btd,bsd->bts", x, keys)
        return jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores), values), (keys, values)

    assert [leaf.role for leaf in find_cache(step, X, jnp.int32(3), CACHE).leaves] == ["key"]
