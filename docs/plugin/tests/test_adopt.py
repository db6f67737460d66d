"""An adopted step, written for plain arrays, keeps its cache in nf4."""

import jax
import jax.numpy as jnp

from qpaged import adopt


def step(x, position, cache):
    keys = jax.lax.dynamic_update_slice_in_dim(cache[0], x, position, axis=1)
    values = jax.lax.dynamic_update_slice_in_dim(cache[1], x, position, axis=1)
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", x, keys), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, values), (keys, values)


def test_an_adopted_step_keeps_its_cache_in_nf4():
    x = jax.random.normal(jax.random.key(0), (2, 8, 2, 64))
    cache = (jnp.zeros((2, 32, 2, 64)), jnp.zeros((2, 32, 2, 64)))
    quantized = adopt.quantize_cache(step, "nf4", example=(x, jnp.int32(0), cache), strict=True)
    _, (keys, _) = jax.jit(quantized)(x, jnp.int32(0), quantized.init(cache))
    assert str(keys.quantizer) == "nf4"
    assert jnp.abs(keys.materialize()[:, :8] - x).max() < 0.2 * jnp.abs(x).max()
