"""Quantized arrays made of stored parts, and codes of four bits packed by hand."""

import jax.numpy as jnp
import numpy as np

import qpaged


def array_of(spelling, codes, scales, outer=None, dtype=jnp.float32):
    """Return a quantized array of these parts."""
    return qpaged.QuantizedArray(
        jnp.asarray(codes),
        None if scales is None else jnp.asarray(scales),
        None,
        None if outer is None else jnp.asarray(outer),
        quantizer=qpaged.get_quantizer(spelling),
        dtype=jnp.dtype(dtype),
    )


def two_to_a_byte(codes):
    """Return codes 0 to 15 as bytes: element 2i in the low nibble, 2i + 1 in the high one."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)


def from_nibbles(packed):
    """Return the codes that :func:`two_to_a_byte` packed."""
    packed = np.asarray(packed)
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
