"""Pools that hold sequences of several lengths, with NaN wherever no token lies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import qpaged
from support.arrays import normal

PAGES, PAGE_SIZE = 24, 8
LENGTHS = (0, 1, PAGE_SIZE - 1, PAGE_SIZE, 39, 40)  # 0 is an inactive row
PER_SEQUENCE = 5


def tables(rng, page_size, lengths):
    """Return page tables over a shuffled pool, with "no page" past each sequence's length."""
    free = rng.permutation(PAGES)
    table = np.full((len(lengths), PER_SEQUENCE), PAGES, np.int32)
    used = 0
    for row, length in enumerate(lengths):
        count = -(-length // page_size)
        table[row, :count] = free[used : used + count]
        used += count
    return table


def poisoned(pool, table, page_size, lengths):
    """Return the pool with NaN, or codes and scales that read as NaN, wherever no token lies."""
    used = np.zeros((pool.shape[1], page_size), bool)
    for row, length in enumerate(lengths):
        slot = np.arange(length)
        used[table[row, slot // page_size], slot % page_size] = True

    def spoil(leaf, poison):
        kept = used if leaf.shape[2] == page_size else used.any(axis=1, keepdims=True)
        return jnp.asarray(np.where(kept[None, :, :, None], leaf, np.asarray(poison, leaf.dtype)))

    if not isinstance(pool, qpaged.QuantizedArray):
        return spoil(pool, np.nan)
    if pool.scales is None:
        return pool.like(spoil(pool.codes, np.asarray(np.nan, pool.dtype).view(pool.codes.dtype)), None)
    code = 0x7F  # a NaN of both fp8 formats, and the largest int8
    outer = None if pool.outer is None else spoil(pool.outer, 254)
    scales = spoil(pool.scales, pool.quantizer.past_end)
    return pool.like(spoil(pool.codes, code), scales, None, outer)


@functools.cache
def filled(format, kv_heads, head_dim, page_size=PAGE_SIZE, lengths=LENGTHS):
    """Return a view that holds sequences of these ``lengths``, and their page table."""
    config = qpaged.PagedAttentionCacheMetaData(
        len(lengths), 1, PAGES, PER_SEQUENCE, PER_SEQUENCE * page_size, page_size, kv_heads, head_dim, 0.5
    )
    view = qpaged.PagedAttentionCacheView.init(None, jnp.float32, config, 0, None, format)
    table = tables(np.random.default_rng(0), page_size, lengths)
    write = jax.jit(qpaged.PagedAttentionCacheView.write_prefill_to_cache)
    for row, length in enumerate(lengths):
        key = normal(max(lengths), kv_heads, head_dim, seed=10 * row + 1)
        value = normal(max(lengths), kv_heads, head_dim, seed=10 * row + 2)
        metadata = qpaged.PagedAttentionMetadata.prefill(
            position=np.arange(max(lengths)), page_table=table[row], length=length
        )
        view = write(view, key, value, metadata)
    keys = poisoned(view.key_pages, table, page_size, lengths)
    values = poisoned(view.value_pages, table, page_size, lengths)
    return view.replace(key_pages=keys, value_pages=values), table


def decode(table, lengths=LENGTHS):
    """Return the metadata of a decode step at each last token, its positions and its table."""
    position = np.array(lengths, np.int32) - 1
    return qpaged.PagedAttentionMetadata.decode(position=position, page_table=table), position, table


def prefill(table, lengths=LENGTHS):
    """Return the metadata of a prefill of the last sequence's last 13 tokens, padded to 16 rows."""
    start = lengths[-1] - 13
    position = np.where(np.arange(16) < 13, start + np.arange(16), -1)
    metadata = qpaged.PagedAttentionMetadata.prefill(
        position=start + np.arange(16), page_table=table[-1], length=13
    )
    return metadata, position, np.broadcast_to(table[-1], (16, PER_SEQUENCE))
