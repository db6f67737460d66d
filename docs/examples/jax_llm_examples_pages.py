"""The serving loop of jax-llm-examples on the pages of qpaged, its source untouched.

    cache = pages_of("int8", model.PagedKVCache.init(key, config, batch_size, pages, page_size), config)
    with qpaged_attention():
        loop = ServingLoop(..., AttentionInterface(cache, get_sequence, insert_sequences), ...)

Lengths, block tables and free pages stay its own ``PagedKVCache``'s; keys and values are views of qpaged.
"""

import contextlib
import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, auto_axes
from llama3_jax import model
from serving_jax import attention_cache_utils

import qpaged

REPLICATED = PartitionSpec()
allot = model.PagedKVCache._paged_update_slice
allot_sequences = attention_cache_utils.paged_kvcache_insert_sequences


def pages_of(quantizer, cache, config):
    """Return a paged cache, fresh from ``PagedKVCache.init``, with pages of a format."""
    heads, pages, page_size, head_dim = cache.k[0].shape
    metadata = qpaged.PagedAttentionCacheMetaData(
        batch_size=cache.batch_size,
        num_hidden_layers=len(cache.k),
        num_pages_per_layer=pages,
        num_pages_per_sequence=cache.block_tables.shape[1],
        max_sequences=config.max_seq_len,
        page_size=page_size,
        num_kv_heads=heads,
        kv_head_dim_size=head_dim,
        hbm_utilization=0.9,
    )
    made = qpaged.PagedAttentionCache.init_cache(config.mesh, config.dtype, metadata, quantizer=quantizer)
    return dataclasses.replace(cache, k=made.views, v=[()] * len(made.views))


def without_pages(cache):
    """Return the cache with a page of one byte a slot, for its own code that allots pages."""
    metadata = cache.k[0].metadata
    shape = metadata.num_kv_heads, metadata.num_pages_per_layer, metadata.page_size, 1
    return dataclasses.replace(cache, k=[jnp.zeros(shape, jnp.int8)], v=[jnp.zeros(shape, jnp.int8)])


def replicated(function):
    """Return a function whose results are whole on every device, within a mesh with Explicit axes."""
    return auto_axes(function, out_sharding=REPLICATED)


def update_slice(cache, key_and_value, *, layer_idx):
    """Do what PagedKVCache.update_slice does: write a token of each sequence to a layer's pages."""
    key, value = key_and_value  # [batch, kv_heads, 1, head_dim]

    @replicated
    def write(cache, key, value):
        ours = without_pages(cache)
        token = jnp.zeros((cache.batch_size, *ours.k[0].shape[:1], 1, 1), jnp.int8)
        _, state = allot(ours, (token, token), layer_idx=0)
        view, position, table = cache.k[layer_idx], cache.lengths, state["block_tables"]
        page = jnp.take_along_axis(table, position[:, None] // cache.page_size, axis=1)[:, 0]
        no_page = view.metadata.num_pages_per_layer
        view = view.reset_pages(jnp.where(position % cache.page_size == 0, page, no_page))
        step = qpaged.PagedAttentionMetadata.decode(position=position, page_table=table)
        return view.write_decodes_to_cache(key[:, :, 0], value[:, :, 0], step), state

    view, state = write(cache, key, value)
    return (view, ()), state


def paged_attention_kernel(query, view, _, block_tables, lengths, config):
    """Do what paged_attention_kernel does, for queries [batch, heads, 1, head_dim]."""

    @replicated
    def attend(query, view, block_tables, lengths):
        step = qpaged.PagedAttentionMetadata.decode(position=lengths - 1, page_table=block_tables)
        return qpaged.paged_attention(query[:, :, 0], view, step)[:, :, None]

    return attend(query, view, block_tables, lengths).astype(config.dtype)


def insert_sequences(cache, entries, rows, lengths, erase=False):
    """Do what paged_kvcache_insert_sequences does: write sequences [layers, kv_heads, tokens, head_dim]."""
    if not entries:
        return cache
    ours = without_pages(cache)
    slots = [tuple(part[:1, :, :, :1].astype(jnp.int8) for part in entry) for entry in entries]
    state = allot_sequences(ours, slots, list(rows), list(lengths))
    views = list(cache.k)
    for (keys, values), row, length in zip(entries, rows, lengths, strict=True):
        for layer, view in enumerate(views):
            views[layer] = insert(view, keys[layer], values[layer], state.block_tables[row], length)
    tables = {name: getattr(state, name) for name in ("lengths", "block_tables", "free_pages")}
    return dataclasses.replace(cache, k=views, **tables)


@functools.partial(jax.jit, donate_argnums=0)
@replicated
def insert(view, key, value, table, length):
    """Write a sequence to fresh pages of a layer."""
    pages = jnp.arange(len(table)) * view.metadata.page_size < length
    view = view.reset_pages(jnp.where(pages, table, view.metadata.num_pages_per_layer))
    position = jnp.arange(key.shape[1])
    step = qpaged.PagedAttentionMetadata.prefill(
        position=jnp.where(position < length, position, -1), page_table=table
    )
    return view.write_prefill_to_cache(key.swapaxes(0, 1), value.swapaxes(0, 1), step)


def get_sequence(cache, row):
    """Refuse: sequences of quantized pages are not given to the loop's own prefix cache."""
    raise NotImplementedError("give the ServingConfig use_prefix_cache=False")


@contextlib.contextmanager
def qpaged_attention():
    """Let the model read and write paged caches by qpaged."""
    with (
        mock.patch.object(model.PagedKVCache, "update_slice", staticmethod(update_slice)),
        mock.patch.object(model, "paged_attention_kernel", paged_attention_kernel),
    ):
        yield
