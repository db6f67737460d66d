"""What goes through the cache is what the model would have computed without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formats import leaves_equal

from qpaged.models import forward
from qpaged.sweep import Settings, load_model, load_text
from qpaged.sweep._attention_error import attention_error, plain_probes
from qpaged.sweep._stream import cached_forward, chunks, make_cache, step

SETTINGS = Settings(tokens=5 * 48, context=48, page_size=8, chunk=11, decode=6, batch=2)


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def tokens(text_file):
    return load_text(text_file).sequences(SETTINGS)[:, :-1]


def run(model, format, tokens, dtype=jnp.float32, settings=SETTINGS):
    advanced = []
    cache = make_cache(model, format, dtype, settings, settings.batch)
    logits = cached_forward(model, cache, tokens, settings, advanced.append)
    assert sum(advanced) == tokens.size
    return logits


def whole_forward(model, tokens):
    """Logits of one sequence by plain causal attention, no cache."""

    def attend(layer, query, key, value):
        group = query.shape[1] // key.shape[1]
        key, value = (jnp.repeat(x, group, axis=1) for x in (key, value))
        scores = jnp.einsum("qhd,shd->hqs", query, key) * query.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(jnp.tri(len(query), dtype=bool), scores, -jnp.inf))
        return jnp.einsum("hqs,shd->qhd", weights, value)

    return forward(model.params, model.config, tokens, jnp.arange(len(tokens), dtype=jnp.int32), attend)


def test_a_plain_cache_changes_nothing(model, tokens):
    logits = run(model, None, tokens)
    for row, sequence in zip(logits, tokens, strict=True):
        np.testing.assert_allclose(row, whole_forward(model, sequence), rtol=2e-4, atol=2e-4)


def test_reused_pages_hold_nothing_of_the_sequences_before(model, tokens):
    after_others, alone = run(model, "int8", tokens[:4]), run(model, "int8", tokens[2:4])
    np.testing.assert_array_equal(after_others[2:], alone)


def test_a_last_batch_with_rows_to_spare(model, tokens):
    np.testing.assert_array_equal(run(model, "int8", tokens[:3])[2], run(model, "int8", tokens[2:3])[0])


def test_chunks_leave_the_codes_that_one_prefill_leaves(model, tokens):
    def first_layer(size):
        cache = make_cache(model, "int8", jnp.float32, SETTINGS, SETTINGS.batch)
        table = np.arange(SETTINGS.pages_per_sequence, dtype=np.int32)
        for chunk in chunks(tokens[0], SETTINGS.context, size):
            metadata = chunk.metadata(table)
            cache, _ = step(model, cache, chunk.tokens, metadata.prefill_position, metadata)
        return cache.views[0]  # deeper ones depend on sums that chunks reorder

    assert leaves_equal(first_layer(11), first_layer(48))


def test_chunks_end_inside_pages_and_cover_the_sequence():
    parts = list(chunks(np.arange(48), 42, 11))
    assert [(part.start, part.length) for part in parts] == [(0, 11), (11, 11), (22, 11), (33, 9)]
    assert np.concatenate([part.tokens[: part.length] for part in parts]).tolist() == list(range(42))
    assert {len(part.tokens) for part in parts} == {11}


def test_plain_parts_are_not_warned_about(model):
    cache = make_cache(model, "int8:token/plain", jnp.bfloat16, SETTINGS, 1)
    assert cache.views[0].value_pages.dtype == jnp.bfloat16


def test_attention_error_is_each_layers_own(model, tokens):
    def cache(format, dtype):
        return make_cache(model, format, dtype, SETTINGS, SETTINGS.batch)

    probes = plain_probes(model, cache(None, jnp.float32), tokens, SETTINGS)
    exact = attention_error(cache(None, jnp.float32), probes)
    rounded = attention_error(cache("raw", jnp.bfloat16), probes)
    assert exact == [0.0] * model.config.num_hidden_layers
    assert all(2**-12 < error < 2**-8 for error in rounded)  # the rounding of bfloat16 is at most 2^-9
