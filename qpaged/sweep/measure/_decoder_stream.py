"""Feeds tokens through a checkpoint's decoder and its paged cache, as a server does."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
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
from qpaged.sweep.measure._model import Prefilled, RaggedPart
from qpaged.sweep.measure._settings import Settings

Hidden = Callable[[ArrayLike, ArrayLike, Attend], jax.Array]
"""hidden(tokens, positions, attend) returns the last hidden states [n, hidden_size]."""


@dataclass(frozen=True)
class Chunk:
    """The same part of each sequence, which are prefilled together.

    Attributes:
        start: the position of the first token.
        tokens: [sequences, length] int32.
        size: the largest length, to which chunks are padded so that they share a compilation.
    """

    start: int
    tokens: np.ndarray
    size: int

    @property
    def columns(self) -> slice:
        """Where the chunk is in its sequences."""
        return slice(self.start, self.start + self.tokens.shape[1])

    def flat_tokens(self, batch: int) -> np.ndarray:
        """Return [batch * size] int32, the tokens of one sequence after another, padded."""
        return np.pad(self.tokens.reshape(-1), (0, batch * self.size - self.tokens.size))

    def metadata(self, table: np.ndarray) -> PagedAttentionMetadata:
        """Return the metadata of a prefill of all sequences, into the pages of ``table`` [batch, pages]."""
        batch, (rows, length) = len(table), self.tokens.shape
        position = np.tile(np.arange(self.start, self.start + length, dtype=np.int32), rows)
        return PagedAttentionMetadata.ragged(
            position=np.pad(position, (0, batch * self.size - len(position)), constant_values=-1),
            page_tables=table,
            starts=length * np.minimum(np.arange(batch + 1, dtype=np.int32), rows),
        )


def chunks(tokens: np.ndarray, size: int) -> Iterator[Chunk]:
    """Yield the chunks of sequences [sequences, n]."""
    size = min(size, tokens.shape[1])
    for start in range(0, tokens.shape[1], size):
        yield Chunk(start, tokens[:, start : start + size], size)


class DecoderStream:
    """A decoder and its paged cache; see :class:`Stream`.

    Args:
        hidden: runs the model over some tokens.
        cache: fresh; of ShapeDtypeStructs for a stream that only compiles.
        bytes_per_token: see :class:`Stream`.
        dtype: the name of the cache's logical dtype.
        compute: that of the dtype in which ``hidden`` computes.
    """

    def __init__(
        self,
        config: DecoderConfig,
        hidden: Hidden,
        cache: PagedAttentionCache,
        settings: Settings,
        bytes_per_token: float,
        dtype: str,
        compute: str,
    ):
        self.views = list(cache.views)
        self.bytes_per_token = bytes_per_token
        self.dtype = dtype
        self._compute = compute
        self._config = config
        self._hidden = hidden
        self._settings = settings
        metadata = cache.views[0].metadata
        self._batch = metadata.batch_size
        # The early queries of a chunk would see more recent rows exact, or packed, than in a decode.
        has_exact = any(has_exact_pages(view.key_pages, view.value_pages) for view in cache.views)
        self.chunk = min(settings.chunk, metadata.page_size) if has_exact else settings.chunk

    def begin(self, sequences: int) -> None:
        """Reset all pages, and allocate those of a new batch: the same ones in every stream."""
        allocator = PageAllocator(self.views[0].metadata)
        for row in range(sequences):
            allocator.allocate(row, self._settings.context)
        self.views = [
            _reset(view.replace(layer_index=0)).replace(layer_index=view.layer_index) for view in self.views
        ]
        inactive = [None] * (self._batch - sequences)
        self.table = allocator.page_table([*range(sequences), *inactive])

    def compile(self) -> None:
        """Compile what a batch runs, once for all layers that are alike."""
        config, first = self._config, self.views[0].metadata
        table = np.zeros((self._batch, first.num_pages_per_sequence), np.int32)
        size = min(self.chunk, self._settings.prefilled)
        chunk = Chunk(0, np.zeros((self._batch, size), np.int32), size)
        steps = [(self._batch * size, chunk.metadata(table))]
        if self._settings.decoded or self._settings.prompts:
            decode = PagedAttentionMetadata.decode(position=table[:, 0], page_table=table)
            steps.append((self._batch, decode))
        views = [view.replace(layer_index=0) for view in self.views]
        kinds = set()
        for layer, view in enumerate(views):
            kind = (
                tuple(jax.tree_util.tree_leaves(view)),
                jax.tree_util.tree_structure(view),
                config.attention(layer),
            )
            if kind in kinds:
                continue
            kinds.add(kind)
            _reset.lower(view).compile()
            for tokens, metadata in steps:
                query, key = (
                    jax.ShapeDtypeStruct((tokens, heads, config.head_dim), self._compute)
                    for heads in (config.num_attention_heads, config.num_key_value_heads)
                )
                _write_and_attend.lower(view, query, key, key, metadata, config.attention(layer)).compile()

    def prefill(self, tokens: np.ndarray) -> Iterator[Prefilled]:
        """Feed the beginning of all sequences, [sequences, n], chunk by chunk."""
        for chunk in chunks(tokens, self.chunk):
            metadata = chunk.metadata(self.table)
            hidden = self._forward(chunk.flat_tokens(self._batch), metadata.ragged_position, metadata)
            outputs = hidden[: chunk.tokens.size].reshape(*chunk.tokens.shape, -1)
            yield Prefilled(slice(0, len(tokens)), chunk.columns, outputs)

    def prefill_ragged(self, sequences: Sequence[np.ndarray]) -> Iterator[RaggedPart]:
        """Feed sequences of any lengths, [n] int32 each, some tokens of all of them at a step."""
        size, longest = self.chunk, max(map(len, sequences))
        for start in range(0, longest, size):
            parts = [tokens[start : start + size] for tokens in sequences]
            lengths = [len(part) for part in parts]
            row = np.repeat(np.arange(len(parts)), lengths)
            position = np.concatenate([start + np.arange(length, dtype=np.int32) for length in lengths])
            room = (0, self._batch * size - len(row))  # so that every step has the same shapes
            starts = np.cumsum([0, *lengths, *[0] * (self._batch - len(parts))], dtype=np.int32)
            row, position = (np.pad(of_tokens, room, constant_values=-1) for of_tokens in (row, position))
            metadata = PagedAttentionMetadata.ragged(position=position, page_tables=self.table, starts=starts)
            tokens = np.pad(np.concatenate(parts), room)
            yield RaggedPart(self._forward(tokens, metadata.ragged_position, metadata), row, position)

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
    view = view.write_to_cache(key, value, metadata)
    return view, paged_attention(query, view, metadata, **vars(options))


@functools.partial(jax.jit, donate_argnums=0)
def _reset(view: PagedAttentionCacheView) -> PagedAttentionCacheView:
    return view.reset_pages(jnp.arange(view.metadata.num_pages_per_layer, dtype=jnp.int32))
