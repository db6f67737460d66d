"""Feeds tokens through a step function and its cache."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from qpaged.arrays import is_quantized
from qpaged.sweep.measure._model import Prefilled
from qpaged.sweep.measure._settings import Settings

Pytree: TypeAlias = Any

Step = Callable[[Pytree, jax.Array, jax.Array], tuple[jax.Array, Pytree]]
"""step(state, tokens, positions) returns (logits, state).

Tokens and positions are [sequences, n] int32, logits [sequences, n, vocabulary]. The state is a pytree that
holds a fresh cache, and whatever else the model needs; its structure, shapes and dtypes stay.
"""


class StepStream:
    """A step with its state; see :class:`Stream`.

    Args:
        state: with a fresh cache.
        in_cache: True for each leaf of the state that belongs to the cache.
        batch: sequences of each step.
        capacity: tokens that the cache holds, of all sequences together.
    """

    def __init__(
        self,
        step: Step,
        state: Pytree,
        in_cache: list[bool],
        batch: int,
        capacity: int,
        settings: Settings,
    ):
        self._in_cache = in_cache
        self._batch = batch
        self._settings = settings
        self._fresh, self._tree = jax.tree_util.tree_flatten(state, is_leaf=is_quantized)
        cache, _ = self._split(self._fresh)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(cache))
        self.bytes_per_token = size / capacity
        self.dtype = jnp.dtype(cache[0].dtype).name

        def run(
            cache: list[Pytree], rest: list[Pytree], tokens: jax.Array, positions: jax.Array
        ) -> tuple[jax.Array, list[Pytree], list[Pytree]]:
            logits, state = step(self._join(cache, rest), tokens, positions)
            leaves = jax.tree_util.tree_leaves(state, is_leaf=is_quantized)
            cache, rest = self._split(leaves)
            return logits.astype(jnp.float32), cache, rest

        # The cache alone is donated: the rest, such as weights, is used again by the next stream.
        self._run = jax.jit(run, donate_argnums=0)

    def begin(self, sequences: int) -> None:
        """Start over with a copy of the fresh cache, because each step donates the cache that it is given."""
        cache, self._rest = self._split(self._fresh)
        self._cache = jax.tree_util.tree_map(jnp.copy, cache)

    def prefill(self, tokens: np.ndarray) -> Iterator[Prefilled]:
        """Feed the beginning of all sequences, [sequences, n], chunk by chunk."""
        rows, length = tokens.shape
        size = min(self._settings.chunk, length)
        for start in range(0, length, size):
            part = tokens[:, start : start + size]
            columns = slice(start, start + part.shape[1])
            yield Prefilled(slice(0, rows), columns, self._feed(part, start))

    def decode(self, tokens: np.ndarray, position: int) -> jax.Array:
        """Feed one token to each sequence, all at the same position."""
        return self._feed(tokens[:, None], position)[:, 0]

    def _feed(self, tokens: np.ndarray, start: int) -> jax.Array:
        """Feed tokens [sequences, n] from position ``start`` on, and return their logits."""
        missing = self._batch - len(tokens)
        padded = np.pad(tokens, ((0, missing), (0, 0))).astype(np.int32)
        positions = np.broadcast_to(start + np.arange(tokens.shape[1], dtype=np.int32), padded.shape)
        logits, self._cache, self._rest = self._run(self._cache, self._rest, padded, positions)
        return logits[: len(tokens)]

    def _split(self, leaves: list[Pytree]) -> tuple[list[Pytree], list[Pytree]]:
        """Return the leaves of the cache, and the others."""
        cache: list[Pytree] = []
        rest: list[Pytree] = []
        for leaf, in_cache in zip(leaves, self._in_cache, strict=True):
            (cache if in_cache else rest).append(leaf)
        return cache, rest

    def _join(self, cache: list[Pytree], rest: list[Pytree]) -> Pytree:
        """Return the state whose leaves :meth:`_split` separated."""
        cache_leaves, other_leaves = iter(cache), iter(rest)
        leaves = [next(cache_leaves if in_cache else other_leaves) for in_cache in self._in_cache]
        return jax.tree_util.tree_unflatten(self._tree, leaves)
