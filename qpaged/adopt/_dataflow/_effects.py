"""Record the writes and reads of a program, and where its inputs are returned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from jax.extend.core import JaxprEqn

from qpaged import _compat
from qpaged._compat import Atom
from qpaged.adopt._dataflow._views import Axes, Operation, Selection, SourceLocation, Views
from qpaged.implicit._facts import Fact, facts_of


@dataclass(frozen=True)
class Write:
    """An operation overwrites a part of an input.

    Attributes:
        input_index: the number of the input.
        operation: the one that writes.
        partial_axes: the axes of the input along which less than everything is overwritten.
        adds: whether it adds to what lies there, which must be zeros where nothing was written yet.
    """

    input_index: int
    operation: Operation
    partial_axes: Axes
    adds: bool = False

    def __str__(self) -> str:
        axes = ", ".join(map(str, sorted(self.partial_axes)))
        extent = f"in part along axis {axes}" if axes else "whole"
        return f"written {extent} by {self.operation}"


@dataclass(frozen=True)
class Read:
    """A dot_general reads an input.

    Attributes:
        input_index: the number of the input.
        operation: the dot_general.
        contracting, batch, free: the axes of the input that it contracts, batches over, and keeps.
        selected: the axes along which it reads one index alone.
    """

    input_index: int
    operation: Operation
    contracting: Axes
    batch: Axes
    free: Axes
    selected: Selection


@dataclass
class Dataflow:
    """What a program does with its inputs, in the order of the program.

    Attributes:
        writes: partial writes into inputs.
        reads: reads of inputs by dots.
        outputs: for each output of the program, what it shows of the inputs.
        call_location: the line of the innermost call that is being followed.
        facts: what is known of the program's values, by variable.
    """

    writes: list[Write] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    outputs: list[Views] = field(default_factory=list)
    call_location: SourceLocation | None = None
    facts: dict[Atom, Fact | None] = field(default_factory=dict)

    def fact_of(self, atom: Atom) -> Fact | None:
        """Return what is known of an operand."""
        return None if _compat.is_literal(atom) else self.facts.get(atom)

    def follow_facts(self, eqn: JaxprEqn) -> None:
        """Note what is known of an equation's outputs."""
        self.note_facts(eqn.outvars, facts_of(eqn, [self.fact_of(atom) for atom in eqn.invars]))

    def note_facts(self, variables: Sequence[Atom], facts: Sequence[Fact | None]) -> None:
        """Note what is known of variables, in place of what an earlier call of their function knew."""
        self.facts.update(zip(variables, facts, strict=True))

    def locate(self, eqn: JaxprEqn) -> SourceLocation | None:
        """Return the user's line of an equation: inside a function of JAX's own, the line that calls it."""
        return _compat.source_line(eqn) or self.call_location

    def operation(self, eqn: JaxprEqn) -> Operation:
        """Return an equation's primitive and line."""
        return Operation(eqn.primitive.name, self.locate(eqn))

    # The body of a loop is interpreted several times, and must not be recorded as often.

    def add_write(self, write: Write) -> None:
        """Record a write, once."""
        if write not in self.writes:
            self.writes.append(write)

    def add_read(self, read: Read) -> None:
        """Record a read, once."""
        if read not in self.reads:
            self.reads.append(read)


Rule: TypeAlias = Callable[[Dataflow, JaxprEqn, Sequence[Views]], Sequence[Views] | None]
"""rule(dataflow, equation, views of its operands) -> views of its outputs; None if it does not apply."""
