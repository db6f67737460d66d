"""What the tests run over: every format that the registry has, and the arrays they are tried on."""

import jax
import jax.numpy as jnp
import numpy as np

import qpaged

FORMATS = qpaged.available_formats()
CACHES = (None, *FORMATS)
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def normal(*shape, seed=0, scale=1.0):
    """Gaussian float32 values."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


def quantized(spelling, shape=(2, 6, 16, 32), dtype=jnp.float32, offsets=False):
    """A filled array of a format, with arbitrary offsets if asked for."""
    array = qpaged.get_quantizer(spelling).quantize(normal(*shape).astype(dtype))
    if offsets:
        return array.like(array.codes, array.scales, normal(*array.scales.shape, seed=1))
    return array


def multipliers(array):
    """Each element's scale, float32, in the array's shape."""
    if array.scales is None:
        return jnp.zeros(array.shape, jnp.float32)
    factors = array.multipliers()
    for axis, extent in enumerate(array.block):
        factors = jnp.repeat(factors, extent, axis=axis)
    return factors


def leaves_equal(a, b):
    """Whether two trees hold the same bits."""
    pairs = zip(jax.tree_util.tree_leaves(a), jax.tree_util.tree_leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)
