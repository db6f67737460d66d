from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

import qpaged


@dataclass(frozen=True)
class Signs(qpaged.Wrapper):
    """y = x or -x, channel by channel: with +rotate, the randomized Hadamard of QuaRot."""

    name: ClassVar[str] = "signs"
    transforms: ClassVar[bool] = True

    def transform(self, x, axis):
        return self.inner.transform(flipped(x, axis), axis)

    def inverse(self, x, axis):
        return flipped(self.inner.inverse(x, axis), axis)

    def error_bound(self, x, multipliers):
        return self.inner.error_bound(flipped(x, -1), multipliers)


def flipped(x, axis):
    channels = x.shape[axis]
    # RandomState's stream is frozen, as what files depend on must be.
    signs = 1 - 2 * np.random.RandomState(channels).randint(2, size=channels)
    return jnp.moveaxis(jnp.moveaxis(x, axis, -1) * jnp.asarray(signs, x.dtype), -1, axis)
