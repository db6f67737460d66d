"""Clear and copy pages in every array of a pool, and keep its sharding."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from qpaged._compat import explicit_sharding, with_auto_axes
from qpaged.arrays import gather_rows, write_rows

F = TypeVar("F", bound=Callable[..., Any])
PAGE_AXIS = 1  # of every array of a pool: codes and scales alike


def keep_sharding(update: F, pool: Any) -> F:
    """Return ``update``, a function of a pool and indices, with its output placed as ``pool`` is.

    Under Explicit mesh axes JAX asks for the sharding of every scatter's result, which is the pool's own.
    """
    leaves = jax.tree_util.tree_leaves(pool)
    # All the arrays of a pool are made on one mesh: if one is on no such mesh, none is.
    if any(explicit_sharding(leaf) is None for leaf in leaves):
        return update
    return with_auto_axes(update, jax.tree_util.tree_map(explicit_sharding, pool))  # type: ignore[return-value]


def clear_pages(pool: Any, indices: jax.Array) -> Any:
    """Return a pool with zeros for these pages (n,) of all its arrays."""

    def clear_part(part: jax.Array) -> jax.Array:
        zeros = jnp.zeros((len(indices), part.shape[0], *part.shape[2:]), part.dtype)
        return write_rows(part, (PAGE_AXIS,), (indices,), zeros)

    return jax.tree_util.tree_map(clear_part, pool)


def copy_pages(pool: Any, source: jax.Array, target: jax.Array) -> Any:
    """Return a pool with pages ``source`` (n,) copied to ``target`` (n,) in all its arrays.

    All sources are read before any target is written. A pair with a page out of range is dropped; of several
    pairs with one target the last counts.
    """

    def copy_part(part: jax.Array) -> jax.Array:
        num_pages = part.shape[PAGE_AXIS]
        rows = gather_rows(part, (PAGE_AXIS,), source[:, None])
        return write_rows(part, (PAGE_AXIS,), (_final_targets(source, target, num_pages),), rows)

    return jax.tree_util.tree_map(copy_part, pool)


def _final_targets(source: jax.Array, target: jax.Array, num_pages: int) -> jax.Array:
    """Return ``target``, but "no page" for pairs out of range and all but the last pair of a target."""
    inside = (source >= 0) & (source < num_pages) & (target >= 0) & (target < num_pages)
    target = jnp.where(inside, target, num_pages)
    order = jnp.argsort(target, stable=True)
    in_order = target[order]
    # The sort is stable, so the last of a run of equal targets is the last pair.
    is_last = jnp.append(in_order[1:] != in_order[:-1], True)
    keeps = jnp.zeros(len(target), bool).at[order].set(is_last)
    return jnp.where(keeps, target, num_pages)
