"""A decoder: rotary positions, grouped-query attention, RMSNorm, a gated MLP, and what families add to it.

`forward` runs over a flat run of tokens and leaves attention to a callback, so the same function trains a
model, fills a cache and decodes from one. What comes before attention in a layer, and what comes after it,
are compiled once for all layers.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qpaged.models.config import Activation, DecoderConfig
from qpaged.models.rope import Rotation, rotary_angles, rotate

Params = dict[str, jax.Array]
"""Weights under their Hugging Face names; linear weights are (out, in)."""

Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]
"""attend(layer, query, key, value) -> output.

query and output are (n, num_attention_heads, head_dim), key and value are
(n, num_key_value_heads, head_dim); query and key already carry their positions. `layer` is a Python int;
`DecoderConfig.attention` says how it attends.
"""

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
OUTPUT = "lm_head.weight"

ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}


def param_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of a model, by Hugging Face name."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        shapes |= {layer_prefix(layer) + name: shape for name, shape in _layer_shapes(config).items()}
    shapes[FINAL_NORM] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[OUTPUT] = (config.vocab_size, config.hidden_size)
    return shapes


def layer_prefix(layer: int) -> str:
    """What the names of a layer's weights start with."""
    return f"model.layers.{layer}."


def _layer_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of a layer, by its name after the prefix."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    shapes |= _attention_shapes(config)
    shapes["post_attention_layernorm.weight"] = (hidden,)
    if config.sandwich_norms:
        shapes["pre_feedforward_layernorm.weight"] = shapes["post_feedforward_layernorm.weight"] = (hidden,)
    return shapes | _mlp_shapes(config)


def _attention_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    hidden, head = config.hidden_size, config.head_dim
    query, key = config.num_attention_heads * head, config.num_key_value_heads * head
    rows = {"qkv": query + 2 * key} if config.fused_projections else {"q": query, "k": key, "v": key}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, out in rows.items():
        shapes |= _linear_shapes(f"self_attn.{name}_proj", out, hidden, config.attention_bias)
    shapes |= _linear_shapes("self_attn.o_proj", hidden, query, config.output_bias)
    if config.query_key_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (head,)
    return shapes


def _mlp_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    rows = {"gate_up": 2 * inner} if config.fused_projections else {"gate": inner, "up": inner}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, out in rows.items():
        shapes |= _linear_shapes(f"mlp.{name}_proj", out, hidden, config.mlp_bias)
    return shapes | _linear_shapes("mlp.down_proj", hidden, inner, config.mlp_bias)


def _linear_shapes(name: str, out: int, into: int, bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def init_params(config: DecoderConfig, key: jax.Array) -> Params:
    """Random float32 weights: norms and biases neutral, embeddings at 0.02, linear maps at 1/sqrt(fan in).

    The two maps that write into the residual stream are shrunk by 1/sqrt(2 layers), so that its variance
    does not grow with depth (Radford et al. 2019, section 2.3).
    """
    shapes = param_shapes(config)
    keys = jax.random.split(key, len(shapes))
    return {name: _init_weight(name, shapes[name], config, k) for name, k in zip(shapes, keys, strict=True)}


def _init_weight(name: str, shape: tuple[int, ...], config: DecoderConfig, key: jax.Array) -> jax.Array:
    if len(shape) == 1:
        neutral = 0 if name.endswith(".bias") or config.unit_offset else 1
        return jnp.full(shape, neutral, jnp.float32)
    scale = 0.02 if name in (EMBEDDING, OUTPUT) else shape[1] ** -0.5
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        scale *= (2 * config.num_hidden_layers) ** -0.5
    return scale * jax.random.normal(key, shape, jnp.float32)


def forward(
    params: Params,
    config: DecoderConfig,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attend,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Logits (n, vocab_size) float32 of tokens (n,) int32 at positions (n,) int32; as `final_hidden`."""
    return output_logits(params, config, final_hidden(params, config, tokens, positions, attend, dtype))


def final_hidden(
    params: Params,
    config: DecoderConfig,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attend,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """(n, hidden_size) after the last norm, for tokens (n,) int32 at positions (n,) int32.

    Tokens may belong to any number of sequences: only `attend` relates one to another. It is called once a
    layer, in order, and owns the cache; its output may be of any float dtype. Computation is in `dtype`, the
    embedding's if None, to which weights are cast as they are used; norms and rotary angles are in float32.
    """
    hidden = _embed(params[EMBEDDING], config, tokens, dtype)
    ropes = {config.layer_rope(layer) for layer in range(config.num_hidden_layers)}
    rotations = {rope: rotary_angles(rope, config.head_dim, positions) for rope in ropes}
    for layer in range(config.num_hidden_layers):
        weights = {name: params[layer_prefix(layer) + name] for name in _layer_shapes(config)}
        rotation = rotations[config.layer_rope(layer)]
        mixed = attend(layer, *_before_attention(weights, config, hidden, rotation))
        hidden = _after_attention(weights, config, hidden, mixed)
    return _final_norm(params[FINAL_NORM], config, hidden)


def output_logits(params: Params, config: DecoderConfig, hidden: jax.Array) -> jax.Array:
    """Logits (n, vocab_size) float32 of (n, hidden_size) after the last norm."""
    return _logits(params[EMBEDDING if config.tie_word_embeddings else OUTPUT], config, hidden)


@partial(jax.jit, static_argnames="config", inline=True)
def _logits(output: jax.Array, config: DecoderConfig, hidden: jax.Array) -> jax.Array:
    logits, cap = _multiply(hidden, output, jnp.float32), config.final_logit_softcapping
    return logits if cap is None else cap * jnp.tanh(logits / cap)


@partial(jax.jit, static_argnames=("config", "dtype"), inline=True)
def _embed(
    embedding: jax.Array, config: DecoderConfig, tokens: jax.Array, dtype: DTypeLike | None
) -> jax.Array:
    hidden = embedding[tokens].astype(dtype or embedding.dtype)
    return hidden * jnp.asarray(config.hidden_size**0.5, hidden.dtype) if config.scale_embeddings else hidden


@partial(jax.jit, static_argnames="config", inline=True)
def _before_attention(
    weights: Params, config: DecoderConfig, hidden: jax.Array, rotation: Rotation
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query, key and value of each token, each (n, its heads, head_dim)."""
    query, key, value = _project_heads(weights, config, _norm(weights, "input_layernorm", config, hidden))
    if config.query_key_norm:
        query = _norm(weights, "self_attn.q_norm", config, query)
        key = _norm(weights, "self_attn.k_norm", config, key)
    return rotate(query, rotation), rotate(key, rotation), value


@partial(jax.jit, static_argnames="config", inline=True)
def _after_attention(
    weights: Params, config: DecoderConfig, hidden: jax.Array, mixed: jax.Array
) -> jax.Array:
    """The residual stream (n, hidden_size) after a layer whose attention gave `mixed`."""
    mixed = mixed.reshape(len(hidden), -1).astype(hidden.dtype)
    mixed = _linear(weights, "self_attn.o_proj", mixed)
    if not config.sandwich_norms:
        hidden += mixed
        return hidden + _mlp(weights, config, _norm(weights, "post_attention_layernorm", config, hidden))
    hidden += _norm(weights, "post_attention_layernorm", config, mixed)
    inner = _mlp(weights, config, _norm(weights, "pre_feedforward_layernorm", config, hidden))
    return hidden + _norm(weights, "post_feedforward_layernorm", config, inner)


@partial(jax.jit, static_argnames="config", inline=True)
def _final_norm(weight: jax.Array, config: DecoderConfig, hidden: jax.Array) -> jax.Array:
    return rms_norm(hidden, weight, config.rms_norm_eps, config.unit_offset)


def _project_heads(
    weights: Params, config: DecoderConfig, hidden: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, key = config.num_attention_heads, config.num_key_value_heads
    if config.fused_projections:
        heads = _linear(weights, "self_attn.qkv_proj", hidden).reshape(len(hidden), -1, config.head_dim)
        return heads[:, :query], heads[:, query : query + key], heads[:, query + key :]
    projected = (_linear(weights, f"self_attn.{name}_proj", hidden) for name in "qkv")
    q, k, v = (x.reshape(len(hidden), -1, config.head_dim) for x in projected)
    return q, k, v


def _mlp(weights: Params, config: DecoderConfig, hidden: jax.Array) -> jax.Array:
    """down(act(gate(x)) * up(x)): Shazeer 2020, "GLU Variants Improve Transformer"."""
    if config.fused_projections:
        gate, up = jnp.split(_linear(weights, "mlp.gate_up_proj", hidden), 2, axis=-1)
    else:
        gate, up = (_linear(weights, f"mlp.{name}_proj", hidden) for name in ("gate", "up"))
    return _linear(weights, "mlp.down_proj", ACTIVATIONS[config.hidden_act](gate) * up)


def _linear(weights: Params, name: str, x: jax.Array) -> jax.Array:
    product = _multiply(x, weights[f"{name}.weight"], x.dtype)
    bias = weights.get(f"{name}.bias")
    return product if bias is None else product + bias.astype(x.dtype)


def _multiply(x: jax.Array, weight: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x (n, in) times weight (out, in), as (n, out): the weight is read as it lies, never transposed."""
    return jnp.einsum("ni,oi->no", x, weight.astype(x.dtype), preferred_element_type=dtype)


def _norm(weights: Params, name: str, config: DecoderConfig, x: jax.Array) -> jax.Array:
    return rms_norm(x, weights[f"{name}.weight"], config.rms_norm_eps, config.unit_offset)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, unit_offset: bool = False) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 (Zhang & Sennrich 2019).

    The factor is 1 + weight with `unit_offset`.
    """
    wide, factor = x.astype(jnp.float32), weight.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * (1 + factor if unit_offset else factor)).astype(x.dtype)
