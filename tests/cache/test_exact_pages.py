"""Pools with exact pages, against a plain Python model of their rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.caches import (
    BATCH,
    HEAD_DIM,
    HEADS,
    PAGE_SIZE,
    PAGES,
    SEQUENCE_PAGES,
    decode,
    make_view,
    prefill,
    reset,
    write_decodes,
    write_prefill,
)
from support.exact_pages import rows
from support.long import first_short

import qpaged
from qpaged import pools

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
        for table, numbers in newest.items():
            for place, page in enumerate(table):
                if not 0 <= page < PAGES:
                    continue
                if place >= self.sinks and place <= max(numbers) - self.window:
                    behind.add(page)
        leaving = [page for page in self.exact if page in behind]
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
        for page, written_rows in rows_of.items():
            if page in self.exact:
                for slot, row in written_rows:
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


@pytest.mark.short(2)
@pytest.mark.parametrize("seed", first_short(1, range(3)))
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


@pytest.mark.short(1)
@pytest.mark.parametrize("spelling", ["int8+exact5", "int4:channel+offset+exact5+sink1", "int8:token+exact1"])
def test_two_sequences_leave_a_page_that_they_share_in_one_step(spelling):
    rng = np.random.default_rng(0)
    view = make_view(spelling)
    model = Model(spelling, view.key_pages.capacity)
    tables = np.array([[3, 1, 7, 2], [3, 1, 4, 9]])  # a fork after two pages
    key = rows(rng, 8)
    view = write_prefill(view, key, key, prefill(np.arange(8), tables[0]))
    model.write([(tables[0], position, row) for position, row in enumerate(key)])
    for position in range(8, 16):
        key = rows(rng, BATCH)
        view = write_decodes(view, key, key, decode(np.full(BATCH, position), tables))
        model.write([(table, position, row) for table, row in zip(tables, key, strict=True)])
        assert_holds(view, model)
        exact = np.asarray(view.key_pages.page)
        exact = exact[exact < PAGES]
        assert len(set(exact.tolist())) == len(exact)
