"""The bundled model is small, predicts held-out text, and uses its context."""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import qpaged.models
from qpaged.models import forward, load_tiny, standard_library_text

WINDOWS, CONTEXT, SCORED = 8, 1024, 128


def causal_attention(layer, query, key, value, *, length):
    """Compute grouped-query attention over WINDOWS sequences, one after another in the arguments."""
    query = query.reshape(WINDOWS, length, key.shape[1], -1, key.shape[2])
    key = key.reshape(WINDOWS, length, *key.shape[1:])
    value = value.reshape(WINDOWS, length, *value.shape[1:])
    scores = jnp.einsum("bqkgd,bskd->bkgqs", query, key) * key.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf))
    attended = jnp.einsum("bkgqs,bskd->bqkgd", weights, value)
    return attended.reshape(WINDOWS * length, -1, key.shape[-1])


@cache
def held_out_windows():
    """Return tokens (WINDOWS, CONTEXT + 1) spread over the held-out text."""
    text = np.frombuffer(standard_library_text("held_out"), np.uint8).astype(np.int32)
    starts = np.linspace(0, len(text) - CONTEXT - 1, WINDOWS).astype(int)
    return text[starts[:, None] + np.arange(CONTEXT + 1)]


@cache
def held_out_bits(length):
    """Return -log2 p of the last `length` bytes of each window, (WINDOWS, length), without more context."""
    config, params = load_tiny()
    tokens = held_out_windows()[:, -length - 1 :]
    positions = jnp.tile(jnp.arange(length), WINDOWS)
    attend = partial(causal_attention, length=length)
    run = jax.jit(lambda params, tokens: forward(params, config, tokens, positions, attend))
    log_p = jax.nn.log_softmax(run(params, tokens[:, :-1].reshape(-1)))
    bits = -np.take_along_axis(np.asarray(log_p), tokens[:, 1:].reshape(-1, 1), axis=-1) / np.log(2)
    return bits.reshape(WINDOWS, length)


def test_the_model_is_a_byte_level_model_of_context_1024():
    config, params = load_tiny()
    assert (config.vocab_size, config.max_position_embeddings) == (256, 1024)
    assert config.num_attention_heads > config.num_key_value_heads
    assert {weight.dtype for weight in params.values()} == {jnp.dtype(jnp.float32)}


def test_the_model_is_small_enough_to_ship():
    files = (Path(qpaged.models.__file__).parent / "tiny").iterdir()
    assert sum(path.stat().st_size for path in files) < 5.5e6


def test_the_model_predicts_held_out_text():
    assert held_out_bits(CONTEXT).mean() < 1.6


def test_the_model_uses_its_context():
    """The same bytes are easier to predict with the full context before them than with a little of it."""
    full_context = held_out_bits(CONTEXT)[:, -SCORED:]
    short_context = held_out_bits(2 * SCORED)[:, -SCORED:]
    assert full_context.mean() < short_context.mean() - 0.02
