"""Checks and choices of dtypes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qpaged._arguments import shown


def float_dtype(
    name: str, dtype: Any, advice: str = "give 'bfloat16', 'float16' or 'float32', say"
) -> np.dtype:
    """Return an argument that is a dtype as a NumPy dtype.

    Raises:
        TypeError: not a real floating-point dtype, or one that JAX has not enabled; ``name`` is the argument.
    """
    try:
        found = None if dtype is None else jnp.dtype(dtype)  # to NumPy None is float64
    except (TypeError, ValueError):
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        came = shown(dtype) if found is None else found.name
        raise TypeError(f"{name} must be a real floating-point dtype, but got {came}; {advice}.")
    return _enabled(name, found)


def dtype_of_floats(name: str, dtype: DTypeLike) -> np.dtype:
    """Return the dtype of an array.

    Raises:
        TypeError: not a real floating-point dtype, or one that JAX has not enabled; ``name`` is the argument.
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name} must have a real floating-point dtype, but came as {dtype.name}; "
            f"convert it first, for example with .astype(jnp.bfloat16)."
        )
    return _enabled(name, dtype)


def _enabled(name: str, dtype: np.dtype) -> np.dtype:
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise TypeError(
            f"{name} came as {dtype.name}, which JAX has not enabled; use float32, or set jax_enable_x64."
        )
    return dtype


def is_dtype(value: object) -> bool:
    """Return True for a dtype, and for the classes that stand for one, such as ``jnp.int8``."""
    is_class = isinstance(value, type) and issubclass(value, np.generic | int | float)
    return is_class or isinstance(value, np.dtype | type(jnp.int8))


def are_floats(*arrays: Any) -> bool:
    """Return True if arrays, plain or implicit, are all of real floats."""
    return all(jnp.issubdtype(array.dtype, jnp.floating) for array in arrays)


def common_dtype(first: DTypeLike, second: DTypeLike) -> np.dtype:
    """Return the dtype in which two floats meet: their own if they agree, else float32 or wider.

    JAX under strict promotion has no answer for bfloat16 and float16, say.
    """
    first, second = jnp.dtype(first), jnp.dtype(second)
    if first == second:
        return first
    return max(jnp.dtype(jnp.float32), first, second, key=lambda dtype: dtype.itemsize)
