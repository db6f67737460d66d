"""Lane rows: the codes of several slots in one row of a TPU's 128 lanes.

A TPU lays another axis than the last along its lanes where the last one is short, and would then copy the
whole pool into row-major order for every kernel that reads pages. A pool whose rows fill the lanes is laid
out as it is written. Codes in two planes fill them several times over, since the length of their slots is no
power of two.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import jax

LANES = 128

Codes = TypeVar("Codes", jax.Array, jax.ShapeDtypeStruct)


def count_slots_per_row(shape: Sequence[int], several_times: bool = False) -> int:
    """Return how many slots of codes (..., slots, width) fill the lanes of a row; 1 if they fill none.

    Args:
        shape: of the codes, one slot to a row.
        several_times: whether a row may fill the lanes several times over.
    """
    slots, width = shape[-2:]
    slots_per_row = LANES // math.gcd(width, LANES)
    least_rows = 2  # XLA on CPU copies a pool whose rows are an axis of one
    if slots_per_row * width != LANES:
        if not several_times:
            return 1
        least_rows = 4  # bytes in a word of a TPU, which packs rows and would lay out fewer another way
    if slots % slots_per_row or slots // slots_per_row < least_rows:
        return 1
    return slots_per_row


def to_lane_rows(codes: jax.Array, slots_per_row: int) -> jax.Array:
    """Return codes (..., slots, width) as (..., slots / slots_per_row, slots_per_row * width)."""
    if slots_per_row == 1:
        return codes
    *leading, slots, width = codes.shape
    # In two steps, since a reshape that splits and merges at once loses an Explicit sharding.
    rows = codes.reshape(*leading, slots // slots_per_row, slots_per_row, width)
    return rows.reshape(*leading, slots // slots_per_row, slots_per_row * width)


def from_lane_rows(codes: Codes, slots_per_row: int) -> Codes:
    """Return codes (..., rows, lanes) as (..., slots, width); of a ShapeDtypeStruct, one."""
    if slots_per_row == 1:
        return codes
    shape = slot_shape(codes.shape, slots_per_row)
    if isinstance(codes, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, codes.dtype)  # type: ignore[return-value]
    return codes.reshape(*codes.shape[:-1], slots_per_row, shape[-1]).reshape(shape)


def slot_shape(shape: Sequence[int], slots_per_row: int) -> tuple[int, ...]:
    """Return the shape (..., slots, width) of codes that are stored in rows of ``shape``."""
    if slots_per_row == 1:
        return tuple(shape)
    *leading, rows, lanes = shape
    return *leading, rows * slots_per_row, lanes // slots_per_row
