"""The interpreter that runs functions of arrays on implicit arrays.

A function is traced once on the logical shapes of its implicit arguments, and its jaxpr is evaluated
equation by equation, with implicit arrays as values. JAX's own transformations see only ordinary
operations on the arrays inside, so they compose with this in any order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from qpaged import _compat
from qpaged._compat import Aval, Equation, Jaxpr, OpenJaxpr, Operand, Params, Primitive, Pytree, Tracer
from qpaged.implicit import _origins, _reports, _tree
from qpaged.implicit._dispatch import call_handler, registry
from qpaged.implicit._fields import is_stored
from qpaged.implicit._operands import as_array, checked_results
from qpaged.implicit._rule_context import RuleContext
from qpaged.implicit._rules import RULES
from qpaged.implicit._value import ImplicitValue, is_implicit

# Two-operand primitives whose operands may be swapped, so that an implicit one comes first.
COMMUTATIVE = frozenset({"add", "add_any", "and", "eq", "max", "min", "mul", "ne", "or", "xor"})
# Rules that slice, stack or divide implicit arrays leaf by leaf, which is wrong for work that was deferred.
LEAFWISE = frozenset({"cond", "scan", "shard_map", "while"})
_TRACED = object()


def use_implicit_args(f: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of JAX arrays accept `ImplicitArray`s anywhere in its arguments.

    Inside, the function sees arrays of the logical shape and dtype. What it does with them goes to
    the handlers registered with `primitive_handler`; what nothing handles is materialized, with a
    `MaterializeWarning`. It may return implicit arrays. Arguments that are not implicit are passed
    as they are. The result can be jitted, differentiated, vectorised and so on.
    """

    lazy_f = use_implicit_args_lazily(f)

    @functools.wraps(f)
    def implicit_f(*args: Any, **kwargs: Any) -> Any:
        with _reports.report_each_location_once():
            return jax.tree_util.tree_map(_with_work_done, lazy_f(*args, **kwargs), is_leaf=is_implicit)

    return implicit_f


def use_implicit_args_lazily(f: Callable[..., Any]) -> Callable[..., Any]:
    """Do what :func:`use_implicit_args` does, but return arrays that defer work as they are: for handlers."""

    @functools.wraps(f)
    def implicit_f(*args: Any, **kwargs: Any) -> Any:
        with _reports.report_each_location_once():
            return _interpret(f, args, kwargs)

    return implicit_f


def _with_work_done(value: Operand) -> Operand:
    """Return a value that may leave an evaluation: one that defers work is reported and materialized."""
    deferred = value.deferred() if is_implicit(value) else None
    if deferred is None:
        return value
    primitive, location = deferred
    _reports.report(primitive, value, location)
    return _materialize_fully(value)


def materialize_nested(implicit_arr: Operand, full: bool = False) -> Operand:
    """Return the array that an implicit array stands for; `materialize()` may use further implicit arrays.

    Args:
        implicit_arr: an implicit array; anything else is returned unchanged.
        full: go on until the result is a JAX array, where `materialize()` returns an implicit one.
    """
    value = implicit_arr
    while is_implicit(value):
        if value.materializes_children_first:
            children, structure = _tree.flatten_one_layer(value)
            value = _tree.unflatten_one_layer(structure, [_materialize_fully(child) for child in children])
        value = _call_one_layer_down(type(value).materialize, value)
        if not full:
            break
    return value


def default_handler(primitive: Primitive, *args: Operand, **params: Any) -> Any:
    """Apply a primitive to plain arrays: for handlers that deal with a part and leave the rest.

    The method of :class:`ImplicitArray` of that name is another thing: what is done without a handler.

    Args:
        primitive: the primitive a handler was given.
        *args: its operands, plain arrays.
        **params: its parameters.
    """
    return _compat.bind(primitive, args, params)


def logical_struct(value: ImplicitValue) -> jax.ShapeDtypeStruct:
    """Return the shape, dtype and placement of the array that an implicit array materializes to."""
    with _reports.no_reports():
        return jax.eval_shape(_materialize_fully, value)


def materialize_and_bind(primitive: Primitive, operands: Sequence[Operand], params: Params) -> Any:
    """Apply a primitive to operands after materializing one layer of the implicit ones."""
    operands = [materialize_nested(operand) for operand in operands]
    if not any(is_implicit(operand) for operand in operands):
        return _compat.bind(primitive, operands, params)
    # What a layer materialized to is implicit itself, so the handlers of its own class are asked now.
    return _interpret(lambda *inner: _compat.bind(primitive, inner, params), operands, {})


def _materialize_fully(value: Operand) -> Operand:
    return materialize_nested(value, full=True)


def _call_one_layer_down(function: Callable[..., Any], *args: Operand) -> Any:
    """Call a function of implicit arrays as one of their children, some of which may be implicit, too."""
    children, structure = _tree.flatten_one_layer(args)

    def function_of_children(*inner: Operand) -> Any:
        return function(*_tree.unflatten_one_layer(structure, inner))

    return _interpret(function_of_children, children, {})


def _interpret(f: Callable[..., Any], args: Sequence[Pytree], kwargs: dict[str, Pytree]) -> Pytree:
    """Trace a function on the logical types of its implicit arguments, and evaluate the jaxpr on these."""
    leaves, tree = _tree.flatten((tuple(args), kwargs))
    implicit_indices = [index for index, leaf in enumerate(leaves) if is_implicit(leaf)]
    if not implicit_indices:
        return f(*args, **kwargs)
    outputs = _Outputs()

    # The other arguments are closed over, so the function sees Python values and concrete arrays as they are.
    def f_of_implicit_leaves(*dense: Tracer) -> list[Tracer]:
        inner_leaves = list(leaves)
        for index, value in zip(implicit_indices, dense, strict=True):
            inner_leaves[index] = value
        inner_args, inner_kwargs = tree.unflatten(inner_leaves)
        return outputs.record(f(*inner_args, **inner_kwargs))

    values: list[ImplicitValue] = []
    avals: list[Aval] = []
    for index in implicit_indices:
        value, aval = _with_current_type(leaves[index])
        values.append(value)
        avals.append(aval)
    jaxpr = jax.make_jaxpr(f_of_implicit_leaves)(*avals)
    return outputs.rebuild(_evaluate(jaxpr, values))


@dataclass
class _Outputs:
    """The outputs of a function that is traced: their tree, and the leaves that are no tracers.

    Values that do not depend on the implicit arguments pass through the trace as they are. No tracer may
    outlive its trace, so `_TRACED` stands for the others.
    """

    tree: Any = None
    leaves: list[Any] = field(default_factory=list)

    def record(self, outs: Pytree) -> list[Tracer]:
        """Keep the tree and its other leaves, and return the tracers."""
        leaves, self.tree = _tree.flatten_fully(outs)
        self.leaves = [_TRACED if isinstance(leaf, Tracer) else leaf for leaf in leaves]
        return [leaf for leaf in leaves if isinstance(leaf, Tracer)]

    def rebuild(self, evaluated: Sequence[Operand]) -> Pytree:
        """Return the tree with what the traced leaves were evaluated to."""
        remaining = iter(evaluated)
        return self.tree.unflatten([next(remaining) if leaf is _TRACED else leaf for leaf in self.leaves])


def _with_current_type(value: ImplicitValue) -> tuple[ImplicitValue, Aval]:
    """Return an argument with its stored shape brought up to date, and the abstract value to trace it as.

    The children decide: outside, vmap or a slice may have changed them under a stored shape. A class
    that derives its shape cannot be out of date, so its materialization is traced only for a placement.
    """
    children = jax.tree_util.tree_leaves(value)
    derives_shape = not is_stored(type(value), "shape")
    if derives_shape:
        sharding = value.explicit_sharding()
        is_placed = any(_compat.has_placement(jax.typeof(child)) for child in children)
        if sharding is not None or not is_placed:
            return value, jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
    try:
        struct = logical_struct(value)
    except (TypeError, ValueError) as error:
        error.add_note(_why_materialized(value, children))
        raise
    return _tree.with_logical_type(value, struct.shape, struct.dtype), struct


def _why_materialized(value: ImplicitValue, children: list[Any]) -> str:
    shapes = ", ".join(str(jnp.shape(child)) for child in children)
    return (
        f"This happened in {type(value).__name__}.materialize(), which was traced for its shape: an argument "
        f"of a function decorated with use_implicit_args has children of shapes {shapes}. If they are "
        f"stacked, jax.vmap the function, or let materialize() accept leading axes."
    )


def _evaluate(closed: Jaxpr, args: Sequence[Operand]) -> list[Operand]:
    """Evaluate a jaxpr on values any of which may be implicit."""
    # As jax.core.eval_jaxpr does, except that equations with implicit operands are not bound.
    jaxpr, consts = _compat.jaxpr_and_consts(closed)
    values: dict[Any, Operand] = dict(zip(jaxpr.constvars, consts, strict=True))
    for var, arg in zip(jaxpr.invars, args, strict=True):
        values[var] = _with_type_of(arg, var.aval)
    with _origins.evaluation() as origins:
        for eqn, dead in zip(jaxpr.eqns, _dead_after_each_equation(jaxpr), strict=True):
            operands = [atom.val if _compat.is_literal(atom) else values[atom] for atom in eqn.invars]
            # Names of scopes and lines of code survive, so profiles and errors look as they would without.
            with _compat.equation_context(eqn):
                outs = _evaluate_equation(eqn, operands, origins)
            values.update(zip(eqn.outvars, outs, strict=True))
            for var in dead:  # run eagerly, this frees intermediate arrays
                origins.forget(values.pop(var))
    return [
        as_array(atom.val, atom.aval) if _compat.is_literal(atom) else values[atom] for atom in jaxpr.outvars
    ]


def _evaluate_all(closed: Jaxpr, args: Sequence[Operand]) -> list[Operand]:
    """Evaluate a jaxpr, and do the work that its results defer."""
    return [_with_work_done(out) for out in _evaluate(closed, args)]


def _dead_after_each_equation(jaxpr: OpenJaxpr) -> list[set[Any]]:
    """Return, for each equation, the variables that no later equation or output uses."""
    used_later = {atom for atom in jaxpr.outvars if not _compat.is_literal(atom)}
    dead_sets: list[set[Any]] = []
    for eqn in reversed(jaxpr.eqns):
        dead = {atom for atom in eqn.invars if not _compat.is_literal(atom)} - used_later
        used_later |= dead
        dead_sets.append(dead)
    return dead_sets[::-1]


def _with_type_of(value: Operand, aval: Aval) -> Operand:
    """Return a value with the shape and dtype that ``aval`` says; one that is not implicit as it is."""
    if not is_implicit(value):
        return value
    return _tree.with_logical_type(value, aval.shape, aval.dtype)


def _evaluate_equation(
    eqn: Equation, operands: list[Operand], origins: _origins.Origins
) -> Sequence[Operand]:
    """Evaluate an equation. If operands are implicit: by a handler, else by a rule, else materialized."""
    primitive, params = eqn.primitive, eqn.params
    first_implicit = next((operand for operand in operands if is_implicit(operand)), None)
    if first_implicit is None:
        outs = _as_sequence(primitive, _compat.bind(primitive, operands, params))
        origins.follow(eqn, operands, outs)
        return outs
    operands = [as_array(value, var.aval) for value, var in zip(operands, eqn.invars, strict=True)]
    origins.note_zero_literals(eqn, operands)
    outs = _call_handler(primitive, first_implicit, operands, params)
    if outs is not NotImplemented:
        return checked_results(_as_sequence(primitive, outs), eqn)
    if primitive.name in RULES:  # after the handlers, so that programs can handle these primitives themselves
        outs = _apply_rule(eqn, operands)
        if outs is not NotImplemented:
            return outs
    _report_operands(eqn, operands)
    outs = type(first_implicit).default_handler(primitive, *operands, params=params)
    return checked_results(_as_sequence(primitive, outs), eqn)


def _as_sequence(primitive: Primitive, outs: Any) -> Any:
    """Return the results of a primitive as a sequence, also those of one that gives a single result."""
    if primitive.multiple_results:
        return outs
    return [outs]


def _call_handler(
    primitive: Primitive, first_implicit: ImplicitValue, operands: list[Operand], params: Params
) -> Any:
    """Return what the handler for these operands returns; NotImplemented if there is none."""
    commutes = first_implicit.commute_ops and primitive.name in COMMUTATIVE
    if commutes and len(operands) == 2 and not is_implicit(operands[0]):
        operands = operands[::-1]  # one handler, for (implicit, other), serves both orders
    handler = registry.find(primitive, operands)
    if handler is None:
        return NotImplemented
    # Handlers work on the children of their operands, which may be implicit and have handlers of their own.
    return _call_one_layer_down(lambda *inner: call_handler(handler, primitive, inner, params), *operands)


def _apply_rule(eqn: Equation, operands: list[Operand]) -> list[Operand]:
    """Evaluate an equation by the rule for its primitive, and bring stored shapes of results up to date."""
    evaluate = _evaluate
    if eqn.primitive.name in LEAFWISE:
        operands = [_with_work_done(operand) for operand in operands]
        evaluate = _evaluate_all
    ctx = RuleContext(
        primitive=eqn.primitive,
        params=eqn.params,
        out_avals=[var.aval for var in eqn.outvars],
        location=_compat.source_line(eqn),
        facts=tuple(_origins.fact_of(operand) for operand in operands),
        evaluate=evaluate,
        materialize=_materialize_fully,
    )
    with _reports.fallback_location(ctx.location):
        outs = RULES[eqn.primitive.name](ctx, operands)
    if outs is NotImplemented:
        return NotImplemented
    return [_with_type_of(out, aval) for out, aval in zip(outs, ctx.out_avals, strict=True)]


def _report_operands(eqn: Equation, operands: list[Operand]) -> None:
    location = _compat.source_line(eqn)
    for operand in operands:
        if is_implicit(operand):
            _reports.report(eqn.primitive.name, operand, location)
