"""Find the cache of an existing model, and run the model's own code on a quantized one."""

from qpaged._deprecated import renamed_attributes
from qpaged.adopt._cache_leaf import CacheLeaf, FoundCache
from qpaged.adopt._find import CacheNotFoundError, find_cache
from qpaged.adopt._report import MaterializeError, Report
from qpaged.adopt._saving import register_export
from qpaged.adopt._step import QuantizedStep, quantize_cache

__all__ = [
    "CacheLeaf",
    "CacheNotFoundError",
    "FoundCache",
    "MaterializeError",
    "QuantizedStep",
    "Report",
    "find_cache",
    "quantize_cache",
]

register_export()
__getattr__ = renamed_attributes(__name__, {"Materialized": "qpaged.implicit.Materialization"})
