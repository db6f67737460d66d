"""Formats: the contract that a plugin implements, and the registry that finds it."""

from qpaged.arrays import (
    BlockFitRule,
    GlobalScaleRule,
    GrowthRule,
    OffsetRule,
    TransformRule,
    in_units,
    trellis_codes,
)
from qpaged.formats._cache_format import CacheFormat
from qpaged.formats._cache_scales import CacheScales, check_formats, scale_values, without_granularity
from qpaged.formats._contract import Quantizer
from qpaged.formats._exact import ExactFormat, PoolQuantizer, format_of_codes
from qpaged.formats._growth import FitAgain
from qpaged.formats._power_of_two import PowerOfTwoQuantizer
from qpaged.formats._registry import (
    RegistryError,
    available_formats,
    available_quantizers,
    available_wrappers,
    get_quantizer,
    quantizer_from_config,
)
from qpaged.formats._transform import ChainedTransform
from qpaged.formats._wrapper import Wrapper

__all__ = [
    "BlockFitRule",
    "CacheFormat",
    "CacheScales",
    "ChainedTransform",
    "ExactFormat",
    "FitAgain",
    "GlobalScaleRule",
    "GrowthRule",
    "OffsetRule",
    "PoolQuantizer",
    "PowerOfTwoQuantizer",
    "Quantizer",
    "RegistryError",
    "TransformRule",
    "Wrapper",
    "available_formats",
    "available_quantizers",
    "available_wrappers",
    "check_formats",
    "format_of_codes",
    "get_quantizer",
    "in_units",
    "quantizer_from_config",
    "scale_values",
    "trellis_codes",
    "without_granularity",
]
