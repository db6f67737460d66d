"""A checkpoint's decoder over the paged cache."""

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qpaged.models
from qpaged.attention import paged_attention
from qpaged.cache import (
    NarrowFloatPoolWarning,
    PageAllocator,
    PagedAttentionCache,
    PagedAttentionCacheMetaData,
    PagedAttentionCacheView,
    PagedAttentionMetadata,
)
from qpaged.models import (
    DecoderConfig,
    Params,
    Tokenizer,
    checkpoint_sha256,
    final_hidden,
    load_checkpoint,
    load_tokenizer,
    output_logits,
)
from qpaged.quantizer import CacheFormat
from qpaged.sweep._attention import SUMS, AttentionProfile, compare_attention
from qpaged.sweep._model import Prefilled
from qpaged.sweep._settings import Settings

PLAIN = CacheFormat()
COMPUTE_DTYPE = "float32"  # what models are computed in, and what plain caches hold


@dataclass(frozen=True)
class Decoder:
    """A decoder of a checkpoint; see :class:`Model`."""

    name: str
    config: DecoderConfig
    params: Params
    tokenizer: Tokenizer
    sha256: str
    path: str | None = None
    reference: str = "plain pages in float32, the precision that the model computes in"

    @property
    def architecture(self) -> str:
        return self.config.model_type

    @property
    def parameters(self) -> int:
        return sum(weight.size for weight in self.params.values())

    @property
    def elements_per_token(self) -> int:
        return 2 * self.config.num_hidden_layers * self.config.num_key_value_heads * self.config.head_dim

    @property
    def head_dim(self) -> int:
        return self.config.head_dim

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def kv_heads(self) -> int:
        return self.config.num_key_value_heads

    @property
    def longest(self) -> int:
        return self.config.max_position_embeddings

    @property
    def vocabulary(self) -> int:
        return self.config.vocab_size

    def stream(self, format: CacheFormat, settings: Settings, sequences: int) -> "DecoderStream":
        return DecoderStream(
            self, self.cache(format, settings, sequences), settings, _dtype(format, settings)
        )

    def logits(self, outputs: jax.Array) -> jax.Array:
        logits = output_logits(self.params, self.config, outputs.reshape(-1, outputs.shape[-1]))
        return logits.reshape(*outputs.shape[:-1], -1)

    def cache(self, format: CacheFormat, settings: Settings, sequences: int) -> PagedAttentionCache:
        """A fresh cache that holds exactly ``sequences`` sequences."""
        pages = settings.pages_per_sequence
        metadata = PagedAttentionCacheMetaData(
            batch_size=sequences,
            num_hidden_layers=self.layers,
            num_pages_per_layer=sequences * pages,
            num_pages_per_sequence=pages,
            max_sequences=settings.context,
            page_size=settings.page_size,
            num_kv_heads=self.kv_heads,
            kv_head_dim_size=self.head_dim,
            hbm_utilization=0.9,
        )
        with warnings.catch_warnings():  # whoever sweeps a plain pool asks for its accuracy, not its speed
            warnings.simplefilter("ignore", NarrowFloatPoolWarning)
            return PagedAttentionCache.init_cache(None, _dtype(format, settings), metadata, quantizer=format)

    def hidden(self, tokens: Any, position: Any, attend: Any) -> jax.Array:
        """The last hidden states (n, hidden_size) float32 of tokens (n,) at their positions."""
        return final_hidden(
            self.params, self.config, jnp.asarray(tokens), position, attend, dtype=COMPUTE_DTYPE
        )

    def attention_profile(
        self, format: CacheFormat, tokens: np.ndarray, settings: Settings
    ) -> AttentionProfile:
        probed = tokens[: settings.probed]
        if format == PLAIN:  # beside itself
            return AttentionProfile.of(np.zeros((self.layers, 2, len(SUMS))))
        plain, measured = (self.stream(each, settings, 1) for each in (PLAIN, format))
        sums = []
        for sequence in probed:
            plain.begin(1)
            measured.begin(1)
            for chunk in chunks(sequence, settings.chunk):
                sums.append(self._chunk_sums(plain, measured, chunk))
        return AttentionProfile.of(np.swapaxes(np.array(sums, np.float64), 0, 1))

    def _chunk_sums(self, plain: "DecoderStream", measured: "DecoderStream", chunk: "Chunk") -> list[Any]:
        """Of each layer, :data:`SUMS` (6,) of one chunk."""
        table, sums = plain.table[0], []
        metadata = chunk.metadata(table)
        position = np.where(np.arange(len(chunk.tokens)) < chunk.length, metadata.prefill_position, -1)

        def attend(layer, query, key, value):
            out = plain.attend(layer, query, key, value, metadata)
            measured.attend(layer, query, key, value, metadata)
            views = (stream.views[layer].replace(layer_index=0) for stream in (plain, measured))
            sums.append(compare_attention(*views, query, position, table, self.config.attention(layer)))
            return out

        self.hidden(chunk.tokens, metadata.prefill_position, attend)
        return jax.device_get(sums)


def _dtype(format: CacheFormat, settings: Settings) -> str:
    """The logical dtype of a cache."""
    return COMPUTE_DTYPE if format == PLAIN else settings.dtype


def load_model(
    path: str | Path | None = None, tokenizer: str | None = None, context: int | None = None
) -> Decoder:
    """The checkpoint in directory ``path``; the bundled tiny model without one.

    Args:
        tokenizer: a directory with a ``tokenizer.json``, or ``"bytes"``; the checkpoint's own if None.
        context: tokens of the sequences, for models that compute otherwise where these are long.

    Raises:
        OSError, ValueError: it cannot be read.
        ImportError: safetensors or tokenizers is missing.
    """
    directory = Path(qpaged.models.__file__).parent / "tiny" if path is None else Path(path)
    name = "bundled tiny model" if path is None else directory.resolve().name
    config, params = load_checkpoint(directory)  # weights as they are stored
    if context is not None:
        config = config.for_context(context)
    tokens = load_tokenizer("bytes" if path is None else tokenizer or directory)
    return Decoder(
        name, config, params, tokens, checkpoint_sha256(directory), None if path is None else str(path)
    )


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


def chunks(tokens: np.ndarray, size: int) -> Iterator[Chunk]:
    """The chunks of ``tokens``."""
    size = min(size, len(tokens))
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        yield Chunk(start, len(part), np.pad(part, (0, size - len(part))))


class DecoderStream:
    """A decoder and its paged cache; see :class:`Stream`."""

    def __init__(self, model: Decoder, cache: PagedAttentionCache, settings: Settings, dtype: str):
        self.views, self.dtype = list(cache.views), dtype
        self._model, self._settings = model, settings
        metadata = cache.views[0].metadata
        self.bytes_per_token = cache.nbytes / (metadata.num_pages_per_layer * metadata.page_size)
        self._batch = metadata.batch_size
        self._allocator = PageAllocator(metadata)
        self._sequences = 0

    def begin(self, sequences: int) -> None:
        for row in range(self._sequences):
            self._allocator.free(row)
        self._sequences = sequences
        given = [
            page for row in range(sequences) for page in self._allocator.allocate(row, self._settings.context)
        ]
        self.views = [_reset_view(view, given) for view in self.views]
        self.table = self._allocator.page_table([*range(sequences), *[None] * (self._batch - sequences)])

    def prefill(self, tokens: np.ndarray) -> Iterator[Prefilled]:
        for row, sequence in enumerate(tokens):
            for chunk in chunks(sequence, self._settings.chunk):
                metadata = chunk.metadata(self.table[row])
                hidden = self._forward(chunk.tokens, metadata.prefill_position, metadata)[: chunk.length]
                columns = slice(chunk.start, chunk.start + chunk.length)
                yield Prefilled(slice(row, row + 1), columns, hidden[None])

    def decode(self, tokens: np.ndarray, position: int) -> jax.Array:
        rows, batch = len(tokens), self._batch
        positions = np.where(np.arange(batch) < rows, position, -1).astype(np.int32)
        metadata = PagedAttentionMetadata.decode(position=positions, page_table=self.table)
        padded = np.pad(tokens, (0, batch - rows))
        return self._forward(padded, metadata.decodes_position, metadata)[:rows]

    def attend(self, layer: int, query: Any, key: Any, value: Any, metadata: PagedAttentionMetadata) -> Any:
        """Write keys and values of a layer, and attend to what is written."""
        view = self.views[layer].replace(layer_index=0)
        options = self._model.config.attention(layer)
        written, out = _write_and_attend(view, query, key, value, metadata, options)
        self.views[layer] = written.replace(layer_index=layer)
        return out

    def _forward(self, tokens: Any, position: Any, metadata: PagedAttentionMetadata) -> jax.Array:
        attend = functools.partial(self.attend, metadata=metadata)
        return self._model.hidden(tokens, position, attend)


# The layer's index is static: at 0 for all, layers of one format share one compilation.


@functools.partial(jax.jit, donate_argnums=0, static_argnames="options")
def _write_and_attend(view: PagedAttentionCacheView, query, key, value, metadata, options):
    write = view.write_decodes_to_cache if metadata.is_decode_mode() else view.write_prefill_to_cache
    view = write(key, value, metadata)
    return view, paged_attention(query, view, metadata, **vars(options))


def _reset_view(view: PagedAttentionCacheView, pages: list[int]) -> PagedAttentionCacheView:
    """The view with these pages fresh; donates it."""
    count = view.metadata.num_pages_per_layer
    padded = np.full(count, count, np.int32)  # "no page", so that every batch has the same shapes
    padded[: len(pages)] = pages
    return _reset(view.replace(layer_index=0), padded).replace(layer_index=view.layer_index)


@functools.partial(jax.jit, donate_argnums=0)
def _reset(view: PagedAttentionCacheView, pages: jax.Array) -> PagedAttentionCacheView:
    return view.reset_pages(pages)
