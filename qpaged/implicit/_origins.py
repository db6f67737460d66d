"""What a program shows of its plain values: what they were broadcast from, and which of them are zeros.

A mask of rows meets a cache in `select_n` or `mul`, stretched to the shape of the cache. A handler that asks
for the rows that it was made of need not read the stretched one, and may keep it in scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qpaged import _compat
from qpaged._compat import Atom, Equation, Operand


class Broadcast(NamedTuple):
    """A value that was broadcast: ``out`` is ``source`` with its axes on ``dimensions``."""

    out: jax.Array
    source: jax.Array
    dimensions: tuple[int, ...]


@dataclass
class Origins:
    """What one evaluation of a jaxpr knows of its plain values, by their `id`.

    The values are kept beside it, so that no other gets their id.
    """

    broadcasts: dict[int, Broadcast] = field(default_factory=dict)
    zeros: dict[int, Operand] = field(default_factory=dict)

    def follow(self, eqn: Equation, operands: Sequence[Operand], outs: Sequence[Operand]) -> None:
        """Note what an equation of plain operands shows of its result."""
        name = eqn.primitive.name
        if name == "broadcast_in_dim" and len(operands) == 1:
            dimensions = eqn.params["broadcast_dimensions"]
            self.broadcasts[id(outs[0])] = Broadcast(outs[0], operands[0], dimensions)
        if name in ("broadcast_in_dim", "convert_element_type", "reshape"):
            self.note_zeros(eqn.invars[:1], operands[:1], outs)

    def note_zeros(self, atoms: Sequence[Atom], operands: Sequence[Operand], outs: Sequence[Operand]) -> None:
        """Note of each of ``outs`` that it is zeros, if the operand that it was made of is."""
        for atom, operand, out in zip(atoms, operands, outs, strict=True):
            if is_zero_literal(atom) or is_zeros(operand):
                self.zeros[id(out)] = out

    def forget(self, value: Operand) -> None:
        """Let go of a value that the program does not use any more."""
        self.broadcasts.pop(id(value), None)
        self.zeros.pop(id(value), None)


# A context variable rather than a global, because threads trace at the same time; innermost evaluation last.
_evaluations: ContextVar[tuple[Origins, ...]] = ContextVar("evaluations", default=())


@contextmanager
def evaluation(zeros: Sequence[Operand] = ()) -> Iterator[Origins]:
    """Collect what is known of values, of which ``zeros`` are zeros; yield the collection."""
    origins = Origins(zeros={id(value): value for value in zeros})
    token = _evaluations.set((*_evaluations.get(), origins))
    try:
        yield origins
    finally:
        _evaluations.reset(token)


def is_zero_literal(atom: Atom) -> bool:
    """Return True for a zero that is written into a jaxpr."""
    return _compat.is_literal(atom) and bool(np.all(np.equal(atom.val, 0)))


def is_zeros(operand: Operand) -> bool:
    """Return True if the program shows a plain operand to be zeros; False also where it does not say."""
    return any(id(operand) in origins.zeros for origins in _evaluations.get())


def unstretched(operand: Operand) -> jax.Array:
    """Return a plain operand with length 1 along each axis that a broadcast stretched, as far as is known."""
    for origins in _evaluations.get():
        broadcast = origins.broadcasts.get(id(operand))
        if broadcast is None:
            continue
        source = unstretched(broadcast.source)
        shape = [1] * jnp.ndim(operand)
        for length, axis in zip(jnp.shape(source), broadcast.dimensions, strict=True):
            shape[axis] = length
        return lax.broadcast_in_dim(source, shape, broadcast.dimensions)
    return operand
