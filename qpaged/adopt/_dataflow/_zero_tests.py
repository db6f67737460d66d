"""Find comparisons with zero by which a program tells the slots of a cache that nothing was written to.

Some models mask with ``jnp.where(scores != 0, scores, -inf)``. That needs unwritten slots that read as exact
zeros, which not every format gives. A comparison counts if its operand was made of an input by moves and
elementwise operations, or of one dot product with it (scores). What comes after a softmax, a sum or another
dot product does not count: zeros there mean something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from qpaged import _compat
from qpaged.adopt._dataflow._views import Operation, SourceLocation


class Trace(NamedTuple):
    """An input that a value was made of, and True if a dot product lies between."""

    input_index: int
    is_score: bool


Traces: TypeAlias = frozenset[Trace]
NO_TRACES: Traces = frozenset()
ENDS = ("exp", "exp2", "logistic", "argmax", "argmin", "reduce_", "cum")
"""Primitives, by the beginning of their names, of which nothing is followed further."""


class ZeroTests:
    """The comparisons with zero of one program, by the number of the input that is compared.

    Attributes:
        found: the first comparison for each input.
    """

    def __init__(self, jaxpr: Jaxpr | ClosedJaxpr):
        self.found: dict[int, Operation] = {}
        opened, _ = _compat.jaxpr_and_consts(jaxpr)
        traces = [frozenset({Trace(index, False)}) for index in range(len(opened.invars))]
        self._follow(opened, traces, [False] * len(traces), None)

    def _follow(
        self,
        jaxpr: Jaxpr | ClosedJaxpr,
        traces_in: Sequence[Traces],
        zeros_in: Sequence[bool],
        caller: SourceLocation | None,
    ) -> tuple[list[Traces], list[bool]]:
        """Return the traces of a jaxpr's outputs, and which of them are zeros."""
        opened, _ = _compat.jaxpr_and_consts(jaxpr)
        traces: dict[Any, Traces] = dict(zip(opened.invars, traces_in, strict=True))
        zeros = {var for var, is_zero in zip(opened.invars, zeros_in, strict=True) if is_zero}

        def traces_of(atom: Any) -> Traces:
            return NO_TRACES if _compat.is_literal(atom) else traces.get(atom, NO_TRACES)

        def is_zero(atom: Any) -> bool:
            if _compat.is_literal(atom):
                return bool(np.all(np.asarray(atom.val) == 0))
            return atom in zeros

        for eqn in opened.eqns:
            operands = [traces_of(atom) for atom in eqn.invars]
            operand_zeros = [is_zero(atom) for atom in eqn.invars]
            location = _compat.source_line(eqn) or caller
            if eqn.primitive.name in ("eq", "ne") and any(operand_zeros):
                for trace in frozenset().union(*operands):
                    self.found.setdefault(trace.input_index, Operation(eqn.primitive.name, location))
            outs, out_zeros = self._outputs(eqn, operands, operand_zeros, location)
            traces.update(zip(eqn.outvars, outs, strict=True))
            zeros.update(var for var, is_zero in zip(eqn.outvars, out_zeros, strict=True) if is_zero)
        return [traces_of(atom) for atom in opened.outvars], [is_zero(atom) for atom in opened.outvars]

    def _outputs(
        self,
        eqn: JaxprEqn,
        operands: Sequence[Traces],
        operand_zeros: Sequence[bool],
        location: SourceLocation | None,
    ) -> tuple[list[Traces], list[bool]]:
        name, count = eqn.primitive.name, len(eqn.outvars)
        together: Traces = frozenset().union(*operands)
        if not together or name.startswith(ENDS):
            passes_zero = name in ("broadcast_in_dim", "convert_element_type", "reshape") and operand_zeros[0]
            return [NO_TRACES] * count, [passes_zero] * count
        if name == "dot_general":
            scores = {Trace(trace.input_index, True) for trace in together if not trace.is_score}
            return [frozenset(scores)] * count, [False] * count
        alternatives = []
        for inner, first in _inner_programs(eqn):
            # A carry that begins as zeros does not stay so.
            zeros = [False] * len(operands) if name in ("scan", "while") else operand_zeros
            inner_outs, _ = self._follow(inner, operands[first:], zeros[first:], location)
            if len(inner_outs) == count:
                alternatives.append(inner_outs)
        if not alternatives:
            return [together] * count, [False] * count
        return [NO_TRACES.union(*branches) for branches in zip(*alternatives, strict=True)], [False] * count


def _inner_programs(eqn: JaxprEqn) -> Iterator[tuple[Jaxpr | ClosedJaxpr, int]]:
    """Yield the jaxprs that an equation runs, with the number of its operand that is their first."""
    if eqn.primitive.name == "while":
        yield eqn.params["body_jaxpr"], eqn.params["cond_nconsts"]
        return
    for inner in _compat.inner_jaxprs(eqn):
        opened, _ = _compat.jaxpr_and_consts(inner)
        first = len(eqn.invars) - len(opened.invars)  # behind the index of a cond
        if first >= 0:
            yield inner, first
