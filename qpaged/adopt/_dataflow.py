"""Where the inputs of a program go: what is written into them, and which dots read them.

A program is a jaxpr. Each value in it is followed as a view of the inputs that it shows: for every axis of
the value, the axes of the input along which it runs. Nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qpaged import _compat
from qpaged.arrays._moves import _groups

Axes = frozenset[int]
NOWHERE: Axes = frozenset()


@dataclass(frozen=True)
class View:
    """What a value shows of one input.

    Attributes:
        leaf: the input's number.
        dims: for each axis of the value, the axes of the input along which it runs; none where it repeats.
        picked: (axis of the input, index) where the value holds one index alone; None for one not known.
        written: whether something was written into it on the way.
        remade: the first operation on the way that made it anew, of other values too; None where none did.
    """

    leaf: int
    dims: tuple[Axes, ...]
    picked: frozenset[tuple[int, int | None]] = frozenset()
    written: bool = False
    remade: Write | None = None

    @property
    def whole(self) -> bool:
        """Whether it runs along every axis of the input, and in their order."""
        return all(axis in dims for axis, dims in enumerate(self.dims))


Views = tuple[View, ...]


@dataclass(frozen=True)
class Write:
    """A part of an input was replaced: ``axes`` are those along which it was not the whole."""

    leaf: int
    primitive: str
    axes: Axes
    place: tuple[str, int] | None


@dataclass(frozen=True)
class Read:
    """A dot_general of an input: the axes it contracts, batches over and keeps, and what was picked."""

    leaf: int
    contract: Axes
    batch: Axes
    kept: Axes
    picked: frozenset[tuple[int, int | None]]
    place: tuple[str, int] | None


@dataclass
class Flow:
    """What became of a program's inputs, in the order of the program.

    Attributes:
        writes: into them, in part.
        reads: of them by dots.
        outputs: what the program returns of them.
        around: where the call is that is being followed.
    """

    writes: list[Write] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    outputs: list[Views] = field(default_factory=list)
    around: tuple[str, int] | None = None

    def place(self, eqn: Any) -> tuple[str, int] | None:
        """The line of an equation, or that of the call around one in JAX's own functions."""
        return _compat.source_line(eqn) or self.around


def follow(closed: Any) -> Flow:
    """The flow of every input of a closed jaxpr."""
    jaxpr, _ = _compat.jaxpr_and_consts(closed)
    flow = Flow()
    whole = [
        (View(leaf, tuple(frozenset((axis,)) for axis in range(len(var.aval.shape)))),)
        for leaf, var in enumerate(jaxpr.invars)
    ]
    flow.outputs = _follow(flow, closed, whole)
    return flow


def _follow(flow: Flow, closed: Any, inputs: Sequence[Views]) -> list[Views]:
    jaxpr, _ = _compat.jaxpr_and_consts(closed)
    values: dict[Any, Views] = dict(zip(jaxpr.invars, inputs, strict=True))

    def views(atom: Any) -> Views:
        return () if _compat.is_literal(atom) else values.get(atom, ())

    for eqn in jaxpr.eqns:
        operands = [views(atom) for atom in eqn.invars]
        if any(operands):
            outs = RULES.get(eqn.primitive.name, _unknown)(flow, eqn, operands)
            values.update(zip(eqn.outvars, outs, strict=True))
    return [views(atom) for atom in jaxpr.outvars]


Rule = Callable[[Flow, Any, Sequence[Views]], Sequence[Views]]


def _note(events: list[Any], event: Any) -> None:
    """Keep an event once: the bodies of loops are followed several times."""
    if event not in events:
        events.append(event)


def _union(views: Iterable[View]) -> Views:
    """Views of one input as one: what any of them may show."""
    merged: dict[int, View] = {}
    for view in views:
        other = merged.get(view.leaf)
        if other is not None and len(other.dims) == len(view.dims):
            dims = tuple(a | b for a, b in zip(other.dims, view.dims, strict=True))
            view = View(
                view.leaf,
                dims,
                view.picked & other.picked,
                view.written or other.written,
                other.remade or view.remade,
            )
        merged[view.leaf] = view
    return tuple(merged.values())


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(getattr(atom.aval, "shape", ()))


def _moved(view: View, dims: Iterable[Axes], picks: Iterable[tuple[Axes, int | None]] = ()) -> View:
    """The view with other dims, and with one index alone taken along some."""
    new = {(axis, index) for axes, index in picks if len(axes) == 1 for axis in axes}
    taken = {axis for axis, _ in new}
    kept = {(axis, index) for axis, index in view.picked if axis not in taken}
    return replace(view, dims=tuple(dims), picked=frozenset(kept | new))


# What is unknown, elementwise and alike


def _unknown(flow: Flow, eqn: Any, operands: Sequence[Views]) -> Sequence[Views]:
    """A call is followed into; anything else shows what operands of the output's shape do."""
    inner = [
        v for v in eqn.params.values() if hasattr(v, "eqns") or hasattr(getattr(v, "jaxpr", None), "eqns")
    ]
    if len(inner) == 1 and len(_compat.jaxpr_and_consts(inner[0])[0].invars) == len(operands):
        outside, flow.around = flow.around, flow.place(eqn)
        outs = _follow(flow, inner[0], operands)
        flow.around = outside
        return outs
    outs = []
    for out in eqn.outvars:
        same = [v for atom, v in zip(eqn.invars, operands, strict=True) if _shape(atom) == _shape(out)]
        shown = _union(view for views in same for view in views)
        outs.append(tuple(_remade(flow, eqn, view) for view in shown) if len(operands) > 1 else shown)
    return outs


def _remade(flow: Flow, eqn: Any, view: View) -> View:
    made = Write(view.leaf, eqn.primitive.name, NOWHERE, flow.place(eqn))
    return view if view.remade else replace(view, remade=made)


# Axes that move


def _transpose(flow: Flow, eqn: Any, operands: Sequence[Views]) -> Sequence[Views]:
    order = eqn.params["permutation"]
    return [tuple(_moved(v, (v.dims[axis] for axis in order)) for v in operands[0])]


def _squeeze(flow: Flow, eqn: Any, operands: Sequence[Views]) -> Sequence[Views]:
    gone = eqn.params["dimensions"]
    return [tuple(_moved(v, (d for axis, d in enumerate(v.dims) if axis not in gone)) for v in operands[0])]


def _broadcast(flow: Flow, eqn: Any, operands: Sequence[Views]) -> Sequence[Views]:
    place = eqn.params["broadcast_dimensions"]

    def spread(view: View) -> View:
        dims = [NOWHERE] * len(eqn.params["shape"])
        for axis, to in enumerate(place):
            dims[to] = view.dims[axis]
        return _moved(view, dims)

    return [tuple(map(spread, operands[0]))]


def _reshape(flow: Flow, eqn: Any, operands: Sequence[Views]) -> Sequence[Views]:
    before, after = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    if 0 in before:
        return [()]
    groups = _groups(before, after)

    def regroup(view: View) -> View:
        dims = [NOWHERE] * len(after)
        for old, new in groups:
            together = NOWHERE.union(*(view.dims[axis] for axis in old if before[axis] > 1))
            for axis in new:
                dims[axis] = together if after[axis] > 1 else NOWHERE
        return _moved(view, dims)

    return [tuple(map(regroup, operands[0]))]


# Parts


def _slice(flow: Flow, eqn: Any, operands: Sequence[Views]) -> Sequence[Views]:
    shape, start, limit = _shape(eqn.invars[0]), eqn.params["start_indices"], eqn.params["limit_indices"]
    alone = [axis for axis, n in enumerate(shape) if limit[axis] - start[axis] == 1 < n]
    return [tuple(_moved(v, v.dims, [(v.dims[axis], start[axis]) for axis in alone]) for v in operands[0])]


def _dynamic_slice(flow: Flow, eqn: Any, operands: Sequence[Views]) -> Sequence[Views]:
    shape, sizes = _shape(eqn.invars[0]), eqn.params["slice_sizes"]
    alone = [axis for axis, n in enumerate(shape) if sizes[axis] == 1 < n]
    starts = eqn.invars[1:]

    def index(axis: int) -> int | None:
        return int(starts[axis].val) if _compat.is_literal(starts[axis]) else None

    return [tuple(_moved(v, v.dims, [(v.dims[axis], index(axis)) for axis in alone]) for v in operands[0])]


def _gather(flow: Flow, eqn: Any, operands: Sequence[Views]) -> Sequence[Views]:
    numbers, shape = eqn.params["dimension_numbers"], _shape(eqn.invars[0])
    batched = tuple(getattr(numbers, "operand_batching_dims", ()))
    gone = {*numbers.collapsed_slice_dims, *batched}
    windows = [axis for axis in range(len(shape)) if axis not in gone]

    def read(view: View) -> View:
        dims = [NOWHERE.union(*(view.dims[axis] for axis in gone))] * len(_shape(eqn.outvars[0]))
        for axis, to in zip(windows, numbers.offset_dims, strict=True):
            dims[to] = view.dims[axis]
        alone = gone if len(windows) == len(dims) else ()
        return _moved(view, dims, [(view.dims[axis], None) for axis in alone])

    return [tuple(map(read, operands[0]))]


def _unstack(flow: Flow, eqn: Any, operands: Sequence[Views]) -> Sequence[Views]:
    axis = eqn.params["axis"]
    return [
        tuple(_moved(v, (*v.dims[:axis], *v.dims[axis + 1 :]), [(v.dims[axis], index)]) for v in operands[0])
        for index in range(len(eqn.outvars))
    ]


def _split(flow: Flow, eqn: Any, operands: Sequence[Views]) -> Sequence[Views]:
    axis, start, outs = eqn.params["axis"], 0, []
    for size in eqn.params["sizes"]:
        picks = [(axis, start)] if size == 1 else []
        outs.append(tuple(_moved(v, v.dims, [(v.dims[a], i) for a, i in picks]) for v in operands[0]))
        start += size
    return outs


# Parts put together


def _join(flow: Flow, eqn: Any, operands: Sequence[Views], axis: int, new: bool) -> Sequence[Views]:
    """Views side by side: along ``axis`` runs what the parts picked differently."""
    joined = []
    for leaf in dict.fromkeys(view.leaf for views in operands for view in views):
        parts = [view for views in operands for view in views if view.leaf == leaf]
        common = frozenset.intersection(*(part.picked for part in parts))
        along = frozenset(index for part in parts for index, _ in part.picked - common)
        dims = [NOWHERE.union(*at) for at in zip(*(part.dims for part in parts), strict=True)]
        if new:
            dims.insert(axis, NOWHERE)
        dims[axis] |= along
        remade = next((part.remade for part in parts if part.remade), None)
        view = View(leaf, tuple(dims), common, any(part.written for part in parts), remade)
        grown = not new and not along and len(parts) < len(operands)
        joined.append(_remade(flow, eqn, view) if grown else view)
    return [tuple(joined)]


def _concatenate(flow: Flow, eqn: Any, operands: Sequence[Views]) -> Sequence[Views]:
    return _join(flow, eqn, operands, eqn.params["dimension"], new=False)


def _stack(flow: Flow, eqn: Any, operands: Sequence[Views]) -> Sequence[Views]:
    return _join(flow, eqn, operands, eqn.params["axis"], new=True)


# Writes


def _write(flow: Flow, eqn: Any, operand: Views, update: Views, partial: Sequence[int]) -> Sequence[Views]:
    """``update`` written into ``operand``, which it covers but along the axes ``partial``."""
    own = {view.leaf for view in update}
    for view in operand:
        if view.leaf not in own:  # else a part of it is put back
            axes = NOWHERE.union(*(view.dims[axis] for axis in partial))
            _note(flow.writes, Write(view.leaf, eqn.primitive.name, axes, flow.place(eqn)))
    return [tuple(replace(view, written=True) for view in operand)]


def _dynamic_update_slice(flow: Flow, eqn: Any, operands: Sequence[Views]) -> Sequence[Views]:
    shape, size = _shape(eqn.invars[0]), _shape(eqn.invars[1])
    partial = [axis for axis, n in enumerate(shape) if size[axis] < n]
    return _write(flow, eqn, operands[0], operands[1], partial)


def _scatter(flow: Flow, eqn: Any, operands: Sequence[Views]) -> Sequence[Views]:
    numbers, shape = eqn.params["dimension_numbers"], _shape(eqn.invars[0])
    missing = {*numbers.inserted_window_dims, *getattr(numbers, "operand_batching_dims", ())}
    windows = [axis for axis in range(len(shape)) if axis not in missing]
    updates = _shape(eqn.invars[2])
    sizes = {axis: updates[of] for axis, of in zip(windows, numbers.update_window_dims, strict=True)}
    partial = [axis for axis in windows if sizes[axis] < shape[axis]]
    return _write(flow, eqn, operands[0], operands[2], [*partial, *numbers.inserted_window_dims])


# Reads


def _dot(flow: Flow, eqn: Any, operands: Sequence[Views]) -> Sequence[Views]:
    for views, contracted, batched in zip(operands, *eqn.params["dimension_numbers"], strict=True):
        for view in views:
            kept = [axis for axis in range(len(view.dims)) if axis not in (*contracted, *batched)]
            contract, batch, keep = (
                NOWHERE.union(*(view.dims[axis] for axis in group)) for group in (contracted, batched, kept)
            )
            _note(flow.reads, Read(view.leaf, contract, batch, keep, view.picked, flow.place(eqn)))
    return [()]


# Control flow


def _cond(flow: Flow, eqn: Any, operands: Sequence[Views]) -> Sequence[Views]:
    branches = [_follow(flow, branch, operands[1:]) for branch in eqn.params["branches"]]
    return [_union(view for views in outs for view in views) for outs in zip(*branches, strict=True)]


def _while(flow: Flow, eqn: Any, operands: Sequence[Views]) -> Sequence[Views]:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    consts, carry = list(operands[n_cond : n_cond + n_body]), list(operands[n_cond + n_body :])
    return _settled(carry, lambda carry: _follow(flow, eqn.params["body_jaxpr"], [*consts, *carry]))


def _scan(flow: Flow, eqn: Any, operands: Sequence[Views]) -> Sequence[Views]:
    n_consts, n_carry = _compat.scan_counts(eqn.params, len(operands))
    consts, xs = list(operands[:n_consts]), operands[n_consts + n_carry :]
    slices = [tuple(_moved(v, v.dims[1:], [(v.dims[0], None)]) for v in views) for views in xs]
    ys: list[Views] = []

    def turn(carry: list[Views]) -> list[Views]:
        outs = _follow(flow, eqn.params["jaxpr"], [*consts, *carry, *slices])
        ys[:] = outs[n_carry:]
        return outs[:n_carry]

    carry = _settled(list(operands[n_consts : n_consts + n_carry]), turn)

    def stacked(view: View) -> View:
        along = frozenset(axis for axis, index in view.picked if index is None)
        return replace(
            view, dims=(along, *view.dims), picked=frozenset(p for p in view.picked if p[1] is not None)
        )

    return [*carry, *(tuple(map(stacked, views)) for views in ys)]


def _settled(carry: list[Views], turn: Callable[[list[Views]], list[Views]]) -> list[Views]:
    """Carries after a loop: what any turn may leave in them."""
    while True:
        after = [_union((*old, *new)) for old, new in zip(carry, turn(carry), strict=True)]
        if after == carry:
            return carry
        carry = after


RULES: dict[str, Rule] = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "unstack": _unstack,
    "split": _split,
    "concatenate": _concatenate,
    "stack": _stack,
    "dynamic_update_slice": _dynamic_update_slice,
    "scatter": _scatter,
    "dot_general": _dot,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
}
