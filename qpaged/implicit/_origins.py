"""What an evaluation knows of its plain values: facts that the program shows of them.

A mask of rows meets a cache in `select_n` or `mul`, stretched to the shape of the cache. A handler that asks
along which axes it was stretched need not read all of it, and may keep it in scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import jax
from jax import lax

from qpaged._compat import Equation, Operand
from qpaged.implicit import _facts
from qpaged.implicit._facts import ZEROS, Fact, Facts, Kind, facts_of, known_facts


class Origin(NamedTuple):
    """What is known of a value.

    Attributes:
        value: itself, kept so that no other value gets its `id`.
        fact: what the program shows of it.
        one_hot: of a row, the one-hot value that it was multiplied with or selected by, if known.
    """

    value: Operand
    fact: Fact
    one_hot: jax.Array | None = None


class Origins:
    """What one evaluation of a jaxpr knows of its plain values."""

    def __init__(self, values: Sequence[Operand] = (), facts: Facts = ()):
        self._by_id: dict[int, Origin] = {}
        for value, fact in zip(values, facts, strict=True):
            if fact is not None:
                self._by_id[id(value)] = Origin(value, fact)

    def find(self, value: Operand) -> Origin | None:
        return self._by_id.get(id(value))

    def follow(self, eqn: Equation, operands: Sequence[Operand], outs: Sequence[Operand]) -> None:
        """Note what an equation of plain operands shows of its results."""
        facts = facts_of(eqn, [fact_of(operand) for operand in operands])
        for out, fact in zip(outs, facts, strict=True):
            if fact is not None:
                source = fact.source if fact.kind is Kind.ROW else None
                one_hot = None if source is None else one_hot_of(operands[source])
                self._by_id[id(out)] = Origin(out, fact, one_hot)

    def note_zero_literals(self, eqn: Equation, operands: Sequence[Operand]) -> None:
        """Note the operands that are zeros written into the jaxpr, which became arrays only now."""
        nothing = [None] * len(operands)
        for operand, fact in zip(operands, known_facts(eqn.invars, nothing), strict=True):
            if fact is not None:
                self._by_id.setdefault(id(operand), Origin(operand, ZEROS))

    def forget(self, value: Operand) -> None:
        """Let go of a value that the program does not use any more."""
        self._by_id.pop(id(value), None)


# A context variable rather than a global, because threads trace at the same time; innermost evaluation last.
_evaluations: ContextVar[tuple[Origins, ...]] = ContextVar("evaluations", default=())


@contextmanager
def evaluation(values: Sequence[Operand] = (), facts: Facts = ()) -> Iterator[Origins]:
    """Collect what is known of values, which begins with ``facts`` of ``values``; yield the collection."""
    origins = Origins(values, facts)
    token = _evaluations.set((*_evaluations.get(), origins))
    try:
        yield origins
    finally:
        _evaluations.reset(token)


def _origin_of(operand: Operand) -> Origin | None:
    for origins in reversed(_evaluations.get()):
        origin = origins.find(operand)
        if origin is not None:
            return origin
    return None


def fact_of(operand: Operand) -> Fact | None:
    """Return what the program shows of a plain operand, if anything."""
    origin = _origin_of(operand)
    return None if origin is None else origin.fact


def is_zeros(operand: Operand) -> bool:
    """Return True if the program shows a plain operand to be zeros; False also where it does not say."""
    return _facts.is_zeros(fact_of(operand))


def unstretched(operand: Operand) -> jax.Array:
    """Return a plain operand with length 1 along each axis that a broadcast stretched, as far as is known."""
    fact = fact_of(operand)
    for axis in () if fact is None else fact.repeats:
        operand = lax.slice_in_dim(operand, 0, 1, axis=axis)
    return operand


def one_hot_of(operand: Operand) -> jax.Array | None:
    """Return the one-hot value of a row, or an operand that is one, :func:`unstretched`; None if unknown."""
    origin = _origin_of(operand)
    if origin is None:
        return None
    return unstretched(operand) if origin.fact.kind is Kind.ONE_HOT else origin.one_hot
