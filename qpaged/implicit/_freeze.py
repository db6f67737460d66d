"""Train some children of implicit arrays and leave the others as they are: qax's `utils.freeze_keys`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp


def freeze_keys(optimizer: Any, arr_type: type, keys: Iterable[str], use_scalar_zeros: bool = False) -> Any:
    """An optax optimizer that does not update certain children of certain implicit arrays.

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

    def zeroed(tree: Any, params: Any, scalar: bool) -> Any:
        def of_array(node: Any, param: Any) -> Any:
            return _zero_children(node, param, frozen, scalar) if isinstance(node, arr_type) else node

        params = tree if params is None else params
        return jax.tree_util.tree_map(of_array, tree, params, is_leaf=lambda node: isinstance(node, arr_type))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        updates, state = optimizer.update(zeroed(updates, params, False), state, params, **extra)
        return zeroed(updates, params, use_scalar_zeros), state

    return optimizer._replace(update=update)


def _zero_children(array: Any, param: Any, frozen: frozenset[str], scalar: bool) -> Any:
    """Zeros of the parameter's dtype, for the gradient of an integer has none that can be added."""
    children, aux = array.tree_flatten_with_keys()
    originals, _ = param.tree_flatten_with_keys()
    return array.tree_unflatten(
        aux,
        [
            jax.tree_util.tree_map(lambda p: jnp.zeros(() if scalar else p.shape, p.dtype), original)
            if getattr(key, "name", key) in frozen
            else child
            for (key, child), (_, original) in zip(children, originals, strict=True)
        ],
    )
