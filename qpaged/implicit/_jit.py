"""The rule for jit inside a function of implicit arrays.

It stays a jit rather than being inlined: run eagerly, a model that jits itself would otherwise be
executed operation by operation. Compiled functions are cached by jaxpr, and JAX keeps one jaxpr for equal
functions and shapes, so an eager loop compiles once.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import Sharding

from qpaged import _compat
from qpaged._compat import Jaxpr, Operand
from qpaged.implicit import _origins, _reports, _tree
from qpaged.implicit._dispatch import registry
from qpaged.implicit._facts import Fact
from qpaged.implicit._rule_context import Outputs, RuleContext
from qpaged.implicit._value import is_implicit

Evaluate: TypeAlias = Callable[[Jaxpr, Sequence[Operand]], list[Operand]]


class _CompiledJaxpr:
    """One inner function, compiled, which repeats the reports of its tracing at every call.

    It is traced anew for operands of other types, and repeats the reports of these alone. ``facts`` are
    what is known of its operands.
    """

    def __init__(self, jaxpr: Jaxpr, name: str, facts: tuple[Fact | None, ...], evaluate: Evaluate):
        self._reports: defaultdict[Hashable, list[_reports.Report]] = defaultdict(list)

        def run(operands: list[Operand]) -> list[Operand]:
            reports = self._reports[_tree.layout(operands)]
            with _reports.collect_reports(reports), _origins.evaluation(operands, facts):
                return evaluate(jaxpr, operands)

        run.__name__ = run.__qualname__ = name  # the name that profiles and jaxprs show
        self._run = jax.jit(run)

    def __call__(self, operands: list[Operand]) -> list[Operand]:
        outs = self._run(operands)
        _reports.repeat_reports(self._reports[_tree.layout(operands)])
        return outs


@functools.lru_cache(maxsize=256)
def _compiled(
    jaxpr: Jaxpr, name: str, facts: tuple[Fact | None, ...], evaluate: Evaluate, registry_version: int
) -> _CompiledJaxpr:
    del registry_version  # only part of the key: a new handler may change what the function does
    return _CompiledJaxpr(jaxpr, name, facts, evaluate)


def jit(ctx: RuleContext, operands: list[Operand]) -> Outputs:
    """Evaluate an inner jit. Donation and compiler options belong to the outermost call, and are dropped."""
    jaxpr = ctx.params["jaxpr"]
    operands = _with_constraints(operands, ctx.params.get("in_shardings", ()))
    if _compat.inlines_while_tracing(ctx.params):
        outs = ctx.evaluate(jaxpr, operands)
    else:
        name = ctx.params.get("name", "jit")
        outs = _compiled(jaxpr, name, ctx.facts, ctx.evaluate, registry.version)(operands)
    return _with_constraints(outs, ctx.params.get("out_shardings", ()))


def _with_constraints(values: list[Operand], shardings: tuple[Any, ...]) -> list[Operand]:
    """Constrain plain values to the shardings that an inner jit names; implicit ones stay as they are."""
    values = list(values)
    for index, sharding in enumerate(shardings):
        # What is unspecified is no Sharding. One of an implicit array does not fit its leaves.
        if isinstance(sharding, Sharding) and not is_implicit(values[index]):
            values[index] = jax.lax.with_sharding_constraint(values[index], sharding)
    return values
