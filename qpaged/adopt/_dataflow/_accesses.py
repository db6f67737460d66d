"""Rules of the primitives that write into a cache and read it: dynamic_update_slice, scatter, dot_general."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from jax.extend.core import JaxprEqn

from qpaged.adopt._dataflow._effects import Dataflow, Read, Rule, Write
from qpaged.adopt._dataflow._moves import shape_of
from qpaged.adopt._dataflow._views import Views
from qpaged.implicit._facts import Kind


def _dynamic_update_slice(dataflow: Dataflow, eqn: JaxprEqn, operands: Sequence[Views]) -> Sequence[Views]:
    shape = shape_of(eqn.invars[0])
    update_shape = shape_of(eqn.invars[1])
    partial_axes = [axis for axis, size in enumerate(update_shape) if size < shape[axis]]
    return _record_write(dataflow, eqn, operands[0], operands[1], partial_axes)


def _scatter(dataflow: Dataflow, eqn: JaxprEqn, operands: Sequence[Views]) -> Sequence[Views]:
    numbers = eqn.params["dimension_numbers"]
    shape = shape_of(eqn.invars[0])
    update_shape = shape_of(eqn.invars[2])
    inserted_axes = numbers.inserted_window_dims
    batching_axes = numbers.operand_batching_dims
    window_axes = [axis for axis in range(len(shape)) if axis not in (*inserted_axes, *batching_axes)]
    # Along an inserted axis each window is one index wide; along a batching axis the windows cover
    # everything.
    partial_axes = list(inserted_axes)
    for axis, update_axis in zip(window_axes, numbers.update_window_dims, strict=True):
        if update_shape[update_axis] < shape[axis]:
            partial_axes.append(axis)
    adds = eqn.primitive.name == "scatter-add"
    return _record_write(dataflow, eqn, operands[0], operands[2], partial_axes, adds)


# Arithmetic over a whole axis that writes no more than a row of it


def _select_n(dataflow: Dataflow, eqn: JaxprEqn, operands: Sequence[Views]) -> Sequence[Views] | None:
    fact = dataflow.fact_of(eqn.invars[0])
    if fact is None or fact.kind not in (Kind.ONE_HOT, Kind.ALL_BUT_ONE) or len(operands) != 3:
        return None
    cache, update = operands[1:] if fact.kind is Kind.ONE_HOT else operands[:0:-1]
    return _record_write(dataflow, eqn, cache, update, [fact.axis]) if cache else None


def _add(dataflow: Dataflow, eqn: JaxprEqn, operands: Sequence[Views]) -> Sequence[Views] | None:
    return _arithmetic_write(dataflow, eqn, operands, Kind.ROW, adds=True)


def _mul(dataflow: Dataflow, eqn: JaxprEqn, operands: Sequence[Views]) -> Sequence[Views] | None:
    return _arithmetic_write(dataflow, eqn, operands, Kind.ALL_BUT_ONE, adds=False)


def _arithmetic_write(
    dataflow: Dataflow, eqn: JaxprEqn, operands: Sequence[Views], kind: Kind, adds: bool
) -> Sequence[Views] | None:
    """Record an operation with another operand of a kind as a write; return None if there is none such."""
    for position, atom in enumerate(eqn.invars):
        fact, cache = dataflow.fact_of(atom), operands[1 - position]
        if cache and fact is not None and fact.kind is kind:
            return _record_write(dataflow, eqn, cache, operands[position], [fact.axis], adds)
    return None


def _record_write(
    dataflow: Dataflow,
    eqn: JaxprEqn,
    operand: Views,
    update: Views,
    partial_axes: Iterable[int],
    adds: bool = False,
) -> Sequence[Views]:
    """Record that an update overwrites a part of the operand, and return the views of the result."""
    partial_axes = list(partial_axes)
    updating_inputs = {view.input_index for view in update}
    for view in operand:
        # An update that shows the input itself puts a slice back; the write into that slice is recorded
        # already.
        if view.input_index not in updating_inputs:
            input_axes = view.input_axes_of(partial_axes)
            dataflow.add_write(Write(view.input_index, dataflow.operation(eqn), input_axes, adds))
    return [tuple(replace(view, written=True) for view in operand)]


def _dot_general(dataflow: Dataflow, eqn: JaxprEqn, operands: Sequence[Views]) -> Sequence[Views]:
    contracting, batch = eqn.params["dimension_numbers"]
    for views, contracting_axes, batch_axes in zip(operands, contracting, batch, strict=True):
        for view in views:
            ndim = len(view.input_axes)
            free_axes = set(range(ndim)) - {*contracting_axes, *batch_axes}
            dataflow.add_read(
                Read(
                    view.input_index,
                    dataflow.operation(eqn),
                    contracting=view.input_axes_of(contracting_axes),
                    batch=view.input_axes_of(batch_axes),
                    free=view.input_axes_of(free_axes),
                    selected=view.selected,
                )
            )
    return [()]  # scores and attention's output show nothing of the cache any more


ACCESS_RULES: dict[str, Rule] = {
    "dynamic_update_slice": _dynamic_update_slice,
    "scatter": _scatter,
    "scatter-add": _scatter,
    "select_n": _select_n,
    "add": _add,
    "mul": _mul,
    "dot_general": _dot_general,
}
