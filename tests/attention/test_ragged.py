"""Ragged batches: prompts, chunks, decodes and drafts in one call, against one sequence after another."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arrays import normal
from support.filled_pages import LENGTHS, PAGES, filled_view

import qpaged
from qpaged.attention import _ragged, _tpu, _xla, _xla_lanes
from qpaged.testing._pools import head_dim as smallest_head_dim

Q_HEADS, KV_HEADS = 4, 2
ROOM = 72  # tokens of a batch
OPTIONS = {
    "plain": {},
    "window": {"sliding_window": 11},
    "cap and sinks": {"logits_soft_cap": 3.0, "sinks": normal(Q_HEADS, seed=7)},
}
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}  # float32 sums of some tens of products in other orders
# Queries of each sequence, its last ones: none, whole prompts, decodes, drafts and a chunk.
QUERIES = 0, 1, 7, 1, 39, 5


@functools.partial(jax.jit, static_argnames=("backend", "sliding_window", "logits_soft_cap"))
def attend(query, view, step, **options):
    return qpaged.paged_attention(query, view, step, return_lse=True, **options)


def batch_of(queries, table, lengths=LENGTHS, room=ROOM):
    """Return a ragged batch of the last ``queries`` of each sequence, and where each sequence's are in it."""
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    position = np.full(room, 3, np.int32)  # of padding: as good as any
    for length, count, start in zip(lengths, queries, starts[:-1], strict=True):
        position[start : start + count] = np.arange(length - count, length)
    step = qpaged.PagedAttentionMetadata.ragged(position=position, page_tables=table, starts=starts)
    return step, [slice(*ends) for ends in itertools.pairwise(starts)]


def prefill_of(step, sequence, here):
    """Return a batch's sequence as a prefill, padded so that all have one shape."""
    padded = np.full(ROOM, -1, np.int32)
    padded[: here.stop - here.start] = step.ragged_position[here]
    return qpaged.PagedAttentionMetadata.prefill(
        position=padded, page_table=np.asarray(step.ragged_page_tables)[sequence]
    )


def padded_rows(rows, here):
    return jnp.zeros_like(rows).at[: here.stop - here.start].set(rows[here])


def check_batch(view, table, queries, backend=None, new=False, **options):
    """Check a batch against its sequences, one after another, by the reference."""
    head_dim = view.metadata.kv_head_dim_size
    step, places = batch_of(queries, table)
    query = normal(ROOM, Q_HEADS, head_dim, seed=20)
    own = [normal(ROOM, KV_HEADS, head_dim, seed=seed) for seed in (21, 22)]
    out, lse = attend(query, view, step, backend=backend, **({"new": tuple(own)} if new else {}), **options)
    for sequence, here in enumerate(places):
        count = here.stop - here.start
        given_new = {"new": tuple(padded_rows(rows, here) for rows in own)} if new else {}
        want = attend(
            padded_rows(query, here),
            view,
            prefill_of(step, sequence, here),
            backend="reference",
            **given_new,
            **options,
        )
        np.testing.assert_allclose(out[here], want[0][:count], **TOLERANCE)
        np.testing.assert_allclose(lse[here], want[1][:count], **TOLERANCE)
    padding = slice(places[-1].stop, None)
    assert not np.any(out[padding]) and np.all(np.isneginf(lse[padding]))


@pytest.mark.short(6)
@pytest.mark.parametrize("new", [False, True], ids=["", "new"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", [None, "xla", "reference"])
def test_a_batch_is_its_sequences(backend, name, new):
    view, table = filled_view("int8", KV_HEADS, 32)
    check_batch(view, table, QUERIES, backend, new, **OPTIONS[name])


@pytest.mark.short(10)
@pytest.mark.parametrize("spelling", qpaged.available_formats())
def test_a_batch_of_every_format(spelling):
    head_dim = max(32, *(smallest_head_dim(one) for one in qpaged.CacheFormat.of(spelling).layer(0) if one))
    view, table = filled_view(spelling, KV_HEADS, head_dim)
    check_batch(view, table, QUERIES)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_batches_of_one_shape_share_a_compilation(data):
    """However tokens are divided among sequences, and however many sequences there are."""
    view, table = filled_view("int4+rotate", KV_HEADS, 32)
    queries, left = [], ROOM
    for length in LENGTHS:
        queries.append(data.draw(st.integers(0, min(length, left))))
        left -= queries[-1]
    check_batch(view, table, queries)
    step, _ = batch_of(queries, table)
    key = value = normal(ROOM, KV_HEADS, 32, seed=3)
    write_batch(view, key, value, step)
    assert write_batch._cache_size() == 1


@jax.jit
def write_batch(view, key, value, step):
    """Do what :func:`write` does, for the batches of one shape alone."""
    return view.write_to_cache(key, value, step)


@jax.jit
def write(view, key, value, step):
    return view.write_to_cache(key, value, step)


EXACT = "int4+rotate+exact8+sink8", "int4:channel+offset+exact1/int8:token+exact16"


def fresh_view(spelling):
    config = qpaged.PagedAttentionCacheMetaData(len(LENGTHS), 1, PAGES, 5, 40, 8, KV_HEADS, 32, 0.5)
    return qpaged.PagedAttentionCacheView.init(None, jnp.float32, config, 0, None, spelling)


def read(view, pages):
    """Return the keys and values of pages as attention reads them, whatever number an exact page has."""
    return [
        np.asarray(qpaged.pools.gather_slots(pool, pages), np.float32)
        for pool in (view.key_pages, view.value_pages)
    ]


@pytest.mark.short(2)
@pytest.mark.parametrize("spelling", [None, "int8", "int4:token", "nvfp4", *EXACT])
def test_a_batch_is_written_as_its_sequences_are(spelling):
    """In two batches: prompts, and then what follows them, of some sequences more than a window."""
    table = filled_view("int8", KV_HEADS, 32)[1]
    in_batches = in_turn = fresh_view(spelling)
    ends = np.zeros(len(LENGTHS), int)
    for seed, queries in enumerate([(0, 1, 5, 3, 9, 25), (0, 0, 2, 5, 30, 1)]):
        ends += queries
        step, places = batch_of(queries, table, lengths=ends)
        key, value = normal(ROOM, KV_HEADS, 32, seed=seed), normal(ROOM, KV_HEADS, 32, seed=9 + seed)
        in_batches = write(in_batches, key, value, step)
        for sequence, here in enumerate(places):
            rows = padded_rows(key, here), padded_rows(value, here)
            in_turn = write(in_turn, *rows, prefill_of(step, sequence, here))
        pages = jnp.asarray(table[table < PAGES])
        for of_batches, of_turns in zip(read(in_batches, pages), read(in_turn, pages), strict=True):
            np.testing.assert_array_equal(of_batches, of_turns)
        query = normal(ROOM, Q_HEADS, 32, seed=20)
        for new in (None, (key, value)):
            out, want = attend(query, in_batches, step, new=new), attend(query, in_turn, step, new=new)
            np.testing.assert_allclose(out[0], want[0], **TOLERANCE)


def test_attention_before_the_write_of_exact_pages():
    view, table = fresh_view(EXACT[0]), filled_view("int8", KV_HEADS, 32)[1]
    first, _ = batch_of((0, 1, 3, 4, 20, 25), table, lengths=(0, 1, 3, 4, 20, 25))
    rows = normal(ROOM, KV_HEADS, 32, seed=1)
    view = write(view, rows, rows, first)
    query, own = normal(ROOM, Q_HEADS, 32, seed=2), normal(ROOM, KV_HEADS, 32, seed=3)
    step, places = batch_of((0, 0, 4, 1, 19, 15), table)
    out, _ = attend(query, view, step, new=(own, own))
    for sequence, here in enumerate(places):
        rows = padded_rows(own, here)
        want, _ = attend(
            padded_rows(query, here),
            view,
            prefill_of(step, sequence, here),
            new=(rows, rows),
            backend="reference",
        )
        np.testing.assert_allclose(out[here], want[: here.stop - here.start], **TOLERANCE)


def test_what_lies_past_the_last_sequence_is_not_written():
    view, table = fresh_view("int8"), filled_view("int8", KV_HEADS, 32)[1]
    step, places = batch_of(QUERIES, table)
    rows = normal(ROOM, KV_HEADS, 32, seed=1)
    poisoned = rows.at[places[-1].stop :].set(jnp.nan)
    written = write(view, poisoned, poisoned, step)
    assert all(np.isfinite(part).all() for part in read(written, jnp.arange(PAGES)))
    query = normal(ROOM, Q_HEADS, 32).at[places[-1].stop :].set(jnp.nan)
    for new in (None, (poisoned, poisoned)):
        assert np.isfinite(attend(query, written, step, new=new)[0]).all()


def test_a_step_without_sequences_or_pages():
    view = fresh_view("int8")
    rows = normal(4, KV_HEADS, 32)
    for shape in ((0, 5), (2, 0)):
        step = qpaged.PagedAttentionMetadata.ragged(
            position=[0, 1, 2, 3],
            page_tables=np.zeros(shape, np.int32),
            starts=np.zeros(shape[0] + 1, np.int32),
        )
        assert not np.any(attend(normal(4, Q_HEADS, 32), write(view, rows, rows, step), step)[0])


@pytest.mark.short(1)
@pytest.mark.skipif(not qpaged.attention_backends()[0].available, reason="needs the tpu backend")
@pytest.mark.parametrize("new", [False, True], ids=["", "new"])
def test_the_interpreted_kernel_agrees(new, monkeypatch):
    from jax.experimental.pallas import tpu as pltpu

    monkeypatch.setattr(_tpu, "KV_TILE", 128)
    monkeypatch.setattr(_tpu, "MAX_Q_ROWS", 8)  # so that a run has several query tiles
    monkeypatch.setattr(_tpu, "TABLE_ENTRIES", 30)  # and a batch several calls
    lengths = (0, 1, 64, 100, 300)
    view, table = filled_view("int8", KV_HEADS, 64, 64, lengths)
    step, _ = batch_of((0, 1, 30, 1, 20), table, lengths)
    query = normal(ROOM, Q_HEADS, 64, seed=1)
    options = {"new": (normal(ROOM, KV_HEADS, 64), normal(ROOM, KV_HEADS, 64, seed=2))} if new else {}
    want = attend(query, view, step, backend="reference", **options)
    with pltpu.force_tpu_interpret_mode():
        out = attend(query, view, step, backend="tpu", **options)
    np.testing.assert_allclose(out[0], want[0], **TOLERANCE)


@pytest.mark.long
def test_many_lanes_at_a_step_agree(monkeypatch):
    """The xla backend as it is on GPUs."""
    monkeypatch.setattr(_xla_lanes, "PREFILL_LANES", 2)
    monkeypatch.setattr(_xla, "by_platform", lambda *args, cuda, **_: cuda(*args))
    jax.clear_caches()
    view, table = filled_view("int8", KV_HEADS, 32)
    check_batch(view, table, QUERIES, "xla", new=True)
    jax.clear_caches()


def test_as_many_tokens_as_sequences_are_no_decode():
    step = qpaged.PagedAttentionMetadata.ragged(
        position=[5, 3], page_tables=np.zeros((2, 5), int), starts=[0, 2, 2]
    )
    query, own = normal(2, Q_HEADS, 32), normal(2, KV_HEADS, 32)
    with pytest.raises(ValueError, match="new must be of tokens whose positions follow one another"):
        qpaged.paged_attention(query, fresh_view("int8"), step, new=(own, own))


def test_steps_without_tokens_are_taken_by_every_backend():
    view = fresh_view("int8")
    steps = [qpaged.PagedAttentionMetadata.decode(position=[], page_table=np.zeros((0, 5), int))]
    for sequences in (0, 1):
        tables, starts = np.zeros((sequences, 5), int), np.zeros(sequences + 1, int)
        steps.append(qpaged.PagedAttentionMetadata.ragged(position=[], page_tables=tables, starts=starts))
    for step in steps:
        backends = {backend.name for backend in qpaged.attention_backends(normal(0, Q_HEADS, 32), view, step)}
        assert {"xla", "reference"} <= backends


def test_a_placeholder_is_written_and_attended_to_by_no_one():
    view, step, rows = fresh_view("int8"), qpaged.PagedAttentionMetadata.init_empty(), normal(5, KV_HEADS, 32)
    assert view.write_to_cache(rows, rows, step) is view


def test_positions_that_do_not_follow_one_another_are_refused_or_nan():
    view, table = filled_view("int8", KV_HEADS, 32)
    step, places = batch_of(QUERIES, table)
    position = np.array(step.ragged_position)
    position[places[4].start + 1] = 0
    step = step.replace(ragged_position=position)
    query, own = normal(ROOM, Q_HEADS, 32), normal(ROOM, KV_HEADS, 32)
    with pytest.raises(ValueError, match="new must be of tokens whose positions follow one another"):
        qpaged.paged_attention(query, view, step, new=(own, own))
    out, _ = attend(query, view, step, new=(own, own))
    is_nan = np.isnan(np.asarray(out)).any(axis=(1, 2))
    np.testing.assert_array_equal(np.flatnonzero(is_nan), np.arange(ROOM)[places[4]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"starts": [0, 2]},
            "starts must have one entry more than page_tables has rows, in each group, but came with 2 in 1",
        ),
        (
            {"starts": [0, 3, 2]},
            r"starts must ascend from 0 to at most the number of tokens, 4, but came as \[0",
        ),
        ({"starts": [0, 3, 5]}, "starts must ascend from 0 to at most the number of tokens, 4"),
        ({"starts": [1, 3, 4]}, "starts must ascend from 0"),
        ({"starts": [0.0, 3.0, 4.0]}, "starts must be integers"),
        ({"page_tables": [0, 1]}, r"page_tables must have shape \(sequences, pages_per_sequence\)"),
        ({"position": [[0, 1, 2, 3]]}, r"position must have shape \(tokens,\)"),
    ],
)
def test_bad_batches_are_refused(change, message):
    arguments = {"position": [0, 1, 2, 3], "page_tables": [[0], [1]], "starts": [0, 3, 4], **change}
    with pytest.raises((TypeError, ValueError), match=message):
        qpaged.PagedAttentionMetadata.ragged(**arguments)


def test_starts_of_a_record_must_ascend():
    step, _ = batch_of(QUERIES, filled_view("int8", KV_HEADS, 32)[1])
    record = step.to_dict() | {"ragged_starts": np.array([0, 5, 3, 8, 8, 8, 8])}
    with pytest.raises(ValueError, match="ragged_starts must ascend from 0"):
        qpaged.PagedAttentionMetadata.from_dict(record)


def test_rows_of_another_number_are_refused():
    step, view = batch_of(QUERIES, filled_view("int8", KV_HEADS, 32)[1])[0], fresh_view("int8")
    with pytest.raises(
        ValueError, match=r"key must have shape \(len\(ragged_position\), kv_heads, head_dim\)"
    ):
        view.write_to_cache(normal(3, KV_HEADS, 32), normal(3, KV_HEADS, 32), step)


def test_other_writes_name_the_one_that_takes_a_batch():
    step, view = batch_of(QUERIES, filled_view("int8", KV_HEADS, 32)[1])[0], fresh_view("int8")
    rows = normal(ROOM, KV_HEADS, 32)
    for method in (view.write_prefill_to_cache, view.write_decodes_to_cache):
        with pytest.raises(ValueError, match="got that of a ragged batch; write_to_cache takes any"):
            method(rows, rows, step)


def test_run_lengths():
    assert [_ragged.run_length(tokens, 8) for tokens in (8, 64, 65, 512, 4096)] == [8, 8, 16, 64, 128]
