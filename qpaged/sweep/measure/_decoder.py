"""A checkpoint's decoder as a model that can be swept."""

import functools
import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

import qpaged.models
from qpaged._bad_argument import BadArgumentError
from qpaged._deprecated import renamed_argument
from qpaged.cache import NarrowFloatPoolWarning, PagedAttentionCache, PagedAttentionCacheMetaData
from qpaged.formats import CacheFormat, CacheScales
from qpaged.models import (
    Attend,
    DecoderConfig,
    Params,
    Tokenizer,
    checkpoint_sha256,
    final_hidden,
    load_checkpoint,
    load_tokenizer,
    output_logits,
    param_shapes,
    read_config,
)
from qpaged.sweep.measure._attention import SUMS, AttentionProfile, compare_attention
from qpaged.sweep.measure._decoder_stream import Chunk, DecoderStream, chunks
from qpaged.sweep.measure._run import PLAIN
from qpaged.sweep.measure._settings import COMPUTE_DTYPES, Settings

PLAIN_DTYPE = "float32"
"""What plain caches hold: all that models compute, exactly."""


@dataclass(frozen=True)
class Decoder:
    """A decoder of a checkpoint; see :class:`Model`.

    Attributes:
        scales: those of caches with static scales; 1 if None.
        compute: the name of the dtype that it computes in.
        reference: a description of the plain cache.
        mesh: the devices that weights and KV heads are divided over; None for one.
        is_streamed: whether weights are read from their files whenever they are used.
    """

    name: str
    config: DecoderConfig
    params: Params
    tokenizer: Tokenizer
    sha256: str
    path: str | None = None
    scales: CacheScales | None = None
    compute: str = "float32"
    reference: str = "plain pages in float32, the precision that the model computes in"
    mesh: Mesh | None = None
    is_streamed: bool = False

    @property
    def takes_ragged(self) -> bool:
        return True

    @property
    def architecture(self) -> str:
        return self.config.model_type

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, param_shapes(self.config).values()))

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

    @renamed_argument("format", "quantizer")
    def stream(self, quantizer: CacheFormat, settings: Settings, sequences: int) -> DecoderStream:
        """Return a stream whose fresh cache holds ``sequences`` at once."""
        return self._stream(self.cache(quantizer, settings, sequences), quantizer, settings, sequences)

    def compile(self, quantizer: CacheFormat, settings: Settings, sequences: int) -> None:
        """Compile what such a stream runs, without a cache; nothing over several devices."""
        if self.mesh is not None:
            return  # how arrays will lie is known where they are there
        cache = jax.eval_shape(lambda: self.cache(quantizer, settings, sequences))
        self._stream(cache, quantizer, settings, sequences).compile()

    def _stream(
        self, cache: PagedAttentionCache, quantizer: CacheFormat, settings: Settings, sequences: int
    ) -> DecoderStream:
        size = self._bytes_per_token(quantizer, settings.counted, sequences)
        dtype = _cache_dtype(quantizer, settings)
        return DecoderStream(self.config, self.hidden, cache, settings, size, dtype, self.compute)

    def _bytes_per_token(self, quantizer: CacheFormat, settings: Settings, sequences: int) -> float:
        """Return the bytes of a cache on one device, where each head is stored once, for each token."""
        alone = replace(self, mesh=None)
        cache: PagedAttentionCache = jax.eval_shape(lambda: alone.cache(quantizer, settings, sequences))
        return cache.nbytes / (sequences * settings.pages_per_sequence * settings.page_size)

    def logits(self, outputs: jax.Array) -> jax.Array:
        """Return the logits [..., vocabulary] of hidden states [..., hidden_size]."""
        logits = output_logits(self.params, self.config, outputs.reshape(-1, outputs.shape[-1]))
        return self._everywhere(logits.reshape(*outputs.shape[:-1], -1))

    @renamed_argument("format", "quantizer")
    def cache(self, quantizer: CacheFormat, settings: Settings, sequences: int) -> PagedAttentionCache:
        """Return a fresh cache that holds exactly ``sequences`` sequences."""
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
        dtype = _cache_dtype(quantizer, settings)
        with warnings.catch_warnings():
            # A narrow plain pool is slow on CPU, but a sweep asks for its accuracy.
            warnings.simplefilter("ignore", NarrowFloatPoolWarning)
            cache = PagedAttentionCache.init_cache(self.mesh, dtype, metadata, quantizer=quantizer)
        if self.scales is None or not cache.has_static_scales:
            return cache
        return cache.with_scales(self.scales)

    def with_scales(self, scales: CacheScales, source: str) -> "Decoder":
        """Return the decoder with static scales for its caches, on which its predictions depend, too.

        Args:
            scales: of every layer.
            source: where they come from, which its name then says.

        Raises:
            ValueError: scales of another number of layers or KV heads.
        """
        scales.check_sizes(self.layers, self.kv_heads)
        digest = hashlib.sha256(f"{self.sha256} {scales.format}".encode())
        for part in (scales.key, scales.value):
            digest.update(part.tobytes())
        name = f"{self.name} with the scales of {source}"
        return replace(self, scales=scales, name=name, sha256=digest.hexdigest())

    def computing_in(self, dtype: str) -> "Decoder":
        """Return the decoder computing in another dtype, ``"float32"`` or ``"bfloat16"``.

        Norms, rotary angles, attention scores and logits stay float32. The reference computes alike, and its
        plain cache still holds all that it is given.

        Raises:
            BadArgumentError: another dtype.
        """
        if dtype not in COMPUTE_DTYPES:
            raise BadArgumentError(
                "compute", f"must be one of {', '.join(COMPUTE_DTYPES)}, but came as {dtype!r}."
            )
        if dtype == self.compute:
            return self
        digest = hashlib.sha256(f"{self.sha256} {dtype}".encode()).hexdigest()
        reference = f"plain pages in float32, of a model that computes in {dtype}"
        name = f"{self.name} in {dtype}"
        return replace(self, compute=dtype, name=name, sha256=digest, reference=reference)

    def in_another_dtype(self) -> "tuple[str, Decoder]":
        """Return the other dtype that the decoder may compute in, and the decoder computing in it."""
        (other,) = set(COMPUTE_DTYPES) - {self.compute}
        return other, self.computing_in(other)

    def hidden(
        self,
        tokens: ArrayLike,  # [n] int32
        position: ArrayLike,  # [n] int32
        attend: Attend,
    ) -> jax.Array:  # [n, hidden_size]
        """Return the last hidden states of tokens at their positions."""

        def attend_after_reading(layer: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            query.block_until_ready()  # or weights of many layers would be read before they are used
            return attend(layer, query, key, value)

        hidden = final_hidden(
            self.params,
            self.config,
            np.asarray(tokens),
            np.asarray(position),
            attend_after_reading if self.is_streamed else attend,
            dtype=self.compute,
        )
        return self._everywhere(hidden)

    def _everywhere(self, array: jax.Array) -> jax.Array:
        """Return an array as every device has it whole, so that every process can read it."""
        return array if self.mesh is None else _replicated(self.mesh)(array)

    def attention_profile(
        self,
        plain: DecoderStream,
        measured: DecoderStream,
        tokens: np.ndarray,  # [sequences, context] int32
        settings: Settings,
    ) -> AttentionProfile:
        """Return each layer's attention error, from :attr:`Settings.probed` sequences."""
        if measured is plain:  # The reference has no error beside itself.
            return AttentionProfile.of(np.zeros((self.layers, 2, len(SUMS))))
        sums: list[list[np.ndarray]] = []  # of each chunk and sequence, [layers]
        tokens = tokens[: settings.probed]
        for first in range(0, len(tokens), settings.batch):
            batch = tokens[first : first + settings.batch]
            plain.begin(len(batch))
            measured.begin(len(batch))
            for chunk in chunks(batch, measured.chunk):
                sums += self._chunk_sums(plain, measured, chunk)
        return AttentionProfile.of(np.swapaxes(np.array(sums, np.float64), 0, 1))

    def _chunk_sums(
        self, plain: DecoderStream, measured: DecoderStream, chunk: Chunk
    ) -> list[list[np.ndarray]]:
        """Return :data:`SUMS` of each sequence of a chunk for each layer."""
        table = plain.table
        metadata = chunk.metadata(table)
        rows, length = chunk.tokens.shape
        position = np.full(chunk.size, -1, np.int32)
        position[:length] = np.arange(chunk.columns.start, chunk.columns.stop)
        sums: list[list[jax.Array]] = [[] for _ in range(rows)]

        def attend(layer: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            out = plain.attend(layer, query, key, value, metadata)
            measured.attend(layer, query, key, value, metadata)
            views = [stream.views[layer].replace(layer_index=0) for stream in (plain, measured)]
            for row in range(rows):
                # Of one size; what follows the sequence's own queries has negative positions.
                queries = query[row * length : row * length + chunk.size]
                options = self.config.attention(layer)
                sums[row].append(compare_attention(*views, queries, position, table[row], options))
            return out

        self.hidden(chunk.flat_tokens(len(table)), metadata.ragged_position, attend)
        return jax.device_get(sums)


@functools.cache
def _replicated(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array, out_shardings=NamedSharding(mesh, PartitionSpec()))


def load_model(
    path: str | Path | None = None,
    tokenizer: str | None = None,
    context: int | None = None,
    *,
    mesh: Mesh | None = None,
    streamed: bool = False,
) -> Decoder:
    """Load the checkpoint in directory ``path``, or the bundled tiny model without one.

    Args:
        tokenizer: a directory with a ``tokenizer.json``, or ``"bytes"``; the checkpoint's own if None.
        context: tokens of the sequences, for models that compute differently on long ones.
        mesh: the devices to divide weights and KV heads over, along an axis ``"tp"``, which may be of several
            processes; None for one device.
        streamed: read weights from their files whenever they are used: slow, but the model need not fit into
            memory.

    Raises:
        OSError, ValueError: the checkpoint cannot be read, or a tokenizer was given without one.
        ImportError: safetensors or tokenizers is missing.
    """
    if path is None and tokenizer not in (None, "bytes"):
        raise BadArgumentError(
            "tokenizer",
            'must be "bytes" or left out for the bundled model, whose tokens are bytes, but came as '
            f"{tokenizer!r}; give the checkpoint that it belongs to.",
        )
    if path is None:
        directory = Path(qpaged.models.__file__).parent / "tiny"
        name, tokenizer_source = "bundled tiny model", tokenizer or "bytes"
    else:
        directory = Path(path)
        if directory.name == "config.json":
            raise ValueError(f"The model must be a directory: give {directory.parent}, not its config.json.")
        name, tokenizer_source = directory.resolve().name, tokenizer or str(directory)
    if mesh is not None:
        _check_heads(read_config(directory), mesh)
    config, params = load_checkpoint(directory, mesh=mesh, streamed=streamed)  # as they are stored
    if context is not None:
        config = _for_context(config, context)
    return Decoder(
        name=name,
        config=config,
        params=params,
        tokenizer=load_tokenizer(tokenizer_source),
        sha256=checkpoint_sha256(directory),
        path=None if path is None else str(path),
        mesh=mesh,
        is_streamed=streamed,
    )


def _check_heads(config: DecoderConfig, mesh: Mesh) -> None:
    """Raise BadArgumentError for more devices than a model's query heads can be divided over."""
    devices, kv_heads = mesh.size, config.num_key_value_heads
    if devices % kv_heads == 0 and config.num_attention_heads % devices:
        raise BadArgumentError(
            "mesh",
            f"must have a number of devices that divides the {config.num_attention_heads} query heads of the "
            f"model, but has {devices}.",
        )


def _for_context(config: DecoderConfig, context: int) -> DecoderConfig:
    try:
        return config.for_context(context)
    except BadArgumentError as error:
        raise BadArgumentError("context", error.rule) from error


def _cache_dtype(quantizer: CacheFormat, settings: Settings) -> str:
    """Return the logical dtype of a cache: the reference keeps all that the model computes."""
    if quantizer == PLAIN:
        return PLAIN_DTYPE
    return settings.dtype
