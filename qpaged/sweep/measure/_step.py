"""A step function of any model that :mod:`qpaged.adopt` can adopt, as a model that can be swept."""

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from qpaged._compat import inner_jaxprs
from qpaged._deprecated import renamed_argument
from qpaged.adopt import FoundCache, find_cache, quantize_cache
from qpaged.formats import CacheFormat
from qpaged.models import Tokenizer, load_tokenizer
from qpaged.sweep.measure._run import PLAIN
from qpaged.sweep.measure._settings import Settings
from qpaged.sweep.measure._step_stream import Pytree, Step, StepStream

MakeStep = Callable[[int, int], tuple[Step, Pytree]]
"""make_step(sequences, length) returns (step, state) for so many sequences of up to so many tokens."""

TreeShapes: TypeAlias = tuple[str, list[tuple[tuple[int, ...], Any]]]


@dataclass(frozen=True)
class StepModel:
    """A step and its state; see :class:`Model`.

    Attributes:
        step: see :data:`Step`.
        state: a pytree with a fresh cache, and whatever else the model needs.
        sequences: sequences that the cache holds at once.
    """

    name: str
    step: Step
    state: Pytree
    sequences: int
    longest: int
    tokenizer: Tokenizer
    path: str | None = None
    architecture: str = "a step"
    reference: str = "the model's own cache, as it is"

    @cached_property
    def found(self) -> FoundCache:
        """The cache that was found in the state."""
        return find_cache(self.step, *self._example(1))

    @cached_property
    def sha256(self) -> str:
        """A hash of the step's program, its constants, and its state."""
        program = jax.make_jaxpr(self.step)(*self._example(1))
        digest = hashlib.sha256(str(program.jaxpr).encode())
        for array in (*_constants(program), *jax.tree_util.tree_leaves(self.state)):
            digest.update(f"{array.shape} {array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def check(self, chunk: int) -> None:
        """Check that the step keeps to :data:`Step`, for one token and for a chunk.

        Raises:
            ValueError: it does not, or its cache is too small.
        """
        before = _shapes(self.state)
        for tokens in {1, chunk}:
            logits, state = jax.eval_shape(self.step, *self._example(tokens))
            if logits.shape[:-1] != (self.sequences, tokens):
                raise ValueError(
                    f"logits must be (sequences, n, vocabulary), for {self.sequences} sequences of {tokens} "
                    f"tokens, but came as {logits.shape}; give those of every token."
                )
            if _shapes(state) != before:
                raise ValueError(
                    "the state must come back in the structure, shapes and dtypes in which it came."
                )
        for leaf in self.found.leaves:
            sequences = leaf.shape[leaf.axis("batch")]
            length = leaf.shape[leaf.axis("length")]
            if sequences != self.sequences or length < self.longest:
                raise ValueError(
                    f"the cache must hold {self.sequences} sequences of {self.longest} tokens, as make_step "
                    f"is asked to, but {leaf.path} holds {sequences} of {length}."
                )

    @cached_property
    def in_cache(self) -> list[bool]:
        """True for each leaf of the state that belongs to the cache."""
        cache_paths = {leaf.path for leaf in self.found.leaves}
        (argument,) = self.found.arguments
        in_cache = []
        for path, _ in jax.tree_util.tree_leaves_with_path(self.state):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            in_cache.append(f"{argument}/{name}".rstrip("/") in cache_paths)
        return in_cache

    @property
    def parameters(self) -> int:
        """Number of elements of the state outside the cache."""
        leaves = jax.tree_util.tree_leaves(self.state)
        return sum(leaf.size for leaf, in_cache in zip(leaves, self.in_cache, strict=True) if not in_cache)

    @property
    def elements_per_token(self) -> int:
        return sum(int(np.prod(leaf.shape)) for leaf in self.found.leaves) // self.capacity

    @property
    def capacity(self) -> int:
        """Tokens that the cache holds, of all sequences together."""
        return self._size("length") * self._size("batch")

    @property
    def head_dim(self) -> int:
        return self._size("head_dim")

    @property
    def kv_heads(self) -> int:
        return self._size("heads")

    @property
    def layers(self) -> int | None:
        layers = []
        for leaf in self.found.leaves:
            if leaf.layer is None:  # one array holds several layers
                return None
            layers.append(leaf.layer)
        return 1 + max(layers)

    @cached_property
    def vocabulary(self) -> int:
        return jax.eval_shape(self.step, *self._example(1))[0].shape[-1]

    @renamed_argument("format", "quantizer")
    def stream(self, quantizer: CacheFormat, settings: Settings, sequences: int) -> StepStream:
        """Return a stream through the step; plain is the model's own cache."""
        step, state = self.step, self.state
        if quantizer != PLAIN:
            adopted = quantize_cache(
                self.step, quantizer, example=self._example(1), page_size=settings.page_size
            )
            step, state = adopted, adopted.init(self.state)
        return StepStream(step, state, self.in_cache, self.sequences, self.capacity, settings)

    def logits(self, outputs: jax.Array) -> jax.Array:
        """Return the outputs of a step, which are its logits."""
        return outputs

    @renamed_argument("format", "quantizer")
    def attention_profile(self, quantizer: CacheFormat, tokens: np.ndarray, settings: Settings) -> None:
        """Return None, since the layers of a step cannot be inspected."""
        return None

    def _size(self, axis: str) -> int:
        """Return the size of an axis of the cache's first leaf."""
        leaf = self.found.leaves[0]
        return leaf.shape[leaf.axis(axis)]

    def _example(self, tokens: int) -> tuple[Pytree, jax.Array, jax.Array]:
        """Return arguments of a step of so many tokens."""
        zeros = jnp.zeros((self.sequences, tokens), jnp.int32)
        return self.state, zeros, zeros


def load_step(spelling: str, settings: Settings, tokenizer: str | None = None) -> StepModel:
    """Load the model that the :data:`MakeStep` at ``"module:function"`` returns.

    Modules in the working directory are found, too.

    Args:
        tokenizer: a directory with a ``tokenizer.json``; bytes if None.

    Raises:
        ValueError: a spelling without a colon, a module or function that does not exist, or a step whose
            cache cannot be found.
    """
    module, _, name = spelling.partition(":")
    if not module or not name:
        raise ValueError(f"--step must be given as module:function, but came as {spelling!r}.")
    working_directory = str(Path.cwd())
    if working_directory not in sys.path:
        sys.path.insert(0, working_directory)
    try:
        make_step = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--step {spelling} cannot be imported: {error}.") from error
    except (Exception, SystemExit) as error:  # as modules raise that are scripts
        raise ValueError(f"--step {spelling} cannot be imported: {error!r}.") from error
    text_tokenizer = load_tokenizer(tokenizer or "bytes")
    try:
        step, state = make_step(settings.batch, settings.context)
        model = StepModel(
            name=spelling,
            step=step,
            state=jax.tree_util.tree_map(jnp.asarray, state),
            sequences=settings.batch,
            longest=settings.context,
            tokenizer=text_tokenizer,
            path=spelling,
        )
        model.check(min(settings.chunk, settings.prefilled))
    except (Exception, SystemExit) as error:  # The function is the user's and may raise anything.
        raise ValueError(f"--step {spelling}: {type(error).__name__}: {error}") from error
    return model


def _constants(program: Any) -> Iterator[jax.Array]:
    """Yield the arrays that a jaxpr closes over, and those of the jaxprs inside it."""
    yield from getattr(program, "consts", ())
    for equation in getattr(program, "jaxpr", program).eqns:
        for inner in inner_jaxprs(equation):
            yield from _constants(inner)


def _shapes(state: Pytree) -> TreeShapes:
    """Return the structure, and the shape and dtype of each leaf."""
    leaves, tree = jax.tree_util.tree_flatten(state)
    return str(tree), [(leaf.shape, leaf.dtype) for leaf in leaves]
