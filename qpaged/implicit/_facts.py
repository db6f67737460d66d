"""Facts that a program shows of its plain values: zeros, and what is zero but at one index of an axis.

Some programs write a row into a cache by arithmetic, over all of its length: they add a row times a one-hot
vector, or select by `jnp.arange(length) == position`. These facts, read off the equations of a jaxpr, tell
such a write from a cache that is computed anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from qpaged import _compat
from qpaged._compat import Atom, Aval, Equation


class Kind(Enum):
    """What is known of a value along one axis; along the others it may do anything, unless said."""

    ZEROS = "zeros everywhere"
    COUNT = "0, 1, 2 and so on, and the same along the other axes"
    ONE_HOT = "1 or True at one index at most, 0 or False at the others"
    ALL_BUT_ONE = "0 or False at one index at most, 1 or True at the others"
    ROW = "anything at one index at most, 0 at the others"


class Fact(NamedTuple):
    """What is known of a value.

    Attributes:
        kind: None if nothing of the kinds is known.
        axis: the axis that the kind is about.
        repeats: the axes along which the value is the same all along, as after a broadcast.
    """

    kind: Kind | None = None
    axis: int = 0
    repeats: tuple[int, ...] = ()


Facts: TypeAlias = Sequence[Fact | None]
ZEROS = Fact(Kind.ZEROS)


def facts_of(eqn: Equation, facts: Facts) -> list[Fact | None]:
    """Return what is known of the results of an equation, given what is known of its operands."""
    name = eqn.primitive.name
    facts = known_facts(eqn.invars, facts)
    if name in ("jit", "pjit", "closed_call"):
        return _facts_of_call(eqn, facts)
    rule = RULES.get(name)
    if rule is None or len(eqn.outvars) != 1:
        return [None] * len(eqn.outvars)
    return [rule(eqn, facts)]


def known_facts(atoms: Sequence[Atom], facts: Facts) -> list[Fact | None]:
    """Return the facts of operands, some of which may be zeros that are written into the jaxpr."""
    return [ZEROS if _is_literal(atom, 0) else fact for atom, fact in zip(atoms, facts, strict=True)]


def _is_literal(atom: Atom, number: int) -> bool:
    return _compat.is_literal(atom) and bool(np.all(np.equal(atom.val, number)))


def is_zeros(fact: Fact | None) -> bool:
    """Return True if a value is known to be zeros."""
    return fact is not None and fact.kind is Kind.ZEROS


def _facts_of_call(eqn: Equation, facts: Facts) -> list[Fact | None]:
    called, _ = _compat.jaxpr_and_consts(_compat.called_jaxpr(eqn.params))
    known = dict(zip(called.invars, facts, strict=True))

    def fact_of(atom: Atom) -> Fact | None:
        return None if _compat.is_literal(atom) else known.get(atom)

    for inner in called.eqns:
        inner_facts = facts_of(inner, [fact_of(atom) for atom in inner.invars])
        known.update(zip(inner.outvars, inner_facts, strict=True))
    return known_facts(called.outvars, [fact_of(atom) for atom in called.outvars])


def _shape(atom: Atom) -> tuple[int, ...]:
    return tuple(getattr(atom.aval, "shape", ()))


def _same(eqn: Equation, facts: Facts) -> Fact | None:
    return facts[0]


def _converted(eqn: Equation, facts: Facts) -> Fact | None:
    fact = facts[0]
    if fact is not None and fact.kind is Kind.COUNT and not _counts(eqn.outvars[0], fact.axis):
        return Fact(repeats=fact.repeats)
    return fact


def _iota(eqn: Equation, facts: Facts) -> Fact | None:
    axis = eqn.params["dimension"]
    return Fact(Kind.COUNT, axis) if _counts(eqn.outvars[0], axis) else None


def _counts(atom: Atom, axis: int) -> bool:
    """Return True if the dtype has a number of its own for each index: bfloat16 has not, beyond 256."""
    aval: Aval = atom.aval
    dtype, length = aval.dtype, aval.shape[axis]
    if not isinstance(length, int):
        return False  # a length of symbols, as `jax.export` has them, is compared with nothing
    if jnp.issubdtype(dtype, jnp.integer):
        return length - 1 <= jnp.iinfo(dtype).max
    return jnp.issubdtype(dtype, jnp.floating) and length <= 2 ** (jnp.finfo(dtype).nmant + 1)


def _moved(axis_after: Callable[[Equation, int], int | None]) -> Callable[[Equation, Facts], Fact | None]:
    """Make a rule of a move, from a function that says which axis an axis has become, None if none."""

    def rule(eqn: Equation, facts: Facts) -> Fact | None:
        fact = facts[0]
        if fact is None:
            return None
        moved = [axis_after(eqn, axis) for axis in fact.repeats]
        repeats = tuple(axis for axis in moved if axis is not None)
        if fact.kind is None or fact.kind is Kind.ZEROS:
            return Fact(fact.kind, 0, repeats)
        axis = axis_after(eqn, fact.axis)
        return Fact(None, 0, repeats) if axis is None else Fact(fact.kind, axis, repeats)

    return rule


def _broadcast(eqn: Equation, facts: Facts) -> Fact | None:
    fact = _moved(_axis_after_broadcast)(eqn, facts) or Fact()
    moved = [_axis_after_broadcast(eqn, axis) for axis in range(len(_shape(eqn.invars[0])))]
    stretched = [axis for axis, length in enumerate(eqn.params["shape"]) if axis not in moved and length != 1]
    return fact._replace(repeats=(*fact.repeats, *stretched))


def _axis_after_broadcast(eqn: Equation, axis: int) -> int | None:
    """Return the axis that an axis is broadcast to; None if it is stretched."""
    after = eqn.params["broadcast_dimensions"][axis]
    return after if eqn.params["shape"][after] == _shape(eqn.invars[0])[axis] else None


def _axis_after_squeeze(eqn: Equation, axis: int) -> int | None:
    removed = eqn.params["dimensions"]
    return None if axis in removed else axis - sum(other < axis for other in removed)


def _axis_after_reshape(eqn: Equation, axis: int) -> int | None:
    """Return the axis of the same length with as many elements before it; a reshape keeps their order."""
    before, after = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    for new_axis, length in enumerate(after):
        if length == before[axis] != 1 and math.prod(after[:new_axis]) == math.prod(before[:axis]):
            return new_axis
    return None


def _axis_after_transpose(eqn: Equation, axis: int) -> int | None:
    return tuple(eqn.params["permutation"]).index(axis)


def _equals(eqn: Equation, facts: Facts) -> Fact | None:
    axis = _counted_axis(eqn, facts)
    return None if axis is None else Fact(Kind.ONE_HOT, axis)


def _differs(eqn: Equation, facts: Facts) -> Fact | None:
    axis = _counted_axis(eqn, facts)
    return None if axis is None else Fact(Kind.ALL_BUT_ONE, axis)


def _counted_axis(eqn: Equation, facts: Facts) -> int | None:
    """Return the axis along which one operand counts, if the other is the same all along it."""
    for fact, other in zip(facts, reversed(eqn.invars), strict=True):
        if fact is None or fact.kind is not Kind.COUNT:
            continue
        if not _shape(other) or _shape(other)[fact.axis] == 1:
            return fact.axis
    return None


def _complement(eqn: Equation, facts: Facts) -> Fact | None:
    """Return the fact of ``1 - x`` or ``not x``."""
    fact = facts[-1]
    if eqn.primitive.name == "sub" and not _is_literal(eqn.invars[0], 1):
        return None
    if fact is None or fact.kind not in (Kind.ONE_HOT, Kind.ALL_BUT_ONE):
        return None
    return Fact(Kind.ALL_BUT_ONE if fact.kind is Kind.ONE_HOT else Kind.ONE_HOT, fact.axis)


def _product(eqn: Equation, facts: Facts) -> Fact | None:
    for atom, fact in zip(eqn.invars, facts, strict=True):
        if fact is not None and fact.kind in (Kind.ONE_HOT, Kind.ROW) and _shape(atom)[fact.axis] != 1:
            return Fact(Kind.ROW, fact.axis)
    return None


def _both(eqn: Equation, facts: Facts) -> Fact | None:
    for fact in facts:
        if fact is not None and fact.kind is Kind.ONE_HOT:
            return Fact(Kind.ONE_HOT, fact.axis)  # what it repeats along, the other operand need not
    return None


def _selection(eqn: Equation, facts: Facts) -> Fact | None:
    which, *cases = facts
    if which is None or len(cases) != 2 or which.kind is not Kind.ONE_HOT or not is_zeros(cases[0]):
        return None
    return Fact(Kind.ROW, which.axis)


RULES: dict[str, Callable[[Equation, Facts], Fact | None]] = {
    "and": _both,
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _converted,
    "copy": _same,
    "eq": _equals,
    "iota": _iota,
    "mul": _product,
    "ne": _differs,
    "not": _complement,
    "reshape": _moved(_axis_after_reshape),
    "select_n": _selection,
    "squeeze": _moved(_axis_after_squeeze),
    "stop_gradient": _same,
    "sub": _complement,
    "transpose": _moved(_axis_after_transpose),
}
