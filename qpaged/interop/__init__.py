"""Pages in the form that JAX's own paged-attention kernels take, in ``jax.experimental.pallas.ops``.

| kernel | pages | sequences |
|---|---|---|
| ``tpu.paged_attention`` | :func:`quantized_tensors` | :func:`decode_sequences` |
| ``gpu.paged_attention`` | :func:`scaled_pages` | :func:`decode_sequences` |
| ``tpu.ragged_paged_attention`` | :func:`interleaved_pages` | :func:`ragged_sequences` |
| the same, with its scales | :func:`scaled_interleaved_pages` | :func:`ragged_sequences` |

The first two keep codes as codes. The kernels' own quantized pages are numbers of one dtype times one scale
for each slot, and a format whose values are anything else is refused:

- ``int8`` with one scale per page: a code c stands for (c + 1/2) s = (2c + 1) (s / 2), and 2c + 1 takes 9
  bits. Codes of 4 bits (``int4:page``) have room for it, and are exact.
- scales along the channels (``channel``, and groups smaller than head_dim);
- ``+offset``, which adds to a block, and ``+rotate``, which stores transformed channels.

The ragged kernel's own quantized pages have one scale for all keys and one for all values, as those of
``fp8_e4m3:tensor`` do; codes of these are kept, too.

For these, use :func:`interleaved_pages`, which decodes them, or :func:`qpaged.paged_attention`.

:func:`interleaved_view` goes the other way: it makes a view of a pool that an engine for TPUs has allocated.
"""

from qpaged.interop._interleaved import interleaved_shape, interleaved_view
from qpaged.interop._pages import (
    ScaledInterleavedPages,
    ScaledPages,
    interleaved_pages,
    quantized_tensors,
    scaled_interleaved_pages,
    scaled_pages,
)
from qpaged.interop._sequences import RaggedSequences, decode_sequences, ragged_sequences

__all__ = [
    "RaggedSequences",
    "ScaledInterleavedPages",
    "ScaledPages",
    "decode_sequences",
    "interleaved_pages",
    "interleaved_shape",
    "interleaved_view",
    "quantized_tensors",
    "ragged_sequences",
    "scaled_interleaved_pages",
    "scaled_pages",
]
