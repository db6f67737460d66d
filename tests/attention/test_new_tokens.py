"""Attention before the write: to a call's own tokens as they are given, and to older ones as the view has."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import normal
from support.filled_pages import LENGTHS, PADDED_CHUNK, decode_step, filled_view, prefill_step
from support.long import first_short

import qpaged
from qpaged.attention import _tpu

Q_HEADS, KV_HEADS = 6, 2
OPTIONS = {
    "plain": {},
    "window": {"sliding_window": 11},
    "window of one": {"sliding_window": 1},
    "cap and sinks": {"logits_soft_cap": 3.0, "sinks": normal(Q_HEADS, seed=7)},
}
FORMATS = ["int8", "int4:channel+offset/int4:token+rotate", None, "nvfp4"]
# float32 sums of some tens of products in other orders, through an exponential
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}


def decode(table, lengths=LENGTHS):
    return decode_step(table, lengths)[0]


def prefill(table, lengths=LENGTHS):
    return prefill_step(table, lengths)[0]


def both(table, lengths=LENGTHS):
    """Return a prefill of the last sequence and a decode of the others."""
    decodes = decode(table, lengths)
    position = decodes.decodes_position.at[-1].set(-1)
    return prefill(table, lengths).replace(decodes_position=position, decodes_page_table=table)


STEPS = {"decode": decode, "prefill": prefill, "both": both}


@functools.partial(jax.jit, static_argnames=("backend", "sliding_window", "logits_soft_cap"))
def attend(query, view, step, **options):
    return qpaged.paged_attention(query, view, step, **options)


def rows_of(step, head_dim):
    """Return the query, key and value of each token of a step."""
    prefill, decodes = step.prefill_tokens(), step.decodes_tokens()
    count = sum(len(tokens[0]) for tokens in (prefill, decodes) if tokens is not None)
    shapes = ((count, Q_HEADS, head_dim), (count, KV_HEADS, head_dim), (count, KV_HEADS, head_dim))
    return [normal(*shape, seed=seed) for seed, shape in enumerate(shapes, 20)]


def written(view, key, value, step):
    """Return a plain view with the values of ``view``, and a step's rows written to it."""
    pools = [jax.tree_util.tree_map(jnp.asarray, pool) for pool in (view.key_pages, view.value_pages)]
    pools = [pool.dequantize() if isinstance(pool, qpaged.QuantizedArray) else pool for pool in pools]
    plain = filled_view(None, KV_HEADS, view.metadata.kv_head_dim_size)[0]
    plain = plain.replace(metadata=view.metadata, key_pages=pools[0], value_pages=pools[1])
    start = 0
    if not step.is_decode_mode():
        start = len(step.prefill_position)
        plain = plain.write_prefill_to_cache(key[:start], value[:start], step)
    if not step.is_prefill_mode():
        plain = plain.write_decodes_to_cache(key[start:], value[start:], step)
    return plain


@pytest.mark.short(10)
@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize("spelling", first_short(2, FORMATS))
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", STEPS)
def test_it_gives_what_exact_rows_in_the_cache_give(kind, name, spelling, backend):
    """The slots that the call will write hold older rows, which nothing reads."""
    options = {"backend": backend, **OPTIONS[name]}
    view, table = filled_view(spelling, KV_HEADS, 32)
    step = STEPS[kind](table)
    query, key, value = rows_of(step, 32)
    want = attend(query, written(view, key, value, step), step, **options)
    out = attend(query, view, step, new=(key, value), **options)
    np.testing.assert_allclose(out, want, **TOLERANCE)


@pytest.mark.skipif(not qpaged.attention_backends()[0].available, reason="needs the tpu backend")
@pytest.mark.parametrize("name", first_short(1, ["window", "cap and sinks"]))
def test_the_interpreted_kernel_agrees(name, monkeypatch):
    from jax.experimental.pallas import tpu as pltpu

    monkeypatch.setattr(_tpu, "KV_TILE", 128)
    monkeypatch.setattr(_tpu, "MAX_Q_ROWS", 24)
    lengths = (0, 1, 64, 300)
    view, table = filled_view("int8", KV_HEADS, 64, 64, lengths)
    step = both(table, lengths)
    query, key, value = rows_of(step, 64)
    options = {"new": (key, value), **OPTIONS[name]}
    want = attend(query, view, step, backend="reference", **options)
    with pltpu.force_tpu_interpret_mode():
        out = attend(query, view, step, backend="tpu", **options)
    np.testing.assert_allclose(out, want, **TOLERANCE)


def test_nothing_that_the_format_rounds_is_between_a_query_and_its_own_call():
    """The first tokens of a sequence give the same whatever the format is."""
    step = qpaged.PagedAttentionMetadata.prefill(position=np.arange(PADDED_CHUNK), page_table=[0, 1, 2, 3, 4])
    query, key, value = rows_of(step, 32)
    outs = []
    for spelling in (None, "int4"):
        view, _ = filled_view(spelling, KV_HEADS, 32)
        outs.append(attend(query, view, step, new=(key, value)))
    np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize("kind", STEPS)
def test_inactive_rows_and_padding_give_zeros(kind):
    view, table = filled_view("int8", KV_HEADS, 32)
    step = STEPS[kind](table)
    query, key, value = rows_of(step, 32)
    poisoned = [rows.at[position_of(step) < 0].set(jnp.nan) for rows in (key, value)]
    out, lse = qpaged.paged_attention(
        query, view, step, new=tuple(poisoned), sinks=jnp.zeros(Q_HEADS), return_lse=True
    )
    inactive = position_of(step) < 0
    assert inactive.any() and np.isfinite(out).all()
    assert not out[inactive].any() and np.isneginf(lse[inactive]).all()


def position_of(step):
    tokens = [step.prefill_tokens(), step.decodes_tokens()]
    return np.concatenate([position for position, _ in filter(None, tokens)])


ROWS = jnp.zeros((6, KV_HEADS, 32))
REFUSED = {
    "one array": (ROWS, TypeError, r"new must be \(key, value\), but came as a"),
    "three arrays": ((ROWS,) * 3, TypeError, r"new must be \(key, value\)"),
    "too few": ((ROWS, ROWS[1:]), ValueError, r"new\[1\] must have shape .*\(6, 2, 32\), .*\(5, 2, 32\)"),
    "integers": ((ROWS.astype(int), ROWS), TypeError, r"new\[0\] must have a real floating-point dtype"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_new_tokens_of_other_kinds_are_refused(name):
    new, error, message = REFUSED[name]
    view, table = filled_view("int8", KV_HEADS, 32)
    with pytest.raises(error, match=message):
        qpaged.paged_attention(jnp.zeros((6, Q_HEADS, 32)), view, decode(table), new=new)


@pytest.mark.parametrize("position", [[3, 4, 6], [-1, 0, 1], [4, 3, 5], [2, -1, 4]], ids=str)
def test_positions_that_do_not_follow_one_another_are_refused_or_give_nan(position):
    view, table = filled_view("int8", KV_HEADS, 32)
    step = qpaged.PagedAttentionMetadata.prefill(position=position, page_table=table[-1])
    query, key, value = rows_of(step, 32)
    with pytest.raises(
        ValueError, match=rf"padding last, but they are at {re.escape(str(position))}; write first"
    ):
        qpaged.paged_attention(query, view, step, new=(key, value))
    out = attend(query, view, step, new=(key, value))  # where positions are traced
    active = np.array(position) >= 0
    assert np.isnan(out[active]).all() and not out[~active].any()


@pytest.mark.skipif(not qpaged.attention_backends()[0].available, reason="needs the tpu backend")
@pytest.mark.parametrize(("backend", "kernels"), [("xla", 0), ("reference", 0), (None, 2)])
def test_a_backend_that_is_named_attends_to_new_tokens_too(backend, kernels):
    view = qpaged.PagedAttentionCacheView.fresh(
        None,
        jnp.bfloat16,
        qpaged.PagedAttentionCacheMetaData(1, 1, 8, 4, 64, 16, 2, 128, 0.5),
        0,
        None,
        "int8",
    )
    step = qpaged.PagedAttentionMetadata.prefill(position=np.arange(16), page_table=np.arange(4))
    query, key, value = (rows.astype(jnp.bfloat16) for rows in rows_of(step, 128))
    lowered = jax.jit(
        lambda *rows: qpaged.paged_attention(rows[0], view, step, new=rows[1:], backend=backend)
    )
    text = lowered.trace(query, key, value).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == kernels
