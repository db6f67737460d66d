"""Primitives that do the same to each piece of an axis: a piece of their result is made of pieces alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from qpaged.implicit._facts import axis_after_reshape

Params: TypeAlias = Mapping[str, Any]

ELEMENTWISE = frozenset({"add", "convert_element_type", "div", "max", "min", "mul", "neg", "select_n", "sub"})


def axis_after(name: str, params: Params, shape: Sequence[int], axis: int) -> int | None:
    """Return the axis of the result along which its pieces lie; None if the primitive does otherwise.

    Args:
        name: of the primitive.
        params: its parameters.
        shape: of the operands that have the axis; all have as many axes.
        axis: of these operands, counted from the front.
    """
    if name in ELEMENTWISE:
        return axis
    rule = _RULES.get(name)
    return None if rule is None else rule(params, shape, axis)


def params_of_piece(name: str, params: Params, axis: int, length: int) -> dict[str, Any]:
    """Return the parameters that make a piece of the result, ``length`` long along its axis ``axis``."""
    changed = dict(params)
    resized = _SHAPES.get(name)
    if resized is not None:
        shape = list(params[resized])
        shape[axis] = length
        changed[resized] = tuple(shape)
    return changed


_SHAPES = {"broadcast_in_dim": "shape", "reshape": "new_sizes", "slice": "limit_indices"}


def _transpose(params: Params, shape: Sequence[int], axis: int) -> int | None:
    return tuple(params["permutation"]).index(axis)


def _squeeze(params: Params, shape: Sequence[int], axis: int) -> int | None:
    removed = params["dimensions"]
    return None if axis in removed else axis - sum(other < axis for other in removed)


def _reshape(params: Params, shape: Sequence[int], axis: int) -> int | None:
    if params.get("dimensions") is not None:
        return None
    return axis_after_reshape(shape, axis, params["new_sizes"])


def _broadcast(params: Params, shape: Sequence[int], axis: int) -> int | None:
    after: int = params["broadcast_dimensions"][axis]
    return after if params["shape"][after] == shape[axis] else None


def _slice(params: Params, shape: Sequence[int], axis: int) -> int | None:
    stride = 1 if params["strides"] is None else params["strides"][axis]
    bounds = params["start_indices"][axis], params["limit_indices"][axis], stride
    return axis if bounds == (0, shape[axis], 1) else None


def _concatenate(params: Params, shape: Sequence[int], axis: int) -> int | None:
    return None if params["dimension"] == axis else axis


def _stack(params: Params, shape: Sequence[int], axis: int) -> int | None:
    return axis + (params["axis"] <= axis)


_RULES: dict[str, Callable[[Params, Sequence[int], int], int | None]] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "reshape": _reshape,
    "slice": _slice,
    "squeeze": _squeeze,
    "stack": _stack,
    "transpose": _transpose,
}
