"""Which methods of a format kernels may call: those that are elementwise, and so work on any tile.

A method is elementwise if its jaxpr holds elementwise operations alone, and only those that the compilers of
kernels lower: on integers of fewer than 32 bits they convert, compare and mask, but do not calculate.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qpaged._compat import Jaxpr, inner_jaxprs, jaxpr_and_consts

TILE = 8, 128
ANY_WIDTH = frozenset({
    "and", "bitcast_convert_type", "broadcast_in_dim", "convert_element_type", "copy", "eq", "ge", "gt", "le",
    "lt", "ne", "not", "or", "select_n", "stop_gradient", "xor",
})  # fmt: skip
"""Primitives that kernels have for numbers of any width."""
WIDE_ONLY = frozenset({
    "abs", "add", "ceil", "clamp", "div", "exp", "floor", "integer_pow", "log", "max", "min", "mul", "neg",
    "round", "rsqrt", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sqrt", "square", "sub",
    "tanh",
})  # fmt: skip
"""Primitives that kernels have for floats and for integers of 32 bits."""
CONTROL_FLOW = frozenset({"cond", "scan", "while"})
"""Primitives with inner jaxprs that kernels do not have; calls are looked into."""
FLOATS = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def not_elementwise(method: Callable[..., jax.Array], *dtypes: DTypeLike) -> str | None:
    """Return why kernels may not call ``method`` on a tile of each of ``dtypes``; None if they may."""
    tiles = [jax.ShapeDtypeStruct(TILE, dtype) for dtype in dtypes]
    jaxpr = jax.make_jaxpr(method)(*tiles)
    if any(out.shape not in (TILE, ()) for out in jaxpr.out_avals):
        return "does not give back the shape it is given"
    return next(_objections(jaxpr), None)


def _objections(jaxpr: Jaxpr) -> Iterator[str]:
    """Yield what a kernel could not lower of a jaxpr, inner jaxprs included."""
    for eqn in jaxpr_and_consts(jaxpr)[0].eqns:
        inner = inner_jaxprs(eqn)
        if inner and eqn.primitive.name not in CONTROL_FLOW:
            for inner_jaxpr in inner:
                yield from _objections(inner_jaxpr)
            continue
        name = eqn.primitive.name
        avals = [atom.aval for atom in (*eqn.invars, *eqn.outvars)]
        if name not in ANY_WIDTH | WIDE_ONLY or any(aval.shape not in (TILE, ()) for aval in avals):
            yield f"uses {name}, which is not elementwise or which kernels do not have"
        elif name in WIDE_ONLY and any(_is_narrow_integer(aval.dtype) for aval in avals):
            yield f"uses {name} on integers of fewer than 32 bits; use .astype(jnp.int32) first"
        for aval in avals:
            if jnp.issubdtype(aval.dtype, jnp.floating) and aval.dtype.name not in FLOATS:
                yield f"uses {aval.dtype.name}, which kernels do not have"


def _is_narrow_integer(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.integer) and dtype.itemsize < 4
