"""`promoting_ranks`: the library's own arithmetic promotes ranks, whatever a program asks of its own."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def promoting_ranks(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function, so that `jax_numpy_rank_promotion` does not concern what happens inside."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return call
