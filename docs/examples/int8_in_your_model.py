"""An int8 cache in a model that keeps its own: its decode step runs on it unmodified."""

import jax
import jax.numpy as jnp

from qpaged import adopt


def decode_step(params, token, position, cache):
    """One layer with grouped heads: any code of yours that takes a cache and returns it."""
    x = params["embed"][token][:, None]  # (batch, 1, width)
    q = jnp.einsum("btw,whd->bthd", x, params["q"])
    k = jnp.einsum("btw,wkd->btkd", x, params["k"])
    v = jnp.einsum("btw,wkd->btkd", x, params["v"])
    keys = jax.lax.dynamic_update_slice_in_dim(cache["k"], k, position, axis=1)
    values = jax.lax.dynamic_update_slice_in_dim(cache["v"], v, position, axis=1)
    attended = jax.nn.dot_product_attention(
        q, keys, values, mask=(jnp.arange(keys.shape[1]) <= position)[None, None, None]
    )
    logits = jnp.einsum("bthd,hdv->btv", attended, params["out"])[:, 0]
    return logits, {"k": keys, "v": values}


shapes = {
    "embed": (256, 64),
    "q": (64, 4, 64),
    "k": (64, 2, 64),
    "v": (64, 2, 64),
    "out": (4, 64, 256),
}
seeds = jax.random.split(jax.random.key(0), len(shapes))
params = {
    name: jax.random.normal(seed, shape) / 8
    for seed, (name, shape) in zip(seeds, shapes.items(), strict=True)
}
cache = {name: jnp.zeros((2, 1024, 2, 64)) for name in ("k", "v")}
token = jnp.array([3, 5])

step = adopt.quantize_cache(decode_step, "int8", example=(params, token, jnp.int32(0), cache))
cache = step.init(cache)  # the same tree, quantized: a quarter of the float32 bytes
jitted = jax.jit(step, donate_argnums=3)
for position in range(8):
    logits, cache = jitted(params, token, jnp.int32(position), cache)
    token = logits.argmax(axis=-1)

print(step.found)  # the arrays of the cache, with the evidence
print(step.report())  # how many arrays are quantized, bytes before and after, and: nothing was materialized
