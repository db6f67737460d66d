"""Indices of tokens and pages: checked and brought to int32 before any arithmetic, and mapped to slots."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qpaged._arguments import shown
from qpaged._promotion import promoting_ranks
from qpaged.arrays import clip_to_int32
from qpaged.cache._step_tokens import Members, StepTokens
from qpaged.pools import SlotMapping


def as_indices(name: str, values: ArrayLike) -> jax.Array:
    """Return ``values`` as int32.

    What is beyond the range of int32 becomes one of its ends: past every pool, or negative.

    Raises:
        TypeError: the values are not integers; ``name`` is the argument.
        ValueError: they are lists of several lengths.
    """
    array = values if isinstance(values, jax.Array) else _to_numpy(name, values)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        came = f"came as {array.dtype.name}; convert with .astype(np.int32)"
        if array.dtype.kind in "OSU":  # objects and text
            came = f"got {shown(values)}; give an array of integers, or a list"
        raise TypeError(f"{name} must be integers, but {came}.")
    return jnp.asarray(clip_to_int32(array))


def _to_numpy(name: str, values: ArrayLike) -> np.ndarray:
    """Return values that are no ``jax.Array`` as a NumPy array."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(
            f"{name} must be integers in rows of one length, but got {shown(values)}; fill a page table up "
            f"with num_pages_per_layer, which is no page."
        ) from error
    return array.astype(np.int32) if array.size == 0 else array  # an empty list is of floats to NumPy


@promoting_ranks
def slot_mapping(step: StepTokens, page_size: int, num_pages: int) -> SlotMapping:
    """Return where tokens go: page = page_table[position // page_size], slot = position mod page_size.

    The page is ``num_pages``, one past the last, for a position that is negative or past the table, and for
    an entry that is not a page.
    """
    position, table, starts, _ = step
    logical_page, slot = position // page_size, position % page_size
    if not table.size:
        return SlotMapping(jnp.full_like(position, num_pages), slot, logical_page, table)
    inside, sequence = (position >= 0) & (logical_page < table.shape[1]), None
    if starts is not None:
        _, _, sequence, _, is_member = Members.of(starts, len(position))
        inside &= is_member
    logical_page = jnp.where(inside, logical_page, 0)
    if len(table) == 1:
        page = table[0, logical_page]
    elif sequence is None:
        page = jnp.take_along_axis(table, logical_page[:, None], axis=1)[:, 0]
    else:
        page = table[sequence, logical_page]
    is_page = inside & (page >= 0) & (page < num_pages)
    return SlotMapping(jnp.where(is_page, page, num_pages), slot, logical_page, table, sequence)
