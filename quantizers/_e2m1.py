"""E2M1: the 4-bit float of OCP MX v1.0 and NVFP4. 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""

from typing import Any

import jax
import jax.numpy as jnp

LARGEST = 6.0
# Between neighbours, each with whether a tie goes up, to the even code.
THRESHOLDS = (
    (0.25, False),
    (0.75, True),
    (1.25, False),
    (1.75, True),
    (2.5, False),
    (3.5, True),
    (5.0, False),
)
SIGN = 8


def encode(units: jax.Array) -> jax.Array:
    """The nearest E2M1 number's code, ties to even, saturating; uint8, sign in bit 3."""
    size = jnp.abs(units)
    code = sum((size >= t if up else size > t).astype(jnp.uint8) for t, up in THRESHOLDS)
    return code | jnp.where(jnp.signbit(units), jnp.uint8(SIGN), jnp.uint8(0))


def decode(codes: jax.Array, dtype: Any) -> jax.Array:
    """The numbers of codes, exactly, as ``dtype``."""
    size = (codes & (SIGN - 1)).astype(dtype)
    four, six, two, half = (jnp.asarray(number, dtype) for number in (4, 6, 2, 0.5))
    # 0, 1, 2, 3, 4, 6, 8, 12: twice the numbers, as a line with two bends
    doubled = size + jnp.maximum(size - four, 0) + two * jnp.maximum(size - six, 0)
    negated = doubled - two * doubled  # not -0
    return jnp.where(codes & SIGN != 0, negated, doubled) * half


def unit_error(units: jax.Array) -> jax.Array:
    """The largest error of coding ``units``: half the spacing there, or what is beyond the largest number."""
    size = jnp.abs(units)
    return jnp.maximum(jnp.maximum(size / 4, 0.25), size - LARGEST)
