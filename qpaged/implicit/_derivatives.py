"""Functions with derivatives of their own.

Their values are computed with the operands implicit, their derivatives by the rule they came with,
at the dense operands. The outputs are dense: a rule that speaks of arrays has no tangents for the
parts of an implicit one.
"""

from __future__ import annotations

from typing import Any

import jax

from qpaged.implicit._step import Outputs, Step


def custom_jvp(step: Step, values: list[Any]) -> Outputs:
    """A custom_jvp function; under differentiation its own rule is applied to the dense operands."""
    run = jax.custom_jvp(lambda operands: _value(step, operands))

    @run.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        _, tangents_out = jax.jvp(lambda operands: _dense_value(step, operands), primals, tangents)
        return _value(step, *primals), tangents_out

    return run(values)


def custom_vjp(step: Step, values: list[Any]) -> Outputs:
    """A custom_vjp function; under differentiation its own rule is applied to the dense operands."""
    run = jax.custom_vjp(lambda operands: _value(step, operands))
    run.defvjp(
        lambda operands: jax.vjp(lambda v: _dense_value(step, v), operands),
        lambda pullback, cotangents: pullback(cotangents),
    )
    return run(values)


def _value(step: Step, operands: list[Any]) -> list[Any]:
    return [step.dense(out) for out in step.evaluate(step.params["call_jaxpr"], operands)]


def _dense_value(step: Step, operands: list[Any]) -> list[Any]:
    return list(step.bind([step.dense(value) for value in operands]))
