"""A quantized cache in the model you have: find it, and run the model's own code on QuantizedArrays."""

from qpaged.adopt._found import CacheLeaf, CacheNotFoundError, FoundCache, find_cache
from qpaged.adopt._step import Materialized, MaterializeError, QuantizedStep, Report, quantize_cache

__all__ = [
    "CacheLeaf",
    "CacheNotFoundError",
    "FoundCache",
    "MaterializeError",
    "Materialized",
    "QuantizedStep",
    "Report",
    "find_cache",
    "quantize_cache",
]
