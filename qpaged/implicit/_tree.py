"""Pytrees that hold implicit arrays: flattening them layer by layer, and keeping their shapes current."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import PyTreeDef

from qpaged._compat import DType, Operand, Pytree
from qpaged.implicit._fields import is_stored, read_or_none
from qpaged.implicit._value import ImplicitValue, is_implicit

LayerStructure: TypeAlias = tuple[PyTreeDef, list[PyTreeDef]]  # of the tree, and of every value in it


def flatten(tree: Pytree) -> tuple[list[Any], PyTreeDef]:
    """Flatten a tree with its implicit arrays as leaves."""
    return jax.tree_util.tree_flatten(tree, is_leaf=is_implicit)


def flatten_one_layer(tree: Pytree) -> tuple[list[Any], LayerStructure]:
    """Flatten a tree and its implicit arrays into their children, with implicit children as leaves."""
    values, tree_structure = flatten(tree)
    children: list[Any] = []
    value_structures = []
    for value in values:
        value_children, structure = _flatten_children(value)
        children += value_children
        value_structures.append(structure)
    return children, (tree_structure, value_structures)


def unflatten_one_layer(structure: LayerStructure, children: Sequence[Any]) -> Pytree:
    """Invert `flatten_one_layer`."""
    tree_structure, value_structures = structure
    remaining = iter(children)
    values = []
    for value_structure in value_structures:
        value_children = [next(remaining) for _ in range(value_structure.num_leaves)]
        values.append(value_structure.unflatten(value_children))
    return tree_structure.unflatten(values)


def _flatten_children(value: Operand) -> tuple[list[Any], PyTreeDef]:
    # JAX asks about the root, too, which must not be a leaf of itself.
    def is_leaf(node: Pytree) -> bool:
        return is_implicit(node) and node is not value

    return jax.tree_util.tree_flatten(value, is_leaf=is_leaf)


def flatten_fully(tree: Pytree) -> tuple[list[Any], PyTreeDef]:
    """Flatten a tree down to its arrays."""
    return jax.tree_util.tree_flatten(tree)


def with_logical_type(value: ImplicitValue, shape: tuple[int, ...], dtype: DType) -> ImplicitValue:
    """Return an implicit array whose stored shape and dtype are those it has where it is used.

    A transformation changes the children of an implicit array (vmap and scan take an axis away, shard_map
    divides it), but does not know of a shape that is stored beside them.
    """
    stale: dict[str, Any] = {}
    for name, current in (("shape", tuple(shape)), ("dtype", dtype)):
        if is_stored(type(value), name) and read_or_none(value, name) != current:
            stale[name] = current
    if not stale:
        return value
    value = copy.copy(value)  # the original belongs to the caller
    for name, current in stale.items():
        object.__setattr__(value, name, current)  # the class may be a frozen dataclass
    return value


def same_layout(left: Pytree, right: Pytree) -> bool:
    """Return True if two trees have the same structure, and leaves of the same shapes and dtypes."""
    return layout(left) == layout(right)


def same_structure(left: Pytree, right: Pytree) -> bool:
    """Return True if two trees have the same structure, whatever their leaves."""
    return bool(flatten_fully(left)[1] == flatten_fully(right)[1])


def layout(tree: Pytree) -> tuple[PyTreeDef, tuple[tuple[tuple[int, ...], DType], ...]]:
    """Return the structure of a tree, and the shapes and dtypes of its leaves."""
    leaves, structure = flatten_fully(tree)
    return structure, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
