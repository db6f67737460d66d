"""Pools with exact pages, against a plain Python model of their rules."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import normal
from support.attention_oracle import attention_and_lse
from support.caches import (
    BATCH,
    HEAD_DIM,
    HEADS,
    PAGE_SIZE,
    PAGES,
    SEQUENCE_PAGES,
    attend,
    decode,
    make_view,
    prefill,
    reset,
    write_decodes,
    write_prefill,
)
from support.long import first_short

import qpaged
from qpaged import pools

NO_PAGE = PAGES
FORMATS = (
    "int4+rotate+exact8",
    "int8+exact1",
    "int8:token+exact5+sink4",
    "int4:channel+offset+exact2+sink1",
    "nvfp4+exact9",
    "raw+exact1",
    "fp8_e4m3+exact3",
    "int2+offset+exact1+sink6",
)
pack = jax.jit(lambda view, pages, lengths: view.pack_pages(pages, lengths))
copy = jax.jit(lambda view, source, target: view.copy_pages(source, target))


class Model:
    """What a pool of keys should hold: pages of floats, which of them are exact, and in which order."""

    def __init__(self, spelling, capacity):
        (format, _) = qpaged.CacheFormat.of(spelling).layer(0)
        self.quantizer = format.inner
        self.window, self.sinks = format.window(PAGE_SIZE), format.sink_pages(PAGE_SIZE)
        self.capacity = capacity
        self.packed = np.zeros((PAGES, HEADS, PAGE_SIZE, HEAD_DIM), np.float32)
        self.exact = {}  # page -> [order, rows, is full, is sink]
        self.clock = 0

    def pack(self, page, rows):
        array = self.quantizer.quantize(jnp.asarray(rows)[:, None])
        self.packed[page] = np.asarray(array.dequantize())[:, 0]
        self.exact.pop(page, None)

    def content(self, page):
        return self.exact[page][1] if page in self.exact else self.packed[page]

    def write(self, tokens):
        """Write (table, position, row) of each token, all in one call."""
        tokens = [(list(table), int(position), row) for table, position, row in tokens]
        tokens = [
            (t, p, row)
            for t, p, row in tokens
            if 0 <= p < len(t) * PAGE_SIZE and 0 <= t[p // PAGE_SIZE] < PAGES
        ]
        newest = {}
        for table, position, _ in tokens:
            key = tuple(table)
            newest.setdefault(key, []).append(position // PAGE_SIZE)
        written = {table[position // PAGE_SIZE] for table, position, _ in tokens}
        behind = set()
        after = set()
        for table, numbers in newest.items():
            for place, page in enumerate(table):
                if not 0 <= page < PAGES:
                    continue
                if place >= self.sinks and place <= max(numbers) - self.window:
                    behind.add(page)
                if place > min(numbers):
                    after.add(page)
        leaving = [page for page in self.exact if page in behind or (page in after and page not in written)]
        direct = [page for page in written if page in behind]
        opens = []
        for table, position, _ in sorted(tokens, key=lambda token: token[0][token[1] // PAGE_SIZE]):
            page = table[position // PAGE_SIZE]
            if page not in self.exact and page not in behind and page not in [o[0] for o in opens]:
                opens.append((page, position // PAGE_SIZE < self.sinks))
        room = self.capacity - len([page for page in self.exact if page not in leaving])
        candidates = [page for page in self.exact if page not in leaving and page not in written]
        candidates.sort(key=lambda page: (self.exact[page][3], not self.exact[page][2], self.exact[page][0]))
        shortage = max(0, len(opens) - room)
        leaving += candidates[:shortage]
        room += len(candidates[:shortage])
        direct += [page for page, _ in opens[room:]]
        rows_of = {}
        for table, position, row in tokens:
            rows_of.setdefault(table[position // PAGE_SIZE], []).append((position % PAGE_SIZE, row))
        for page in dict.fromkeys([*leaving, *direct]):
            content = np.array(self.content(page))
            for slot, row in rows_of.get(page, []):
                content[:, slot] = row
            self.pack(page, content)
        for page, is_sink in opens[:room]:
            self.clock += 1
            self.exact[page] = [self.clock, np.array(self.packed[page]), False, is_sink]
        for page, rows in rows_of.items():
            if page in self.exact:
                for slot, row in rows:
                    self.exact[page][1][:, slot] = row
                    self.exact[page][2] |= slot == PAGE_SIZE - 1

    def reset(self, pages):
        for page in pages:
            self.exact.pop(page, None)
            self.packed[page] = 0

    def pack_pages(self, pages, lengths):
        for page, length in zip(pages, lengths, strict=True):
            if page in self.exact:
                rows = self.exact[page][1]
                rows[:, length:] = 0
                self.pack(page, rows)

    def copy(self, source, target):
        held = self.exact.get(source)
        held = held and [held[0], np.array(held[1]), *held[2:]]
        self.packed[target] = self.packed[source]
        self.exact.pop(target, None)
        if held is not None:
            if len(self.exact) < self.capacity:
                self.clock += 1
                self.exact[target] = [self.clock, *held[1:]]
            else:
                self.pack(target, held[1])


def assert_holds(view, model):
    exact = np.asarray(pools.is_exact(view.key_pages, jnp.arange(PAGES, dtype=jnp.int32)))
    assert {int(page) for page in np.flatnonzero(exact)} == set(model.exact)
    slots = pools.gather_slots(view.key_pages, jnp.arange(PAGES, dtype=jnp.int32))
    got = np.asarray(slots).reshape(HEADS, PAGES, PAGE_SIZE, HEAD_DIM).swapaxes(0, 1)
    for page in range(PAGES):
        np.testing.assert_array_equal(got[page], model.content(page), err_msg=f"page {page}")


def rows(rng, count):
    return rng.normal(size=(count, HEADS, HEAD_DIM)).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spelling", first_short(3, FORMATS))
def test_pages_are_as_the_rules_say(spelling, seed):
    rng = np.random.default_rng(seed)
    view = make_view(spelling)
    model = Model(spelling, view.key_pages.capacity)
    tables = rng.permutation(PAGES)[: 3 * SEQUENCE_PAGES].reshape(3, SEQUENCE_PAGES)
    spare = [page for page in range(PAGES) if page not in tables]
    length = np.zeros(3, int)
    for _ in range(40):
        match rng.choice(["chunk", "decode", "decode", "decode", "rewind", "reset", "pack", "copy", "late"]):
            case "chunk":
                sequence = rng.integers(3)
                count = min(6, SEQUENCE_PAGES * PAGE_SIZE - length[sequence])
                key = rows(rng, 6)
                position = np.where(np.arange(6) < count, length[sequence] + np.arange(6), -1)
                view = write_prefill(view, key, key, prefill(position, tables[sequence], count))
                model.write([(tables[sequence], p, row) for p, row in zip(position, key, strict=True)])
                length[sequence] += count
            case "decode":
                chosen = rng.permutation(3)[:BATCH]
                position = np.where(length[chosen] < SEQUENCE_PAGES * PAGE_SIZE, length[chosen], -1)
                key = rows(rng, BATCH)
                view = write_decodes(view, key, key, decode(position, tables[chosen]))
                model.write([(tables[s], p, row) for s, p, row in zip(chosen, position, key, strict=True)])
                length[chosen] += position >= 0
            case "late":
                sequence = rng.integers(3)
                position = np.array([rng.integers(max(1, length[sequence])), -1])
                key = rows(rng, BATCH)
                view = write_decodes(view, key, key, decode(position, tables[[sequence, sequence]]))
                model.write([(tables[sequence], position[0], key[0])])
            case "rewind":
                sequence = rng.integers(3)
                length[sequence] = rng.integers(length[sequence] + 1)
            case "reset":
                sequence = rng.integers(3)
                length[sequence] = 0
                view = reset(view, tables[sequence])
                model.reset(tables[sequence])
            case "pack":
                pages, lengths = tables[rng.integers(3)], rng.integers(PAGE_SIZE + 1, size=SEQUENCE_PAGES)
                view = pack(view, pages, lengths)
                model.pack_pages(pages, lengths)
            case "copy":
                sequence = rng.integers(3)
                place = rng.integers(SEQUENCE_PAGES)
                source, target = tables[sequence, place], spare[rng.integers(len(spare))]
                view = copy(view, source, target)
                model.copy(source, target)
                spare[spare.index(target)] = source
                tables[sequence, place] = target
        assert_holds(view, model)


ATTENTION = {
    "int8:token+exact5+sink4": {},
    "int4+rotate+exact8": {"sliding_window": 6},
    "int4:channel+offset+exact9/int4:token+rotate+exact1+sink4": {"logits_soft_cap": 3.0},
    "int8/int4+exact6": {"sliding_window": 3},
    "plain/nvfp4+exact2+sink1": {},
}


def filled(spelling, seed=0):
    """Return a view of two sequences, 14 and 9 tokens long, written in chunks and rows, and their tables."""
    rng = np.random.default_rng(seed)
    view = make_view(spelling)
    tables = np.array([[3, 1, 7, 2], [4, 9, 0, NO_PAGE]])
    for table, cuts in zip(tables, ((0, 5, 12), (0, 8)), strict=True):
        for start, end in itertools.pairwise(cuts):
            key, value = rows(rng, end - start), rows(rng, end - start)
            view = write_prefill(view, key, value, prefill(np.arange(start, end), table))
    for position in ((12, 8), (13, -1)):
        view = write_decodes(view, rows(rng, 2), rows(rng, 2), decode(np.array(position), tables))
    return view, tables


@functools.partial(jax.jit, static_argnames=("backend", "sliding_window", "logits_soft_cap", "return_lse"))
def attend_with(query, view, step, **options):
    return qpaged.paged_attention(query, view, step, **options)


def slots_of(pages):
    """Return what a pool holds, NumPy [kv_heads, pages, page_size, head_dim]."""
    slots = pools.gather_slots(pages, jnp.arange(PAGES, dtype=jnp.int32))
    slots = slots if isinstance(slots, jax.Array) else slots.materialize()
    return np.asarray(slots).reshape(HEADS, PAGES, PAGE_SIZE, HEAD_DIM)


@pytest.mark.parametrize("kind", ["decode", "prefill"])
@pytest.mark.parametrize("spelling", first_short(3, tuple(ATTENTION)))
@pytest.mark.parametrize("backend", [None, "reference"])
def test_attention_reads_what_the_pools_hold(backend, spelling, kind):
    options = ATTENTION[spelling]
    view, tables = filled(spelling)
    query = np.random.default_rng(5).normal(size=(2, 4, HEAD_DIM)).astype(np.float32)
    position = np.array([13, 8])
    if kind == "decode":
        step = decode(position, tables)
        every_table = tables
    else:
        position = np.array([11, 13])
        step, every_table = prefill(position, tables[0]), tables[[0, 0]]
    sinks = normal(4, seed=8)
    out, lse = attend_with(query, view, step, backend=backend, sinks=sinks, return_lse=True, **options)
    want_out, want_lse = attention_and_lse(
        query,
        slots_of(view.key_pages),
        slots_of(view.value_pages),
        position,
        every_table,
        HEAD_DIM**-0.5,
        options.get("sliding_window"),
        options.get("logits_soft_cap"),
        np.asarray(sinks),
    )
    # float32 sums of some tens of products in other orders, through an exponential
    np.testing.assert_allclose(out, want_out, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=2e-5)


def test_the_last_tokens_and_the_first_are_read_as_they_were_written():
    view, tables = filled("int2+offset+exact5+sink4")
    plain, _ = filled(None)
    got, want = slots_of(view.key_pages), slots_of(plain.key_pages)
    read, written = (pool[:, tables[0]].reshape(HEADS, -1, HEAD_DIM) for pool in (got, want))
    same = (read == written).all(axis=(0, 2))
    assert same[:4].all() and same[14 - 5 : 14].all() and not same[4:8].any()


@pytest.mark.parametrize(
    "spelling", first_short(2, ("int4+exact8", "int8:channel+exact5+sink4", "nvfp4+exact1"))
)
def test_chunks_do_not_matter_to_the_codes(spelling):
    key, table = rows(np.random.default_rng(1), 14), np.array([3, 1, 7, 2])
    held = []
    for cuts in ((0, 14), (0, 3, 9, 14), tuple(range(15))):
        view = make_view(spelling)
        for start, end in itertools.pairwise(cuts):
            padded = np.zeros((14, HEADS, HEAD_DIM), np.float32)
            padded[: end - start] = key[start:end]
            position = np.where(np.arange(14) < end - start, start + np.arange(14), -1)
            view = write_prefill(view, padded, padded, prefill(position, table, end - start))
        held.append((slots_of(view.key_pages), np.asarray(pools.is_exact(view.key_pages, table))))
    for slots, exact in held[1:]:
        np.testing.assert_array_equal(slots, held[0][0])
        np.testing.assert_array_equal(exact, held[0][1])


def test_rejected_drafts_touch_no_scale():
    """Drafts thirty times as loud are written, rejected, and written over by the rows that are kept."""
    key, table = rows(np.random.default_rng(2), 14), np.array([3, 1, 7, 2])
    views = []
    for drafts in (False, True):
        view = make_view("int8+exact8")
        for position in range(14):
            if drafts:
                loud = 30 * rows(np.random.default_rng(position), 3)
                places = np.minimum(position + np.arange(3), 15)
                view = write_prefill(view, loud, loud, prefill(places, table))
            view = write_prefill(view, key[[position]], key[[position]], prefill(np.array([position]), table))
        views.append(view.pack_pages(table, np.array([4, 4, 4, 2])))
    np.testing.assert_array_equal(slots_of(views[0].key_pages), slots_of(views[1].key_pages))


def test_new_tokens_are_read_as_given_before_they_are_written():
    view, tables = filled("int4+exact6")
    query, key, value = (rows(np.random.default_rng(seed), 2) for seed in (3, 4, 5))
    step = decode(np.array([14, 9]), tables)
    out = qpaged.paged_attention(query, view, step, new=(key, value))
    np.testing.assert_allclose(
        out, attend(query, write_decodes(view, key, value, step), step), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("spelling", "text"),
    [
        ("int4+exact0", "tokens must be at least 1, but came as 0"),
        ("plain+exact8", "'plain' is no quantizer"),
        ("int4+exact", "no wrapper is named '+exact'"),
        ("int4+sink4+exact8", "no wrapper is named '+sink4'"),
    ],
)
def test_spellings_that_name_no_format(spelling, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        qpaged.CacheFormat.of(spelling)


def test_spellings():
    format = qpaged.CacheFormat.of("int4+rotate+sink4/int8:token+exact128+sink16")
    assert str(format) == "int4+rotate+exact1+sink4/int8:token+exact128+sink16"
    assert qpaged.CacheFormat.from_config(format.config) == format
    key, value = format.layer(0)
    assert (key.window(16), key.sink_pages(16)) == (1, 1)
    assert (value.window(16), value.sink_pages(16)) == (9, 1)


def test_exact_pages_are_counted():
    counts = {"batch_size": 3, "num_hidden_layers": 2, "max_sequences": 64, "page_size": 4}
    counts |= {"num_kv_heads": 2, "kv_head_dim_size": 32, "hbm_utilization": 0.5}
    metadata = qpaged.PagedAttentionCacheMetaData.create(
        None, **counts, dtype="float32", quantizer="int8+exact8+sink4", memory_bytes=2_000_000
    )
    cache = qpaged.PagedAttentionCache.init_cache(None, "float32", metadata, quantizer="int8+exact8+sink4")
    leaves = jax.tree_util.tree_leaves(cache)
    assert cache.nbytes == sum(leaf.nbytes for leaf in leaves) <= 1_000_000
    page = 2 * 2 * (2 * 4 * 32 + 2 * 4)  # codes of a page, and its scales
    assert cache.nbytes + page > 1_000_000
    assert cache.views[0].key_pages.capacity == 3 * 4
