"""Causal language models of keras-hub, whose cache is one array for all layers' keys and values.

On Python 3.11: ``pip install -e . keras-hub==0.32.0``, which brings TensorFlow.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adopted._case import Case
from adopted._weights import random_weights

os.environ["KERAS_BACKEND"] = "jax"  # Keras reads it when it is imported
import keras
import keras_hub

LAYERS = 2
KV_HEADS = 2
HEAD_DIM = 64
VOCABULARY = 256
SIZES = {
    "vocabulary_size": VOCABULARY,
    "num_layers": LAYERS,
    "num_query_heads": 4,
    "num_key_value_heads": KV_HEADS,
    "hidden_dim": 4 * HEAD_DIM,
    "intermediate_dim": 256,
}


def cases() -> list[Case]:
    """Return Llama 3 and Gemma."""
    return [_llama3("float32"), _gemma("float32"), _gemma("bfloat16")]


def _llama3(dtype: str) -> Case:
    backbone = keras_hub.models.Llama3Backbone(**SIZES, dtype=dtype)
    return _case("Llama3", keras_hub.models.Llama3CausalLM(backbone))


def _gemma(dtype: str) -> Case:
    backbone = keras_hub.models.GemmaBackbone(**SIZES, head_dim=HEAD_DIM, dtype=dtype)
    return _case(
        "Gemma" if dtype == "float32" else f"Gemma {dtype}", keras_hub.models.GemmaCausalLM(backbone)
    )


def _case(name: str, model: Any) -> Case:
    def cache(batch: int, length: int) -> jax.Array:
        return jnp.zeros((batch, LAYERS, 2, length, KV_HEADS, HEAD_DIM), model.compute_dtype)

    return Case(
        name=f"keras-hub {name}",
        packages=("keras-hub", "keras"),
        step=_step(model),
        params=random_weights([variable.value for variable in model.variables], SIZES["hidden_dim"] ** -0.5),
        cache=cache,
        vocabulary=VOCABULARY,
    )


def _step(model: Any) -> Callable[[Any, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]:
    """Return the model's own call with a cache, as a function of its variables' values."""

    def step(params, tokens, position, cache):
        with keras.StatelessScope(state_mapping=zip(model.variables, params, strict=True)):
            logits, _, cache = model.call_with_cache(tokens, cache, position)
        return logits, cache

    return step
