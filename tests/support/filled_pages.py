"""A pool that holds sequences of several lengths, poisoned wherever no token lies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import qpaged
from qpaged.arrays import BlockParts
from support.arrays import normal

PAGES, PAGE_SIZE = 24, 8
LENGTHS = (0, 1, PAGE_SIZE - 1, PAGE_SIZE, 39, 40)  # 0 is an inactive row
PER_SEQUENCE = 5


def tables(rng, page_size, lengths):
    """Each sequence's pages, shuffled over the pool; "no page" past its length."""
    free = rng.permutation(PAGES)
    table = np.full((len(lengths), PER_SEQUENCE), PAGES, np.int32)
    taken = 0
    for row, length in enumerate(lengths):
        count = -(-length // page_size)
        table[row, :count] = free[taken : taken + count]
        taken += count
    return table


def poisoned(pool, table, page_size, lengths):
    """The pool with NaN, or codes and scales that read as NaN, wherever no token lies."""
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
        return pool.like(spoil(pool.codes, np.asarray(np.nan, pool.dtype).view(pool.codes.dtype)), pool.parts)
    code = 0x7F  # a NaN of both fp8 formats, and the largest int8
    global_scale = None if pool.global_scale is None else spoil(pool.global_scale, 254)
    scales = spoil(pool.scales, pool.quantizer.nan_scale)
    return pool.like(spoil(pool.codes, code), BlockParts(scales, global_scale))


@functools.cache
def filled(format, kv_heads, head_dim, page_size=PAGE_SIZE, lengths=LENGTHS):
    """A view that holds sequences of these ``lengths``, and their table."""
    config = qpaged.PagedAttentionCacheMetaData(
        len(lengths), 1, PAGES, PER_SEQUENCE, PER_SEQUENCE * page_size, page_size, kv_heads, head_dim, 0.5
    )
    view = qpaged.PagedAttentionCacheView.init(None, jnp.float32, config, 0, None, format)
    table = tables(np.random.default_rng(0), page_size, lengths)
    write = jax.jit(qpaged.PagedAttentionCacheView.write_prefill_to_cache)
    for row, length in enumerate(lengths):
        key, value = (normal(max(lengths), kv_heads, head_dim, seed=10 * row + i) for i in (1, 2))
        metadata = qpaged.PagedAttentionMetadata.prefill(
            position=np.arange(max(lengths)), page_table=table[row], length=length
        )
        view = write(view, key, value, metadata)
    keys, values = (poisoned(pool, table, page_size, lengths) for pool in (view.key_pages, view.value_pages))
    return view.replace(key_pages=keys, value_pages=values), table


def decode(table, lengths=LENGTHS):
    position = np.array(lengths, np.int32) - 1
    return qpaged.PagedAttentionMetadata.decode(position=position, page_table=table), position, table


def prefill(table, lengths=LENGTHS):
    """The last sequence's last 13 tokens, in 16 places."""
    start = lengths[-1] - 13
    position = np.where(np.arange(16) < 13, start + np.arange(16), -1)
    metadata = qpaged.PagedAttentionMetadata.prefill(
        position=start + np.arange(16), page_table=table[-1], length=13
    )
    return metadata, position, np.broadcast_to(table[-1], (16, PER_SEQUENCE))
