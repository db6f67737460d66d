"""What handlers are given, and what is accepted from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qpaged import _compat
from qpaged.implicit._value import is_implicit


def checked(outs: Any, eqn: Any) -> Sequence[Any]:
    """What a handler returned, refused if it has not the shapes that the program was traced with."""
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
        expected = getattr(var.aval, "shape", None)
        if expected is not None and tuple(jnp.shape(out)) != tuple(expected):
            raise TypeError(
                f"A handler of {name!r} returned a {type(out).__name__} of shape {tuple(jnp.shape(out))}, "
                f"where {tuple(expected)} is expected. Return the shape that the primitive would return."
            )
    return outs


def as_array(value: Any, aval: Any) -> Any:
    """Literals and constants as JAX arrays of the type they have in the jaxpr; the rest as it is."""
    if isinstance(value, jax.Array) or is_implicit(value) or not isinstance(aval, _compat.ShapedArray):
        return value  # references are not ShapedArrays, and must stay what they are
    if aval.weak_type and not aval.shape:
        weak = jnp.asarray(np.asarray(value).item())
        if weak.dtype == aval.dtype:
            return weak
    return jnp.asarray(np.asarray(value), dtype=aval.dtype)
