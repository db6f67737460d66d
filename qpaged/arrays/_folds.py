"""Folds: the codes of several slots in one row of a TPU's lanes.

A TPU lays another axis than the last along its lanes where that is short, and would bring a pool that lies so
into another order for every kernel that copies pages. One whose rows are full lies as it is written.
"""

from collections.abc import Sequence
from typing import Any

import jax

LANES = 128


def folds_of(shape: Sequence[int]) -> int:
    """How many slots of codes (..., slots, width) fill a row; 1 where they do not fill several."""
    slots, width = shape[-2:]
    fill = 0 < width < LANES and LANES % width == 0 and slots % (LANES // width) == 0
    return LANES // width if fill and slots * width > LANES else 1  # an axis of one costs XLA on CPU a copy


def fold(codes: Any, folds: int) -> Any:
    """Codes (..., slots, width) as (..., slots / folds, folds · width)."""
    if folds == 1:
        return codes
    *outer, slots, width = codes.shape
    apart = codes.reshape(*outer, slots // folds, folds, width)  # a step at a time, which keeps shardings
    return apart.reshape(*outer, slots // folds, folds * width)


def unfold(codes: Any, folds: int) -> Any:
    """The inverse of :func:`fold`; also of what has a shape only."""
    if folds == 1:
        return codes
    shape = unfolded(codes.shape, folds)
    if isinstance(codes, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, codes.dtype)
    return codes.reshape(*codes.shape[:-1], folds, shape[-1]).reshape(shape)


def unfolded(shape: Sequence[int], folds: int) -> tuple[int, ...]:
    """The shape that :func:`unfold` makes of ``shape``."""
    if folds == 1:
        return tuple(shape)
    *outer, rows, lanes = shape
    return *outer, rows * folds, lanes // folds
