"""What a quantized array answers to code that takes it for a plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from numpy.typing import DTypeLike

ARITHMETIC = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "divmod": "divmod()",
    "pow": "**", "matmul": "@",
}  # fmt: skip
OTHER_OPERATORS = {
    "getitem": "indexing", "setitem": "assignment to elements", "float": "float()", "int": "int()",
    "complex": "complex()", "iter": "iteration", "len": "len()", "bool": "bool()", "neg": "-", "pos": "+",
    "abs": "abs()", "invert": "~", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
}  # fmt: skip
"""Operators as messages call them, by the names of their methods."""

PLAIN = jax.Array, np.ndarray, np.generic, bool, int, float, complex


class PlainUse:
    """Base class of arrays that are computed with under ``use_implicit_args`` alone.

    ``np.asarray`` gives the values, as it says that they are wanted. Operators, indices, the attributes of a
    ``jax.Array`` and the functions of ``jax.numpy`` raise an error that says what to call: if they worked, a
    forgotten ``use_implicit_args`` would decode the whole array at each of them.
    """

    __array_ufunc__ = None  # so that NumPy's arrays and numbers leave their operators to the ones here
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        """Return True for the array itself; elements are not compared outside of ``use_implicit_args``."""
        if isinstance(other, PLAIN):
            raise TypeError(_advice("comparison with numbers"))
        return self is other

    def materialize(self) -> jax.Array:
        raise NotImplementedError

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.materialize(), dtype=dtype)

    def __jax_array__(self) -> NoReturn:
        raise TypeError(_advice("a function of jax.numpy"))

    def __getattr__(self, name: str) -> Any:
        if hasattr(jax.Array, name) and not name.startswith("_"):
            raise AttributeError(_advice(f".{name}"))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _advice(use: str) -> str:
    return (
        f"{use} does not work on a quantized array here. .materialize() gives its values; to compute on it, "
        f"use step.apply(function, cache) of a qpaged.adopt step, or "
        f"jax.jit(qpaged.implicit.use_implicit_args(function))."
    )


def _refusal(use: str) -> Callable[..., NoReturn]:
    def refuse(self: PlainUse, *_: Any) -> NoReturn:
        raise TypeError(_advice(use))

    return refuse


for _name, _use in (ARITHMETIC | OTHER_OPERATORS).items():
    setattr(PlainUse, f"__{_name}__", _refusal(_use))
for _name, _use in ARITHMETIC.items():
    setattr(PlainUse, f"__r{_name}__", _refusal(_use))
