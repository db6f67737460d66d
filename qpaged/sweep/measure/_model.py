"""What is measured: a model, and the stream of tokens that goes through it and its cache."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import jax
import numpy as np

from qpaged.models import Tokenizer
from qpaged.quantizer import CacheFormat
from qpaged.sweep._attention import AttentionProfile
from qpaged.sweep._settings import Settings


class Prefilled(NamedTuple):
    """What the model made of a chunk: of so many ``rows`` and ``columns`` of the tokens."""

    rows: slice
    columns: slice
    outputs: jax.Array


class Stream(Protocol):
    """A model and its cache, as a server holds them: it takes a batch of sequences after another.

    Attributes:
        bytes_per_token: of the allocated cache, keys and values of all layers, scales included.
        dtype: the name of the cache's logical dtype.
    """

    bytes_per_token: float
    dtype: str

    def begin(self, sequences: int) -> None:
        """Forget what is held, for so many fresh sequences, at most ``batch`` of the settings."""

    def prefill(self, tokens: np.ndarray) -> Iterator[Prefilled]:
        """Feed the beginning (sequences, n) int32, in chunks; outputs (rows, columns, features)."""

    def decode(self, tokens: np.ndarray, position: int) -> jax.Array:
        """Feed one token to each sequence, (sequences,) int32; outputs (sequences, features)."""


class Model(Protocol):
    """A model that can be swept.

    Attributes:
        name: for people.
        architecture: its kind, as its configuration has it.
        path: where it came from, as it was asked for; None for the bundled one.
        sha256: of all that its predictions hang on.
        parameters: weights.
        elements_per_token: elements that a token has in the cache: keys and values of all layers.
        head_dim, kv_heads, layers: of the cache; layers is None where they share an array.
        longest: tokens that a sequence may have.
        vocabulary: token ids are below it.
        tokenizer: as :func:`qpaged.models.load_tokenizer` gives it.
        reference: in words, what is taken for exact.
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

    def stream(self, format: CacheFormat, settings: Settings, sequences: int) -> Stream:
        """With a fresh cache for so many sequences at once. Plain caches are as the reference has them."""

    def logits(self, outputs: jax.Array) -> jax.Array:
        """(..., vocabulary) float32 of a stream's outputs (..., features)."""

    def attention_profile(
        self, format: CacheFormat, tokens: np.ndarray, settings: Settings
    ) -> AttentionProfile | None:
        """On sequences (sequences, context); None for a model whose layers cannot be seen into."""
