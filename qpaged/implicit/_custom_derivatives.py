"""Rules for functions with custom derivatives: custom_jvp and custom_vjp.

Values are computed with implicit operands, derivatives by the function's own rule at the dense operands.
The outputs are dense, because the function's own rule has no tangents for the children of implicit arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from qpaged._compat import Operand
from qpaged.implicit._rule_context import Outputs, RuleContext


def custom_jvp(ctx: RuleContext, operands: list[Operand]) -> Outputs:
    """Evaluate a custom_jvp function; under differentiation its own rule is applied to the dense operands."""

    def primal(operands: list[Operand]) -> list[Operand]:
        return _value(ctx, operands)

    def dense_primal(operands: list[Operand]) -> list[Operand]:
        return _value_of_dense(ctx, operands)

    def jvp(primals: tuple[list[Operand]], tangents: tuple[list[Operand]]) -> tuple[Any, Any]:
        _, tangents_out = jax.jvp(dense_primal, primals, tangents)
        return primal(*primals), tangents_out

    function = jax.custom_jvp(primal)
    function.defjvp(jvp)
    return function(operands)


def custom_vjp(ctx: RuleContext, operands: list[Operand]) -> Outputs:
    """Evaluate a custom_vjp function; under differentiation its own rule is applied to the dense operands."""

    def primal(operands: list[Operand]) -> list[Operand]:
        return _value(ctx, operands)

    def dense_primal(operands: list[Operand]) -> list[Operand]:
        return _value_of_dense(ctx, operands)

    def forward(operands: list[Operand]) -> tuple[list[Operand], Callable[..., Any]]:
        return jax.vjp(dense_primal, operands)

    def backward(pullback: Callable[..., Any], cotangents: list[Operand]) -> tuple[Any, ...]:
        return pullback(cotangents)

    function = jax.custom_vjp(primal)
    function.defvjp(forward, backward)
    return function(operands)


def _value(ctx: RuleContext, operands: list[Operand]) -> list[Operand]:
    # JAX requires outputs and tangents to have the same tree, and the tangents are dense.
    return [ctx.to_dense(out) for out in ctx.evaluate(ctx.params["call_jaxpr"], operands)]


def _value_of_dense(ctx: RuleContext, operands: list[Operand]) -> list[Operand]:
    # Binding the primitive itself, rather than evaluating its jaxpr, brings in its derivative rule.
    return list(ctx.bind([ctx.to_dense(operand) for operand in operands]))
