"""Arrays that tests write and read, and the comparison of their bits."""

import jax
import jax.numpy as jnp
import numpy as np

import qpaged
from qpaged.testing._programs import element_scales as multipliers  # noqa: F401 - for tests of arrays


def normal(*shape, seed=0, scale=1.0):
    """Return Gaussian float32 values."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


def quantized(spelling, shape=(2, 6, 16, 32), dtype=jnp.float32):
    """Return Gaussian values as a quantized array of the format."""
    return qpaged.get_quantizer(spelling).quantize(normal(*shape).astype(dtype))


def leaves_equal(a, b):
    """Return True if two trees hold the same bits."""
    pairs = zip(jax.tree_util.tree_leaves(a), jax.tree_util.tree_leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)
