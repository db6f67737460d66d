"""One equation of a jaxpr, as the rules for higher-order primitives see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qpaged import _compat
from qpaged.implicit import _notes
from qpaged.implicit._value import is_implicit

Outputs = Sequence[Any]
Rule = Callable[["Step", list[Any]], Outputs]


@dataclass(frozen=True)
class Step:
    """The primitive of an equation, its parameters, its logical types, and how to go on inside it.

    `evaluate(jaxpr, values)` runs an inner jaxpr with implicit values; `materialize(value)` makes one
    dense, through all layers.
    """

    primitive: Any
    params: dict[str, Any]
    in_avals: Sequence[Any]
    out_avals: Sequence[Any]
    place: _notes.Place | None
    evaluate: Callable[[Any, Sequence[Any]], list[Any]]
    materialize: Callable[[Any], Any]

    def dense(self, value: Any) -> Any:
        """The value as a plain array, with a report if it was not one."""
        if not is_implicit(value):
            return value
        _notes.report(self.primitive.name, value, self.place)
        return self.materialize(value)

    def bind(self, values: Sequence[Any]) -> Outputs:
        """The primitive itself, on plain values."""
        outs = _compat.bind(self.primitive, values, self.params)
        return outs if self.primitive.multiple_results else [outs]
