"""Protocols of what is measured: a model, and the stream of tokens through it and its cache."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from qpaged.formats import CacheFormat
from qpaged.models import Tokenizer
from qpaged.sweep.measure._attention import AttentionProfile
from qpaged.sweep.measure._settings import Settings


class Prefilled(NamedTuple):
    """The model's outputs for one chunk, which covers ``rows`` and ``columns`` of the tokens."""

    rows: slice
    columns: slice
    outputs: jax.Array  # [rows, columns, features]


class RaggedPart(NamedTuple):
    """The model's outputs for parts of several sequences, one after another.

    Attributes:
        outputs: [tokens, features].
        row: [tokens], the sequence of each token; -1 for padding.
        position: [tokens], its position there.
    """

    outputs: jax.Array
    row: np.ndarray
    position: np.ndarray


class Stream(Protocol):
    """A model and its cache, as a server holds them: it processes one batch of sequences after another.

    Attributes:
        bytes_per_token: of the allocated cache, keys and values of all layers, scales included.
        dtype: the name of the cache's logical dtype.
    """

    bytes_per_token: float
    dtype: str

    def begin(self, sequences: int) -> None:
        """Clear the cache for a batch of ``sequences``, at most ``batch`` of the settings."""

    def prefill(self, tokens: np.ndarray) -> Iterator[Prefilled]:
        """Feed the beginning of each sequence, [sequences, n] int32, and yield the outputs chunk by chunk."""

    def decode(self, tokens: np.ndarray, position: int) -> jax.Array:
        """Feed one token to each sequence, [sequences] int32, and return outputs [sequences, features]."""


class RaggedStream(Stream, Protocol):
    """A stream that takes sequences of any lengths together, as tasks need."""

    def prefill_ragged(self, sequences: Sequence[np.ndarray]) -> Iterator[RaggedPart]:
        """Feed all sequences, [n] int32 each, and yield the outputs part by part."""


class Model(Protocol):
    """A model that can be swept.

    Attributes:
        name: the name that reports show.
        architecture: the model's type, as its configuration names it.
        path: where it was loaded from, as the user typed it; None for the bundled model.
        sha256: a hash of everything that its predictions depend on.
        parameters: number of weights.
        elements_per_token: cache elements of one token: keys and values of all layers.
        head_dim, kv_heads, layers: sizes of the cache; layers is None where layers share an array.
        longest: tokens that a sequence may have.
        vocabulary: token ids are below it.
        tokenizer: as :func:`qpaged.models.load_tokenizer` returns it.
        reference: a description of the cache that is taken as exact.
        takes_ragged: True if its streams are a :class:`RaggedStream` each.
    """

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> str | None: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def reference(self) -> str: ...
    @property
    def takes_ragged(self) -> bool: ...
    @property
    def architecture(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def parameters(self) -> int: ...
    @property
    def elements_per_token(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def layers(self) -> int | None: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def longest(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...

    def stream(self, quantizer: CacheFormat, settings: Settings, sequences: int) -> Stream:
        """Return a stream whose fresh cache holds ``sequences`` at once; plain caches are the reference's."""

    def compile(self, quantizer: CacheFormat, settings: Settings, sequences: int) -> None:
        """Compile what such a stream runs, if that can be done without running it; allocate no cache."""

    def logits(self, outputs: jax.Array) -> jax.Array:
        """Return float32 logits [..., vocabulary] of a stream's outputs [..., features]."""

    def in_another_dtype(self) -> "tuple[str, Model] | None":
        """Return another dtype and the model computing in it, for the reference's noise; None without one."""

    def attention_profile(
        self,
        plain: Any,
        measured: Any,
        tokens: np.ndarray,  # [sequences, context] int32
        settings: Settings,
    ) -> AttentionProfile | None:
        """Return each layer's attention error; None for a model whose layers cannot be inspected.

        Args:
            plain: a stream that :meth:`stream` returned for plain caches; it begins anew.
            measured: likewise, of the format to be measured, or ``plain`` itself.
        """
