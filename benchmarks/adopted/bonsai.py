"""Qwen 3 of bonsai: a model and a cache that are nnx modules, through its jitted forward."""

import jax
import jax.numpy as jnp
from bonsai.models.qwen3 import modeling as qwen3
from flax import nnx

from adopted._case import PADDING, Case
from adopted._weights import random_weights

WIDTH = 256
SIZES = {
    "num_layers": 2,
    "vocab_size": 256,
    "emb_dim": WIDTH,
    "mlp_dim": 512,
    "num_heads": 4,
    "head_dim": 64,
    "num_kv_heads": 2,
    "rope_theta": 1_000_000,
    "rope_scaling_factor": 8.0,
    "local_rope_theta": 1e4,
    "norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
NO_TOKEN = -1


def cases() -> list[Case]:
    """Return the model in float32 and in bfloat16."""
    return [_case("Qwen3", jnp.float32), _case("Qwen3 bfloat16", jnp.bfloat16)]


def _case(name: str, dtype: jax.typing.DTypeLike) -> Case:
    config = qwen3.ModelConfig(**SIZES)
    weights = random_weights(qwen3.Qwen3(config, rngs=nnx.Rngs(0)), WIDTH**-0.5)

    return Case(
        name=f"bonsai {name}",
        packages=("flax",),
        step=_step,
        params=jax.tree.map(lambda leaf: leaf.astype(dtype), weights),
        cache=lambda batch, length: qwen3.init_cache(config, batch, length, 0, dtype),
        vocabulary=config.vocab_size,
        pads=True,
    )


def _step(params, tokens, position, cache):
    """Call the package's forward, which returns the logits of the last token; the cache counts positions."""
    padding = PADDING if tokens.shape[1] > 1 else NO_TOKEN  # a token that was chosen is never padding
    logits, cache = qwen3.forward(params, cache, tokens, padding)
    return logits[:, None], cache
