"""A decoder with rotary positions, grouped-query attention, RMSNorm and a gated MLP, and its variants.

`forward` runs over a flat run of tokens and leaves attention to a callback, so the same function trains a
model, fills a cache and decodes from one. The parts of a layer before and after attention are compiled once
for all layers.
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qpaged.models.config import Activation, DecoderConfig
from qpaged.models.experts import route
from qpaged.models.rope import Rotation, rotary_angles, rotate

Params = Mapping[str, jax.Array]
"""Weights under their Hugging Face names; linear weights are (out, in).

Those of experts are stacked, (experts, out, in), under a name without the expert's number, which is Qwen's.
"""

Shapes = dict[str, tuple[int, ...]]
"""Shapes of weights by name."""

Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]
"""attend(layer, query, key, value) -> output.

query and output are (n, num_attention_heads, head_dim), key and value are
(n, num_key_value_heads, head_dim); query and key are rotated to their positions already. `layer` is a Python
int; `DecoderConfig.attention` has the options of its attention.
"""

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
OUTPUT = "lm_head.weight"
EXPERTS = "mlp.experts."
"""What stands for "mlp." in the names of stacked weights; in files, the number of an expert follows it."""

ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}

# The weights


def param_shapes(config: DecoderConfig) -> Shapes:
    """Return the shape of every weight of a model, by Hugging Face name."""
    shapes: Shapes = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        for name, shape in _layer_shapes(config).items():
            shapes[layer_prefix(layer) + name] = shape
    shapes[FINAL_NORM] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[OUTPUT] = (config.vocab_size, config.hidden_size)
    return shapes


def layer_prefix(layer: int) -> str:
    """Return the prefix of the names of a layer's weights."""
    return f"model.layers.{layer}."


def _layer_shapes(config: DecoderConfig) -> Shapes:
    """Return the shape of every weight of a layer, by its name after the prefix."""
    norm_shape = (config.hidden_size,)
    shapes: Shapes = {"input_layernorm.weight": norm_shape}
    shapes |= _attention_shapes(config)
    shapes["post_attention_layernorm.weight"] = norm_shape
    if config.sandwich_norms:
        shapes["pre_feedforward_layernorm.weight"] = norm_shape
        shapes["post_feedforward_layernorm.weight"] = norm_shape
    return shapes | _mlp_shapes(config)


def _attention_shapes(config: DecoderConfig) -> Shapes:
    hidden_size = config.hidden_size
    query_size = config.num_attention_heads * config.head_dim
    key_size = config.num_key_value_heads * config.head_dim
    if config.fused_projections:
        out_sizes = {"qkv": query_size + 2 * key_size}
    else:
        out_sizes = {"q": query_size, "k": key_size, "v": key_size}
    shapes: Shapes = {}
    for name, out_size in out_sizes.items():
        shapes |= _linear_shapes(f"self_attn.{name}_proj", out_size, hidden_size, config.attention_bias)
    shapes |= _linear_shapes("self_attn.o_proj", hidden_size, query_size, config.output_bias)
    if config.query_key_norm:
        shapes["self_attn.q_norm.weight"] = (config.head_dim,)
        shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes


def _mlp_shapes(config: DecoderConfig) -> Shapes:
    if config.experts is None:
        return _gated_mlp_shapes(config)
    num_experts = config.experts.num_experts
    shapes: Shapes = {"mlp.gate.weight": (num_experts, config.hidden_size)}
    for name, shape in _gated_mlp_shapes(config).items():
        shapes[name.replace("mlp.", EXPERTS)] = (num_experts, *shape)
    return shapes


def _gated_mlp_shapes(config: DecoderConfig) -> Shapes:
    hidden_size = config.hidden_size
    inner_size = config.intermediate_size
    if config.fused_projections:
        out_sizes = {"gate_up": 2 * inner_size}
    else:
        out_sizes = {"gate": inner_size, "up": inner_size}
    shapes: Shapes = {}
    for name, out_size in out_sizes.items():
        shapes |= _linear_shapes(f"mlp.{name}_proj", out_size, hidden_size, config.mlp_bias)
    return shapes | _linear_shapes("mlp.down_proj", hidden_size, inner_size, config.mlp_bias)


def _linear_shapes(name: str, out_size: int, in_size: int, has_bias: bool) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (out_size, in_size)}
    if has_bias:
        shapes[f"{name}.bias"] = (out_size,)
    return shapes


def init_params(config: DecoderConfig, key: jax.Array) -> Params:
    """Return random float32 weights.

    Norms and biases are neutral, embeddings have a deviation of 0.02, and linear maps of 1/sqrt(fan in). The
    two maps that write into the residual stream are shrunk by 1/sqrt(2 layers), so that its variance
    does not grow with depth (Radford et al. 2019, section 2.3).
    """
    shapes = param_shapes(config)
    keys = jax.random.split(key, len(shapes))
    params: dict[str, jax.Array] = {}
    for (name, shape), weight_key in zip(shapes.items(), keys, strict=True):
        params[name] = _init_weight(name, shape, config, weight_key)
    return params


def _init_weight(name: str, shape: tuple[int, ...], config: DecoderConfig, key: jax.Array) -> jax.Array:
    if len(shape) == 1:
        is_zero = name.endswith(".bias") or config.unit_offset
        return jnp.full(shape, 0 if is_zero else 1, jnp.float32)
    scale = 0.02 if name in (EMBEDDING, OUTPUT) else shape[-1] ** -0.5
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        scale *= (2 * config.num_hidden_layers) ** -0.5
    return scale * jax.random.normal(key, shape, jnp.float32)


# The forward pass


def forward(
    params: Params,
    config: DecoderConfig,
    tokens: jax.Array | np.ndarray,  # [n] int32
    positions: jax.Array | np.ndarray,  # [n] int32
    attend: Attend,
    dtype: DTypeLike | None = None,
) -> jax.Array:  # [n, vocab_size] float32
    """Return the logits (n, vocab_size) float32 of tokens (n,) int32 at positions (n,) int32.

    The arguments are those of `final_hidden`.
    """
    hidden = final_hidden(params, config, tokens, positions, attend, dtype)
    return output_logits(params, config, hidden)


def final_hidden(
    params: Params,
    config: DecoderConfig,
    tokens: jax.Array | np.ndarray,  # [n] int32
    positions: jax.Array | np.ndarray,  # [n] int32
    attend: Attend,
    dtype: DTypeLike | None = None,
) -> jax.Array:  # [n, hidden_size]
    """Return (n, hidden_size) after the last norm, for tokens (n,) int32 at positions (n,) int32.

    Tokens may belong to any number of sequences: only `attend` relates one to another. It is called once a
    layer, in order, and owns the cache; its output may be of any float dtype. Computation is in `dtype`, the
    embedding's if None, to which weights are cast as they are used; norms and rotary angles are in float32.
    """
    hidden = _embed(params[EMBEDDING], config, tokens, dtype)
    ropes = {config.layer_rope(layer) for layer in range(config.num_hidden_layers)}
    rotations = {rope: rotary_angles(rope, config.head_dim, positions) for rope in ropes}
    for layer in range(config.num_hidden_layers):
        # Under names without the layer's number, so that all layers share a compilation.
        weights = {name: params[layer_prefix(layer) + name] for name in _layer_shapes(config)}
        rotation = rotations[config.layer_rope(layer)]
        query, key, value = _before_attention(weights, config, hidden, rotation)
        attended = attend(layer, query, key, value)
        hidden = _after_attention(weights, config, hidden, attended)
    return _final_norm(params[FINAL_NORM], config, hidden)


def output_logits(
    params: Params,
    config: DecoderConfig,
    hidden: jax.Array,  # [n, hidden_size]
) -> jax.Array:  # [n, vocab_size] float32
    """Return the logits (n, vocab_size) float32 of (n, hidden_size) after the last norm."""
    output_matrix = params[EMBEDDING if config.tie_word_embeddings else OUTPUT]
    return _logits(output_matrix, config, hidden)


@partial(jax.jit, static_argnames="config", inline=True)
def _logits(
    output_matrix: jax.Array,  # [vocab_size, hidden_size]
    config: DecoderConfig,
    hidden: jax.Array,  # [n, hidden_size]
) -> jax.Array:  # [n, vocab_size] float32
    logits = _multiply(hidden, output_matrix, jnp.float32)
    cap = config.final_logit_softcapping
    if cap is None:
        return logits
    return cap * jnp.tanh(logits / cap)


@partial(jax.jit, static_argnames=("config", "dtype"), inline=True)
def _embed(
    embedding: jax.Array,  # [vocab_size, hidden_size]
    config: DecoderConfig,
    tokens: jax.Array,  # [n]
    dtype: DTypeLike | None,
) -> jax.Array:  # [n, hidden_size]
    hidden = embedding[tokens].astype(dtype or embedding.dtype)
    if config.scale_embeddings:
        # Gemma rounds the factor to the dtype of the embeddings before it multiplies.
        hidden *= jnp.asarray(config.hidden_size**0.5, hidden.dtype)
    return hidden


@partial(jax.jit, static_argnames="config", inline=True)
def _before_attention(
    weights: Params,
    config: DecoderConfig,
    hidden: jax.Array,  # [n, hidden_size]
    rotation: Rotation,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return query, key and value of each token, each (n, its heads, head_dim)."""
    normed = _norm(weights, "input_layernorm", config, hidden)
    query, key, value = _project_heads(weights, config, normed)
    if config.query_key_norm:
        query = _norm(weights, "self_attn.q_norm", config, query)
        key = _norm(weights, "self_attn.k_norm", config, key)
    return rotate(query, rotation), rotate(key, rotation), value


@partial(jax.jit, static_argnames="config", inline=True)
def _after_attention(
    weights: Params,
    config: DecoderConfig,
    hidden: jax.Array,  # [n, hidden_size]
    attended: jax.Array,  # [n, num_attention_heads, head_dim]
) -> jax.Array:  # [n, hidden_size]
    """Return the residual stream after a layer, given the output of its attention."""
    attended = attended.reshape(len(hidden), -1).astype(hidden.dtype)
    attention_output = _linear(weights, "self_attn.o_proj", attended)
    if not config.sandwich_norms:
        hidden += attention_output
        normed = _norm(weights, "post_attention_layernorm", config, hidden)
        return hidden + _mlp(weights, config, normed)
    # Gemma's post-norms are of what is added to the residual stream, so "post_attention" is another norm
    # here.
    hidden += _norm(weights, "post_attention_layernorm", config, attention_output)
    normed = _norm(weights, "pre_feedforward_layernorm", config, hidden)
    mlp_output = _mlp(weights, config, normed)
    return hidden + _norm(weights, "post_feedforward_layernorm", config, mlp_output)


@partial(jax.jit, static_argnames="config", inline=True)
def _final_norm(
    weight: jax.Array,  # [hidden_size]
    config: DecoderConfig,
    hidden: jax.Array,  # [n, hidden_size]
) -> jax.Array:
    return rms_norm(hidden, weight, config.rms_norm_eps, config.unit_offset)


def _project_heads(
    weights: Params,
    config: DecoderConfig,
    hidden: jax.Array,  # [n, hidden_size]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return query, key and value, each (n, its heads, head_dim)."""
    if config.fused_projections:
        heads = _project(weights, "qkv", config, hidden)
        key_start = config.num_attention_heads
        value_start = key_start + config.num_key_value_heads
        return heads[:, :key_start], heads[:, key_start:value_start], heads[:, value_start:]
    query = _project(weights, "q", config, hidden)
    key = _project(weights, "k", config, hidden)
    value = _project(weights, "v", config, hidden)
    return query, key, value


def _project(
    weights: Params,
    name: str,
    config: DecoderConfig,
    hidden: jax.Array,  # [n, hidden_size]
) -> jax.Array:  # [n, heads, head_dim]
    projected = _linear(weights, f"self_attn.{name}_proj", hidden)
    return projected.reshape(len(hidden), -1, config.head_dim)


def _mlp(
    weights: Params,
    config: DecoderConfig,
    hidden: jax.Array,  # [n, hidden_size]
) -> jax.Array:  # [n, hidden_size]
    """Compute the MLP, or the sum of each token's experts times their weights (Jiang et al. 2024)."""
    if config.experts is None:
        return _gated_mlp(weights, config, hidden)
    stacked = {name: weights[name.replace("mlp.", EXPERTS)] for name in _gated_mlp_shapes(config)}
    expert_weights = route(_linear(weights, "mlp.gate", hidden), config.experts)  # [n, experts]

    # Every expert computes every token, one expert after another: simple, flat in memory, and enough where
    # the cache is the subject. A server would compute the chosen ones alone. (XLA on CPU widens a layer's
    # bfloat16 stacks to float32 before the loop; float32 and float16 ones are read in place.)
    def add_expert(total: jax.Array, expert: tuple[Params, jax.Array]) -> tuple[jax.Array, None]:
        mlp, weight = expert
        weight = weight[:, None].astype(hidden.dtype)
        # Chosen, not multiplied by 0: tokens may overflow in experts that never learned from their like.
        return total + jnp.where(weight > 0, weight * _gated_mlp(mlp, config, hidden), 0), None

    total, _ = jax.lax.scan(add_expert, jnp.zeros_like(hidden), (stacked, expert_weights.T))
    return total


def _gated_mlp(
    weights: Params,
    config: DecoderConfig,
    hidden: jax.Array,  # [n, hidden_size]
) -> jax.Array:  # [n, hidden_size]
    """Compute down(act(gate(x)) * up(x)): Shazeer 2020, "GLU Variants Improve Transformer"."""
    if config.fused_projections:
        gate, up = jnp.split(_linear(weights, "mlp.gate_up_proj", hidden), 2, axis=-1)
    else:
        gate = _linear(weights, "mlp.gate_proj", hidden)
        up = _linear(weights, "mlp.up_proj", hidden)
    activation = ACTIVATIONS[config.hidden_act]
    return _linear(weights, "mlp.down_proj", activation(gate) * up)


def _linear(
    weights: Params,
    name: str,
    x: jax.Array,  # [n, in]
) -> jax.Array:  # [n, out]
    product = _multiply(x, weights[f"{name}.weight"], x.dtype)
    bias = weights.get(f"{name}.bias")
    if bias is None:
        return product
    return product + bias.astype(x.dtype)


def _multiply(
    x: jax.Array,  # [n, in]
    weight: jax.Array,  # [out, in]
    dtype: DTypeLike,
) -> jax.Array:  # [n, out]
    # Contracting the last axes reads the weight as it lies in memory: a transposed copy is never made.
    return jnp.einsum("ni,oi->no", x, weight.astype(x.dtype), preferred_element_type=dtype)


def _norm(weights: Params, name: str, config: DecoderConfig, x: jax.Array) -> jax.Array:
    return rms_norm(x, weights[f"{name}.weight"], config.rms_norm_eps, config.unit_offset)


def rms_norm(
    x: jax.Array,  # [..., size]
    weight: jax.Array,  # [size]
    eps: float,
    unit_offset: bool = False,
) -> jax.Array:  # [..., size]
    """Compute x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 (Zhang & Sennrich 2019).

    The factor is 1 + weight with `unit_offset`.
    """
    normed = x.astype(jnp.float32)
    normed *= jax.lax.rsqrt(jnp.mean(normed * normed, axis=-1, keepdims=True) + eps)
    factor = weight.astype(jnp.float32)
    if unit_offset:
        factor = 1 + factor
    return (normed * factor).astype(x.dtype)
