"""Interpret a jaxpr on views: the walk over its equations, into calls, branches and loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from qpaged import _compat
from qpaged.adopt._dataflow._accesses import ACCESS_RULES
from qpaged.adopt._dataflow._effects import Dataflow, Rule
from qpaged.adopt._dataflow._moves import MOVE_RULES, shape_of
from qpaged.adopt._dataflow._views import View, Views, merge_views

AnyJaxpr: TypeAlias = Jaxpr | ClosedJaxpr


def trace_dataflow(jaxpr: AnyJaxpr) -> Dataflow:
    """Return what a program writes into its inputs, reads from them, and returns of them."""
    opened, _ = _compat.jaxpr_and_consts(jaxpr)
    inputs = []
    for input_index, variable in enumerate(opened.invars):
        inputs.append((View.of_input(input_index, len(variable.aval.shape)),))
    dataflow = Dataflow()
    dataflow.outputs = _interpret(dataflow, jaxpr, inputs)
    return dataflow


def _interpret(dataflow: Dataflow, jaxpr: AnyJaxpr, inputs: Sequence[Views]) -> list[Views]:
    """Return the views of a jaxpr's outputs, and record its writes and reads."""
    opened, _ = _compat.jaxpr_and_consts(jaxpr)
    views: dict[Any, Views] = dict(zip(opened.invars, inputs, strict=True))

    def views_of(atom: Any) -> Views:
        if _compat.is_literal(atom):  # literals are not hashable
            return ()
        return views.get(atom, ())

    for eqn in opened.eqns:
        operands = [views_of(atom) for atom in eqn.invars]
        if any(operands):  # the rest of the model computes with nothing of any input
            rule = RULES.get(eqn.primitive.name, _call_or_elementwise)
            outputs = rule(dataflow, eqn, operands)
            if outputs is None:
                outputs = _elementwise(dataflow, eqn, operands)
            views.update(zip(eqn.outvars, outputs, strict=True))
        dataflow.follow_facts(eqn)
    return [views_of(atom) for atom in opened.outvars]


# Calls, and primitives without a rule


def _call_or_elementwise(dataflow: Dataflow, eqn: JaxprEqn, operands: Sequence[Views]) -> Sequence[Views]:
    callee = _callee(eqn)
    if callee is None:
        return _elementwise(dataflow, eqn, operands)
    opened, _ = _compat.jaxpr_and_consts(callee)
    dataflow.note_facts(opened.invars, [dataflow.fact_of(atom) for atom in eqn.invars])
    caller_location = dataflow.call_location
    dataflow.call_location = dataflow.locate(eqn)
    outputs = _interpret(dataflow, callee, operands)
    dataflow.call_location = caller_location
    return outputs


def _callee(eqn: JaxprEqn) -> AnyJaxpr | None:
    """Return the jaxpr that an equation calls with its own operands, as jit and remat do; None for others."""
    jaxprs = [param for param in eqn.params.values() if _compat.is_jaxpr(param)]
    if len(jaxprs) != 1:
        return None
    opened, _ = _compat.jaxpr_and_consts(jaxprs[0])
    if len(opened.invars) != len(eqn.invars):
        return None
    return jaxprs[0]


def _elementwise(dataflow: Dataflow, eqn: JaxprEqn, operands: Sequence[Views]) -> Sequence[Views]:
    """Return the views of an unknown primitive: each output shows what the operands of its shape show."""
    outputs = []
    for outvar in eqn.outvars:
        same_shape: list[View] = []
        for atom, views in zip(eqn.invars, operands, strict=True):
            if shape_of(atom) == shape_of(outvar):
                same_shape.extend(views)
        shown = merge_views(same_shape)
        if (
            len(operands) > 1
        ):  # with one operand it is a cast or the like, and the values stay the input's own
            shown = tuple(view.rebuilt(dataflow.operation(eqn)) for view in shown)
        outputs.append(shown)
    return outputs


def _each_operand(dataflow: Dataflow, eqn: JaxprEqn, operands: Sequence[Views]) -> Sequence[Views]:
    """Return the views of a primitive that returns its operands one by one."""
    return operands


# Control flow


def _cond(dataflow: Dataflow, eqn: JaxprEqn, operands: Sequence[Views]) -> Sequence[Views]:
    # The first operand is the index of the branch.
    branches = [_interpret(dataflow, branch, operands[1:]) for branch in eqn.params["branches"]]
    outputs = []
    for alternatives in zip(*branches, strict=True):
        outputs.append(merge_views(view for views in alternatives for view in views))
    return outputs


def _while(dataflow: Dataflow, eqn: JaxprEqn, operands: Sequence[Views]) -> Sequence[Views]:
    first_body_const = eqn.params["cond_nconsts"]
    first_carry = first_body_const + eqn.params["body_nconsts"]
    consts = operands[first_body_const:first_carry]
    # The condition is not interpreted: it returns a flag, and writes nothing.

    def body(carry: Sequence[Views]) -> list[Views]:
        return _interpret(dataflow, eqn.params["body_jaxpr"], [*consts, *carry])

    carry, _ = _iterate(body, operands[first_carry:])
    return carry


def _scan(dataflow: Dataflow, eqn: JaxprEqn, operands: Sequence[Views]) -> Sequence[Views]:
    num_consts, num_carry = _compat.scan_counts(eqn.params, len(operands))
    consts = operands[:num_consts]
    first_carry = operands[num_consts : num_consts + num_carry]
    xs = operands[num_consts + num_carry :]
    # The body sees one index of the first axis of xs, a different one in each iteration.
    slices = [tuple(view.select({0: None}).without_axis(0) for view in views) for views in xs]

    def body(carry: Sequence[Views]) -> list[Views]:
        return _interpret(dataflow, eqn.params["jaxpr"], [*consts, *carry, *slices])

    carry, outputs = _iterate(body, first_carry)
    ys = [tuple(_stack_iterations(view) for view in views) for views in outputs[num_carry:]]
    return [*carry, *ys]


def _stack_iterations(view: View) -> View:
    """Return the view of a scan's stacked output: its first axis runs along what the iterations selected."""
    iterated = frozenset(input_axis for input_axis, index in view.selected if index is None)
    still_selected = frozenset(
        (input_axis, index) for input_axis, index in view.selected if index is not None
    )
    return replace(view, input_axes=(iterated, *view.input_axes), selected=still_selected)


def _iterate(
    body: Callable[[Sequence[Views]], list[Views]], carry: Sequence[Views]
) -> tuple[list[Views], list[Views]]:
    """Interpret a loop's body until its carry's views change no more; return these and the body's outputs.

    Merging only adds axes and drops selections, of which there are finitely many, so this ends.
    """
    carry = list(carry)
    while True:
        outputs = body(carry)
        merged = []
        for before, after in zip(carry, outputs, strict=False):  # behind the carry, a scan's body returns ys
            merged.append(merge_views((*before, *after)))
        if merged == carry:
            return carry, outputs
        carry = merged


RULES: dict[str, Rule] = {
    **MOVE_RULES,
    **ACCESS_RULES,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
    "optimization_barrier": _each_operand,
    "device_put": _each_operand,
}
