"""Checks and choices of dtypes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def float_dtype(name: str, dtype: Any) -> np.dtype:
    """Return ``dtype`` as a NumPy dtype.

    Raises:
        TypeError: not a real floating-point dtype, or one that JAX has not enabled; ``name`` is the argument.
    """
    if dtype is None:
        raise TypeError(
            f"{name} must be a real floating-point dtype, but came as None; give jnp.bfloat16, say."
        )
    dtype = jnp.dtype(dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise TypeError(
            f"{name} came as float64, which JAX has not enabled; use float32, or set jax_enable_x64."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name} must have a real floating-point dtype, but came as {dtype.name}; "
            f"convert it first, for example with .astype(jnp.bfloat16)."
        )
    return dtype


def common_dtype(first: DTypeLike, second: DTypeLike) -> np.dtype:
    """Return the dtype in which two floats meet: their own if they agree, else float32 or wider.

    JAX under strict promotion has no answer for bfloat16 and float16, say.
    """
    first, second = jnp.dtype(first), jnp.dtype(second)
    if first == second:
        return first
    return max(jnp.dtype(jnp.float32), first, second, key=lambda dtype: dtype.itemsize)
