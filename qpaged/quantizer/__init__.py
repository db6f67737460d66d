"""Formats: the contract that a plugin implements, and the registry that finds it."""

from qpaged.quantizer._cache_format import CacheFormat
from qpaged.quantizer._contract import Quantizer
from qpaged.quantizer._exponent import PowerOfTwoQuantizer
from qpaged.quantizer._registry import (
    RegistryError,
    available_formats,
    available_quantizers,
    available_wrappers,
    get_quantizer,
    quantizer_from_config,
)
from qpaged.quantizer._wrapper import Wrapper

__all__ = [
    "CacheFormat",
    "PowerOfTwoQuantizer",
    "Quantizer",
    "RegistryError",
    "Wrapper",
    "available_formats",
    "available_quantizers",
    "available_wrappers",
    "get_quantizer",
    "quantizer_from_config",
]
