"""+rotate: a format under a Hadamard rotation of head_dim."""

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qpaged import ChainedTransform, TransformRule, Wrapper

HEADROOM = 2.0**-5  # so that no partial sum overflows: they reach n^1/2 times the largest value
EXACT_BITS = 24  # of the integers that float32 holds exactly
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

    @property
    def transform(self) -> TransformRule:
        if self.inner.transform is None:
            return HADAMARD
        return ChainedTransform(self.inner.transform, HADAMARD)

    def check(self) -> None:
        if self.inner.scale_dtype is None:
            raise ValueError(f"+rotate goes with formats that have scales, but {self.inner} has none.")

    def error_bound(self, x: jax.Array, multipliers: jax.Array) -> jax.Array:
        y, n = self.transform.forward(x, -1), run_length(x.shape[-1])
        # Values that are no normal numbers once they are brought down for headroom are lost.
        lost = float(jnp.finfo(jnp.float32).tiny) / HEADROOM
        of_channels = self.inner.error_bound(y, multipliers) + jnp.abs(y) * 2.0**-20 + 2 * lost
        of_run = of_channels.reshape(*x.shape[:-1], -1, n).sum(axis=-1)
        largest = jnp.abs(x).reshape(*x.shape[:-1], -1, n).max(axis=-1)
        return jnp.repeat(of_run + largest * (n * 2.0**-EXACT_BITS), n, axis=-1)


class Hadamard:
    """y = H x / n and its inverse H y, in runs of n channels, exact in float32."""

    def forward(self, x: jax.Array, axis: int) -> jax.Array:
        """Return H x / n along ``axis``, of ``x`` rounded so that all sums are exact."""
        x = jnp.moveaxis(x, axis, -1)
        n = run_length(x.shape[-1])
        largest = jnp.max(jnp.abs(x.reshape(*x.shape[:-1], -1, n)), axis=-1)
        step = jnp.repeat(_exact_step(largest, n), n, axis=-1)
        # step is a power of two of at most 2^111, whose reciprocal is exact.
        y = hadamard(jnp.round(x * (1 / step)), -1) * jnp.float32(1 / n) * step
        largest_float32 = float(jnp.finfo(jnp.float32).max)
        return jnp.moveaxis(jnp.clip(y, -largest_float32, largest_float32), -1, axis)

    def inverse(self, x: jax.Array, axis: int) -> jax.Array:
        """Return H x along ``axis``."""
        return hadamard(x * HEADROOM, axis) * (1 / HEADROOM)


HADAMARD = Hadamard()


def run_length(channels: int) -> int:
    """Return the largest power of two that divides ``channels``."""
    return channels & -channels


def hadamard(x: jax.Array, axis: int) -> jax.Array:
    """Return H x along ``axis``, in runs of the largest power of two; H is its own transpose."""
    x = jnp.moveaxis(x, axis, -1)
    n = run_length(x.shape[-1])
    runs = x.reshape(*x.shape[:-1], x.shape[-1] // n, n)
    numbers = (((runs.ndim - 1,), (0,)), ((), ()))
    rotated = lax.dot_general(
        runs, jnp.asarray(_hadamard_matrix(n)), numbers, precision=lax.Precision.HIGHEST
    )
    return jnp.moveaxis(rotated.reshape(x.shape), -1, axis)


@functools.cache
def _hadamard_matrix(n: int) -> np.ndarray:
    """Return Sylvester's Hadamard matrix: the sign at (i, j) is the parity of the bits that i and j share."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _exact_step(largest: jax.Array, n: int) -> jax.Array:
    """Return the power of two in multiples of which n values up to ``largest`` have exact float32 sums."""
    exponent = lax.bitcast_convert_type(largest, jnp.uint32) >> MANTISSA_BITS
    down = EXACT_BITS - 1 - (n.bit_length() - 1)
    bits = jnp.maximum(exponent.astype(jnp.int32) - down, 1).astype(jnp.uint32) << MANTISSA_BITS
    return lax.bitcast_convert_type(bits, jnp.float32)
