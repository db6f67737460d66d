"""Teacher-forced runs of a model through a cache, the way a server does it."""

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qpaged.attention import paged_attention
from qpaged.cache import (
    NarrowFloatPoolWarning,
    PageAllocator,
    PagedAttentionCache,
    PagedAttentionCacheMetaData,
    PagedAttentionMetadata,
)
from qpaged.models import LlamaConfig, Params, forward
from qpaged.sweep._model import Model
from qpaged.sweep._settings import Settings

BACKEND = "xla"

Advance = Callable[[int], None]
"""Called with the number of tokens that were done since the last call."""


def make_cache(
    model: Model, format: Any, dtype: Any, settings: Settings, sequences: int
) -> PagedAttentionCache:
    """A fresh cache that holds exactly ``sequences`` sequences."""
    pages = settings.pages_per_sequence
    metadata = PagedAttentionCacheMetaData(
        batch_size=sequences,
        num_hidden_layers=model.config.num_hidden_layers,
        num_pages_per_layer=sequences * pages,
        num_pages_per_sequence=pages,
        max_sequences=settings.context,
        page_size=settings.page_size,
        num_kv_heads=model.config.num_key_value_heads,
        kv_head_dim_size=model.config.head_dim,
        hbm_utilization=0.9,
    )
    with warnings.catch_warnings():  # whoever sweeps a plain pool asks for its accuracy, not its speed
        warnings.simplefilter("ignore", NarrowFloatPoolWarning)
        return PagedAttentionCache.init_cache(None, dtype, metadata, quantizer=format)


def cached_forward(
    model: Model, cache: PagedAttentionCache, tokens: np.ndarray, settings: Settings, advance: Advance
) -> np.ndarray:
    """Logits (sequences, context, vocabulary) float32 of ``tokens`` (sequences, context), through ``cache``.

    Batch by batch: pages are allocated and reset, each sequence is prefilled in chunks, then all decode
    their last tokens together. What a token attends to has always been through the cache. Donates ``cache``.
    """
    logits = np.empty((*tokens.shape, model.config.vocab_size), np.float32)
    batch = cache.views[0].metadata.batch_size
    allocator = PageAllocator(cache.views[0].metadata)
    for first in range(0, len(tokens), batch):
        rows = range(first, min(first + batch, len(tokens)))
        given = [page for row in rows for page in allocator.allocate(row, settings.context)]
        cache = reset(cache, _padded(np.array(given, np.int32), allocator.metadata.num_pages_per_layer))
        table = allocator.page_table([*rows, *[None] * (batch - len(rows))])
        for row in rows:
            cache = _prefill(model, cache, tokens[row], table[row - first], logits[row], settings, advance)
        held = slice(rows.start, rows.stop)
        cache = _decode(model, cache, tokens[held], table, logits[held], settings, advance)
        for row in rows:
            allocator.free(row)
    return logits


def chunks(tokens: np.ndarray, end: int, size: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """(start, length, padded tokens) of each chunk of ``tokens[:end]``; all padded to one size."""
    size = min(size, end)
    for start in range(0, end, size):
        part = tokens[start : min(start + size, end)]
        yield start, len(part), np.pad(part, (0, size - len(part)))


def _prefill(model, cache, tokens, table, logits, settings: Settings, advance: Advance):
    for start, length, part in chunks(tokens, settings.prefilled, settings.chunk):
        where = np.int32(start), np.int32(length), table
        cache, out = prefill_step(model.params, cache, model.config, part, *where)
        logits[start : start + length] = np.asarray(out)[:length]
        advance(length)
    return cache


def _decode(model, cache, tokens, table, logits, settings: Settings, advance: Advance):
    rows, batch = len(tokens), len(table)
    for index in range(settings.prefilled, settings.context):
        position = np.where(np.arange(batch) < rows, index, -1).astype(np.int32)
        part = np.pad(tokens[:, index], (0, batch - rows))
        cache, out = decode_step(model.params, cache, model.config, part, position, table)
        logits[:, index] = np.asarray(out)[:rows]
        advance(rows)
    return cache


def _padded(pages: np.ndarray, count: int) -> np.ndarray:
    """``pages`` filled up to ``count`` with "no page"."""
    return np.pad(pages, (0, count - len(pages)), constant_values=count)


@functools.partial(jax.jit, donate_argnums=0)
def reset(cache: PagedAttentionCache, pages: jax.Array) -> PagedAttentionCache:
    """The cache with these pages fresh."""
    return cache.reset_pages(pages)


@functools.partial(jax.jit, static_argnums=2, donate_argnums=1)
def prefill_step(
    params: Params, cache: PagedAttentionCache, config: LlamaConfig, tokens, start, length, table
):
    """(cache, logits (chunk, vocabulary)) after one chunk of a sequence that begins at position ``start``."""
    position = start + jnp.arange(len(tokens), dtype=jnp.int32)
    metadata = PagedAttentionMetadata.prefill(position=position, page_table=table, length=length)
    return _step(params, cache, config, tokens, position, metadata)


@functools.partial(jax.jit, static_argnums=2, donate_argnums=1)
def decode_step(params: Params, cache: PagedAttentionCache, config: LlamaConfig, tokens, position, table):
    """(cache, logits (batch, vocabulary)) after one token of each sequence."""
    metadata = PagedAttentionMetadata.decode(position=position, page_table=table)
    return _step(params, cache, config, tokens, position, metadata)


def _step(params, cache, config, tokens, position, metadata):
    views = list(cache.views)

    def attend(layer, query, key, value):
        write = "write_decodes_to_cache" if metadata.is_decode_mode() else "write_prefill_to_cache"
        views[layer] = getattr(views[layer], write)(key, value, metadata)
        return paged_attention(query, views[layer], metadata, backend=BACKEND)

    logits = forward(params, config, tokens, position, attend)
    return cache.replace(views=views), logits.astype(jnp.float32)
