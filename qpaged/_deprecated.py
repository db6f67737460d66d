"""Old names of arguments and modules, which go on working for one version, with a warning."""

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

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


def renamed_attributes(module: str, renamed: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module's ``__getattr__``, which resolves old names with a DeprecationWarning.

    Args:
        module: the module's name.
        renamed: the full name of what each old one stands for.
    """

    def get(name: str) -> Any:
        if name not in renamed:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", renamed[name])
        home, _, new = renamed[name].rpartition(".")
        return getattr(importlib.import_module(home), new)

    return get


def warn_renamed(old: str, new: str) -> None:
    """Warn the caller's caller that ``old`` is called ``new`` now."""
    warnings.warn(f"{old} is now {new}; the old name goes with the next version.", DeprecationWarning, 3)
