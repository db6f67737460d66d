"""The paged cache: configuration, per-step metadata, views, budget, allocator, sharding."""

from qpaged.cache._allocation import AllocationError, PageCounts, PageTableUpdates
from qpaged.cache._allocator import PageAllocator
from qpaged.cache._allocator_record import allocator_of_record, allocator_to_record
from qpaged.cache._budget import HostMemoryWarning
from qpaged.cache._cache import PagedAttentionCache
from qpaged.cache._config import PagedAttentionCacheMetaData
from qpaged.cache._dropped import DroppedToken, dropped_tokens
from qpaged.cache._fresh import NarrowFloatPoolWarning
from qpaged.cache._head_sizes import HeadSizes
from qpaged.cache._metadata import PagedAttentionMetadata
from qpaged.cache._page_changes import PageChanges
from qpaged.cache._sharding import PartitionManager
from qpaged.cache._view import PagedAttentionCacheView

__all__ = [
    "AllocationError",
    "DroppedToken",
    "HeadSizes",
    "HostMemoryWarning",
    "NarrowFloatPoolWarning",
    "PageAllocator",
    "PageChanges",
    "PageCounts",
    "PageTableUpdates",
    "PagedAttentionCache",
    "PagedAttentionCacheMetaData",
    "PagedAttentionCacheView",
    "PagedAttentionMetadata",
    "PartitionManager",
    "allocator_of_record",
    "allocator_to_record",
    "dropped_tokens",
]
