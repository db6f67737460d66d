"""What one array argument is to a program: keys or values of a cache, and which axis is what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from qpaged.adopt._dataflow import NOWHERE, Axes, Flow, Read, Write

Role: TypeAlias = Literal["key", "value", "key and value"]

NAME_THEM = "name the axes with axes="


@dataclass(frozen=True)
class CacheLeaf:
    """One array of a cache.

    Attributes:
        path: where it is among the step's arguments: the argument's name, then keys, with slashes between.
        shape: of the array in the example.
        dtype: of the array, a float.
        role: whether dots read it as keys, as values, or as both.
        axes: for each axis what runs along it: "layers", "pair" (keys and values of one array), "batch",
            "length", "heads" or "head_dim".
        layer: its place among the arrays of its role, in the order of the program; None where it holds
            several layers.
        output: the path of the output that returns it; None where none does.
        evidence: what the program does to it, and where.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    role: Role
    axes: tuple[str, ...]
    layer: int | None
    output: str | None
    evidence: tuple[str, ...]

    def axis(self, name: str) -> int:
        """The number of the axis that ``name`` runs along."""
        return self.axes.index(name)

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in zip(self.axes, self.shape, strict=True))
        layer = "several layers" if self.layer is None else f"layer {self.layer}"
        head = f"{self.path}: {self.role}, {layer}, {jnp.dtype(self.dtype).name} ({sizes})"
        return "\n".join([head, *(f"    {line}" for line in self.evidence)])


@dataclass(frozen=True)
class Miss:
    """An array that is like one of a cache, and why it is none; or ``unclear``, why it cannot be told."""

    text: str
    unclear: bool = False


def classify(
    path: str,
    aval: jax.ShapeDtypeStruct,
    flow: Flow,
    number: int,
    output: str | None,
    names: tuple[str, ...] | None,
) -> CacheLeaf | Miss | None:
    """What an array is in the cache; a miss where it is like one; None where it has nothing of one.

    Args:
        path: of the array among the arguments.
        aval: its shape and dtype.
        flow: of the program.
        number: the array's among the program's inputs.
        output: the path of the output that returns it.
        names: of its axes, where the caller gave them.
    """
    writes = [write for write in flow.writes if write.leaf == number]
    reads = [read for read in flow.reads if read.leaf == number]
    head = f"{path} {short(aval)}"
    if not writes:
        returned = (view for views in flow.outputs for view in views if view.leaf == number and view.whole)
        made = next((view.remade for view in returned if view.remade), None)
        if not (made and reads):
            return None
        how = f"returned as made anew by {made.primitive} {_at(made)}"
        return Miss(
            f"{head}: {how}; only what is written in part can be adopted, by lax.dynamic_update_slice or "
            f".at[...].set in a cache of fixed size"
        )
    if not reads:
        return Miss(f"{head}: {_written(writes[0])}, but no dot_general reads it")
    lengths = _lengths(aval.shape, writes, reads) if names is None else frozenset((names.index("length"),))
    if len(lengths) != 1:
        what = f"axes {sorted(lengths)} may each be the length" if lengths else "no axis can be the length"
        return Miss(f"{head}: {what}; {_written(writes[0])}; {NAME_THEM}", unclear=True)
    (length,) = lengths
    keys = [read for read in reads if length in read.kept]
    values = [read for read in reads if length in read.contract]
    if not (keys or values):
        return Miss(f"{head}: no dot_general keeps or contracts axis {length}, its length; {NAME_THEM}", True)
    if names is not None and not any(names.index("head_dim") in axes for axes in _inner(keys, values)):
        what = f"no dot_general contracts axis {names.index('head_dim')}, its head_dim, or keeps it of values"
        return Miss(f"{head}: {what}; {NAME_THEM}", unclear=True)
    if names is None:
        channels = _channels(length, keys, values)
        if len(channels) != 1:
            return Miss(f"{head}: axes {sorted(channels)} may each be head_dim; {NAME_THEM}", unclear=True)
        names = _names(
            len(aval.shape), {length: "length"} | dict.fromkeys(channels, "head_dim"), keys, values
        )
    return CacheLeaf(
        path=path,
        shape=aval.shape,
        dtype=aval.dtype,
        role="key and value" if keys and values else "key" if keys else "value",
        axes=names,
        layer=None if "layers" in names else 0,
        output=output,
        evidence=_evidence(writes, keys, values, output),
    )


def _lengths(shape: Sequence[int], writes: Sequence[Write], reads: Sequence[Read]) -> Axes:
    """The axes along which every write takes a part, over which no dot batches, and which some read has
    more of than one index."""
    parts = [write.axes for write in writes if write.axes]
    part = frozenset.intersection(*parts) if parts else NOWHERE
    batched = NOWHERE.union(*(read.batch for read in reads))
    picked = frozenset.intersection(*(frozenset(axis for axis, _ in read.picked) for read in reads))
    return frozenset(axis for axis in part - batched - picked if shape[axis] > 1)


def _channels(length: int, keys: Sequence[Read], values: Sequence[Read]) -> Axes:
    """What keys contract, and what values keep."""
    axes = _inner(keys, values)
    shared = frozenset.intersection(*axes) - {length}
    return shared or axes[0] - {length}


def _inner(keys: Sequence[Read], values: Sequence[Read]) -> list[Axes]:
    """By read, the axes among which the channels are."""
    return [read.contract for read in keys] + [read.kept for read in values]


def _names(ndim: int, names: dict[int, str], keys: Sequence[Read], values: Sequence[Read]) -> tuple[str, ...]:
    """The names of all axes, those of some being known."""
    for axis in sorted({axis for read in (*keys, *values) for axis, _ in read.picked} - set(names)):
        of_keys, of_values = ({dict(read.picked).get(axis) for read in group} for group in (keys, values))
        apart = of_keys and of_values and not (of_keys & of_values or None in of_keys | of_values)
        names[axis] = "pair" if apart and "pair" not in names.values() else "layers"
    rest = [axis for axis in range(ndim) if axis not in names]
    names |= dict(zip(rest, ("batch", "heads"), strict=False))
    return tuple(names.get(axis, "layers") for axis in range(ndim))


def _evidence(
    writes: Sequence[Write], keys: Sequence[Read], values: Sequence[Read], output: str | None
) -> tuple[str, ...]:
    lines = [_written(write) for write in writes]
    lines += [f"read as keys by dot_general {_at(read)}" for read in keys]
    lines += [f"read as values by dot_general {_at(read)}" for read in values]
    lines.append(f"returned as output {output}" if output else "not returned")
    return tuple(dict.fromkeys(lines))


def short(aval: jax.ShapeDtypeStruct) -> str:
    """Dtype and shape in a word."""
    return f"{jnp.dtype(aval.dtype).name}{aval.shape}"


def _written(write: Write) -> str:
    axes = ", ".join(map(str, sorted(write.axes)))
    how = f"in part along axis {axes}" if axes else "whole"
    return f"written {how} by {write.primitive} {_at(write)}"


def _at(event: Write | Read) -> str:
    return f"at {event.place[0]}:{event.place[1]}" if event.place else "somewhere"
