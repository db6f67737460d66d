"""Llama 3 of jax-llm-examples, on a mesh of one device with Explicit axes, as its own callers set one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from llama3_jax import model as llama3

from adopted._case import PADDING, Case, Step

SIZES = {
    "embed": 256,
    "ffw_size": 512,
    "q_heads": 4,
    "kv_heads": 2,
    "num_layers": 2,
    "head_dim": 64,
    "vocab_size": 256,
    "max_seq_len": 128,
    "causal": True,
}


def cases() -> list[Case]:
    """Return the model in float32 and in bfloat16."""
    return [_case("Llama3", jnp.float32), _case("Llama3 bfloat16", jnp.bfloat16)]


def _case(name: str, dtype: jax.typing.DTypeLike) -> Case:
    axes = ("x", "y", "z")
    mesh = jax.make_mesh((1, 1, 1), axes, devices=jax.devices()[:1], axis_types=(AxisType.Explicit,) * 3)
    config = llama3.Config(
        **SIZES,
        dtype=dtype,
        mesh=mesh,
        use_prefill_attn_kernel=False,
        use_decode_attn_kernel=False,
        quant_layer=False,
        quant_cache=False,  # its own int8 cache
    )

    def cache(batch: int, length: int):
        return llama3.KVCache.init(jax.random.key(0), _with_length(config, length), batch)

    return Case(
        name=f"jax-llm-examples {name}",
        packages=(),
        step=_step(config),
        params=llama3.Weights.init(jax.random.key(0), config),
        cache=cache,
        vocabulary=config.vocab_size,
        pads=True,
        mesh=mesh,
    )


def _with_length(config: Any, length: int) -> Any:
    """Return the configuration for a cache of another length."""
    return dataclasses.replace(config, max_seq_len=length)


def _step(config: Any) -> Step:
    """Return a step that is the package's prefill for prompts, and what its decode step calls for tokens.

    Its decode step returns no logits. The cache counts the positions.
    """

    def step(params, tokens, position, cache):
        if tokens.shape[1] == 1:
            return llama3.forward(tokens, jnp.ones_like(tokens), params, config, cache)
        _, logits, cache = llama3.prefill(
            tokens, params, cache, _with_length(config, cache.size), pad_id=PADDING
        )
        return logits, cache

    return step
