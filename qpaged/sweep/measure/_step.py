"""Any model that :mod:`qpaged.adopt` can adopt, given as a step of its own."""

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qpaged.adopt import FoundCache, find_cache, quantize_cache
from qpaged.arrays import QuantizedArray
from qpaged.models import Tokenizer, load_tokenizer
from qpaged.quantizer import CacheFormat
from qpaged.sweep._model import Prefilled
from qpaged.sweep._settings import Settings

PLAIN = CacheFormat()

Step = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""step(state, tokens, positions) -> (logits, state).

Tokens and positions are (sequences, n) int32, logits (sequences, n, vocabulary).
The state is a pytree that holds a fresh cache, and whatever else the model needs; its structure, shapes and
dtypes stay.
"""

MakeStep = Callable[[int, int], tuple[Step, Any]]
"""make_step(sequences, length) -> (step, state), for so many sequences of up to so many tokens."""


@dataclass(frozen=True)
class StepModel:
    """A step and its state; see :class:`Model`."""

    name: str
    step: Step
    state: Any
    sequences: int
    longest: int
    tokenizer: Tokenizer
    path: str | None = None
    architecture: str = "a step"
    reference: str = "the model's own cache, as it is"

    @cached_property
    def found(self) -> FoundCache:
        """The cache among the state."""
        return find_cache(self.step, *self._example(1))

    @cached_property
    def sha256(self) -> str:
        """Of the step's program and of its state."""
        made = jax.make_jaxpr(self.step)(*self._example(1))
        digest = hashlib.sha256(str(made.jaxpr).encode())
        for array in (*_constants(made), *jax.tree_util.tree_leaves(self.state)):
            digest.update(f"{array.shape} {array.dtype}".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def check(self, chunk: int) -> None:
        """ValueError unless the step keeps to :data:`Step`, for one token and for a chunk."""
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
            held = leaf.shape[leaf.axis("batch")], leaf.shape[leaf.axis("length")]
            if held[0] != self.sequences or held[1] < self.longest:
                raise ValueError(
                    f"the cache must hold {self.sequences} sequences of {self.longest} tokens, as make_step "
                    f"is asked to, but {leaf.path} holds {held[0]} of {held[1]}."
                )

    @cached_property
    def held(self) -> list[bool]:
        """Of each leaf of the state whether it belongs to the cache."""
        cache, (name,) = {leaf.path for leaf in self.found.leaves}, self.found.arguments
        keyed = jax.tree_util.tree_leaves_with_path(self.state)
        paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in keyed]
        return [f"{name}/{path}".rstrip("/") in cache for path in paths]

    @property
    def parameters(self) -> int:
        """Elements of the state beside the cache."""
        leaves = jax.tree_util.tree_leaves(self.state)
        return sum(leaf.size for leaf, held in zip(leaves, self.held, strict=True) if not held)

    @property
    def elements_per_token(self) -> int:
        return sum(int(np.prod(leaf.shape)) for leaf in self.found.leaves) // self.capacity

    @property
    def capacity(self) -> int:
        """Tokens that the cache holds, of all sequences."""
        leaf = self.found.leaves[0]
        return leaf.shape[leaf.axis("length")] * leaf.shape[leaf.axis("batch")]

    @property
    def head_dim(self) -> int:
        leaf = self.found.leaves[0]
        return leaf.shape[leaf.axis("head_dim")]

    @property
    def kv_heads(self) -> int:
        leaf = self.found.leaves[0]
        return leaf.shape[leaf.axis("heads")]

    @property
    def layers(self) -> int | None:
        layers = [leaf.layer for leaf in self.found.leaves]
        return None if None in layers else 1 + max(layer for layer in layers if layer is not None)

    @cached_property
    def vocabulary(self) -> int:
        return jax.eval_shape(self.step, *self._example(1))[0].shape[-1]

    def stream(self, format: CacheFormat, settings: Settings, sequences: int) -> "StepStream":
        if format == PLAIN:
            return StepStream(self, self.step, self.state, settings)
        step = quantize_cache(self.step, format, example=self._example(1), page_size=settings.page_size)
        return StepStream(self, step, step.init(self.state), settings)

    def logits(self, outputs: jax.Array) -> jax.Array:
        return outputs

    def attention_profile(self, format: CacheFormat, tokens: np.ndarray, settings: Settings) -> None:
        return None

    def _example(self, tokens: int) -> tuple[Any, jax.Array, jax.Array]:
        """Arguments of a step of so many tokens."""
        fed = jnp.zeros((self.sequences, tokens), jnp.int32)
        return self.state, fed, fed


class StepStream:
    """A step with its state; see :class:`Stream`. The cache is donated from step to step, nothing else is."""

    def __init__(self, model: StepModel, step: Step, state: Any, settings: Settings):
        self._model, self._settings = model, settings
        leaves, self._tree = jax.tree_util.tree_flatten(state, is_leaf=_quantized)
        self._held, self._fresh = model.held, leaves
        held = [leaf for leaf, held in zip(leaves, self._held, strict=True) if held]
        size = sum(part.size * part.dtype.itemsize for part in jax.tree_util.tree_leaves(held))
        self.bytes_per_token = size / model.capacity
        self.dtype = jnp.dtype(held[0].dtype).name

        def run(cache: list[Any], rest: list[Any], tokens: jax.Array, positions: jax.Array) -> Any:
            parts = {True: iter(cache), False: iter(rest)}
            given = jax.tree_util.tree_unflatten(self._tree, [next(parts[held]) for held in self._held])
            logits, state = step(given, tokens, positions)
            leaves = jax.tree_util.tree_leaves(state, is_leaf=_quantized)
            return logits.astype(jnp.float32), *self._parts(leaves)

        self._run = jax.jit(run, donate_argnums=0)

    def begin(self, sequences: int) -> None:
        self._sequences = sequences
        held, self._rest = self._parts(self._fresh)
        self._cache = jax.tree_util.tree_map(jnp.copy, held)

    def prefill(self, tokens: np.ndarray) -> Iterator[Prefilled]:
        size = min(self._settings.chunk, tokens.shape[1])
        for start in range(0, tokens.shape[1], size):
            part = tokens[:, start : start + size]
            yield Prefilled(slice(0, len(part)), slice(start, start + part.shape[1]), self._feed(part, start))

    def decode(self, tokens: np.ndarray, position: int) -> jax.Array:
        return self._feed(tokens[:, None], position)[:, 0]

    def _feed(self, tokens: np.ndarray, start: int) -> jax.Array:
        missing = self._model.sequences - len(tokens)
        padded = np.pad(tokens, ((0, missing), (0, 0))).astype(np.int32)
        positions = np.broadcast_to(start + np.arange(tokens.shape[1], dtype=np.int32), padded.shape)
        logits, self._cache, self._rest = self._run(self._cache, self._rest, padded, positions)
        return logits[: len(tokens)]

    def _parts(self, leaves: list[Any]) -> tuple[list[Any], list[Any]]:
        """Those of the cache, and the rest."""
        pairs = list(zip(leaves, self._held, strict=True))
        return [leaf for leaf, held in pairs if held], [leaf for leaf, held in pairs if not held]


def load_step(spelling: str, settings: Settings, tokenizer: str | None = None) -> StepModel:
    """The model of ``"module:function"``, a :data:`MakeStep`.

    Modules in the working directory are found, too.

    Args:
        tokenizer: a directory with a ``tokenizer.json``; bytes if None.

    Raises:
        ValueError: a spelling without a colon, a module or function that is not there, or a step whose cache
            cannot be found.
    """
    module, _, name = spelling.partition(":")
    if not module or not name:
        raise ValueError(f"--step must be given as module:function, but came as {spelling!r}.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        make_step = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--step {spelling} cannot be imported: {error}.") from error
    sequences, length, tokens = settings.batch, settings.context, load_tokenizer(tokenizer or "bytes")
    try:
        step, state = make_step(sequences, length)
        state = jax.tree_util.tree_map(jnp.asarray, state)
        model = StepModel(spelling, step, state, sequences, length, tokens, spelling)
        model.check(min(settings.chunk, settings.prefilled))
    except Exception as error:  # of other people's code
        raise ValueError(f"--step {spelling}: {type(error).__name__}: {error}") from error
    return model


def _constants(jaxpr: Any) -> Iterator[Any]:
    """Arrays that a program closes over, and those of the programs in it."""
    yield from getattr(jaxpr, "consts", ())
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        for param in jax.tree_util.tree_leaves(eqn.params, is_leaf=_program):
            if _program(param):
                yield from _constants(param)


def _program(param: Any) -> bool:
    return hasattr(param, "eqns") or hasattr(param, "jaxpr")


def _shapes(state: Any) -> Any:
    """Structure, shapes and dtypes."""
    leaves, tree = jax.tree_util.tree_flatten(state)
    return str(tree), [(leaf.shape, leaf.dtype) for leaf in leaves]


def _quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedArray)
