"""Formats: the contract that a plugin implements, and the registry that finds it."""

from qpaged.quantizer._cache_format import CacheFormat
from qpaged.quantizer._contract import GRANULARITIES, Quantizer
from qpaged.quantizer._exponent import PowerOfTwoQuantizer
from qpaged.quantizer._registry import (
    RegistryError,
    available_formats,
    available_quantizers,
    get_quantizer,
    quantizer_from_config,
)

__all__ = [
    "GRANULARITIES",
    "CacheFormat",
    "PowerOfTwoQuantizer",
    "Quantizer",
    "RegistryError",
    "available_formats",
    "available_quantizers",
    "get_quantizer",
    "quantizer_from_config",
]
