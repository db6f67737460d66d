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

import numpy as np

from qpaged import _compat
from qpaged._compat import Atom, Equation


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
        source: of a row or a one-hot value, which operand of its equation is one along the same axis, and
            zero nowhere that the value is not; None if not known.
    """

    kind: Kind | None = None
    axis: int = 0
    repeats: tuple[int, ...] = ()
    source: int | None = None


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
    known: dict[Atom, Fact | None] = {}
    for number, (variable, fact) in enumerate(zip(called.invars, facts, strict=True)):
        known[variable] = _with_source(fact, number)

    def fact_of(atom: Atom) -> Fact | None:
        return None if _compat.is_literal(atom) else known.get(atom)

    for inner in called.eqns:
        inner_facts = facts_of(inner, [fact_of(atom) for atom in inner.invars])
        for variable, fact in zip(inner.outvars, inner_facts, strict=True):
            source = None if fact is None or fact.source is None else fact_of(inner.invars[fact.source])
            known[variable] = _with_source(fact, None if source is None else source.source)
    return known_facts(called.outvars, [fact_of(atom) for atom in called.outvars])


def _with_source(fact: Fact | None, source: int | None) -> Fact | None:
    return None if fact is None else fact._replace(source=source)


def _shape(atom: Atom) -> tuple[int, ...]:
    return tuple(getattr(atom.aval, "shape", ()))


def _dtype(atom: Atom) -> np.dtype | None:
    return getattr(atom.aval, "dtype", None)


def _same(eqn: Equation, facts: Facts) -> Fact | None:
    return _with_source(facts[0], 0)


def _converted(eqn: Equation, facts: Facts) -> Fact | None:
    fact = facts[0]
    if fact is None:
        return None
    result = eqn.outvars[0]
    numbers = _shape(result)[fact.axis] if fact.kind is Kind.COUNT else 2
    return _with_source(fact, 0) if _holds(result, numbers) else Fact(repeats=fact.repeats)


def _iota(eqn: Equation, facts: Facts) -> Fact | None:
    axis, result = eqn.params["dimension"], eqn.outvars[0]
    return Fact(Kind.COUNT, axis) if _holds(result, _shape(result)[axis]) else None


def _holds(atom: Atom, count: int) -> bool:
    """Return True if the dtype has the numbers 0, 1, 2 and so on, ``count`` of them: bfloat16 has 257."""
    if not isinstance(count, int):
        return False  # a length of symbols, as `jax.export` has them, is compared with nothing
    numbers = np.arange(count)
    with np.errstate(all="ignore"):
        return np.array_equal(numbers.astype(_dtype(atom)).astype(np.float64), numbers)


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
    shape = eqn.params["shape"]
    stretched = [axis for axis, length in enumerate(shape) if axis not in moved and length not in (0, 1)]
    source = 0 if len(moved) == len(shape) else None
    return fact._replace(repeats=(*fact.repeats, *stretched), source=source)


def _axis_after_broadcast(eqn: Equation, axis: int) -> int | None:
    """Return the axis that an axis is broadcast to; None if it is stretched."""
    after = eqn.params["broadcast_dimensions"][axis]
    return after if eqn.params["shape"][after] == _shape(eqn.invars[0])[axis] else None


def _axis_after_squeeze(eqn: Equation, axis: int) -> int | None:
    removed = eqn.params["dimensions"]
    return None if axis in removed else axis - sum(other < axis for other in removed)


def _axis_after_reshape(eqn: Equation, axis: int) -> int | None:
    if eqn.params.get("dimensions") is not None:
        return None  # the order that is kept is that of the axes transposed
    return axis_after_reshape(_shape(eqn.invars[0]), axis, _shape(eqn.outvars[0]))


def axis_after_reshape(shape: Sequence[int], axis: int, new_shape: Sequence[int]) -> int | None:
    """Return the axis of the same length with as many elements before it; a reshape keeps their order.

    None if there is none, or if the length is 1, of which there may be several.
    """
    for new_axis, length in enumerate(new_shape):
        if length == shape[axis] != 1 and math.prod(new_shape[:new_axis]) == math.prod(shape[:axis]):
            return new_axis
    return None


def _axis_after_transpose(eqn: Equation, axis: int) -> int | None:
    return tuple(eqn.params["permutation"]).index(axis)


def _sliced(eqn: Equation, facts: Facts) -> Fact | None:
    fact = facts[0]
    if fact is None:
        return None
    repeats = tuple(axis for axis in fact.repeats if _shape(eqn.outvars[0])[axis])
    return Fact(fact.kind if is_zeros(fact) else None, repeats=repeats)


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
    """Return the fact of ``1 - x``, or of ``not x`` of truth values."""
    fact, first = facts[-1], eqn.invars[0]
    complements = _is_literal(first, 1) if eqn.primitive.name == "sub" else _dtype(first) == np.dtype(bool)
    if not complements or fact is None or fact.kind not in (Kind.ONE_HOT, Kind.ALL_BUT_ONE):
        return None
    return Fact(Kind.ALL_BUT_ONE if fact.kind is Kind.ONE_HOT else Kind.ONE_HOT, fact.axis)


def _product(eqn: Equation, facts: Facts) -> Fact | None:
    return _within_one(eqn, facts, Kind.ROW)


def _both(eqn: Equation, facts: Facts) -> Fact | None:
    return _within_one(eqn, facts, Kind.ONE_HOT)


def _within_one(eqn: Equation, facts: Facts, kind: Kind) -> Fact | None:
    """Return the fact of a kind of what is zero wherever an operand is that is one-hot or of that kind."""
    result = _shape(eqn.outvars[0])
    for number, (atom, fact) in enumerate(zip(eqn.invars, facts, strict=True)):
        if fact is None or fact.kind not in (Kind.ONE_HOT, kind):
            continue
        if _shape(atom)[fact.axis] == result[fact.axis]:  # rather than stretched by the other operand
            return Fact(kind, fact.axis, source=number)  # what it repeats along, the other need not
    return None


def _selection(eqn: Equation, facts: Facts) -> Fact | None:
    which, *cases = facts
    if which is None or len(cases) != 2 or which.kind is not Kind.ONE_HOT or not is_zeros(cases[0]):
        return None
    return Fact(Kind.ROW, which.axis, source=0)


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
    "slice": _sliced,
    "squeeze": _moved(_axis_after_squeeze),
    "stop_gradient": _same,
    "sub": _complement,
    "transpose": _moved(_axis_after_transpose),
}
