"""A paged KV cache for JAX whose pages are plain arrays or quantized implicit arrays, behind one API."""

import importlib
from typing import Any

from qpaged._deprecated import renamed_attributes
from qpaged.arrays import QuantizedArray
from qpaged.attention import AttentionBackend, attention_backends, merge_attention, paged_attention
from qpaged.cache import (
    AllocationError,
    DroppedToken,
    HeadSizes,
    HostMemoryWarning,
    NarrowFloatPoolWarning,
    PageAllocator,
    PageChanges,
    PageCounts,
    PagedAttentionCache,
    PagedAttentionCacheMetaData,
    PagedAttentionCacheView,
    PagedAttentionMetadata,
    PageTableUpdates,
    PartitionManager,
    dropped_tokens,
)
from qpaged.formats import (
    BlockFitRule,
    CacheFormat,
    CacheScales,
    ChainedTransform,
    FitAgain,
    GlobalScaleRule,
    GrowthRule,
    OffsetRule,
    PowerOfTwoQuantizer,
    Quantizer,
    RegistryError,
    TransformRule,
    Wrapper,
    available_formats,
    available_quantizers,
    available_wrappers,
    get_quantizer,
    in_units,
    trellis_codes,
)
from qpaged.storage import PrefixStore, SavedCache, load, save

__version__ = "0.1.0"

_renamed = renamed_attributes(__name__, {"quantizer": "qpaged.formats"})
_SUBMODULES = ("adopt", "interop", "models", "plan", "sweep", "testing")  # imported when they are asked for


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    return _renamed(name)


__all__ = [
    "AllocationError",
    "AttentionBackend",
    "BlockFitRule",
    "CacheFormat",
    "CacheScales",
    "ChainedTransform",
    "DroppedToken",
    "FitAgain",
    "GlobalScaleRule",
    "GrowthRule",
    "HeadSizes",
    "HostMemoryWarning",
    "NarrowFloatPoolWarning",
    "OffsetRule",
    "PageAllocator",
    "PageChanges",
    "PageCounts",
    "PageTableUpdates",
    "PagedAttentionCache",
    "PagedAttentionCacheMetaData",
    "PagedAttentionCacheView",
    "PagedAttentionMetadata",
    "PartitionManager",
    "PowerOfTwoQuantizer",
    "PrefixStore",
    "QuantizedArray",
    "Quantizer",
    "RegistryError",
    "SavedCache",
    "TransformRule",
    "Wrapper",
    "attention_backends",
    "available_formats",
    "available_quantizers",
    "available_wrappers",
    "dropped_tokens",
    "get_quantizer",
    "in_units",
    "load",
    "merge_attention",
    "paged_attention",
    "save",
    "trellis_codes",
]
