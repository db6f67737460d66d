"""Masks and weights of rows: selected and multiplied in codes and scales, without decoding.

A mask or weight here has length 1 along each axis that it repeats itself along. Blocks are first refined to
single elements along its other axes.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from qpaged.arrays._blocks import block_shape, refine
from qpaged.arrays._moves import join
from qpaged.arrays._quantized import QuantizedArray
from qpaged.arrays._read_format import channels_matter, with_float_scales

SCALES_OF_FLOATS = 4  # as many elements to a scale, or decoding would be as cheap


def select(which: jax.Array, cases: Sequence[QuantizedArray]) -> QuantizedArray | None:
    """Return ``lax.select_n`` of arrays of one format; None along channels that go together."""
    if not _is_coarse(which, cases[0]):
        return None

    def choose(parts: list[jax.Array]) -> jax.Array:
        return lax.select_n(jnp.broadcast_to(which, parts[0].shape), *parts)

    return join([_refined(case, which) for case in cases], choose, cases[0].channels)


def keep(array: QuantizedArray, mask: jax.Array) -> QuantizedArray | None:
    """Return the array with zeros where ``mask`` is False: there codes and scales are as in an empty one."""
    return select(mask, [array.like(jnp.zeros_like(array.codes), array.parts.map(jnp.zeros_like)), array])


def multiply(array: QuantizedArray, factor: jax.Array) -> QuantizedArray | None:
    """Return the array times a factor of each row: the codes stay, the scales become float32 factors.

    None where scales and factors are nearly as many as elements.
    """
    if array.scales is None or not _is_coarse(factor, array):
        return None
    view = with_float_scales(_refined(array, factor))
    return view.like(view.codes, view.parts.map(lambda part: part * factor.astype(jnp.float32)))


def _is_coarse(mask: jax.Array, array: QuantizedArray) -> bool:
    """Return True if ``mask`` spares channels that go together, and takes few scales for the elements."""
    if channels_matter(array) and mask.shape[array.channels] != 1:
        return False
    if array.scales is None:
        return True
    counts = [max(pair) for pair in zip(array.scales.shape, mask.shape, strict=True)]
    return math.prod(counts) * SCALES_OF_FLOATS <= array.size


def _refined(array: QuantizedArray, mask: jax.Array) -> QuantizedArray:
    """Return the array with blocks of one element along each axis of which ``mask`` is not 1 long."""

    def refine_part(part: jax.Array) -> jax.Array:
        for axis, extent in enumerate(block_shape(array.shape, part.shape)):
            if mask.shape[axis] != 1:
                part = refine(part, axis, extent)
        return part

    return array.like(array.codes, array.parts.map(refine_part))
