"""Teacher-forced runs of a model through a cache, the way a server does it."""

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from qpaged.attention import paged_attention
from qpaged.cache import (
    NarrowFloatPoolWarning,
    PageAllocator,
    PagedAttentionCache,
    PagedAttentionCacheMetaData,
    PagedAttentionCacheView,
    PagedAttentionMetadata,
)
from qpaged.models import forward
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
        cache = reset(cache, given)
        table = allocator.page_table([*rows, *[None] * (batch - len(rows))])
        for row in rows:
            cache = _prefill(model, cache, tokens[row], table[row - first], logits[row], settings, advance)
        held = slice(rows.start, rows.stop)
        cache = _decode(model, cache, tokens[held], table, logits[held], settings, advance)
        for row in rows:
            allocator.free(row)
    return logits


@dataclass(frozen=True)
class Chunk:
    """Tokens of one sequence that are prefilled at once: all chunks of a sequence are padded to one size."""

    start: int
    length: int
    tokens: np.ndarray

    def metadata(self, table: np.ndarray) -> PagedAttentionMetadata:
        """Of its prefill into the pages of ``table``."""
        position = self.start + np.arange(len(self.tokens), dtype=np.int32)
        return PagedAttentionMetadata.prefill(
            position=position, page_table=table, length=np.int32(self.length)
        )


def chunks(tokens: np.ndarray, end: int, size: int) -> Iterator[Chunk]:
    """The chunks of ``tokens[:end]``."""
    size = min(size, end)
    for start in range(0, end, size):
        part = tokens[start : min(start + size, end)]
        yield Chunk(start, len(part), np.pad(part, (0, size - len(part))))


def _prefill(model, cache, tokens, table, logits, settings: Settings, advance: Advance):
    for chunk in chunks(tokens, settings.prefilled, settings.chunk):
        metadata = chunk.metadata(table)
        cache, out = step(model, cache, chunk.tokens, metadata.prefill_position, metadata)
        logits[chunk.start : chunk.start + chunk.length] = np.asarray(out)[: chunk.length]
        advance(chunk.length)
    return cache


def _decode(model, cache, tokens, table, logits, settings: Settings, advance: Advance):
    rows, batch = len(tokens), len(table)
    for index in range(settings.prefilled, settings.context):
        position = np.where(np.arange(batch) < rows, index, -1).astype(np.int32)
        metadata = PagedAttentionMetadata.decode(position=position, page_table=table)
        part = np.pad(tokens[:, index], (0, batch - rows))
        cache, out = step(model, cache, part, metadata.decodes_position, metadata)
        logits[:, index] = np.asarray(out)[:rows]
        advance(rows)
    return cache


def step(
    model: Model, cache: PagedAttentionCache, tokens: Any, position: Any, metadata: PagedAttentionMetadata
) -> tuple[PagedAttentionCache, jax.Array]:
    """(cache, logits (n, vocabulary)) after ``tokens`` (n,) int32 of a prefill or a decode.

    The model runs operation by operation and only a layer's cache is compiled, once for all layers of a
    format: compiling the whole model for each format would take most of a sweep's time.
    """
    views = list(cache.views)

    def attend(layer, query, key, value):
        views[layer], out = through_cache(views[layer], query, key, value, metadata)
        return out

    logits = forward(model.params, model.config, jnp.asarray(tokens), position, attend)
    return cache.replace(views=views), logits


def through_cache(
    view: PagedAttentionCacheView, query: Any, key: Any, value: Any, metadata: PagedAttentionMetadata
) -> tuple[PagedAttentionCacheView, jax.Array]:
    """(view, attention's output) after keys and values were written; donates ``view``."""
    written, out = _write_and_attend(view.replace(layer_index=0), query, key, value, metadata)
    return written.replace(layer_index=view.layer_index), out


def reset(cache: PagedAttentionCache, pages: ArrayLike) -> PagedAttentionCache:
    """The cache with these pages fresh; donates it."""
    return cache.replace(views=[reset_view(view, pages) for view in cache.views])


def reset_view(view: PagedAttentionCacheView, pages: ArrayLike) -> PagedAttentionCacheView:
    """The view with these pages fresh; donates it."""
    count = view.metadata.num_pages_per_layer
    padded = np.full(count, count, np.int32)  # "no page", so that every batch has the same shapes
    padded[: np.size(pages)] = pages
    return _reset(view.replace(layer_index=0), padded).replace(layer_index=view.layer_index)


# The layer's index is static: at 0 for all, layers of one format share one compilation.


@functools.partial(jax.jit, donate_argnums=0)
def _write_and_attend(view: PagedAttentionCacheView, query, key, value, metadata):
    write = view.write_decodes_to_cache if metadata.is_decode_mode() else view.write_prefill_to_cache
    view = write(key, value, metadata)
    return view, paged_attention(query, view, metadata, backend=BACKEND)


@functools.partial(jax.jit, donate_argnums=0)
def _reset(view: PagedAttentionCacheView, pages: jax.Array) -> PagedAttentionCacheView:
    return view.reset_pages(pages)
