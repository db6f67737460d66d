from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

import qpaged


@dataclass(frozen=True)
class Signs(qpaged.Wrapper):
    """y = x or -x, channel by channel: with +rotate, the randomized Hadamard of QuaRot."""

    name: ClassVar[str] = "signs"

    @property
    def transform(self):
        if self.inner.transform is None:
            return FLIP_SIGNS
        return qpaged.ChainedTransform(FLIP_SIGNS, self.inner.transform)

    def error_bound(self, x, multipliers):
        return self.inner.error_bound(FLIP_SIGNS.forward(x, -1), multipliers)


class FlipSigns:
    """Multiplies each channel by 1 or -1; its own inverse."""

    def forward(self, x, axis):
        channels = x.shape[axis]
        # RandomState's stream is frozen, as what files depend on must be.
        signs = 1 - 2 * np.random.RandomState(channels).randint(2, size=channels)
        return jnp.moveaxis(jnp.moveaxis(x, axis, -1) * jnp.asarray(signs, x.dtype), -1, axis)

    def inverse(self, x, axis):
        return self.forward(x, axis)


FLIP_SIGNS = FlipSigns()
