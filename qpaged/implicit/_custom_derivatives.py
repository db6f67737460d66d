"""Rules for functions with custom derivatives: custom_jvp and custom_vjp.

Values are computed with implicit operands, derivatives by the function's own rule at the dense operands.
Outputs are dense, because the function's own rule has no tangents for the children of implicit arrays. Only
those of a class without derivatives stay implicit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from qpaged._compat import Operand
from qpaged.implicit import _reports
from qpaged.implicit._rule_context import Outputs, RuleContext
from qpaged.implicit._value import is_implicit


def custom_jvp(ctx: RuleContext, operands: list[Operand]) -> Outputs:
    """Evaluate a custom_jvp function; under differentiation its own rule is applied to the dense operands."""

    def make(dense_outs: Sequence[int]) -> Callable[[list[Operand]], list[Operand]]:
        def primal(operands: list[Operand]) -> list[Operand]:
            return _value(ctx, operands, dense_outs)

        def dense_primal(operands: list[Operand]) -> list[Operand]:
            return _value_of_dense(ctx, operands, dense_outs)

        def jvp(primals: tuple[list[Operand]], tangents: tuple[list[Operand]]) -> tuple[Any, Any]:
            _, tangents_out = jax.jvp(dense_primal, primals, tangents)
            return primal(*primals), tangents_out

        function = jax.custom_jvp(primal)
        function.defjvp(jvp)
        return function

    return _evaluate(ctx, operands, make)


def custom_vjp(ctx: RuleContext, operands: list[Operand]) -> Outputs:
    """Evaluate a custom_vjp function; under differentiation its own rule is applied to the dense operands."""

    def make(dense_outs: Sequence[int]) -> Callable[[list[Operand]], list[Operand]]:
        def primal(operands: list[Operand]) -> list[Operand]:
            return _value(ctx, operands, dense_outs)

        def dense_primal(operands: list[Operand]) -> list[Operand]:
            return _value_of_dense(ctx, operands, dense_outs)

        def forward(operands: list[Operand]) -> tuple[list[Operand], Callable[..., Any]]:
            return jax.vjp(dense_primal, operands)

        def backward(pullback: Callable[..., Any], cotangents: list[Operand]) -> tuple[Any, ...]:
            return pullback(cotangents)

        function = jax.custom_vjp(primal)
        function.defvjp(forward, backward)
        return function

    return _evaluate(ctx, operands, make)


def _evaluate(
    ctx: RuleContext,
    operands: list[Operand],
    make: Callable[[Sequence[int]], Callable[[list[Operand]], list[Operand]]],
) -> Outputs:
    """Return the outputs: those without a derivative as they are, the others by the function of ``make``."""

    def evaluate(operands: list[Operand]) -> list[Operand]:
        return list(ctx.evaluate(ctx.params["call_jaxpr"], operands))

    with _reports.no_reports():
        outs = jax.eval_shape(evaluate, operands)
    dense_outs = [index for index, out in enumerate(outs) if not _stays_implicit(out)]
    if len(dense_outs) < len(outs):
        outs = evaluate(jax.lax.stop_gradient(operands))
    for index, out in zip(dense_outs, make(dense_outs)(operands), strict=True):
        outs[index] = out
    return outs


def _stays_implicit(value: Operand) -> bool:
    return is_implicit(value) and not type(value).has_derivative


def _value(ctx: RuleContext, operands: list[Operand], indices: Sequence[int]) -> list[Operand]:
    """Return some of the outputs, dense: JAX requires tangents of the same tree, and these are dense."""
    outs = ctx.evaluate(ctx.params["call_jaxpr"], operands)
    return [ctx.to_dense(outs[index]) for index in indices]


def _value_of_dense(ctx: RuleContext, operands: list[Operand], indices: Sequence[int]) -> list[Operand]:
    """Return some of the outputs, by binding the primitive itself, which brings in its derivative rule."""
    outs = list(ctx.bind([ctx.to_dense(operand) for operand in operands]))
    return [outs[index] for index in indices]
