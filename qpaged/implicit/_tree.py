"""Pytrees that hold implicit arrays, one layer at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import jax

from qpaged.implicit._fields import peek, stores
from qpaged.implicit._value import ImplicitValue, is_implicit


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Flatten a tree, implicit arrays kept whole."""
    return jax.tree_util.tree_flatten(tree, is_leaf=is_implicit)


def flatten_one_layer(tree: Any) -> tuple[list[Any], Any]:
    """Flatten a tree and the implicit arrays in it, but not the implicit arrays in those."""
    outer, outer_tree = flatten(tree)
    leaves: list[Any] = []
    layers = []
    for value in outer:
        inner, inner_tree = _open(value)
        leaves += inner
        layers.append(inner_tree)
    return leaves, (outer_tree, layers)


def unflatten_one_layer(structure: Any, leaves: Sequence[Any]) -> Any:
    """The inverse of `flatten_one_layer`."""
    outer_tree, layers = structure
    remaining = iter(leaves)
    outer = [tree.unflatten([next(remaining) for _ in range(tree.num_leaves)]) for tree in layers]
    return outer_tree.unflatten(outer)


def _open(value: Any) -> tuple[list[Any], Any]:
    return jax.tree_util.tree_flatten(value, is_leaf=lambda node: is_implicit(node) and node is not value)


def restated(value: ImplicitValue, shape: tuple[int, ...], dtype: Any) -> ImplicitValue:
    """The same array, with its stored shape and dtype set to what they are where it is used.

    A transformation changes the children of an implicit array (vmap and scan take an axis away,
    shard_map divides it), but it cannot know about a shape that is stored beside them.
    """
    news = {"shape": tuple(shape), "dtype": dtype}
    stale = {
        name: new for name, new in news.items() if stores(type(value), name) and peek(value, name) != new
    }
    if not stale:
        return value
    value = copy.copy(value)
    for name, new in stale.items():
        object.__setattr__(value, name, new)
    return value


def flatten_fully(tree: Any) -> tuple[list[Any], Any]:
    """Flatten a tree down to its arrays."""
    return jax.tree_util.tree_flatten(tree)


def same_layout(left: Any, right: Any) -> bool:
    """Whether two values have the same tree structure, and leaves of the same shapes and dtypes."""
    left_leaves, left_tree = flatten_fully(left)
    right_leaves, right_tree = flatten_fully(right)
    if left_tree != right_tree:
        return False
    return all(
        a.shape == b.shape and a.dtype == b.dtype for a, b in zip(left_leaves, right_leaves, strict=True)
    )
