"""Models of google-tunix, with the caches and masks of its sampler.

On Python 3.11: ``pip install -e . google-tunix==0.1.7``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from tunix.generate import sampler, utils
from tunix.models.gemma3 import model as gemma3
from tunix.models.llama3 import model as llama3
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen3 import model as qwen3

from adopted._case import Case
from adopted._weights import random_weights

LAYERS = 2
KV_HEADS = 2
HEAD_DIM = 64
EMBED_DIM = 128
VOCABULARY = 256
SIZES = {
    "num_layers": LAYERS,
    "embed_dim": EMBED_DIM,
    "hidden_dim": 256,
    "num_heads": 4,
    "head_dim": HEAD_DIM,
    "num_kv_heads": KV_HEADS,
}


def cases() -> list[Case]:
    """Return Llama 3, Qwen 2, Qwen 3 and Gemma 3."""
    rope = {"rope_theta": 10_000, "norm_eps": 1e-6}
    rngs = nnx.Rngs(0)
    return [
        _case("Llama3", llama3.Llama3(llama3.ModelConfig(**SIZES, **rope, vocab_size=VOCABULARY), rngs=rngs)),
        _case("Qwen2", qwen2.Qwen2(qwen2.ModelConfig(**SIZES, **rope, vocab_size=VOCABULARY), rngs=rngs)),
        _case("Qwen3", qwen3.Qwen3(qwen3.ModelConfig(**SIZES, **rope, vocab_size=VOCABULARY), rngs=rngs)),
        _case("Gemma3", gemma3.Gemma3(_gemma3(jnp.float32), rngs=rngs)),
        _case("Gemma3 bfloat16", gemma3.Gemma3(_gemma3(jnp.bfloat16), rngs=rngs)),
    ]


def _gemma3(dtype: Any) -> gemma3.ModelConfig:
    """Return a configuration with a window of 32 tokens, which five of every six layers have."""
    return gemma3.ModelConfig(**SIZES, num_embed=VOCABULARY, sliding_window_size=32, param_dtype=dtype)


def _case(name: str, model: nnx.Module) -> Case:
    graph, params = nnx.split(model)
    params = random_weights(params, EMBED_DIM**-0.5)
    dtype = jax.tree.leaves(params)[0].dtype
    return Case(
        name=f"tunix {name}",
        packages=("google-tunix", "flax"),
        step=_step(graph),
        params=params,
        cache=lambda batch, length: sampler._init_cache(LAYERS, length, batch, KV_HEADS, HEAD_DIM, dtype),
        vocabulary=VOCABULARY,
    )


def _step(graph: Any) -> Callable[[Any, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]:
    """Return a step that is the sampler's prefill for prompts, and its decoding for single tokens.

    Prompts begin at position 0.
    """

    def step(params, tokens, position, cache):
        batch, count = tokens.shape
        length = cache["layer_0"]["k"].shape[1]
        if count > 1:
            mask = utils.make_causal_attn_mask(jnp.ones((batch, count), bool), length)
        else:
            mask = utils.compute_attention_masks(position, length, jnp.zeros((batch, length), bool))
        positions = jnp.broadcast_to(position + jnp.arange(count), (batch, count))
        return nnx.merge(graph, params)(tokens, positions, cache, mask)

    return step
