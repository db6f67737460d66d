"""The decoder agrees with an independent one in NumPy and float64, and keeps its promises to the callback."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.dense_attention import dense_attention

from qpaged.models import (
    DecoderConfig,
    Experts,
    LinearScaling,
    Rope,
    decoder,
    final_hidden,
    forward,
    init_params,
    output_logits,
    param_shapes,
)

CONFIG = DecoderConfig(
    vocab_size=19,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rope=Rope(theta=500.0),
    rms_norm_eps=1e-4,
)
CASES = {
    "grouped-query": CONFIG,
    "multi-query": dataclasses.replace(CONFIG, num_key_value_heads=1),
    "multi-head": dataclasses.replace(CONFIG, num_key_value_heads=4),
    "tied": dataclasses.replace(CONFIG, tie_word_embeddings=True),
    "biases, fused, partial rotation": dataclasses.replace(
        CONFIG,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        fused_projections=True,
        rope=Rope(theta=500.0, partial_rotary_factor=0.5),
        layer_types=("sliding_attention",) * 3,
        sliding_window=4,
    ),
    "norms, caps, windows": dataclasses.replace(
        CONFIG,
        query_key_norm=True,
        sandwich_norms=True,
        unit_offset=True,
        scale_embeddings=True,
        hidden_act="gelu_pytorch_tanh",
        query_pre_attn_scalar=3.0,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=1.5,
        rope=Rope(theta=500.0, scaling=LinearScaling(3.0)),
        sliding_rope=Rope(theta=20.0),
        layer_types=("sliding_attention", "full_attention", "sliding_attention"),
        sliding_window=5,
    ),
    "experts": dataclasses.replace(CONFIG, experts=Experts(5, 2, True)),
    "experts whose weights are kept, biases, fused": dataclasses.replace(
        CONFIG, experts=Experts(5, 3, False), mlp_bias=True, fused_projections=True
    ),
}


def random_params(config):
    """Return weights of which none has its neutral value, norms and biases included."""
    rng, params = np.random.default_rng(1), {}
    for name, shape in param_shapes(config).items():
        weight = rng.normal(size=shape) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
        params[name] = jnp.asarray(weight + ("norm" in name and not config.unit_offset), jnp.float32)
    return params


def tokens_and_positions(length=11, first=0):
    tokens = np.random.default_rng(3).integers(0, CONFIG.vocab_size, length)
    return jnp.asarray(tokens, jnp.int32), jnp.arange(first, first + length, dtype=jnp.int32)


def dense(config):
    """Return attention without a cache, with the options of the configuration."""
    return lambda layer, *heads: dense_attention(config.attention(layer), *heads)


class NumpyLayer:
    """One layer in float64, computed token by token and head by head from the definitions."""

    def __init__(self, params, config, layer):
        self.params, self.config, self.options = params, config, config.attention(layer)
        self.prefix, self.rope = f"model.layers.{layer}.", config.layer_rope(layer)

    def linear(self, name, x, expert=...):
        product = self.params[f"{self.prefix}{name}.weight"][expert] @ x
        bias = self.params.get(f"{self.prefix}{name}.bias")
        return product if bias is None else product + bias[expert]

    def norm(self, name, x):
        return numpy_norm(self.config, x, self.params[f"{self.prefix}{name}.weight"])

    def project(self, name, x):
        return self.linear(f"self_attn.{name}_proj", x).reshape(-1, self.config.head_dim)

    def heads(self, x):
        """Return query, key and value, each (its heads, head_dim)."""
        heads = self.config.num_attention_heads
        kv_heads = self.config.num_key_value_heads
        if self.config.fused_projections:
            fused = self.project("qkv", x)
            query, key, value = np.split(fused, [heads, heads + kv_heads])
        else:
            query, key, value = self.project("q", x), self.project("k", x), self.project("v", x)
        if self.config.query_key_norm:
            query, key = self.norm("self_attn.q_norm", query), self.norm("self_attn.k_norm", key)
        return query, key, value

    def rotate(self, vector, position):
        """Rotate each pair (i, i + d/2), as a complex number, by exp(i position theta^(-2i/d) / factor)."""
        dim = int(len(vector) * self.rope.partial_rotary_factor)
        factor = self.rope.scaling.factor if self.rope.scaling else 1.0
        rotation = np.exp(1j * position * self.rope.theta ** (-np.arange(0, dim, 2) / dim) / factor)
        rotated = (vector[: dim // 2] + 1j * vector[dim // 2 : dim]) * rotation
        return np.concatenate([rotated.real, rotated.imag, vector[dim:]])

    def score(self, query, key):
        score = query @ key * self.options.softmax_scale
        cap = self.options.logits_soft_cap
        return score if cap is None else cap * math.tanh(score / cap)

    def attention(self, normed, positions):
        cache = []
        outputs = []
        for x, position in zip(normed, positions, strict=True):
            query, key, value = self.heads(x)
            cache.append(([self.rotate(k, position) for k in key], value))
            window = cache[-(self.options.sliding_window or len(cache)) :]
            attended = []
            for head, vector in enumerate(query):
                kv_head = head * len(key) // len(query)
                rotated = self.rotate(vector, position)
                exps = np.exp([self.score(rotated, keys[kv_head]) for keys, _ in window])
                attended.append(exps @ [values[kv_head] for _, values in window] / exps.sum())
            outputs.append(self.linear("self_attn.o_proj", np.concatenate(attended)))
        return outputs

    def mlp(self, x):
        experts = self.config.experts
        if experts is None:
            return self.gated_mlp("mlp", x)
        weights = np.exp(self.linear("mlp.gate", x))
        chosen = np.argsort(weights)[-experts.num_experts_per_tok :]
        weights /= weights[chosen].sum() if experts.norm_topk_prob else weights.sum()
        return sum(weights[expert] * self.gated_mlp("mlp.experts", x, expert) for expert in chosen)

    def gated_mlp(self, name, x, expert=...):
        if self.config.fused_projections:
            gate, up = np.split(self.linear(f"{name}.gate_up_proj", x, expert), 2)
        else:
            gate, up = (self.linear(f"{name}.{part}_proj", x, expert) for part in ("gate", "up"))
        if self.config.hidden_act == "silu":
            gate = gate / (1 + np.exp(-gate))
        else:
            gate = gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) / 2
        return self.linear(f"{name}.down_proj", gate * up, expert)

    def __call__(self, hidden, positions):
        attended = self.attention([self.norm("input_layernorm", x) for x in hidden], positions)
        if not self.config.sandwich_norms:
            hidden = [x + y for x, y in zip(hidden, attended, strict=True)]
            return [x + self.mlp(self.norm("post_attention_layernorm", x)) for x in hidden]
        hidden = [x + self.norm("post_attention_layernorm", y) for x, y in zip(hidden, attended, strict=True)]
        inner = [self.mlp(self.norm("pre_feedforward_layernorm", x)) for x in hidden]
        return [x + self.norm("post_feedforward_layernorm", y) for x, y in zip(hidden, inner, strict=True)]


def numpy_norm(config, vector, weight):
    size = np.sqrt(np.mean(vector**2, axis=-1, keepdims=True) + config.rms_norm_eps)
    return vector / size * (weight + config.unit_offset)


def numpy_forward(params, config, tokens, positions):
    params = {name: np.asarray(weight, np.float64) for name, weight in params.items()}
    scale = config.hidden_size**0.5 if config.scale_embeddings else 1.0
    hidden = [scale * params["model.embed_tokens.weight"][token] for token in tokens]
    for layer in range(config.num_hidden_layers):
        hidden = NumpyLayer(params, config, layer)(hidden, positions)
    output = params["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    logits = np.stack([output @ numpy_norm(config, x, params["model.norm.weight"]) for x in hidden])
    cap = config.final_logit_softcapping
    return logits if cap is None else cap * np.tanh(logits / cap)


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_forward_matches_numpy_in_float64(config):
    params = random_params(config)
    tokens, positions = tokens_and_positions(first=5)
    logits = forward(params, config, tokens, positions, dense(config))
    expected = numpy_forward(params, config, np.asarray(tokens), np.asarray(positions))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_shifting_all_positions_changes_nothing():
    params = random_params(CONFIG)
    here = forward(params, CONFIG, *tokens_and_positions(), dense(CONFIG))
    there = forward(params, CONFIG, *tokens_and_positions(first=1000), dense(CONFIG))
    np.testing.assert_allclose(here, there, rtol=1e-3, atol=1e-3)


def test_positions_matter():
    params = random_params(CONFIG)
    tokens, positions = tokens_and_positions()
    near = forward(params, CONFIG, tokens, positions, dense(CONFIG))
    spread = forward(params, CONFIG, tokens, 3 * positions, dense(CONFIG))
    assert jnp.abs(near - spread).max() > 0.01


def test_decoding_through_a_cache_matches_one_pass():
    params = random_params(CONFIG)
    tokens, positions = tokens_and_positions(length=4)
    at_once = forward(params, CONFIG, tokens, positions, dense(CONFIG))
    cache = {layer: ([], []) for layer in range(CONFIG.num_hidden_layers)}

    def attend(layer, query, key, value):
        keys, values = cache[layer]
        keys.append(key)
        values.append(value)
        return dense(CONFIG)(layer, query, np.concatenate(keys), np.concatenate(values))

    steps = [
        forward(params, CONFIG, tokens[i : i + 1], positions[i : i + 1], attend) for i in range(len(tokens))
    ]
    np.testing.assert_allclose(jnp.concatenate(steps), at_once, rtol=1e-4, atol=1e-4)


def test_layers_share_a_compilation(monkeypatch):
    """Tracing a layer rotates a query and a key; three layers, run twice, are traced once."""
    config = dataclasses.replace(CASES["norms, caps, windows"], rms_norm_eps=2e-4)  # not compiled yet
    rotate = decoder.rotate
    calls = []

    def counted_rotate(*args):
        calls.append(args)
        return rotate(*args)

    monkeypatch.setattr(decoder, "rotate", counted_rotate)
    for _ in range(2):
        forward(random_params(config), config, *tokens_and_positions(), dense(config))
    assert len(calls) == 2


def test_layers_are_inlined_under_a_transformation():
    """A program that trains or compiles the whole model contains all operations, and no calls of layers."""
    params = random_params(CONFIG)
    arguments = tokens_and_positions()

    def loss(params):
        return forward(params, CONFIG, *arguments, lambda layer, query, key, value: query).sum()

    program = str(jax.make_jaxpr(jax.value_and_grad(loss))(params))
    assert "dot_general" in program and "_attention" not in program


def test_attend_sees_each_layer_once_in_order():
    seen = []

    def attend(layer, query, key, value):
        seen.append((layer, query.shape, key.shape, value.shape))
        return query

    forward(random_params(CONFIG), CONFIG, *tokens_and_positions(length=5), attend)
    assert seen == [(layer, (5, 4, 8), (5, 2, 8), (5, 2, 8)) for layer in range(3)]


@pytest.mark.parametrize(
    ("stored", "asked"), [("float32", None), ("bfloat16", None), ("bfloat16", "float32")]
)
def test_computation_is_in_the_dtype_asked_for_or_the_weights_own(stored, asked):
    params = {name: weight.astype(stored) for name, weight in random_params(CONFIG).items()}
    dtypes = set()

    def attend(layer, query, key, value):
        dtypes.update([query.dtype, key.dtype, value.dtype])
        return query.astype(jnp.float32)

    hidden = final_hidden(params, CONFIG, *tokens_and_positions(), attend, asked)
    assert {hidden.dtype, *dtypes} == {jnp.dtype(asked or stored)}
    assert output_logits(params, CONFIG, hidden).dtype == jnp.float32


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_init_params_has_the_declared_shapes(config):
    params = init_params(config, jax.random.key(0))
    assert {name: weight.shape for name, weight in params.items()} == param_shapes(config)
    assert {weight.dtype for weight in params.values()} == {jnp.dtype(jnp.float32)}


def test_a_tied_model_has_no_output_matrix():
    assert "lm_head.weight" in param_shapes(CONFIG)
    assert "lm_head.weight" not in param_shapes(CASES["tied"])


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"must be a multiple of num_key_value_heads.* got 4 and 3"):
        dataclasses.replace(CONFIG, num_key_value_heads=3)


def test_an_odd_head_dim_is_refused():
    with pytest.raises(ValueError, match="head_dim 7 gives 7 rotary channels; it must give an even number"):
        dataclasses.replace(CONFIG, head_dim=7)
