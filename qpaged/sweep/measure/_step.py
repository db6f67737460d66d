"""A step function of any model that :mod:`qpaged.adopt` can adopt, as a model that can be swept."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qpaged._bad_argument import BadArgumentError
from qpaged._compat import inner_jaxprs
from qpaged._deprecated import renamed_argument
from qpaged.adopt import FoundCache, find_cache, quantize_cache
from qpaged.formats import CacheFormat
from qpaged.models import Tokenizer
from qpaged.sweep.measure._run import PLAIN
from qpaged.sweep.measure._settings import Settings
from qpaged.sweep.measure._step_stream import Pytree, Step, StepStream


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

    @property
    def takes_ragged(self) -> bool:
        return False  # a step takes as many tokens of each sequence

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

    def in_another_dtype(self) -> None:
        """A step computes as it does."""

    def check(self, chunk: int) -> None:
        """Check that the step keeps to :data:`Step`, for one token and for a chunk.

        Raises:
            BadArgumentError: it does not, or its cache cannot be found or is too small.
        """
        for tokens in {1, chunk}:
            returned = jax.eval_shape(self.step, *self._example(tokens))
            if not is_pair(returned):
                raise self._refusal(
                    f"its step must return (logits, state), but returned {described(returned)}."
                )
            logits, state = returned
            shape = getattr(logits, "shape", None)
            if shape is None or shape[:-1] != (self.sequences, tokens):
                raise self._refusal(
                    f"logits must be (sequences, n, vocabulary), for {self.sequences} sequences of {tokens} "
                    f"tokens, but came as {shape}; give those of every token."
                )
            difference = _difference(self.state, state)
            if difference is not None:
                raise self._refusal(
                    f"the state must come back in the structure, shapes and dtypes in which it came, but "
                    f"{difference}."
                )
        try:
            _ = self.found
        except ValueError as error:
            raise self._refusal(str(error)) from error
        for leaf in self.found.leaves:
            sequences = leaf.shape[leaf.axis("batch")]
            length = leaf.shape[leaf.axis("length")]
            if sequences != self.sequences or length < self.longest:
                raise self._refusal(
                    f"the cache must hold {self.sequences} sequences of {self.longest} tokens, as make_step "
                    f"is asked to, but {leaf.path} holds {sequences} of {length}."
                )

    def _refusal(self, reason: str) -> BadArgumentError:
        return BadArgumentError("step", f"{self.name}: {reason}")

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
        if settings.bits_at is not None:
            raise self._refusal(
                "bits_at must be left out, as the cache has the length that the step gives it"
            )
        step, state = self.step, self.state
        if quantizer != PLAIN:
            adopted = quantize_cache(
                self.step, quantizer, example=self._example(1), page_size=settings.page_size
            )
            step, state = adopted, adopted.init(self.state)
        return StepStream(step, state, self.in_cache, self.sequences, self.capacity, settings)

    def compile(self, quantizer: CacheFormat, settings: Settings, sequences: int) -> None:
        """Compile nothing: the step is compiled as it first runs."""

    def logits(self, outputs: jax.Array) -> jax.Array:
        """Return the outputs of a step, which are its logits."""
        return outputs

    def attention_profile(
        self, plain: StepStream, measured: StepStream, tokens: np.ndarray, settings: Settings
    ) -> None:
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


def _constants(program: Any) -> Iterator[jax.Array]:
    """Yield the arrays that a jaxpr closes over, and those of the jaxprs inside it."""
    yield from getattr(program, "consts", ())
    for equation in getattr(program, "jaxpr", program).eqns:
        for inner in inner_jaxprs(equation):
            yield from _constants(inner)


def is_pair(returned: Any) -> bool:
    """Return True for a pair, as a step and what makes one return."""
    return isinstance(returned, tuple | list) and len(returned) == 2


def described(returned: Any) -> str:
    """Return in words what a function returned instead of a pair."""
    if isinstance(returned, tuple | list):
        return f"{len(returned)} values"
    if hasattr(returned, "shape"):
        return "one array"
    return "None" if returned is None else f"a {type(returned).__name__}"


def _difference(before: Pytree, after: Pytree) -> str | None:
    """Return how a state differs from the one before, in structure, shapes or dtypes; None if it does not."""
    was, came = _leaves(before), _leaves(after)
    for place in was | came:
        if was.get(place) != came.get(place):
            return f"state{place} was {was.get(place, 'not there')}, and is {came.get(place, 'not there')}"
    tree, other_tree = map(jax.tree_util.tree_structure, (before, after))
    return None if str(tree) == str(other_tree) else f"it was {tree}, and is {other_tree}"


def _leaves(state: Pytree) -> dict[str, str]:
    """Return the dtype and the shape of each leaf, by its place."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        leaves[jax.tree_util.keystr(path)] = f"{leaf.dtype}{list(leaf.shape)}"
    return leaves
