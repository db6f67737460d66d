"""Conversion of the operands that handlers are given, and checks of the results that they return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qpaged._compat import Aval, Equation, Operand, ShapedArray
from qpaged.implicit._value import is_implicit


def as_array(value: Operand, aval: Aval) -> Operand:
    """Return a literal or constant as a JAX array of its type in the jaxpr; other values as they are."""
    if isinstance(value, jax.Array) or is_implicit(value):
        return value
    if not isinstance(aval, ShapedArray):
        return value  # a reference, which must stay the same object
    if aval.weak_type and not aval.shape:
        # jnp.asarray makes a weakly typed array of a Python number only.
        weak = jnp.asarray(np.asarray(value).item())
        if weak.dtype == aval.dtype:
            return weak
    return jnp.asarray(np.asarray(value), dtype=aval.dtype)


def checked_results(outs: Any, eqn: Equation) -> Sequence[Operand]:
    """Return what a handler returned; raise if it has not the shapes that the program was traced with."""
    name = eqn.primitive.name
    if not isinstance(outs, list | tuple):
        raise TypeError(
            f"A handler of {name!r} returned a {type(outs).__name__}. The primitive has several results: "
            f"return a list of them."
        )
    if len(outs) != len(eqn.outvars):
        raise TypeError(
            f"A handler of {name!r} returned {len(outs)} values, where {len(eqn.outvars)} are expected. "
            f"Return as many as the primitive does."
        )
    for out, var in zip(outs, eqn.outvars, strict=True):
        _check_shape(name, out, var.aval)
    return outs


def _check_shape(name: str, out: Operand, aval: Aval) -> None:
    expected = getattr(aval, "shape", None)
    if expected is None:  # tokens have no shape
        return
    shape = tuple(jnp.shape(out))
    if shape != tuple(expected):
        raise TypeError(
            f"A handler of {name!r} returned a {type(out).__name__} of shape {shape}, "
            f"where {tuple(expected)} is expected. Return the shape that the primitive would return."
        )
