"""Rules of the primitives that move elements: transposes, reshapes, slices and concatenations.

A *view* says which axes of which program input a value shows; see :mod:`qpaged.adopt._dataflow._views`. A
rule returns the views of each output of an equation, given those of each operand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from jax.extend.core import JaxprEqn, Literal

from qpaged.adopt._dataflow._effects import Dataflow, Rule
from qpaged.adopt._dataflow._views import NO_AXES, View, Views
from qpaged.arrays._reshape import axis_groups

Shape = tuple[int, ...]


def shape_of(atom: Any) -> Shape:
    """Return the shape of an operand or output of an equation; () for what is no array."""
    return tuple(getattr(atom.aval, "shape", ()))


def _each_view(move: Callable[[JaxprEqn, View], View]) -> Rule:
    """Make a rule from a function of one view of the first operand; the others, indices, show no input."""

    @wraps(move)
    def rule(dataflow: Dataflow, eqn: JaxprEqn, operands: Sequence[Views]) -> Sequence[Views]:
        return [tuple(move(eqn, view) for view in operands[0])]

    return rule


# Axes change places


@_each_view
def _transpose(eqn: JaxprEqn, view: View) -> View:
    return view.with_axes(view.input_axes[axis] for axis in eqn.params["permutation"])


@_each_view
def _squeeze(eqn: JaxprEqn, view: View) -> View:
    dropped = eqn.params["dimensions"]
    return view.with_axes(axes for axis, axes in enumerate(view.input_axes) if axis not in dropped)


@_each_view
def _broadcast_in_dim(eqn: JaxprEqn, view: View) -> View:
    input_axes = [NO_AXES] * len(eqn.params["shape"])
    for axis, output_axis in enumerate(eqn.params["broadcast_dimensions"]):
        input_axes[output_axis] = view.input_axes[axis]
    return view.with_axes(input_axes)


def _reshape(dataflow: Dataflow, eqn: JaxprEqn, operands: Sequence[Views]) -> Sequence[Views]:
    old_shape = shape_of(eqn.invars[0])
    new_shape = shape_of(eqn.outvars[0])
    if 0 in old_shape:  # without elements there is nothing to follow: the output shows no input
        return [()]
    return [tuple(_regroup(view, old_shape, new_shape) for view in operands[0])]


def _regroup(view: View, old_shape: Shape, new_shape: Shape) -> View:
    """Return the view of a reshaped value: axes that are merged or split run along the same input axes."""
    input_axes = [NO_AXES] * len(new_shape)
    for old_axes, new_axes in axis_groups(old_shape, new_shape):
        # An axis of length 1 shows no axis of the input, because programs add and drop such axes at will.
        merged = view.input_axes_of(axis for axis in old_axes if old_shape[axis] > 1)
        for axis in new_axes:
            if new_shape[axis] > 1:
                input_axes[axis] = merged
    return view.with_axes(input_axes)


# Slices


@_each_view
def _slice(eqn: JaxprEqn, view: View) -> View:
    sizes = shape_of(eqn.outvars[0])  # a stride makes them smaller than the limits do
    return _select_single(view, shape_of(eqn.invars[0]), sizes, eqn.params["start_indices"])


@_each_view
def _dynamic_slice(eqn: JaxprEqn, view: View) -> View:
    starts: list[int | None] = []
    for start in eqn.invars[1:]:
        starts.append(int(start.val) if isinstance(start, Literal) else None)
    return _select_single(view, shape_of(eqn.invars[0]), eqn.params["slice_sizes"], starts)


def _select_single(view: View, shape: Shape, sizes: Sequence[int], starts: Sequence[int | None]) -> View:
    """Return the view of a slice, which holds one index alone along the axes where its size is 1."""
    single = [axis for axis, size in enumerate(sizes) if size == 1 and shape[axis] > 1]
    return view.select({axis: starts[axis] for axis in single})


@_each_view
def _gather(eqn: JaxprEqn, view: View) -> View:
    numbers = eqn.params["dimension_numbers"]
    indexed_axes = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    window_axes = [axis for axis in range(len(view.input_axes)) if axis not in indexed_axes]
    # Output axes that are not window axes run over the index array, hence along the input axes it indexes.
    input_axes = [view.input_axes_of(indexed_axes)] * len(shape_of(eqn.outvars[0]))
    for axis, output_axis in zip(window_axes, numbers.offset_dims, strict=True):
        input_axes[output_axis] = view.input_axes[axis]
    has_one_window = len(window_axes) == len(input_axes)
    if has_one_window:  # at an index known only at run time
        view = view.select(dict.fromkeys(indexed_axes))
    return view.with_axes(input_axes)


@_each_view
def _pad(eqn: JaxprEqn, view: View) -> View:
    return view  # of what is padded; the number that it is padded with shows none


def _unstack(dataflow: Dataflow, eqn: JaxprEqn, operands: Sequence[Views]) -> Sequence[Views]:
    axis = eqn.params["axis"]
    outputs = []
    for index in range(len(eqn.outvars)):
        outputs.append(tuple(view.select({axis: index}).without_axis(axis) for view in operands[0]))
    return outputs


def _split(dataflow: Dataflow, eqn: JaxprEqn, operands: Sequence[Views]) -> Sequence[Views]:
    axis = eqn.params["axis"]
    outputs = []
    start = 0
    for size in eqn.params["sizes"]:
        single = {axis: start} if size == 1 else {}
        outputs.append(tuple(view.select(single) for view in operands[0]))
        start += size
    return outputs


# Slices joined


def _concatenate(dataflow: Dataflow, eqn: JaxprEqn, operands: Sequence[Views]) -> Sequence[Views]:
    axis = eqn.params["dimension"]
    views = []
    for parts in _parts_by_input(operands):
        view = _join(parts, axis, [part.input_axes for part in parts])
        # A cache that is cut into slices and put together again is still itself, but one with a new row
        # concatenated to it has grown.
        are_slices_of_input = any(part.selected != view.selected for part in parts)
        has_other_operands = len(parts) < len(operands)
        if has_other_operands and not are_slices_of_input:
            view = view.rebuilt(dataflow.operation(eqn))
        views.append(view)
    return [tuple(views)]


def _stack(dataflow: Dataflow, eqn: JaxprEqn, operands: Sequence[Views]) -> Sequence[Views]:
    axis = eqn.params["axis"]
    views = []
    for parts in _parts_by_input(operands):
        expanded = [(*part.input_axes[:axis], NO_AXES, *part.input_axes[axis:]) for part in parts]
        views.append(_join(parts, axis, expanded))
    return [tuple(views)]


def _parts_by_input(operands: Sequence[Views]) -> list[list[View]]:
    """Return the views of all operands, grouped by the input that they show."""
    parts: dict[int, list[View]] = {}
    for views in operands:
        for view in views:
            parts.setdefault(view.input_index, []).append(view)
    return list(parts.values())


def _join(parts: Sequence[View], axis: int, parts_axes: Sequence[Sequence[frozenset[int]]]) -> View:
    """Return the view of parts of one input side by side along ``axis``.

    Layers of a cache are often taken out one by one, as ``cache[0]`` and ``cache[1]``, and stacked again
    after the step. The parts select different indices of that input axis, so after joining, ``axis`` runs
    along the input axis.
    """
    common = frozenset.intersection(*(part.selected for part in parts))
    differing = frozenset(input_axis for part in parts for input_axis, _ in part.selected - common)
    input_axes = [NO_AXES.union(*aligned) for aligned in zip(*parts_axes, strict=True)]
    input_axes[axis] |= differing
    return View(
        input_index=parts[0].input_index,
        input_axes=tuple(input_axes),
        selected=common,
        written=any(part.written for part in parts),
        rebuilt_by=next((part.rebuilt_by for part in parts if part.rebuilt_by), None),
    )


MOVE_RULES: dict[str, Rule] = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "pad": _pad,
    "unstack": _unstack,
    "split": _split,
    "concatenate": _concatenate,
    "stack": _stack,
}
