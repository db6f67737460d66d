"""The arrays among a function's arguments, each with a path that names it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from qpaged._compat import explicit_sharding
from qpaged.arrays import is_cache_array

Pytree: TypeAlias = Any
"""Any pytree: JAX has no type for it."""

KeyPath: TypeAlias = Sequence[Any]
"""Keys of a pytree, as ``jax.tree_util.tree_flatten_with_path`` gives them."""


class Arguments:
    """Arguments of a function, taken apart into arrays with paths, and the rest, which stays as it is.

    A path is the name of an argument, and then the keys that lead to the array, with slashes between. A
    quantized array counts as one, with exact pages or without.

    Attributes:
        paths: of the arrays, in the order of the arguments.
    """

    def __init__(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]):
        leaves_with_keys, self._treedef = jax.tree_util.tree_flatten_with_path(
            (tuple(args), dict(kwargs)), is_leaf=is_cache_array
        )
        parameters = _positional_parameters(function)
        self.paths: list[str] = []
        self._leaves: list[Any] = []
        self._array_positions: list[int] = []  # in _leaves
        for position, (keys, leaf) in enumerate(leaves_with_keys):
            self._leaves.append(leaf)
            # Python's numbers and flags stay as they are: a step may branch on them.
            if hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, type):
                self._array_positions.append(position)
                self.paths.append(_argument_path(parameters, keys))

    @property
    def arrays(self) -> list[Any]:
        """The arrays: of JAX, of NumPy, quantized ones, or their shapes alone."""
        return [self._leaves[position] for position in self._array_positions]

    @property
    def avals(self) -> list[jax.ShapeDtypeStruct]:
        """The logical shapes and dtypes of the arrays, and their shardings on meshes with Explicit axes."""
        structs = []
        for array in self.arrays:
            is_array = is_cache_array(array)
            sharding = array.explicit_sharding() if is_array else explicit_sharding(array)
            structs.append(jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding))
        return structs

    def with_arrays(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments, positional and by name, with other arrays in place of these."""
        leaves = list(self._leaves)
        for position, array in zip(self._array_positions, arrays, strict=True):
            leaves[position] = array
        return jax.tree_util.tree_unflatten(self._treedef, leaves)


def example_arguments(
    step: Callable[..., Any], example: Sequence[Any] | Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of an example by position and by name, or raise unless the step takes them."""
    if isinstance(example, Mapping):
        args, kwargs = (), dict(example)
    elif isinstance(example, tuple | list):
        args, kwargs = tuple(example), {}
    else:
        raise TypeError(
            f"example must be a tuple of the step's arguments, or a dictionary of them by name, but came as "
            f"{type(example).__name__}; of a single argument it is (argument,)."
        )
    try:
        signature = inspect.signature(step)
    except (TypeError, ValueError):  # builtins and some compiled functions have no signature
        return args, kwargs
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        name = getattr(step, "__name__", "step")
        raise TypeError(
            f"example must hold the arguments of {name}{signature}, but does not: {error}. Where some are "
            f"taken by name alone, give all in a dictionary."
        ) from error
    return args, kwargs


def path_name(keys: KeyPath) -> str:
    """Return the keys of a pytree's path with slashes between."""
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def path_under(parent: str, keys: KeyPath) -> str:
    """Return the path that the keys lead to under a parent's path."""
    return "/".join(part for part in (parent, path_name(keys)) if part)


def as_arrays(tree: Pytree) -> Pytree:
    """Return a tree with its numbers and flags as arrays, as the outputs of a traced function must be.

    What can be no array, as a name, becomes None.
    """

    def as_array(leaf: Any) -> jax.Array | None:
        if hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex):
            return jnp.asarray(leaf)
        return None

    return jax.tree_util.tree_map(as_array, tree)


def _positional_parameters(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # builtins and some compiled functions have no signature
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _argument_path(parameters: Sequence[str], keys: KeyPath) -> str:
    """Return the path of a leaf of the tree (args, kwargs)."""
    args_or_kwargs, argument, *inner_keys = keys
    if args_or_kwargs.idx == 1:
        name = str(argument.key)
    elif argument.idx < len(parameters):
        name = parameters[argument.idx]
    else:
        name = f"args[{argument.idx}]"
    return path_under(name, inner_keys)
