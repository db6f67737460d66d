"""Caches of all layers in one array, which a loop carries and writes to."""

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
        keys, values = cache = tuple(lax.dynamic_update_slice(array, x[None], start) for array in cache)
        scores = jnp.einsum("bthd,bshd->bhts", x, keys[index])
        return (jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), values[index]), cache), None

    return lax.scan(layer, (x, cache), jnp.arange(3))[0]


def test_a_layer_written_with_a_position_is_no_length():
    run = quantize_cache(step, "int8", example=(X, jnp.int32(0), CACHE), strict=True)
    assert {leaf.axes for leaf in run.found.leaves} == {AXES}
    out, cache = jax.jit(run)(X, jnp.int32(3), run.init(CACHE))
    want, written = jax.jit(step)(X, jnp.int32(3), CACHE)
    assert jnp.max(jnp.abs(out - want)) < 0.01
    for array, plain in zip(cache, written, strict=True):
        assert jnp.max(jnp.abs(array.dequantize() - plain)) < 0.01
