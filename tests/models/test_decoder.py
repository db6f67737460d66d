"""The decoder against an independent NumPy one in float64, and what its callback may rely on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qpaged.models import DecoderConfig, Rope, final_hidden, forward, init_params, output_logits, param_shapes

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
}


def random_params(config):
    """Weights in which nothing is at its neutral value, the norms included."""
    params = init_params(config, jax.random.key(1))
    noise = {name: jax.random.normal(jax.random.key(2), weight.shape) for name, weight in params.items()}
    return {name: weight + 0.1 * noise[name] for name, weight in params.items()}


def tokens_and_positions(length=11, first=0):
    tokens = np.random.default_rng(3).integers(0, CONFIG.vocab_size, length)
    return jnp.asarray(tokens, jnp.int32), jnp.arange(first, first + length, dtype=jnp.int32)


def causal_attention(layer, query, key, value):
    """Plain attention over one sequence; the last axis of scores is the key."""
    group = query.shape[1] // key.shape[1]
    key, value = jnp.repeat(key, group, axis=1), jnp.repeat(value, group, axis=1)
    scores = jnp.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(jnp.tri(len(query), dtype=bool), scores, -jnp.inf))
    return jnp.einsum("hqk,khd->qhd", weights, value)


def numpy_rotate(vector, position, theta):
    """Each pair (i, i + d/2) is a complex number, turned by exp(i position theta^(-2i/d))."""
    half = len(vector) // 2
    turn = np.exp(1j * position * theta ** (-np.arange(half) / half))
    turned = (vector[:half] + 1j * vector[half:]) * turn
    return np.concatenate([turned.real, turned.imag])


def numpy_norm(vector, weight, eps):
    return vector / np.sqrt(np.mean(vector**2) + eps) * weight


def numpy_attention(config, weight, normed, positions):
    """One token and one head at a time, straight from the definition."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    query, key, value = (
        [(weight(f"self_attn.{m}_proj") @ x).reshape(-1, dim) for x in normed] for m in "qkv"
    )
    outputs = []
    for now in range(len(normed)):
        mixed = []
        for head in range(heads):
            kv_head = head * kv_heads // heads
            turned = numpy_rotate(query[now][head], positions[now], config.rope.theta)
            keys = [numpy_rotate(key[t][kv_head], positions[t], config.rope.theta) for t in range(now + 1)]
            exps = np.exp([turned @ k / np.sqrt(dim) for k in keys])
            mixed.append(sum(e * value[t][kv_head] for t, e in enumerate(exps)) / exps.sum())
        outputs.append(weight("self_attn.o_proj") @ np.concatenate(mixed))
    return outputs


def numpy_forward(params, config, tokens, positions):
    params = {name: np.asarray(weight, np.float64) for name, weight in params.items()}
    eps = config.rms_norm_eps
    hidden = [params["model.embed_tokens.weight"][token] for token in tokens]
    for layer in range(config.num_hidden_layers):

        def weight(name, layer=layer):
            return params[f"model.layers.{layer}.{name}.weight"]

        normed = [numpy_norm(x, weight("input_layernorm"), eps) for x in hidden]
        mixed = numpy_attention(config, weight, normed, positions)
        hidden = [x + y for x, y in zip(hidden, mixed, strict=True)]
        normed = [numpy_norm(x, weight("post_attention_layernorm"), eps) for x in hidden]
        for t, x in enumerate(normed):
            gate = weight("mlp.gate_proj") @ x
            inner = gate / (1 + np.exp(-gate)) * (weight("mlp.up_proj") @ x)
            hidden[t] = hidden[t] + weight("mlp.down_proj") @ inner
    output = params["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return np.stack([output @ numpy_norm(x, params["model.norm.weight"], eps) for x in hidden])


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_forward_matches_numpy_in_float64(config):
    params = random_params(config)
    tokens, positions = tokens_and_positions(first=5)
    logits = jax.jit(lambda p: forward(p, config, tokens, positions, causal_attention))(params)
    expected = numpy_forward(params, config, np.asarray(tokens), np.asarray(positions))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_shifting_all_positions_changes_nothing():
    params = random_params(CONFIG)
    here = forward(params, CONFIG, *tokens_and_positions(), causal_attention)
    there = forward(params, CONFIG, *tokens_and_positions(first=1000), causal_attention)
    np.testing.assert_allclose(here, there, rtol=1e-3, atol=1e-3)


def test_positions_matter():
    params = random_params(CONFIG)
    tokens, positions = tokens_and_positions()
    near = forward(params, CONFIG, tokens, positions, causal_attention)
    spread = forward(params, CONFIG, tokens, 3 * positions, causal_attention)
    assert jnp.abs(near - spread).max() > 0.01


def test_decoding_through_a_cache_matches_one_pass():
    params = random_params(CONFIG)
    tokens, positions = tokens_and_positions(length=4)
    whole = forward(params, CONFIG, tokens, positions, causal_attention)
    cache = {layer: ([], []) for layer in range(CONFIG.num_hidden_layers)}

    def attend(layer, query, key, value):
        keys, values = cache[layer]
        keys.append(key)
        values.append(value)
        padding = jnp.zeros((len(keys) - 1, *query.shape[1:]))
        every_query = jnp.concatenate([padding, query])
        return causal_attention(layer, every_query, jnp.concatenate(keys), jnp.concatenate(values))[-1:]

    steps = [
        forward(params, CONFIG, tokens[i : i + 1], positions[i : i + 1], attend) for i in range(len(tokens))
    ]
    np.testing.assert_allclose(jnp.concatenate(steps), whole, rtol=1e-4, atol=1e-4)


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


def test_tied_model_has_no_output_matrix():
    assert "lm_head.weight" in param_shapes(CONFIG)
    assert "lm_head.weight" not in param_shapes(CASES["tied"])


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"must be a multiple of num_key_value_heads.* got 4 and 3"):
        dataclasses.replace(CONFIG, num_key_value_heads=3)


def test_odd_head_dim_is_refused():
    with pytest.raises(ValueError, match=r"must be even.* got 7 of head_dim 7"):
        dataclasses.replace(CONFIG, head_dim=7)
