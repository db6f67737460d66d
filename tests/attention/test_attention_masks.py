"""Masks beyond the causal one: prefixes seen whole, cross attention, traced windows, ALiBi."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import normal
from support.attention_oracle import attention_and_lse
from support.backends import backends_here
from support.exact_pages import filled, slots_of
from support.filled_pages import LENGTHS, PADDED_CHUNK, decode_step, filled_view, prefill_step
from support.long import first_short

import qpaged
from qpaged.attention import _xla_lanes, _xla_tiles

Q_HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
SLOPES = np.array([0.5, 0.25, 0.125, 0.0], np.float32)
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}  # float32 sums of some tens of products in other orders
LAST = LENGTHS[-1] - 1
# Of the chunk's queries, at 27 to 39: some see up to 33, some to the last slot, most up to themselves.
UNTIL = np.array([33, 33, 33, -1, -1, LAST, 0, LAST, -1, -1, -1, -1, -1, -1, LAST, LAST], np.int32)
MASKS = {
    "prefix": {"visible_until": UNTIL},
    "prefix, window": {"visible_until": UNTIL, "sliding_window": 9},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi, prefix, cap": {"alibi_slopes": SLOPES, "visible_until": UNTIL, "logits_soft_cap": 3.0},
}


@functools.partial(jax.jit, static_argnames=("backend", "sliding_window", "logits_soft_cap"))
def attend(query, view, step, **options):
    return qpaged.paged_attention(query, view, step, return_lse=True, **options)


def plain_of(pool):
    return np.asarray(pool.dequantize() if isinstance(pool, qpaged.QuantizedArray) else pool)


def expected(query, view, position, tables, *, keys=None, values=None, **mask):
    """Return the oracle's attention and log-sum-exps."""
    names = {"sliding_window": "window", "logits_soft_cap": "cap", "visible_until": "until"}
    mask = {names.get(name, name.removeprefix("alibi_")): value for name, value in mask.items()}
    keys = plain_of(view.key_pages) if keys is None else keys
    values = plain_of(view.value_pages) if values is None else values
    scale = view.metadata.kv_head_dim_size**-0.5
    return attention_and_lse(np.asarray(query), keys, values, position, tables, scale, **mask)


@pytest.mark.short(3)
@pytest.mark.parametrize("spelling", first_short(2, ["int8", None, "int4:token+rotate", "int8:channel"]))
@pytest.mark.parametrize("name", MASKS)
def test_a_prefill_agrees_with_the_oracle(name, spelling):
    view, table = filled_view(spelling, KV_HEADS, HEAD_DIM)
    step, position, tables = prefill_step(table)
    query = normal(PADDED_CHUNK, Q_HEADS, HEAD_DIM, seed=5)
    want = expected(query, view, position, tables, **MASKS[name])
    for backend in (None, "xla", "reference"):
        for given, wanted in zip(
            attend(query, view, step, backend=backend, **MASKS[name]), want, strict=True
        ):
            np.testing.assert_allclose(given, wanted, **TOLERANCE)


@pytest.mark.parametrize("name", ["prefix, window", "alibi, prefix, cap"])
def test_tiles_and_lanes_agree(name, monkeypatch):
    monkeypatch.setattr(_xla_tiles, "KV_TILE", 16)
    monkeypatch.setattr(_xla_tiles, "Q_TILE", 4)
    monkeypatch.setattr(_xla_lanes, "PREFILL_LANES", 3)
    view, table = filled_view("int8", KV_HEADS, HEAD_DIM)
    step, position, tables = prefill_step(table)
    query = normal(PADDED_CHUNK, Q_HEADS, HEAD_DIM, seed=5)
    want, _ = expected(query, view, position, tables, **MASKS[name])

    def attend_anew(query, view, step, **options):
        return qpaged.paged_attention(query, view, step, backend="xla", **options)

    np.testing.assert_allclose(
        jax.jit(lambda: attend_anew(query, view, step, **MASKS[name]))(), want, **TOLERANCE
    )
    monkeypatch.setattr("qpaged.attention._xla.attend_in_turn", _xla_lanes.attend)
    np.testing.assert_allclose(
        jax.jit(lambda: attend_anew(query, view, step, **MASKS[name]))(), want, **TOLERANCE
    )


@pytest.mark.parametrize("name", ["prefix", "prefix, window", "alibi, prefix, cap"])
def test_a_ragged_batch_agrees_with_its_prefill(name):
    view, table = filled_view("int8", KV_HEADS, HEAD_DIM)
    step, position, _ = prefill_step(table)
    query = normal(PADDED_CHUNK, Q_HEADS, HEAD_DIM, seed=5)
    count = int((position >= 0).sum())
    ragged = qpaged.PagedAttentionMetadata.ragged(
        position=np.maximum(position, 0), page_tables=table[[3, -1]], starts=[0, 0, count]
    )
    want = attend(query, view, step, **MASKS[name])
    for given, wanted in zip(attend(query, view, ragged, **MASKS[name]), want, strict=True):
        np.testing.assert_allclose(given, wanted, **TOLERANCE)


@pytest.mark.short(3)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", ["prefill", "ragged"])
def test_new_tokens_are_seen_as_written_ones(kind, name):
    """A whole prompt whose tokens see those behind them, before it is written."""
    view, table = filled_view(None, KV_HEADS, HEAD_DIM)
    step = qpaged.PagedAttentionMetadata.prefill(position=np.arange(PADDED_CHUNK), page_table=table[-1])
    if kind == "ragged":
        step = qpaged.PagedAttentionMetadata.ragged(
            position=np.arange(PADDED_CHUNK), page_tables=table[[3, -1]], starts=[0, 0, PADDED_CHUNK]
        )
    mask = dict(MASKS[name])
    if "visible_until" in mask:
        mask["visible_until"] = np.where(np.arange(PADDED_CHUNK) < 11, 10, -1)
    query = normal(PADDED_CHUNK, Q_HEADS, HEAD_DIM, seed=5)
    new = tuple(normal(PADDED_CHUNK, KV_HEADS, HEAD_DIM, seed=seed) for seed in (6, 7))
    want, _ = attend(query, view.write_to_cache(*new, step), step, **mask)
    out, _ = attend(query, view, step, new=new, **mask)
    np.testing.assert_allclose(out, want, **TOLERANCE)


@pytest.mark.short(2)
@pytest.mark.parametrize("name", MASKS)
def test_exact_pages_are_seen_likewise(name):
    view, tables = filled("int4+rotate+exact8")
    position = np.array([4, 6, 11, 13])
    mask = dict(MASKS[name])
    if "visible_until" in mask:
        mask["visible_until"] = np.array([13, 9, 12, -1])
    query = normal(4, Q_HEADS, view.metadata.kv_head_dim_size, seed=5)
    step = qpaged.PagedAttentionMetadata.prefill(position=position, page_table=tables[0])
    pools = {"keys": slots_of(view.key_pages), "values": slots_of(view.value_pages)}
    want = expected(query, view, position, tables[[0] * 4], **pools, **mask)
    for given, wanted in zip(attend(query, view, step, **mask), want, strict=True):
        np.testing.assert_allclose(given, wanted, **TOLERANCE)


def test_cross_attention_sees_all_of_a_text_that_was_written_before():
    view, table = filled_view("int8:token", KV_HEADS, HEAD_DIM)
    lengths = np.array(LENGTHS)
    step = qpaged.PagedAttentionMetadata.decode(position=np.where(lengths > 0, 0, -1), page_table=table)
    query = normal(len(LENGTHS), Q_HEADS, HEAD_DIM, seed=5)
    want, _ = attend(query, view, decode_step(table)[0])
    out, _ = attend(query, view, step, visible_until=lengths - 1)
    np.testing.assert_array_equal(out, want)
    names = backends_here(query, view, step)
    assert "cpu" in names or not qpaged.attention_backends()[2].available


@pytest.mark.parametrize("window", [1, 7, 1000])
@pytest.mark.parametrize("step_of", [decode_step, prefill_step])
def test_a_traced_window_and_scale_give_what_known_ones_give(step_of, window):
    view, table = filled_view("int8", KV_HEADS, HEAD_DIM)
    step, position, _ = step_of(table)
    query = normal(len(position), Q_HEADS, HEAD_DIM, seed=5)
    traced = jax.jit(
        lambda window, scale: qpaged.paged_attention(
            query, view, step, sliding_window=window, softmax_scale=scale
        )
    )
    want, _ = attend(query, view, step, sliding_window=window, softmax_scale=0.25)
    np.testing.assert_allclose(traced(window, 0.25), want, **TOLERANCE)


def test_a_scan_over_layers_takes_each_layers_window():
    view, table = filled_view("int8", KV_HEADS, HEAD_DIM)
    step, position, _ = decode_step(table)
    query = normal(len(position), Q_HEADS, HEAD_DIM, seed=5)
    windows = jnp.array([4, 2**30])

    @jax.jit
    def scan(windows):
        def layer(carry, window):
            return carry, qpaged.paged_attention(query, view, step, sliding_window=window)

        return jax.lax.scan(layer, 0, windows)[1]

    for out, window in zip(scan(windows), (4, None), strict=True):
        np.testing.assert_allclose(out, attend(query, view, step, sliding_window=window)[0], **TOLERANCE)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ({"alibi_slopes": SLOPES}, "knows no ALiBi slopes"),
        (
            {"visible_until": [3] * len(LENGTHS), "sliding_window": 4},
            "takes a sliding window that is known .* and then no visible_until",
        ),
    ],
)
def test_kernels_decline_such_masks(mask, reason):
    view, table = filled_view("int8", KV_HEADS, HEAD_DIM)
    step, position, _ = decode_step(table)
    query = normal(len(position), Q_HEADS, HEAD_DIM, seed=5)
    backends = {
        backend.name: backend.reason for backend in qpaged.attention_backends(query, view, step, **mask)
    }
    assert backends["xla"] is None and backends["reference"] is None
    if qpaged.attention_backends()[2].available:
        with pytest.raises(ValueError, match=reason):
            qpaged.paged_attention(query, view, step, backend="cpu", **mask)


def test_a_prefix_that_ends_past_the_page_table_ends_with_it():
    view, table = filled_view("int8", KV_HEADS, HEAD_DIM)
    step, position, _ = decode_step(table)
    query = normal(len(position), Q_HEADS, HEAD_DIM, seed=5)
    last = np.full(len(position), table.shape[1] * view.metadata.page_size - 1)
    want, _ = attend(query, view, step, visible_until=last)
    out, _ = attend(query, view, step, visible_until=np.full(len(position), 2**31 - 1))
    np.testing.assert_array_equal(out, want)
    assert not out[0].any()  # the inactive row


def test_new_tokens_are_seen_as_far_as_they_go_and_no_other_sequences():
    view, table = filled_view(None, KV_HEADS, HEAD_DIM)
    step = qpaged.PagedAttentionMetadata.ragged(
        position=[0, 1, 2, 0, 1, 2, 3, 4], page_tables=table[[3, -1]], starts=[0, 3, 8]
    )
    query = normal(8, Q_HEADS, HEAD_DIM, seed=5)
    new = [normal(8, KV_HEADS, HEAD_DIM, seed=seed) for seed in (6, 7)]
    until = np.array([6, 6, 6, -1, -1, -1, -1, -1])
    out, _ = attend(query, view, step, new=tuple(new), visible_until=until)
    last = np.array([2, 2, 2, -1, -1, -1, -1, -1])
    want, _ = attend(query, view, step, new=tuple(new), visible_until=last)
    np.testing.assert_allclose(out, want, **TOLERANCE)
    others = tuple(rows.at[3:].multiply(100) for rows in new)
    louder, _ = attend(query, view, step, new=others, visible_until=until)
    np.testing.assert_array_equal(louder[:3], out[:3])
