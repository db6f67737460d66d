"""The view of all layers whose pages lie in one pool."""

from jax.sharding import Mesh
from jax.typing import DTypeLike

from qpaged import pools
from qpaged.cache._config import (
    LARGEST_INDEX,
    AnyQuantizer,
    PagedAttentionCacheMetaData,
    agreed_formats,
    layer_formats,
    logical_dtype,
)
from qpaged.cache._fresh import PoolFormat, Sequences, allocate_pages, warn_of_narrow_floats
from qpaged.cache._placement import Placement
from qpaged.cache._sharding import Resolver, check_layout
from qpaged.cache._view import PagedAttentionCacheView
from qpaged.pools import FlatPool, Pages, ValuesInKeys


def flat_view(
    mesh: Mesh | None,
    dtype: DTypeLike,
    metadata: PagedAttentionCacheMetaData,
    manager: Resolver | None,
    quantizer: AnyQuantizer,
) -> PagedAttentionCacheView:
    """Return a view of all layers in one fresh pool of keys and one of values.

    Raises:
        TypeError: an argument of another kind.
        ValueError: layers that cannot lie in one pool; see :meth:`PagedAttentionCache.init_cache`.
    """
    check_layout(mesh, manager)
    layers, dtype = metadata.num_hidden_layers, logical_dtype(dtype)
    formats = agreed_formats(metadata, quantizer, dtype)
    of_layers = {layer_formats(formats, layer) for layer in range(layers)}
    if metadata.layer_sizes or len(of_layers) > 1:
        raise ValueError(
            "flat must be False for layers of several formats or head sizes, which do not lie in one pool; "
            "make a flat cache of the layers of each kind."
        )
    if layers * metadata.num_pages_per_layer > LARGEST_INDEX:
        raise ValueError(
            f"flat must be False for {layers} layers of {metadata.num_pages_per_layer:,} pages, which int32 "
            f"cannot index together; use larger pages."
        )
    sequences = Sequences(layers * metadata.batch_size, metadata.num_pages_per_sequence)

    placement = Placement.of(mesh, manager, metadata.pool_shape)
    if placement is not None:
        placement.local_pages(metadata.num_pages_per_layer)  # of each layer, not only of all together

    def allocate(made_with: PoolFormat, shape: tuple[int, int, int, int]) -> Pages:
        kv_heads, pages, *slot = shape
        whole = allocate_pages(made_with, (kv_heads, layers * pages, *slot), dtype, sequences, mesh, manager)
        return FlatPool(whole, None, layers)

    [(key_format, value_format)] = of_layers
    keys = allocate(key_format, metadata.pool_shape)
    values: Pages = ValuesInKeys(metadata.value_pool_shape, dtype)
    if not metadata.values_in_keys:
        values = allocate(value_format, metadata.value_pool_shape)
    if any(pools.static_scales(pages) is not None for pages in (keys, values)):
        raise ValueError(
            "flat must be False for formats with static scales, which are those of a layer; a flat pool "
            "would have one for all."
        )
    warn_of_narrow_floats(keys, values)
    return PagedAttentionCacheView(metadata, None, keys, values, placement)
