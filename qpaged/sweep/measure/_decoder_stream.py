"""Feeds tokens through a checkpoint's decoder and its paged cache, as a server does."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jax.typing import ArrayLike

from qpaged.attention import paged_attention
from qpaged.cache import (
    PageAllocator,
    PagedAttentionCache,
    PagedAttentionCacheView,
    PagedAttentionMetadata,
)
from qpaged.models import Attend, AttentionOptions, DecoderConfig
from qpaged.pools import has_exact_pages
from qpaged.sweep.measure._model import Prefilled
from qpaged.sweep.measure._settings import Settings

Hidden = Callable[[ArrayLike, ArrayLike, Attend], jax.Array]
"""hidden(tokens, positions, attend) returns the last hidden states [n, hidden_size]."""


@dataclass(frozen=True)
class Chunk:
    """Tokens of one sequence that are prefilled at once; all chunks of a sequence are padded to one size.

    Attributes:
        start: the position of the first token.
        length: number of tokens without the padding.
        tokens: [size] int32, padded.
    """

    start: int
    length: int
    tokens: np.ndarray

    def metadata(self, table: np.ndarray) -> PagedAttentionMetadata:
        """Return the metadata of a prefill into the pages of ``table``."""
        position = self.start + np.arange(len(self.tokens), dtype=np.int32)
        return PagedAttentionMetadata.prefill(
            position=position, page_table=table, length=np.int32(self.length)
        )


def chunks(tokens: np.ndarray, size: int) -> Iterator[Chunk]:
    """Yield the chunks of a sequence's tokens."""
    size = min(size, len(tokens))
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        yield Chunk(start, len(part), np.pad(part, (0, size - len(part))))


class DecoderStream:
    """A decoder and its paged cache; see :class:`Stream`."""

    def __init__(
        self,
        config: DecoderConfig,
        hidden: Hidden,
        cache: PagedAttentionCache,
        settings: Settings,
        dtype: str,
    ):
        metadata = cache.views[0].metadata
        self.views = list(cache.views)
        self.dtype = dtype
        self.bytes_per_token = cache.nbytes / (metadata.num_pages_per_layer * metadata.page_size)
        self._config = config
        self._hidden = hidden
        self._settings = settings
        self._batch = metadata.batch_size
        # The early queries of a chunk would see more recent rows exact, or packed, than in a decode.
        has_exact = any(has_exact_pages(view.key_pages, view.value_pages) for view in cache.views)
        self._chunk = min(settings.chunk, metadata.page_size) if has_exact else settings.chunk
        self._allocator = PageAllocator(metadata)
        self._sequences = 0

    def begin(self, sequences: int) -> None:
        """Free the pages of the last batch, and allocate and reset those of a new one."""
        for row in range(self._sequences):
            self._allocator.free(row)
        self._sequences = sequences
        pages = []
        for row in range(sequences):
            pages += self._allocator.allocate(row, self._settings.context)
        self.views = [_reset_view(view, pages) for view in self.views]
        inactive = [None] * (self._batch - sequences)
        self.table = self._allocator.page_table([*range(sequences), *inactive])

    def prefill(self, tokens: np.ndarray) -> Iterator[Prefilled]:
        """Feed the beginning of each sequence, [sequences, n], one sequence and chunk after another."""
        for row, sequence in enumerate(tokens):
            for chunk in chunks(sequence, self._chunk):
                metadata = chunk.metadata(self.table[row])
                hidden = self._forward(chunk.tokens, metadata.prefill_position, metadata)
                columns = slice(chunk.start, chunk.start + chunk.length)
                yield Prefilled(slice(row, row + 1), columns, hidden[None, : chunk.length])

    def decode(self, tokens: np.ndarray, position: int) -> jax.Array:
        """Feed one token to each sequence, all at the same position."""
        rows, batch = len(tokens), self._batch
        # Rows without a sequence are inactive, so that every step has the same shapes and compiles once.
        positions = np.where(np.arange(batch) < rows, position, -1).astype(np.int32)
        metadata = PagedAttentionMetadata.decode(position=positions, page_table=self.table)
        padded = np.pad(tokens, (0, batch - rows))
        return self._forward(padded, metadata.decodes_position, metadata)[:rows]

    def attend(
        self,
        layer: int,
        query: jax.Array,  # [tokens, q_heads, head_dim]
        key: jax.Array,  # [tokens, kv_heads, head_dim]
        value: jax.Array,  # [tokens, kv_heads, head_dim]
        metadata: PagedAttentionMetadata,
    ) -> jax.Array:  # [tokens, q_heads, head_dim]
        """Write keys and values of a layer to the cache, and attend to what it holds then."""
        view = self.views[layer].replace(layer_index=0)
        options = self._config.attention(layer)
        written, out = _write_and_attend(view, query, key, value, metadata, options)
        self.views[layer] = written.replace(layer_index=layer)
        return out

    def _forward(
        self, tokens: np.ndarray, position: ArrayLike, metadata: PagedAttentionMetadata
    ) -> jax.Array:
        def attend(layer: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return self.attend(layer, query, key, value, metadata)

        return self._hidden(tokens, position, attend)


# A view's layer index is static. With 0 for all of them, layers of one format share one compilation.


@functools.partial(jax.jit, donate_argnums=0, static_argnames="options")
def _write_and_attend(
    view: PagedAttentionCacheView,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    metadata: PagedAttentionMetadata,
    options: AttentionOptions,
) -> tuple[PagedAttentionCacheView, jax.Array]:
    if metadata.is_decode_mode():
        view = view.write_decodes_to_cache(key, value, metadata)
    else:
        view = view.write_prefill_to_cache(key, value, metadata)
    return view, paged_attention(query, view, metadata, **vars(options))


def _reset_view(view: PagedAttentionCacheView, pages: list[int]) -> PagedAttentionCacheView:
    """Return the view with these pages cleared; the view is donated."""
    count = view.metadata.num_pages_per_layer
    padded = np.full(count, count, np.int32)  # "no page", so that every batch has the same shapes
    padded[: len(pages)] = pages
    return _reset(view.replace(layer_index=0), padded).replace(layer_index=view.layer_index)


@functools.partial(jax.jit, donate_argnums=0)
def _reset(view: PagedAttentionCacheView, pages: jax.Array) -> PagedAttentionCacheView:
    return view.reset_pages(pages)
