"""Views that hold sequences of several lengths, with NaN wherever no token lies, and steps over them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import qpaged
from qpaged.arrays import BlockParts
from qpaged.testing._pools import with_static_scales
from support.arrays import normal

PAGES, PAGE_SIZE = 24, 8
LENGTHS = (0, 1, PAGE_SIZE - 1, PAGE_SIZE, 39, 40)  # 0 is an inactive row
PER_SEQUENCE = 5  # pages
CHUNK, PADDED_CHUNK = 13, 16  # tokens of a prefill


def shuffled_tables(rng, page_size, lengths):
    """Return the page table of each sequence, its pages shuffled over the pool; "no page" past its length."""
    free_pages = rng.permutation(PAGES)
    table = np.full((len(lengths), PER_SEQUENCE), PAGES, np.int32)
    allocated = 0
    for row, length in enumerate(lengths):
        count = -(-length // page_size)
        table[row, :count] = free_pages[allocated : allocated + count]
        allocated += count
    return table


def poisoned(pool, table, page_size, lengths):
    """Return the pool with NaN, or codes and scales that decode to NaN, wherever no token lies."""
    written = np.zeros((pool.shape[1], page_size), bool)
    for row, length in enumerate(lengths):
        slot = np.arange(length)
        written[table[row, slot // page_size], slot % page_size] = True

    def poison_unwritten(leaf, poison):
        mask = written if leaf.shape[2] == page_size else written.any(axis=1, keepdims=True)
        return jnp.asarray(np.where(mask[None, :, :, None], leaf, np.asarray(poison, leaf.dtype)))

    if not isinstance(pool, qpaged.QuantizedArray):
        return poison_unwritten(pool, np.nan)
    if pool.scales is None:
        nan_code = np.asarray(np.nan, pool.dtype).view(pool.codes.dtype)
        return pool.like(poison_unwritten(pool.codes, nan_code), pool.parts)
    codes = poison_unwritten(pool.codes, 0x7F)  # a NaN of both fp8 formats, and the largest int8
    global_scale = None if pool.global_scale is None else poison_unwritten(pool.global_scale, 254)
    scales = pool.scales
    if not pool.quantizer.has_static_scales:
        scales = poison_unwritten(scales, pool.quantizer.nan_scale)
    return pool.like(codes, BlockParts(scales, global_scale))


@functools.cache
def filled_view(spelling, kv_heads, head_dim, page_size=PAGE_SIZE, lengths=LENGTHS):
    """Return a view that holds sequences of these ``lengths``, and their page tables."""
    config = qpaged.PagedAttentionCacheMetaData(
        len(lengths), 1, PAGES, PER_SEQUENCE, PER_SEQUENCE * page_size, page_size, kv_heads, head_dim, 0.5
    )
    view = qpaged.PagedAttentionCacheView.init(None, jnp.float32, config, 0, None, spelling)
    view = with_static_scales(view)
    table = shuffled_tables(np.random.default_rng(0), page_size, lengths)
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


def decode_step(table, lengths=LENGTHS):
    """Return a decode of every sequence's last token, its positions, and the page table of each token."""
    position = np.array(lengths, np.int32) - 1
    return qpaged.PagedAttentionMetadata.decode(position=position, page_table=table), position, table


def prefill_step(table, lengths=LENGTHS):
    """Return a padded prefill of the last sequence's last tokens, its positions, and their page tables."""
    start = lengths[-1] - CHUNK
    position = start + np.arange(PADDED_CHUNK)
    metadata = qpaged.PagedAttentionMetadata.prefill(position=position, page_table=table[-1], length=CHUNK)
    position = np.where(np.arange(PADDED_CHUNK) < CHUNK, position, -1)
    return metadata, position, np.broadcast_to(table[-1], (PADDED_CHUNK, PER_SEQUENCE))


def combined_step(table, lengths=LENGTHS):
    """Return the prefill and the decode in one step."""
    decode = decode_step(table, lengths)[0]
    return prefill_step(table, lengths)[0].replace(
        decodes_position=decode.decodes_position, decodes_page_table=decode.decodes_page_table
    )


def permute_pages(view, table, num_pages=PAGES):
    """Return the view with its pages in another order, and the page table that finds them there."""
    order = np.random.default_rng(3).permutation(num_pages)
    new_page = np.append(np.argsort(order), num_pages)  # "no page" stays as it is

    def permute(leaf):
        return leaf[:, order] if leaf.shape[1] == num_pages else leaf  # static scales are of all pages

    return jax.tree_util.tree_map(permute, view), new_page[table]
