"""Indices of tokens and pages: checked and brought to int32 before any arithmetic."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qpaged.arrays import clipped


def as_indices(name: str, values: Any) -> jax.Array:
    """``values`` as int32: what is beyond its range is as good as its ends, past every pool or negative.

    Raises:
        TypeError: the values are not integers.
    """
    if not isinstance(values, jax.Array):
        values = np.asarray(values)
        if values.size == 0:
            values = values.astype(np.int32)
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise TypeError(
            f"{name} must be integers, but came as {values.dtype.name}; convert with .astype(int32)."
        )
    return jnp.asarray(clipped(values))


def slots_of(position: jax.Array, page_table: jax.Array, page_size: int, num_pages: int):
    """Where tokens go: (page, slot) of each, with page ``num_pages`` for what has no place.

    page = page_table[position // page_size], slot = position mod page_size. A position that is negative
    or past the table, and an entry that is not a page, have none.

    Args:
        position: (tokens,) int32.
        page_table: (pages_per_sequence,) for one sequence, or (tokens, pages_per_sequence), int32.
    """
    logical, slot = position // page_size, position % page_size
    inside = (position >= 0) & (logical < page_table.shape[-1])
    if page_table.shape[-1] == 0:
        return jnp.full_like(position, num_pages), slot
    logical = jnp.where(inside, logical, 0)
    if page_table.ndim == 1:
        page = page_table[logical]
    else:
        page = jnp.take_along_axis(page_table, logical[:, None], axis=1)[:, 0]
    return jnp.where(inside & (page >= 0) & (page < num_pages), page, num_pages), slot
