"""Old names of arguments and modules, which go on working for one version, with a warning."""

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed_argument(old: str, new: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator whose function takes the keyword ``old`` as ``new``, with a DeprecationWarning."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if old in kwargs:
                if new in kwargs:
                    raise TypeError(
                        f"{function.__qualname__} takes {new}, once called {old}, but both came; "
                        f"leave {old} out."
                    )
                warn_renamed(f"{old}= of {function.__qualname__}", f"{new}=")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def warn_renamed(old: str, new: str) -> None:
    """Warn the caller's caller that ``old`` is called ``new`` now."""
    warnings.warn(f"{old} is now {new}; the old name goes with the next version.", DeprecationWarning, 3)
