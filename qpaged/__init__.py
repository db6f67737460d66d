"""A paged KV cache for JAX whose pages are plain arrays or quantized implicit arrays, behind one API."""

from qpaged.arrays import QuantizedArray
from qpaged.attention import AttentionBackend, attention_backends, paged_attention
from qpaged.cache import (
    AllocationError,
    HostMemoryWarning,
    NarrowFloatPoolWarning,
    PageAllocator,
    PagedAttentionCache,
    PagedAttentionCacheMetaData,
    PagedAttentionCacheView,
    PagedAttentionMetadata,
    PartitionManager,
)
from qpaged.formats import (
    CacheFormat,
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
)

__version__ = "0.1.0"

__all__ = [
    "AllocationError",
    "AttentionBackend",
    "CacheFormat",
    "ChainedTransform",
    "FitAgain",
    "GlobalScaleRule",
    "GrowthRule",
    "HostMemoryWarning",
    "NarrowFloatPoolWarning",
    "OffsetRule",
    "PageAllocator",
    "PagedAttentionCache",
    "PagedAttentionCacheMetaData",
    "PagedAttentionCacheView",
    "PagedAttentionMetadata",
    "PartitionManager",
    "PowerOfTwoQuantizer",
    "QuantizedArray",
    "Quantizer",
    "RegistryError",
    "TransformRule",
    "Wrapper",
    "attention_backends",
    "available_formats",
    "available_quantizers",
    "available_wrappers",
    "get_quantizer",
    "paged_attention",
]
