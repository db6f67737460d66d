"""+rotate: a format under a Hadamard rotation of head_dim."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from qpaged import Wrapper

QUARTER = 0.25  # room for the error of a code, so that no sum of finite numbers overflows


@dataclass(frozen=True)
class Rotate(Wrapper):
    """y = H x / n, read back as H y, with H the Hadamard matrix of n channels: y is x, rotated, times n^-1/2.

    Spreads an outlier channel over all of them, so that scales of tokens and groups have less to cover
    (QuaRot, Ashkboos et al. 2024; SpinQuant). Attention turns the query for keys and the output for values,
    once a call, never the cache. n is the largest power of two that divides head_dim; where that is not
    head_dim itself, runs of n channels are rotated each by itself.

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
        x = self.inner.transform(x, axis)
        return hadamard(x * jnp.float32(1 / run(x.shape[axis])), axis)

    def inverse(self, x: jax.Array, axis: int) -> jax.Array:
        return self.inner.inverse(hadamard(x * QUARTER, axis) * (1 / QUARTER), axis)

    def error_bound(self, x: jax.Array, multipliers: jax.Array) -> jax.Array:
        y, n = self.transform(x, -1), run(x.shape[-1])
        each = self.inner.error_bound(y, multipliers) + jnp.abs(y) * 2.0**-20 + jnp.finfo(jnp.float32).tiny
        total = each.reshape(*x.shape[:-1], -1, n).sum(axis=-1)
        return jnp.repeat(total, n, axis=-1)


def run(channels: int) -> int:
    """The largest power of two that divides ``channels``."""
    return channels & -channels


def hadamard(x: jax.Array, axis: int) -> jax.Array:
    """H x along ``axis`` in runs of the largest power of two; H of ones and minus ones is its own transpose.

    Sums of pairs, stage by stage: the same roundings whatever else is in the array, as law 2 wants.
    """
    x = jnp.moveaxis(x, axis, -1)
    shape = x.shape
    half = 1
    while half < run(shape[-1]):
        pairs = x.reshape(*shape[:-1], -1, 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = jnp.stack([first + second, first - second], axis=-2).reshape(shape)
        half *= 2
    return jnp.moveaxis(x, -1, axis)
