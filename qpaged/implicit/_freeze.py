"""Training some children of implicit arrays and leaving the others alone: qax's `utils.freeze_keys`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from qpaged._compat import Pytree


def freeze_keys(optimizer: Any, arr_type: type, keys: Iterable[str], use_scalar_zeros: bool = False) -> Any:
    """Return an optax optimizer that does not update certain children of certain implicit arrays.

    Args:
        optimizer: an `optax.GradientTransformation`, or any named pair of `init` and `update`.
        arr_type: the class of implicit array.
        keys: names of the fields to leave alone.
        use_scalar_zeros: make the frozen updates scalars, which are cheaper to add.

    Returns:
        A transformation of the same type. Frozen children have no part in its state's changes: their
        gradients are zero for the optimizer, and their updates are zero whatever it returns.
    """
    frozen = frozenset(keys)

    def with_frozen_zeroed(tree: Pytree, params: Pytree | None, scalar: bool) -> Pytree:
        def is_frozen_type(node: Any) -> bool:
            return isinstance(node, arr_type)

        def zero_if_frozen_type(node: Any, param: Any) -> Any:
            if not is_frozen_type(node):
                return node
            return _with_children_zeroed(node, param, frozen, scalar)

        if params is None:
            params = tree
        return jax.tree_util.tree_map(zero_if_frozen_type, tree, params, is_leaf=is_frozen_type)

    def update(updates: Pytree, state: Any, params: Pytree | None = None, **extra: Any) -> tuple[Pytree, Any]:
        gradients = with_frozen_zeroed(updates, params, scalar=False)
        updates, state = optimizer.update(gradients, state, params, **extra)
        return with_frozen_zeroed(updates, params, scalar=use_scalar_zeros), state

    return optimizer._replace(update=update)


def _with_children_zeroed(array: Any, param: Any, frozen: frozenset[str], scalar: bool) -> Any:
    """Replace the frozen children of an update by zeros of the parameter's dtype."""

    def zeros(leaf: jax.Array) -> jax.Array:
        # The gradient of an integer has dtype float0, which cannot be added to a parameter.
        return jnp.zeros(() if scalar else leaf.shape, leaf.dtype)

    children, aux = array.tree_flatten_with_keys()
    param_children, _ = param.tree_flatten_with_keys()
    new_children = []
    for (key, child), (_, param_child) in zip(children, param_children, strict=True):
        if getattr(key, "name", key) in frozen:
            child = jax.tree_util.tree_map(zeros, param_child)
        new_children.append(child)
    return array.tree_unflatten(aux, new_children)
