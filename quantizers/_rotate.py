"""+rotate: a format under a Hadamard rotation of head_dim."""

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qpaged import Wrapper

ROOM = 2.0**-5  # so that no partial sum overflows: they reach n^1/2 times the largest value
EXACT_BITS = 24  # of the whole numbers that float32 holds
MANTISSA_BITS = 23


@dataclass(frozen=True)
class Rotate(Wrapper):
    """y = H x / n, read back as H y, with H the Hadamard matrix of n channels: y is x, rotated, times n^-1/2.

    Spreads an outlier channel over all of them, so that scales of tokens and groups have less to cover
    (QuaRot, Ashkboos et al. 2024; SpinQuant). Attention turns the query for keys and the output for values,
    once a call, never the cache. n is the largest power of two that divides head_dim; where that is not
    head_dim itself, runs of n channels are rotated each by itself.

    Values are first rounded, by n 2^-24 of the largest in their run at most, so that all sums are exact: the
    same codes on every device and in whatever batch (law 2).

    The bits of the inner format. An error of y reaches all of its run: |x - x̂| is at most the sum of the
    inner bounds over the run, beside float32 roundings. Some models lose by it: what was easy to code, such
    as a channel that is always near zero, is mixed with what was not.
    """

    name: ClassVar[str] = "rotate"
    transforms: ClassVar[bool] = True

    def check(self) -> None:
        if self.inner.scale_dtype is None:
            raise ValueError(f"+rotate goes with formats that have scales, but {self.inner} has none.")

    def transform(self, x: jax.Array, axis: int) -> jax.Array:
        x = jnp.moveaxis(self.inner.transform(x, axis), axis, -1)
        n = run(x.shape[-1])
        largest = jnp.max(jnp.abs(x.reshape(*x.shape[:-1], -1, n)), axis=-1)
        step = jnp.repeat(_step(largest, n), n, axis=-1)
        # step is a power of two of at most 2^111, whose reciprocal is exact.
        y = hadamard(jnp.round(x * (1 / step)), -1) * jnp.float32(1 / n) * step
        most = float(jnp.finfo(jnp.float32).max)
        return jnp.moveaxis(jnp.clip(y, -most, most), -1, axis)

    def inverse(self, x: jax.Array, axis: int) -> jax.Array:
        return self.inner.inverse(hadamard(x * ROOM, axis) * (1 / ROOM), axis)

    def error_bound(self, x: jax.Array, multipliers: jax.Array) -> jax.Array:
        y, n = self.transform(x, -1), run(x.shape[-1])
        # What is below the smallest normal number when it is brought down for room, is lost.
        lost = float(jnp.finfo(jnp.float32).tiny) / ROOM
        each = self.inner.error_bound(y, multipliers) + jnp.abs(y) * 2.0**-20 + 2 * lost
        total, largest = (part.reshape(*x.shape[:-1], -1, n) for part in (each, jnp.abs(x)))
        return jnp.repeat(total.sum(axis=-1) + largest.max(axis=-1) * (n * 2.0**-EXACT_BITS), n, axis=-1)


def run(channels: int) -> int:
    """The largest power of two that divides ``channels``."""
    return channels & -channels


def hadamard(x: jax.Array, axis: int) -> jax.Array:
    """H x along ``axis``, in runs of the largest power of two; H, of 1 and -1, is its own transpose."""
    x = jnp.moveaxis(x, axis, -1)
    n = run(x.shape[-1])
    runs = x.reshape(*x.shape[:-1], x.shape[-1] // n, n)
    numbers = (((runs.ndim - 1,), (0,)), ((), ()))
    turned = lax.dot_general(runs, jnp.asarray(_matrix(n)), numbers, precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(turned.reshape(x.shape), -1, axis)


@functools.cache
def _matrix(n: int) -> np.ndarray:
    """Sylvester's Hadamard matrix: the sign at (i, j) is the parity of the bits that i and j share."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _step(largest: jax.Array, n: int) -> jax.Array:
    """The power of two in whole numbers of which n values up to ``largest`` have exact float32 sums."""
    exponent = lax.bitcast_convert_type(largest, jnp.uint32) >> MANTISSA_BITS
    down = EXACT_BITS - 1 - (n.bit_length() - 1)
    bits = jnp.maximum(exponent.astype(jnp.int32) - down, 1).astype(jnp.uint32) << MANTISSA_BITS
    return lax.bitcast_convert_type(bits, jnp.float32)
