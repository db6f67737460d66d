"""Functions of arrays, run on implicit arrays.

A function is traced once on the logical shapes of its implicit arguments, and its jaxpr is evaluated
equation by equation, with implicit arrays as values. JAX's own transformations see nothing but
ordinary operations on the arrays inside, so they compose with this in any order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qpaged import _compat
from qpaged.implicit import _notes, _tree
from qpaged.implicit._dispatch import call_handler, handlers
from qpaged.implicit._fields import stores
from qpaged.implicit._operands import as_array, checked
from qpaged.implicit._rules import RULES
from qpaged.implicit._step import Step
from qpaged.implicit._value import ImplicitValue, is_implicit

# Two-operand primitives whose operands may trade places, so that an implicit one comes first.
COMMUTATIVE = frozenset({"add", "add_any", "and", "eq", "max", "min", "mul", "ne", "or", "xor"})
_TRACED = object()


def use_implicit_args(f: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of JAX arrays accept `ImplicitArray`s anywhere in its arguments.

    Inside, the function sees arrays of the logical shape and dtype. What it does with them goes to
    the handlers registered with `primitive_handler`; what nothing handles is materialized, with a
    `MaterializeWarning`. It may return implicit arrays. Arguments that are not implicit are passed
    as they are. The result can be jitted, differentiated, vectorised and so on.
    """

    @functools.wraps(f)
    def implicit_f(*args: Any, **kwargs: Any) -> Any:
        with _notes.one_call():
            return _run(f, args, kwargs)

    return implicit_f


def materialize_nested(implicit_arr: Any, full: bool = False) -> Any:
    """The array that an implicit array stands for, where `materialize()` may meet further implicit arrays.

    Args:
        implicit_arr: an implicit array; anything else is returned unchanged.
        full: go on until the result is a JAX array, where `materialize()` returns an implicit one.
    """
    value = implicit_arr
    while is_implicit(value):
        value = _one_layer_down(type(value).materialize, value)
        if not full:
            break
    return value


def default_handler(primitive: Any, *args: Any, **params: Any) -> Any:
    """What the primitive does without a handler: for handlers that deal with a part and leave the rest.

    Args:
        primitive: the primitive a handler was given.
        *args: its operands, plain arrays.
        **params: its parameters.
    """
    return _compat.bind(primitive, args, params)


def logical_struct(value: ImplicitValue) -> Any:
    """Shape, dtype and placement of what an implicit array materializes to."""
    with _notes.silence():
        return jax.eval_shape(lambda v: materialize_nested(v, full=True), value)


def materialize_and_bind(primitive: Any, values: Sequence[Any], params: dict[str, Any]) -> Any:
    """Bind a primitive with one layer of its implicit operands materialized."""
    dense = [materialize_nested(value) for value in values]
    if not any(is_implicit(value) for value in dense):
        return _compat.bind(primitive, dense, params)
    return _run(lambda *operands: _compat.bind(primitive, operands, params), dense, {})


def _one_layer_down(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function that takes implicit arrays apart: what is implicit inside them is handled too."""
    leaves, structure = _tree.flatten_one_layer(args)
    return _run(lambda *inner: function(*_tree.unflatten_one_layer(structure, inner)), leaves, {})


def _run(f: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    leaves, tree = _tree.flatten((tuple(args), kwargs))
    where = [index for index, leaf in enumerate(leaves) if is_implicit(leaf)]
    if not where:
        return f(*args, **kwargs)
    values, avals = zip(*(_at_its_shape(leaves[index]) for index in where), strict=True)
    out_tree: Any = None
    static: list[Any] = []  # what f returns without tracing it; _TRACED where it does

    def dense_f(*dense: Any) -> list[Any]:
        nonlocal out_tree
        inner = list(leaves)
        for index, value in zip(where, dense, strict=True):
            inner[index] = value
        inner_args, inner_kwargs = tree.unflatten(inner)
        found, out_tree = _tree.flatten_fully(f(*inner_args, **inner_kwargs))
        static[:] = [_TRACED if isinstance(leaf, _compat.Tracer) else leaf for leaf in found]
        return [leaf for leaf in found if isinstance(leaf, _compat.Tracer)]

    traced = iter(_evaluate(jax.make_jaxpr(dense_f)(*avals), values))
    return out_tree.unflatten([next(traced) if leaf is _TRACED else leaf for leaf in static])


def _at_its_shape(value: ImplicitValue) -> tuple[ImplicitValue, Any]:
    """An argument with its stored shape brought up to date, and the abstract value to trace it as.

    The children decide: outside, vmap or a slice may have changed them under a stored shape. A class
    that derives its shape cannot be out of date, so its materialization is traced only if it must be.
    """
    children = jax.tree_util.tree_leaves(value)
    if stores(type(value), "shape") or any(_compat.placed(jax.typeof(child)) for child in children):
        try:
            struct = logical_struct(value)
        except (TypeError, ValueError) as error:
            error.add_note(_why_materialized(value, children))
            raise
        return _tree.restated(value, struct.shape, struct.dtype), struct
    return value, jax.ShapeDtypeStruct(value.shape, value.dtype)


def _why_materialized(value: ImplicitValue, children: list[Any]) -> str:
    shapes = ", ".join(str(jnp.shape(child)) for child in children)
    return (
        f"This happened in {type(value).__name__}.materialize(), which was traced for its shape: an argument "
        f"of a function decorated with use_implicit_args has children of shapes {shapes}. If they are "
        f"stacked, jax.vmap the function, or let materialize() accept leading axes."
    )


def _evaluate(closed: Any, args: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr on values any of which may be implicit."""
    jaxpr, consts = _compat.jaxpr_and_consts(closed)
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    for var, arg in zip(jaxpr.invars, args, strict=True):
        values[var] = _stated(arg, var.aval)
    last_use = {var: eqn for eqn in jaxpr.eqns for var in eqn.invars if not _compat.is_literal(var)}
    kept = {var for var in jaxpr.outvars if not _compat.is_literal(var)}
    for eqn in jaxpr.eqns:
        operands = [var.val if _compat.is_literal(var) else values[var] for var in eqn.invars]
        with _compat.equation_context(eqn):
            outs = _apply(eqn, operands)
        values.update(zip(eqn.outvars, outs, strict=True))
        for var in {v for v in eqn.invars if not _compat.is_literal(v)}:
            if last_use[var] is eqn and var not in kept:
                values.pop(var, None)  # eagerly, this frees the intermediate array
    return [as_array(var.val, var.aval) if _compat.is_literal(var) else values[var] for var in jaxpr.outvars]


def _stated(value: Any, aval: Any) -> Any:
    return _tree.restated(value, aval.shape, aval.dtype) if is_implicit(value) else value


def _apply(eqn: Any, operands: list[Any]) -> Sequence[Any]:
    """One equation: the primitive itself, a handler, a rule, or materialization, in that order."""
    primitive, params = eqn.primitive, eqn.params
    first = next((value for value in operands if is_implicit(value)), None)
    if first is None:
        outs = _compat.bind(primitive, operands, params)
        return outs if primitive.multiple_results else [outs]
    operands = [as_array(value, var.aval) for value, var in zip(operands, eqn.invars, strict=True)]
    outs = _call_handler(primitive, first, operands, params)
    if outs is NotImplemented and primitive.name in RULES:
        step = _step(eqn)
        with _notes.inside(step.place):
            outs = RULES[primitive.name](step, operands)
        return [_stated(out, var.aval) for out, var in zip(outs, eqn.outvars, strict=True)]
    if outs is NotImplemented:
        place = _compat.source_line(eqn)
        for value in operands:
            if is_implicit(value):
                _notes.report(primitive.name, value, place)
        outs = type(first).default_handler(primitive, *operands, params=params)
    return checked(outs if primitive.multiple_results else [outs], eqn)


def _call_handler(primitive: Any, first: ImplicitValue, operands: list[Any], params: dict[str, Any]) -> Any:
    swap = len(operands) == 2 and first.commute_ops and primitive.name in COMMUTATIVE
    ordered = operands[::-1] if swap and not is_implicit(operands[0]) else operands
    candidate = handlers.find(primitive, ordered)
    if candidate is None:
        return NotImplemented
    return _one_layer_down(lambda *values: call_handler(candidate, primitive, values, params), *ordered)


def _step(eqn: Any) -> Step:
    return Step(
        primitive=eqn.primitive,
        params=eqn.params,
        in_avals=[var.aval for var in eqn.invars],
        out_avals=[var.aval for var in eqn.outvars],
        place=_compat.source_line(eqn),
        evaluate=_evaluate,
        materialize=functools.partial(materialize_nested, full=True),
    )
