"""Views with exact pages, filled."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from qpaged import pools
from support.caches import (
    HEAD_DIM,
    HEADS,
    PAGE_SIZE,
    PAGES,
    decode,
    make_view,
    prefill,
    write_decodes,
    write_prefill,
)

NO_PAGE = PAGES


def rows(rng, count):
    return rng.normal(size=(count, HEADS, HEAD_DIM)).astype(np.float32)


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


def slots_of(pages):
    """Return what a pool holds, NumPy [kv_heads, pages, page_size, head_dim]."""
    slots = pools.gather_slots(pages, jnp.arange(PAGES, dtype=jnp.int32))
    slots = slots if isinstance(slots, jax.Array) else slots.materialize()
    return np.asarray(slots).reshape(HEADS, PAGES, PAGE_SIZE, HEAD_DIM)
