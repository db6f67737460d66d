"""Quantized arrays made of stored parts, and codes of four bits packed by hand."""

import jax.numpy as jnp
import numpy as np

import qpaged


def array_of(spelling, codes, scales, global_scale=None, dtype=jnp.float32):
    """Return a quantized array of these parts."""
    return qpaged.QuantizedArray(
        stored=jnp.asarray(codes),
        scales=None if scales is None else jnp.asarray(scales),
        global_scale=None if global_scale is None else jnp.asarray(global_scale),
        quantizer=qpaged.get_quantizer(spelling),
        dtype=jnp.dtype(dtype),
    )


def two_to_a_byte(codes):
    """Codes 0 to 15 as bytes: element 2i in the low nibble, 2i + 1 in the high one."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)


def from_nibbles(packed):
    """The inverse of :func:`two_to_a_byte`."""
    packed = np.asarray(packed)
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
