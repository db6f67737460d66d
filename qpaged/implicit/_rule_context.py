"""The context in which a rule handles one equation, as `LoweringRuleContext` is for JAX's lowering rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import jax

from qpaged import _compat
from qpaged._compat import Aval, Jaxpr, Location, Operand, Params, Primitive
from qpaged.implicit import _reports, _tree
from qpaged.implicit._facts import Fact
from qpaged.implicit._value import ImplicitValue, is_implicit

Outputs: TypeAlias = Sequence[Operand]
Rule: TypeAlias = Callable[["RuleContext", list[Operand]], Outputs]
"""Returns the results of an equation; NotImplemented to have its operands materialized."""


@dataclass(frozen=True)
class RuleContext:
    """One equation of a jaxpr: its primitive, parameters, output types and line of code.

    The interpreter passes itself in, so that rules do not import it: `evaluate(jaxpr, operands)` evaluates an
    inner jaxpr on implicit operands, and `materialize(value)` materializes all layers of an implicit array.
    `facts` are what the program shows of its plain operands.
    """

    primitive: Primitive
    params: Params
    out_avals: Sequence[Aval]
    location: Location | None
    facts: tuple[Fact | None, ...]
    evaluate: Callable[[Jaxpr, Sequence[Operand]], list[Operand]]
    materialize: Callable[[ImplicitValue], jax.Array]

    def to_dense(self, value: Operand) -> Operand:
        """Return a value as a plain array, and report it if it was implicit."""
        if not is_implicit(value):
            return value
        _reports.report(self.primitive.name, value, self.location)
        return self.materialize(value)

    def bind(self, operands: Sequence[Operand]) -> Outputs:
        """Apply the primitive to plain operands, and return its results as a sequence."""
        outs = _compat.bind(self.primitive, operands, self.params)
        if self.primitive.multiple_results:
            return outs
        return [outs]

    def materializes_to(self, value: ImplicitValue, aval: Aval) -> bool:
        """Return True if an implicit array whose leaves were replaced materializes to the shape of `aval`."""
        try:
            with _reports.no_reports():
                typed = _tree.with_logical_type(value, aval.shape, aval.dtype)
                struct = jax.eval_shape(self.materialize, typed)
        except Exception:  # a class may raise anything if its leaves do not fit together any more
            return False
        return struct.shape == aval.shape
