"""`compiled_if_eager`: functions that are compiled once where they are called outside of any program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import jax

from qpaged._compat import Pytree
from qpaged._promotion import promoting_ranks

P = ParamSpec("P")
R = TypeVar("R")


def any_traced(*trees: Pytree) -> bool:
    """Return True if a leaf of the trees is a tracer: what is done with them becomes part of a program."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree_util.tree_leaves(trees))


def compiled_if_eager(static_argnums: Sequence[int] = ()) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function of pytrees of arrays: it is jitted where all of them are concrete.

    Called eagerly, its loops would be compiled anew each time, as their bodies are other functions each time.
    A program that is being traced gets the function's operations as they are, without a call around them.

    Args:
        static_argnums: the positions of arguments that are no arrays, as `jax.jit` takes them.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        compiled = jax.jit(function, static_argnums=tuple(static_argnums))

        @promoting_ranks
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            arrays = [arg for index, arg in enumerate(args) if index not in static_argnums]
            if any_traced(arrays, kwargs):
                return function(*args, **kwargs)
            return compiled(*args, **kwargs)

        return call

    return decorate
