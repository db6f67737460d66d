"""A loop over layers carries the caches of all of them in one array and writes to it."""

import jax
import jax.numpy as jnp
from jax import lax

from qpaged.adopt import quantize_cache

SHAPE = (3, 2, 32, 2, 16)
X, CACHE = jnp.ones((2, 1, 2, 16)), (jnp.zeros(SHAPE), jnp.zeros(SHAPE))
AXES = ("layers", "batch", "length", "heads", "head_dim")


def step(x, position, cache):
    def layer(carry, index):
        x, cache = carry
        start = (index, 0, position, 0, 0)
        keys = lax.dynamic_update_slice(cache[0], x[None], start)
        values = lax.dynamic_update_slice(cache[1], x[None], start)
        scores = jnp.einsum("bthd,bshd->bhts", x, keys[index])
        out = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), values[index])
        return (out, (keys, values)), None

    return lax.scan(layer, (x, cache), jnp.arange(3))[0]


def test_the_layer_axis_of_a_write_is_not_taken_for_the_length():
    run = quantize_cache(step, "int8", example=(X, jnp.int32(0), CACHE), strict=True)
    assert {leaf.axes for leaf in run.found.leaves} == {AXES}
    out, cache = jax.jit(run)(X, jnp.int32(3), run.init(CACHE))
    want, written = jax.jit(step)(X, jnp.int32(3), CACHE)
    assert jnp.max(jnp.abs(out - want)) < 0.01
    for array, plain in zip(cache, written, strict=True):
        assert jnp.max(jnp.abs(array.dequantize() - plain)) < 0.01
