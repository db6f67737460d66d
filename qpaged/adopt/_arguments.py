"""The arrays among a function's arguments, and what they are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qpaged.arrays import QuantizedArray


class Arguments:
    """Arguments taken apart into arrays, each with a path, and the rest, which stays what it is.

    A path is the name of an argument, and then the keys that lead to the array, with slashes between. A
    QuantizedArray counts as one array.
    """

    def __init__(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Any):
        keyed, self._tree = jax.tree_util.tree_flatten_with_path(
            (tuple(args), dict(kwargs)), is_leaf=_quantized
        )
        self._leaves = [leaf for _, leaf in keyed]
        self._which = [
            i for i, leaf in enumerate(self._leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        ]
        names = _parameters(function)
        self.paths = [_argument_path(names, keyed[index][0]) for index in self._which]

    @property
    def arrays(self) -> list[Any]:
        return [self._leaves[index] for index in self._which]

    @property
    def structs(self) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in self.arrays]

    def replaced(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, positional and by name, with other arrays."""
        leaves = list(self._leaves)
        for index, array in zip(self._which, arrays, strict=True):
            leaves[index] = array
        return jax.tree_util.tree_unflatten(self._tree, leaves)


def join(path: Sequence[Any]) -> str:
    """Keys of a pytree's path, with slashes between."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def leaves_by_path(tree: Any, name: str = "") -> dict[str, Any]:
    """The leaves of a tree by path, which begins with ``name``."""
    keyed = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_quantized)
    return {beneath(name, path): leaf for path, leaf in keyed}


def beneath(name: str, path: Sequence[Any]) -> str:
    """The path of what is at ``path`` under ``name``."""
    return "/".join(filter(None, (name, join(path))))


def _quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedArray)


def _parameters(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a function that does not say
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _argument_path(names: Sequence[str], path: Sequence[Any]) -> str:
    kind, first, *rest = path
    if kind.idx == 1:
        name = str(first.key)
    else:
        name = names[first.idx] if first.idx < len(names) else f"args[{first.idx}]"
    return beneath(name, rest)


def as_arrays(tree: Any) -> Any:
    """A tree whose numbers and flags are arrays, too."""
    return jax.tree_util.tree_map(jnp.asarray, tree)
