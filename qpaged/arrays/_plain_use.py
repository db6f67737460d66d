"""What a quantized array answers to code that takes it for a plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from numpy.typing import DTypeLike

ARITHMETIC = "add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "matmul"
OTHER_OPERATORS = "getitem", "iter", "len", "bool", "neg", "pos", "abs", "invert", "lt", "le", "gt", "ge"

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
        raise TypeError(_advice("functions of jax.numpy"))

    def __getattr__(self, name: str) -> Any:
        if hasattr(jax.Array, name) and not name.startswith("_"):
            raise AttributeError(_advice(f".{name}"))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _advice(use: str) -> str:
    return (
        f"a quantized array has no {use} outside of use_implicit_args; call step.apply(function, cache) on "
        f"the cache of a qpaged.adopt step, jax.jit(qpaged.implicit.use_implicit_args(function)) on any "
        f"other, and .materialize() for the values."
    )


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(self: PlainUse, *_: Any) -> NoReturn:
        raise TypeError(_advice(f"__{name}__"))

    return refuse


for _name in (*ARITHMETIC, *(f"r{name}" for name in ARITHMETIC), *OTHER_OPERATORS):
    setattr(PlainUse, f"__{_name}__", _refusal(_name))
