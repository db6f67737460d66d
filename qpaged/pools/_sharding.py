"""The sharding of a pool, which what changes it keeps."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from qpaged._compat import explicit_sharding, with_auto_axes

F = TypeVar("F", bound=Callable[..., Any])


def keep_sharding(update: F, pool: Any) -> F:
    """Return ``update``, a function of a pool and indices, with its output placed as ``pool`` is.

    Under Explicit mesh axes JAX asks for the sharding of every scatter's result, which is the pool's own.
    """
    leaves = jax.tree_util.tree_leaves(pool)
    # All the arrays of a pool are made on one mesh: if one is on no such mesh, none is.
    if any(explicit_sharding(leaf) is None for leaf in leaves):
        return update
    return with_auto_axes(update, jax.tree_util.tree_map(explicit_sharding, pool))  # type: ignore[return-value]
