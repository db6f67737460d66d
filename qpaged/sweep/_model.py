"""The model that is measured."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

import qpaged.models
from qpaged.models import DecoderConfig, Params, load_checkpoint
from qpaged.models._shards import WEIGHTS_FILE

VOCABULARY = 256


@dataclass(frozen=True)
class Model:
    """A byte-level decoder: every token is one byte.

    Attributes:
        path: the checkpoint's directory; None for the bundled model.
        sha256: of the weights' file.

    Raises:
        ValueError: a vocabulary other than the 256 bytes.
    """

    name: str
    config: DecoderConfig
    params: Params
    path: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        if self.config.vocab_size != VOCABULARY:
            raise ValueError(
                f"{self.name} has a vocabulary of {self.config.vocab_size:,} tokens, but only byte-level "
                f"models, whose vocabulary is the {VOCABULARY} bytes, can be swept; choose such a checkpoint."
            )

    @property
    def parameters(self) -> int:
        """How many weights there are."""
        return sum(weight.size for weight in self.params.values())

    @property
    def elements_per_token(self) -> int:
        """Elements that one token has in the cache: keys and values of all layers."""
        return 2 * self.config.num_hidden_layers * self.config.num_key_value_heads * self.config.head_dim


def load_model(path: str | Path | None = None) -> Model:
    """The checkpoint in directory ``path``, weights as float32; the bundled tiny model without one.

    Raises:
        OSError, ValueError: it cannot be read, or is not a byte-level Llama.
        ImportError: safetensors is missing.
    """
    directory = Path(qpaged.models.__file__).parent / "tiny" if path is None else Path(path)
    name = "bundled tiny model" if path is None else directory.resolve().name
    try:
        config, params = load_checkpoint(directory, jnp.float32)
    except (ArithmeticError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"the configuration in {directory} is malformed: {error!r}") from error
    digest = hashlib.sha256((directory / WEIGHTS_FILE).read_bytes()).hexdigest()
    return Model(name, config, params, None if path is None else str(path), digest)
