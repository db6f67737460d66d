"""A Llama-family decoder: rotary positions, grouped-query attention, RMSNorm, SwiGLU.

`forward` runs over a flat run of tokens and leaves attention to a callback, so the same
function trains a model, fills a cache and decodes from one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

Params = dict[str, jax.Array]
"""Weights under their Hugging Face names; linear weights are (out, in)."""

Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]
"""attend(layer, query, key, value) -> output.

query and output are (n, num_attention_heads, head_dim), key and value are
(n, num_key_value_heads, head_dim); query and key already carry their positions. `layer` is a Python int.
"""

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
OUTPUT = "lm_head.weight"


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a decoder, under the field names of Hugging Face's `LlamaConfig`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads, so that every KV head "
                f"serves as many query heads; got {self.num_attention_heads} and {self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, as rotary positions turn pairs; got {self.head_dim}.")


def param_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of a model, by Hugging Face name."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    block = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    shapes[FINAL_NORM] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[OUTPUT] = (config.vocab_size, hidden)
    return shapes


def init_params(config: LlamaConfig, key: jax.Array) -> Params:
    """Random float32 weights: norms at one, embeddings at 0.02, linear maps at 1/sqrt(fan in).

    The two maps that write into the residual stream are shrunk by 1/sqrt(2 layers), so that its variance
    does not grow with depth (Radford et al. 2019, section 2.3).
    """
    shapes = param_shapes(config)
    keys = jax.random.split(key, len(shapes))
    return {name: _init_weight(name, shapes[name], config, k) for name, k in zip(shapes, keys, strict=True)}


def _init_weight(name: str, shape: tuple[int, ...], config: LlamaConfig, key: jax.Array) -> jax.Array:
    if len(shape) == 1:
        return jnp.ones(shape, jnp.float32)
    scale = 0.02 if name in (EMBEDDING, OUTPUT) else shape[1] ** -0.5
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        scale *= (2 * config.num_hidden_layers) ** -0.5
    return scale * jax.random.normal(key, shape, jnp.float32)


def forward(
    params: Params, config: LlamaConfig, tokens: jax.Array, positions: jax.Array, attend: Attend
) -> jax.Array:
    """Logits (n, vocab_size) for tokens (n,) int32 at positions (n,) int32.

    Tokens may belong to any number of sequences: only `attend` relates one to another. It is called once a
    layer, in order, and owns the cache. Computation is in the dtype of `params`; norms and rotary angles are
    in float32.
    """
    rotation = rotary_angles(config, positions)
    hidden = params[EMBEDDING][tokens]
    for layer in range(config.num_hidden_layers):
        weights = _layer_weights(params, layer)
        normed = rms_norm(hidden, weights["input_layernorm"], config.rms_norm_eps)
        query, key, value = _project_heads(weights, config, normed)
        mixed = attend(layer, rotate(query, rotation), rotate(key, rotation), value)
        hidden += mixed.reshape(len(tokens), -1) @ weights["self_attn.o_proj"].T
        hidden += _swiglu(weights, rms_norm(hidden, weights["post_attention_layernorm"], config.rms_norm_eps))
    hidden = rms_norm(hidden, params[FINAL_NORM], config.rms_norm_eps)
    output = params[EMBEDDING if config.tie_word_embeddings else OUTPUT]
    return hidden @ output.T


def _layer_weights(params: Params, layer: int) -> Params:
    prefix = f"model.layers.{layer}."
    return {
        name.removeprefix(prefix).removesuffix(".weight"): weight
        for name, weight in params.items()
        if name.startswith(prefix)
    }


def _project_heads(
    weights: Params, config: LlamaConfig, hidden: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query, key and value of each token, each (n, its heads, head_dim)."""
    query, key, value = (
        (hidden @ weights[f"self_attn.{name}_proj"].T).reshape(len(hidden), -1, config.head_dim)
        for name in "qkv"
    )
    return query, key, value


def _swiglu(weights: Params, hidden: jax.Array) -> jax.Array:
    """down(silu(gate(x)) * up(x)): Shazeer 2020, "GLU Variants Improve Transformer"."""
    gate = jax.nn.silu(hidden @ weights["mlp.gate_proj"].T)
    return (gate * (hidden @ weights["mlp.up_proj"].T)) @ weights["mlp.down_proj"].T


def rms_norm(hidden: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 (Zhang & Sennrich 2019)."""
    wide = hidden.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide.astype(hidden.dtype) * weight


def rotary_angles(config: LlamaConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, each (n, 1, head_dim / 2) float32, of position * theta^(-2i / head_dim)."""
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    angles = positions.astype(jnp.float32)[:, None, None] * config.rope_theta**-exponent
    return jnp.cos(angles), jnp.sin(angles)


def rotate(heads: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn the pairs (x[i], x[i + head_dim / 2]) of (n, heads, head_dim) by their position's angle.

    Rotary embedding (Su et al. 2021) in the half-split order in which Hugging Face stores Llama weights.
    """
    cos, sin = rotation
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(heads.dtype)
