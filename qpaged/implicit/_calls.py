"""jit inside a function of implicit arrays.

It stays a jit rather than being inlined: run eagerly, a model that jits itself would otherwise be
executed operation by operation. The compiled functions are kept by jaxpr, which JAX keeps for equal
functions and shapes, so that an eager loop compiles once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Sharding

from qpaged import _compat
from qpaged.implicit import _notes
from qpaged.implicit._dispatch import handlers
from qpaged.implicit._step import Outputs, Step
from qpaged.implicit._value import is_implicit

Evaluate = Callable[[Any, Any], list[Any]]


class _Compiled:
    """One inner function, compiled, and what its tracing materialized: said again at every call."""

    def __init__(self, jaxpr: Any, name: str, evaluate: Evaluate):
        self._seen: list[tuple[Any, ...]] = []

        def run(values: list[Any]) -> list[Any]:
            with _notes.collect(self._seen):
                return evaluate(jaxpr, values)

        run.__name__ = run.__qualname__ = name
        self._run = jax.jit(run)

    def __call__(self, values: list[Any]) -> list[Any]:
        outs = self._run(values)
        _notes.repeat(self._seen)
        return outs


@functools.lru_cache(maxsize=256)
def _compiled(jaxpr: Any, name: str, evaluate: Evaluate, version: int) -> _Compiled:
    del version  # part of the key: a new handler may change what the function means
    return _Compiled(jaxpr, name, evaluate)


def jit(step: Step, values: list[Any]) -> Outputs:
    """An inner jit. Donation and compiler options are the outermost call's to say, and are dropped."""
    jaxpr = step.params["jaxpr"]
    values = _constrained(values, step.params.get("in_shardings", ()))
    if _compat.inlines_while_tracing(step.params):
        outs = step.evaluate(jaxpr, values)
    else:
        outs = _compiled(jaxpr, step.params.get("name", "jit"), step.evaluate, handlers.version)(values)
    return _constrained(outs, step.params.get("out_shardings", ()))


def _constrained(values: list[Any], shardings: tuple[Any, ...]) -> list[Any]:
    """Shardings that an inner jit asks for, kept for plain values."""
    asked = [*shardings, *(None,) * (len(values) - len(shardings))]
    return [
        jax.lax.with_sharding_constraint(value, sharding)
        if isinstance(sharding, Sharding) and not is_implicit(value)
        else value
        for value, sharding in zip(values, asked, strict=True)
    ]
