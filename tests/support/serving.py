"""A small engine that serves random requests, and what each of its answers must be.

Allocator, cache and attention work together: prompts that share prefixes, decodes, drafts, forks, rewinds,
swaps and evictions. Beside them every sequence is a plain list of tokens. The row of a token depends on all
tokens before it, as a model's does, so that a row of another sequence, a stale one or one that is missing
changes the answer. Pages that hold nothing are poisoned.
"""

import functools
import random
import zlib
from collections import Counter
from dataclasses import dataclass, field

import jax
import numpy as np

import qpaged
from support.caches import config, narrow_floats_allowed

ROWS, PAGES, PAGE_SIZE, SEQUENCE_PAGES = 4, 18, 4, 6
WINDOW = 6
LONGEST = PAGE_SIZE * SEQUENCE_PAGES
KV_HEADS, QUERY_HEADS, HEAD_DIM = 1, 2, 16
TOKENS_AT_ONCE = 16
POISON = 1e4
KINDS = 1024  # of rows
ROOT = 1

_random = np.random.default_rng(7)
KEYS, VALUES = _random.uniform(-1, 1, (2, KINDS, KV_HEADS, HEAD_DIM)).astype(np.float32)
QUERIES = _random.uniform(-1, 1, (ROWS, QUERY_HEADS, HEAD_DIM)).astype(np.float32)

TOLERANCE = {None: 1e-5, "raw": 1e-5, "int8": 0.02, "int8:token": 0.02, "int8:channel": 0.02}
# Half a step of values up to 1 is at most 1/128 with 8 bits, and keys that are off move the weights besides.
COARSE = 0.3  # for fewer bits: it tells poison, but not each row of ordinary size, which the others do


@dataclass
class Request:
    """What a sequence holds: a chain of hashes, one for each token, whose rows they choose."""

    tokens: list[int] = field(default_factory=list)
    chain: list[int] = field(default_factory=list)
    released: int = 0  # pages

    def add(self, token):
        self.tokens.append(token)
        self.chain.append(zlib.crc32(bytes([token]), self.chain[-1] if self.chain else ROOT))

    def cut(self, length):
        del self.tokens[length:], self.chain[length:]

    def copy(self, length):
        return Request(self.tokens[:length], self.chain[:length], self.released)

    def rows(self, first=0):
        kinds = [link % KINDS for link in self.chain[first:]]
        return KEYS[kinds], VALUES[kinds]


class Serving:
    """Serves requests on a cache of one format; raises AssertionError where an answer is wrong.

    Args:
        format: the spelling of a format, or None.
        window: the sliding window of attention; tokens before it are released.
    """

    def __init__(self, format=None, window=None):
        self.metadata = config(
            batch_size=ROWS,
            num_hidden_layers=1,
            num_pages_per_layer=PAGES,
            num_pages_per_sequence=SEQUENCE_PAGES,
            max_sequences=LONGEST,
            page_size=PAGE_SIZE,
            num_kv_heads=KV_HEADS,
            kv_head_dim_size=HEAD_DIM,
        )
        with narrow_floats_allowed():
            cache = qpaged.PagedAttentionCache.init_cache(None, np.float32, self.metadata, None, format)
        self.cache = cache
        self.allocator = qpaged.PageAllocator(self.metadata)
        self.tolerance = TOLERANCE.get(format, COARSE)
        self.window = window
        self.names = [None] * ROWS
        self.requests = {}
        self.table = np.full((ROWS, SEQUENCE_PAGES), PAGES, np.int32)
        self.swapped = {}  # by name: the pages on the host
        self.unreleased = []
        self.next_name = 0
        self.done = Counter()

    # What an engine does. Each takes a random.Random, which makes its choices.

    def start(self, choose):
        """Serve a new prompt, which may begin as others do."""
        rows = [row for row, name in enumerate(self.names) if name is None]
        if not rows:
            return
        name, self.next_name = self.next_name, self.next_name + 1
        length = choose.randrange(1, LONGEST - PAGE_SIZE)
        family = choose.randrange(3)
        prompt = [family if choose.random() < 0.97 else choose.randrange(256) for _ in range(length)]
        found = self.allocator.match_prefix(name, prompt)
        assert found % PAGE_SIZE == 0
        assert found < length
        self.done["tokens found"] += found
        row = choose.choice(rows)
        self.names[row] = name
        self.requests[name] = Request()
        for token in prompt[:found]:
            self.requests[name].add(token)
        self.table[row] = self.allocator.page_table([name])[0]
        if not self._extend({name: prompt[found:]}):
            self._end(name)
            return
        if choose.random() < 0.8:
            self.allocator.share_prefix(name, prompt)
            self.done["prefixes shared"] += 1

    def decode(self, choose):
        """Give every sequence in a row one token more."""
        self._extend({name: [choose.randrange(256)] for name in self._present() if self._room(name)})
        self.done["decodes"] += 1

    def draft(self, choose):
        """Write some drafts of a sequence, and reject some of them."""
        name = self._some(choose)
        if name is None or not self._room(name):
            return
        count = choose.randrange(1, self._room(name) + 1)
        before = len(self.requests[name].tokens)
        if self._extend({name: [choose.randrange(256) for _ in range(count)]}):
            self._rewind(name, before + choose.randrange(count + 1))

    def rewind(self, choose):
        """Take a sequence back to where it was."""
        name = self._some(choose)
        if name is not None:
            least = self.requests[name].released * PAGE_SIZE
            self._rewind(name, choose.randrange(least, len(self.requests[name].tokens) + 1))

    def fork(self, choose):
        """Let a sequence go on twice, perhaps from an earlier token."""
        source = self._some(choose)
        rows = [row for row, name in enumerate(self.names) if name is None]
        if source is None or not rows:
            return
        request = self.requests[source]
        length = choose.choice(
            [None, choose.randrange(request.released * PAGE_SIZE, len(request.tokens) + 1)]
        )
        target, self.next_name = self.next_name, self.next_name + 1
        self.allocator.fork(source, target, length)
        self.requests[target] = request.copy(len(request.tokens) if length is None else length)
        row = choose.choice(rows)
        self.names[row] = target
        self.table[row] = self.allocator.page_table([target])[0]
        self.done["forks"] += 1

    def share(self, choose):
        """Let the tokens of a sequence be found, those that it decoded as well."""
        name = self._some(choose)
        if name is not None:
            self._apply()
            self.allocator.share_prefix(name, self.requests[name].tokens)

    def end(self, choose):
        """Free a sequence, present or swapped out."""
        names = list(self.requests)
        if names:
            self._end(choose.choice(names))
            self.done["frees"] += 1

    def swap_out(self, choose):
        """Send a sequence to the host; its pages are released at some later time."""
        name = self._some(choose)
        if name is None:
            return
        pages = self.allocator.swap_out(name)
        self._apply()
        self.swapped[name] = jax.device_get(_take(self.cache, pages))
        self.unreleased.append(pages)
        self._leave_row(name)
        self.done["swaps"] += 1

    def release(self, choose):
        """Give back the pages of a swap."""
        if self.unreleased:
            pages = self.unreleased.pop(choose.randrange(len(self.unreleased)))
            self._poison(self.allocator.release(pages))

    def swap_in(self, choose):
        """Bring a sequence back from the host."""
        rows = [row for row, name in enumerate(self.names) if name is None]
        if not self.swapped or not rows:
            return
        name = choose.choice(list(self.swapped))
        before = self.allocator.counts()
        try:
            pages = self.allocator.swap_in(name)
        except qpaged.AllocationError:
            assert self.allocator.counts() == before
            return
        self._apply()
        self.cache = _put(self.cache, pages, self.swapped.pop(name))
        row = choose.choice(rows)
        self.names[row] = name
        self.table[row] = self.allocator.page_table([name])[0]

    def release_prefix(self, choose):
        """Give back the pages that the window has left."""
        if self.window is None:
            return
        lengths = [0 if name is None else len(self.requests[name].tokens) for name in self.names]
        positions = [max(length + 1 - self.window, 0) for length in lengths]
        updates = self.allocator.release_prefix(self.names, positions)
        self._update(updates)
        for name, position in zip(self.names, positions, strict=True):
            if name is not None:
                request = self.requests[name]
                request.released = max(request.released, position // PAGE_SIZE)
        self.done["pages released"] += int((updates.row < ROWS).sum())

    def ask_too_much(self, choose):
        """Ask for what cannot be had; nothing may change."""
        tables, counts = self.allocator.page_table(self.names), self.allocator.counts()
        present = self._present()
        with _refused():
            self.allocator.allocate("long", LONGEST + 1)
        with _refused():
            self.allocator.extend([*present, "nobody"], [LONGEST] * (len(present) + 1))
        if present:
            with _refused():
                self.allocator.truncate(present[0], len(self.requests[present[0]].tokens) + 1)
            with _refused():
                self.allocator.fork(present[0], present[-1])
        assert (self.allocator.page_table(self.names) == tables).all()
        assert self.allocator.counts() == counts

    # What must hold.

    def check(self):
        """Compare the attention of all sequences, and what the allocator says, with the requests."""
        assert (self.allocator.page_table(self.names) == self.table).all()
        self._check_counts()
        self._apply()
        position = [-1 if name is None else len(self.requests[name].tokens) - 1 for name in self.names]
        metadata = qpaged.PagedAttentionMetadata.decode(
            position=np.asarray(position, np.int32), page_table=self.table.copy()
        )
        out = np.asarray(_attend(self.cache, metadata, self.window))
        for row, name in enumerate(self.names):
            if name is None or position[row] < 0:
                continue
            request = self.requests[name]
            first = max(0, position[row] + 1 - self.window) if self.window else 0
            if first < request.released * PAGE_SIZE:
                continue  # a rewound sequence, whose window begins among pages that it released
            error = np.abs(out[row] - _answer(row, *request.rows(first))).max()
            assert error <= self.tolerance, f"row {row}, sequence {name}: off by {error}"
        self.done["answers"] += sum(place >= 0 for place in position)

    def _check_counts(self):
        counts = self.allocator.counts()
        assert counts.free + counts.parked + counts.held == PAGES
        assert counts.free + counts.parked == self.allocator.num_free
        held = self.table[self.table < PAGES]
        assert len(set(held.tolist())) <= counts.held
        for name in self._present():
            assert self.allocator.length(name) == len(self.requests[name].tokens)

    # How it is done.

    def _present(self):
        return [name for name in self.names if name is not None]

    def _some(self, choose):
        return choose.choice(self._present()) if self._present() else None

    def _room(self, name):
        return LONGEST - len(self.requests[name].tokens)

    def _extend(self, new):
        """Write new tokens of some sequences; return False if there are too few pages."""
        names = [name if name in new else None for name in self.names]
        lengths = [0 if name is None else len(self.requests[name].tokens) + len(new[name]) for name in names]
        before = self.allocator.counts()
        try:
            updates = self.allocator.extend(names, lengths)
        except qpaged.AllocationError:
            assert self.allocator.counts() == before
            return False
        self._update(updates)
        for row, name in enumerate(names):
            if name is None:
                continue
            request = self.requests[name]
            start = len(request.tokens)
            for token in new[name]:
                request.add(token)
            if len(new[name]) > 1:
                self._write(row, start, *request.rows(start))
                del names[row : row + 1], new[name]
                names.insert(row, None)
        rows = [row for row, name in enumerate(names) if name is not None]
        if rows:
            self._write_one_each(rows)
        return True

    def _write(self, row, start, keys, values):
        """Write tokens of one sequence, some at a time."""
        for first in range(0, len(keys), TOKENS_AT_ONCE):
            part = slice(first, first + TOKENS_AT_ONCE)
            self._write_rows([row] * len(keys[part]), range(start + first, LONGEST), keys[part], values[part])

    def _write_one_each(self, rows):
        requests = [self.requests[self.names[row]] for row in rows]
        parts = [request.rows(len(request.tokens) - 1) for request in requests]
        keys, values = (np.concatenate(part) for part in zip(*parts, strict=True))
        self._write_rows(rows, [len(request.tokens) - 1 for request in requests], keys, values)

    def _write_rows(self, rows, positions, keys, values, table=None):
        """Write a token to each of some rows of the table, in order, after the changes that are pending."""
        position = np.full(TOKENS_AT_ONCE, -1, np.int32)
        position[: len(rows)] = list(positions)[: len(rows)]
        metadata = qpaged.PagedAttentionMetadata.ragged(
            position=position,
            page_tables=(self.table if table is None else table).copy(),
            starts=np.searchsorted(rows, np.arange(ROWS + 1)).astype(np.int32),
        )
        padding = ((0, TOKENS_AT_ONCE - len(rows)), (0, 0), (0, 0))
        self._apply()
        self.cache = _write(self.cache, np.pad(keys, padding), np.pad(values, padding), metadata)

    def _apply(self):
        changes = self.allocator.take_changes()
        self.done["evictions"] += len(changes.evicted)
        self.done["copies"] += int((changes.target < PAGES).sum())
        if changes:
            self.cache = _change(self.cache, changes)

    def _update(self, updates):
        inside = updates.row < ROWS
        self.table[updates.row[inside], updates.column[inside]] = updates.page[inside]

    def _rewind(self, name, length):
        freed = self.allocator.truncate(name, length)
        self.requests[name].cut(length)
        row = self.names.index(name)
        self.table[row, -(-length // PAGE_SIZE) :] = PAGES
        self._poison(freed)
        self.done["rewinds"] += 1

    def _end(self, name):
        freed = self.allocator.free(name)
        if name in self.names:
            self._leave_row(name)
        self.swapped.pop(name, None)
        del self.requests[name]
        self._poison(freed)

    def _leave_row(self, name):
        row = self.names.index(name)
        self.names[row] = None
        self.table[row] = PAGES

    def _poison(self, pages):
        """Fill pages that hold nothing with rows that any answer would show."""
        for first in range(0, len(pages), SEQUENCE_PAGES):
            table = np.full_like(self.table, PAGES)
            part = pages[first : first + SEQUENCE_PAGES]
            table[0, : len(part)] = part
            for start in range(0, len(part) * PAGE_SIZE, TOKENS_AT_ONCE):
                count = min(TOKENS_AT_ONCE, len(part) * PAGE_SIZE - start)
                rows = np.full((count, KV_HEADS, HEAD_DIM), POISON, np.float32)
                self._write_rows([0] * count, range(start, start + count), rows, rows, table)


OPERATIONS = {
    "start": 6,
    "decode": 8,
    "draft": 3,
    "rewind": 1,
    "fork": 3,
    "share": 1,
    "end": 2,
    "swap_out": 1,
    "release": 2,
    "swap_in": 2,
    "release_prefix": 1,
    "ask_too_much": 1,
}
"""How often each is done."""


def serve(serving, seed, steps):
    """Serve random requests for so many steps, and check the answers after most: changes may wait."""
    choose = random.Random(seed)
    operations, weights = zip(*OPERATIONS.items(), strict=True)
    for step in range(steps):
        operation = choose.choices(operations, weights)[0]
        try:
            getattr(serving, operation)(choose)
            if choose.random() < 0.7:
                serving.check()
        except Exception as error:
            error.add_note(f"at step {step} ({operation}) of seed {seed}")
            raise


class _refused:
    """Expects AllocationError; lighter than pytest.raises, in a loop of a million steps."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        assert kind is not None, "nothing was refused"
        return issubclass(kind, qpaged.AllocationError)


def _answer(row, keys, values):
    """Return the attention [QUERY_HEADS, HEAD_DIM] of a row's query to rows [tokens, KV_HEADS, HEAD_DIM]."""
    scores = QUERIES[row].astype(np.float64) @ keys[:, 0].astype(np.float64).T / HEAD_DIM**0.5
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ values[:, 0]


@functools.partial(jax.jit, donate_argnums=0)
def _write(cache, keys, values, metadata):
    return cache.replace(views=[view.write_to_cache(keys, values, metadata) for view in cache.views])


@functools.partial(jax.jit, static_argnums=2)
def _attend(cache, metadata, window):
    return qpaged.paged_attention(QUERIES, cache.views[0], metadata, sliding_window=window)


@functools.partial(jax.jit, donate_argnums=0)
def _change(cache, changes):
    return cache.apply_changes(changes)


@jax.jit
def _take(cache, pages):
    return cache.take_pages(pages)


@functools.partial(jax.jit, donate_argnums=0)
def _put(cache, pages, taken):
    return cache.put_pages(pages, taken)
