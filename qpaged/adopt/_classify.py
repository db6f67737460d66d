"""Decide for one array argument whether it is a cache, and if so, keys or values, with which axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qpaged.adopt._axes import (
    axes_with_head_dim,
    head_dim_candidates,
    infer_axis_names,
    length_candidates,
)
from qpaged.adopt._cache_leaf import CacheLeaf, Role
from qpaged.adopt._dataflow import Dataflow, Operation, Read, Write

NAME_THEM = "name the axes with axes="


@dataclass(frozen=True)
class Candidate:
    """An array argument, and what the program does with it.

    Attributes:
        path: the way to it among the arguments.
        aval: its shape and dtype.
        writes: partial writes into it.
        reads: reads of it by dots.
        rebuilt_by: the operation that computed anew what is returned of it; None if none did.
        output: the path of the output that returns it after a write; None if none does.
    """

    path: str
    aval: jax.ShapeDtypeStruct
    writes: tuple[Write, ...]
    reads: tuple[Read, ...]
    rebuilt_by: Operation | None
    output: str | None

    @classmethod
    def from_dataflow(
        cls,
        dataflow: Dataflow,
        input_index: int,
        path: str,
        aval: jax.ShapeDtypeStruct,
        output: str | None,
    ) -> Candidate:
        """Collect what the program does with one of its inputs."""
        return cls(
            path=path,
            aval=aval,
            writes=tuple(write for write in dataflow.writes if write.input_index == input_index),
            reads=tuple(read for read in dataflow.reads if read.input_index == input_index),
            rebuilt_by=_rebuilt_by(dataflow, input_index),
            output=output,
        )

    def __str__(self) -> str:
        return f"{self.path} {short_aval(self.aval)}"


def _rebuilt_by(dataflow: Dataflow, input_index: int) -> Operation | None:
    """Return the operation that computed anew an output that covers the input; None if there is none."""
    for views in dataflow.outputs:
        for view in views:
            if view.input_index == input_index and view.covers_input and view.rebuilt_by is not None:
                return view.rebuilt_by
    return None


def short_aval(aval: jax.ShapeDtypeStruct) -> str:
    """Return dtype and shape as one word, like float32(2, 16)."""
    return f"{jnp.dtype(aval.dtype).name}{aval.shape}"


@dataclass(frozen=True)
class Rejected:
    """An array that resembles one of a cache, and the reason why it is not adopted.

    Attributes:
        message: the array and the reason.
        unclear: whether it may be one of a cache, and only its axes cannot be told apart.
    """

    message: str
    unclear: bool = False


class UnclearError(Exception):
    """The program leaves open what an axis of a cache array is."""


def classify(candidate: Candidate, axis_names: tuple[str, ...] | None) -> CacheLeaf | Rejected | None:
    """Decide what an array is.

    Args:
        candidate: the array.
        axis_names: the names of its axes, if the caller gave them.

    Returns:
        A leaf of the cache; the reason for which an array that resembles one is rejected; or None for an
        array that has nothing of a cache.
    """
    if not candidate.writes:
        return _reject_unwritten(candidate)
    if not candidate.reads:
        return Rejected(f"{candidate}: {candidate.writes[0]}, but no dot_general reads it")
    try:
        return _classify_cache(candidate, axis_names)
    except UnclearError as error:
        advice = NAME_THEM if axis_names is None else f"axes= names them {axis_names}: check the order"
        return Rejected(f"{candidate}: {error}; {advice}", unclear=True)


def _reject_unwritten(candidate: Candidate) -> Rejected | None:
    """Explain why a cache that is rebuilt as a whole is not adopted; return None for other arrays."""
    if not candidate.reads or candidate.rebuilt_by is None:
        return None
    return Rejected(
        f"{candidate}: returned as made anew by {candidate.rebuilt_by}; only what is written in part can be "
        f"adopted, by lax.dynamic_update_slice or .at[...].set in a cache of fixed size"
    )


def _classify_cache(candidate: Candidate, axis_names: tuple[str, ...] | None) -> CacheLeaf:
    """Return the cache leaf for an array that is written and read.

    Raises:
        UnclearError: the program leaves its axes open, or contradicts the caller's names.
    """
    length = _length_axis(candidate, axis_names)
    # query @ keys has a score for each position, so it keeps the length; scores @ values sums over it.
    keys = [read for read in candidate.reads if length in read.free]
    values = [read for read in candidate.reads if length in read.contracting]
    if not keys and not values:
        raise UnclearError(f"no dot_general keeps or contracts axis {length}, its length")
    if axis_names is None:
        head_dim = _head_dim_axis(length, keys, values)
        axis_names = infer_axis_names(len(candidate.aval.shape), length, head_dim, keys, values)
    else:
        _check_head_dim(axis_names.index("head_dim"), keys, values)
    holds_several_layers = "layers" in axis_names
    return CacheLeaf(
        path=candidate.path,
        shape=candidate.aval.shape,
        dtype=candidate.aval.dtype,
        role=_role(keys, values),
        axes=axis_names,
        layer=None if holds_several_layers else 0,  # numbered once all leaves are known
        output=candidate.output,
        evidence=_evidence(candidate, keys, values),
    )


def _length_axis(candidate: Candidate, axis_names: tuple[str, ...] | None) -> int:
    """Return the axis that the caller names length, or else the only one that may be it."""
    if axis_names is not None:
        return axis_names.index("length")
    axes = length_candidates(candidate.aval.shape, candidate.writes, candidate.reads)
    if not axes and not any(write.partial_axes for write in candidate.writes):
        raise UnclearError(f"{candidate.writes[0]}, so that the length is not clear; take a shorter example")
    if not axes:
        raise UnclearError(f"no axis is written in part and read as the length is; {candidate.writes[0]}")
    if len(axes) > 1:
        raise UnclearError(f"axes {sorted(axes)} may each be the length; {candidate.writes[0]}")
    (length,) = axes
    return length


def _head_dim_axis(length: int, keys: Sequence[Read], values: Sequence[Read]) -> int:
    """Return the only axis that may be head_dim."""
    axes = head_dim_candidates(length, keys, values)
    if len(axes) != 1:
        raise UnclearError(f"axes {sorted(axes)} may each be head_dim")
    (head_dim,) = axes
    return head_dim


def _check_head_dim(head_dim: int, keys: Sequence[Read], values: Sequence[Read]) -> None:
    """Raise UnclearError if no read can have the axis that the caller names head_dim as its head_dim."""
    if not any(head_dim in axes for axes in axes_with_head_dim(keys, values)):
        raise UnclearError(f"no dot_general contracts axis {head_dim}, its head_dim, or keeps it of values")


def _role(keys: Sequence[Read], values: Sequence[Read]) -> Role:
    if keys and values:
        return "key and value"
    return "key" if keys else "value"


def _evidence(candidate: Candidate, keys: Sequence[Read], values: Sequence[Read]) -> tuple[str, ...]:
    """Return what the program does with a cache array, line by line, for people to check."""
    lines = [str(write) for write in candidate.writes]
    lines += [f"read as keys by {read.operation}" for read in keys]
    lines += [f"read as values by {read.operation}" for read in values]
    lines.append(f"returned as output {candidate.output}" if candidate.output else "not returned")
    return tuple(dict.fromkeys(lines))  # several equations may come from one line
