"""The abstract values of the analysis: what a variable of a jaxpr shows of the program's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

Axes: TypeAlias = frozenset[int]
"""Axes of an input."""

Selection: TypeAlias = frozenset[tuple[int, int | None]]
"""(axis of the input, index) pairs; the index is None where it is known only at run time."""

SourceLocation: TypeAlias = tuple[str, int]
"""File and line."""

NO_AXES: Axes = frozenset()


@dataclass(frozen=True)
class Operation:
    """An operation of the program, and the line of the user's code that called it."""

    primitive: str
    location: SourceLocation | None

    def __str__(self) -> str:
        if self.location is None:
            return f"{self.primitive} somewhere"
        file, line = self.location
        return f"{self.primitive} at {file}:{line}"


@dataclass(frozen=True)
class View:
    """What a value shows of one input of the program.

    Attributes:
        input_index: the number of the input.
        input_axes: for each axis of the value, the axes of the input along which it runs; none where the
            value repeats itself, as after a broadcast.
        selected: the axes of the input along which the value holds one index alone, with that index.
        written: whether a part of it was overwritten on the way.
        rebuilt_by: the first operation on the way that computed it anew, from other values too; None if none
            did.
    """

    input_index: int
    input_axes: tuple[Axes, ...]
    selected: Selection = frozenset()
    written: bool = False
    rebuilt_by: Operation | None = None

    @classmethod
    def of_input(cls, input_index: int, ndim: int) -> View:
        """Return the view that an input has of itself."""
        return cls(input_index, tuple(frozenset((axis,)) for axis in range(ndim)))

    @property
    def covers_input(self) -> bool:
        """True if axis i of the value runs along axis i of the input; a slice may be shorter."""
        return all(axis in input_axes for axis, input_axes in enumerate(self.input_axes))

    def input_axes_of(self, axes: Iterable[int]) -> Axes:
        """Return the axes of the input along which any of these axes of the value runs."""
        return NO_AXES.union(*(self.input_axes[axis] for axis in axes))

    def with_axes(self, input_axes: Iterable[Axes]) -> View:
        """Return the view of a value with other axes."""
        return replace(self, input_axes=tuple(input_axes))

    def select(self, indices: Mapping[int, int | None]) -> View:
        """Return the view of the part that holds one index alone along some axes of the value."""
        new: set[tuple[int, int | None]] = set()
        for axis, index in indices.items():
            # An axis that merges several axes of the input has indices that are those of none of them; and
            # one chunk of a length that was cut into chunks holds more than one index of it.
            runs_along = self.input_axes[axis]
            others = self.input_axes[:axis] + self.input_axes[axis + 1 :]
            if len(runs_along) == 1 and runs_along.isdisjoint(NO_AXES.union(*others)):
                (input_axis,) = runs_along
                new.add((input_axis, index))
        replaced_axes = {input_axis for input_axis, _ in new}
        kept = {(input_axis, index) for input_axis, index in self.selected if input_axis not in replaced_axes}
        return replace(self, selected=frozenset(kept | new))

    def without_axis(self, axis: int) -> View:
        """Return the view of a value that has lost an axis."""
        return self.with_axes(self.input_axes[:axis] + self.input_axes[axis + 1 :])

    def rebuilt(self, operation: Operation) -> View:
        """Return the view of a value that an operation computed anew."""
        if self.rebuilt_by is not None:
            return self
        return replace(self, rebuilt_by=operation)

    def merge(self, other: View) -> View:
        """Return the view of a value that may be either of two, of the same input and as many axes."""
        return View(
            self.input_index,
            tuple(a | b for a, b in zip(self.input_axes, other.input_axes, strict=True)),
            self.selected & other.selected,  # certain in both cases
            self.written or other.written,
            self.rebuilt_by or other.rebuilt_by,
        )


Views: TypeAlias = tuple[View, ...]
"""Views of one value, at most one for each input."""


def merge_views(views: Iterable[View]) -> Views:
    """Return the views of a value that may be any of several: one for each input."""
    merged: dict[int, View] = {}
    for view in views:
        earlier = merged.get(view.input_index)
        if earlier is not None and len(earlier.input_axes) == len(view.input_axes):
            view = earlier.merge(view)
        # Views of different ranks cannot be merged; the last one stands.
        merged[view.input_index] = view
    return tuple(merged.values())
