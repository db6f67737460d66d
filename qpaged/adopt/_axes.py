"""Infer which axis of a cache array is what, from how the program writes and reads it."""

from __future__ import annotations

from collections.abc import Sequence

from qpaged.adopt._dataflow import NO_AXES, Axes, Read, Write


def length_candidates(shape: Sequence[int], writes: Sequence[Write], reads: Sequence[Read]) -> Axes:
    """Return the axes that may be the length.

    Every partial write is partial along the length. Other axes may be written in part as well, but dots read
    them in another way.
    """
    partial = [write.partial_axes for write in writes if write.partial_axes]
    always_partial = frozenset.intersection(*partial) if partial else NO_AXES
    # One sequence may be written at a time, but all of them are read by a dot that batches over them. A pool
    # of slots, which is read by a gather of (batch, length) slots, has both along its length.
    batched = NO_AXES.union(*(read.batch - read.free - read.contracting for read in reads))
    # One layer may be written at a time, but it is then read alone, too.
    selected_axes = [frozenset(axis for axis, _ in read.selected) for read in reads]
    always_selected = frozenset.intersection(*selected_axes)
    return frozenset(axis for axis in always_partial - batched - always_selected if shape[axis] > 1)


def head_dim_candidates(length: int, keys: Sequence[Read], values: Sequence[Read]) -> Axes:
    """Return the axes that may be head_dim."""
    per_read = axes_with_head_dim(keys, values)
    shared = frozenset.intersection(*per_read) - {length}
    if shared:
        return shared
    # The reads share none. If the first one leaves several, the error lists them.
    return per_read[0] - {length}


def axes_with_head_dim(keys: Sequence[Read], values: Sequence[Read]) -> list[Axes]:
    """Return for each read the axes among which head_dim is: keys contract it, values keep it."""
    return [read.contracting for read in keys] + [read.free for read in values]


def infer_axis_names(
    ndim: int, length: int, head_dim: int, keys: Sequence[Read], values: Sequence[Read]
) -> tuple[str, ...]:
    """Return the names of all axes, given which one is the length and which one is head_dim."""
    names = {length: "length", head_dim: "head_dim"}
    # What a read selects one index of is no part of a layer's own keys or values.
    selected_axes = {axis for read in (*keys, *values) for axis, _ in read.selected}
    for axis in sorted(selected_axes - names.keys()):
        is_pair = "pair" not in names.values() and _separates_keys_from_values(axis, keys, values)
        names[axis] = "pair" if is_pair else "layers"
    # Nothing in a program tells the batch from the heads. Caches have them in this order, and to quantize
    # them it makes no difference. Only a pool of slots has no batch apart.
    unnamed = [axis for axis in range(ndim) if axis not in names]
    has_batch = not any(length in read.batch for read in (*keys, *values))
    names.update(zip(unnamed, ("batch", "heads") if has_batch else ("heads",), strict=False))
    return tuple(names.get(axis, "layers") for axis in range(ndim))


def _separates_keys_from_values(axis: int, keys: Sequence[Read], values: Sequence[Read]) -> bool:
    """Return True if keys and values are read at known and different indices of an axis."""
    if not keys or not values:
        return False
    key_indices = {dict(read.selected).get(axis) for read in keys}
    value_indices = {dict(read.selected).get(axis) for read in values}
    all_known = None not in key_indices | value_indices
    return all_known and key_indices.isdisjoint(value_indices)
