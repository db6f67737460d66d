"""A paged KV cache for JAX whose pages are plain arrays or quantized implicit arrays, behind one API."""

from qpaged.arrays import QuantizedArray
from qpaged.quantizer import (
    CacheFormat,
    PowerOfTwoQuantizer,
    Quantizer,
    RegistryError,
    available_formats,
    available_quantizers,
    get_quantizer,
)

__all__ = [
    "CacheFormat",
    "PowerOfTwoQuantizer",
    "QuantizedArray",
    "Quantizer",
    "RegistryError",
    "available_formats",
    "available_quantizers",
    "get_quantizer",
]
