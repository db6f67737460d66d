"""How many tokens fit: the pages of each format in a device's memory, as allocating them would have it."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from qpaged.arrays import QuantizedArray
from qpaged.cache import PagedAttentionCache, PagedAttentionCacheMetaData
from qpaged.models import DecoderConfig
from qpaged.quantizer import CacheFormat


@dataclass(frozen=True)
class Plan:
    """The cache of one format on one device; bytes are those of that device.

    Attributes:
        format: its name.
        metadata: what :meth:`PagedAttentionCacheMetaData.create` makes there; its KV heads are those of one
            device.
        memory: of the device.
        weights: the model's, on one device.
        reserve: what is left to everything else: activations, programs, fragmentation.
        key_codes, key_scales, value_codes, value_scales: the pools of all layers; scales with all that goes
            with them, as offsets.
        context: tokens of a sequence.
        shards: devices that the KV heads are divided over.
    """

    format: str
    metadata: PagedAttentionCacheMetaData
    memory: int
    weights: int
    reserve: int
    key_codes: int
    key_scales: int
    value_codes: int
    value_scales: int
    context: int
    shards: int

    @property
    def cache(self) -> int:
        """Bytes of the whole cache."""
        return self.key_codes + self.key_scales + self.value_codes + self.value_scales

    @property
    def unused(self) -> int:
        """Bytes that are no whole page."""
        return self.memory - self.weights - self.reserve - self.cache

    @property
    def pages(self) -> int:
        """Pages of each layer."""
        return self.metadata.num_pages_per_layer

    @property
    def tokens(self) -> int:
        """Tokens that the pages hold."""
        return self.pages * self.metadata.page_size

    @property
    def sequences(self) -> int:
        """Whole sequences of :attr:`context` tokens that the pages hold."""
        return self.pages // self.metadata.num_pages_per_sequence

    @property
    def bytes_per_token(self) -> float:
        """On one device."""
        return self.cache / self.tokens


def plan(
    config: DecoderConfig,
    format: Any,
    *,
    memory_bytes: int,
    context: int,
    weights_bytes: int = 0,
    dtype: Any = "bfloat16",
    page_size: int = 16,
    mesh_size: int = 1,
    hbm_utilization: float = 0.9,
    name: str | None = None,
) -> Plan:
    """The largest cache that fits beside a model's weights.

    ``hbm_utilization`` of what the weights leave of each device's memory goes to the cache. On a mesh,
    weights are divided over all devices; KV heads too where their number allows it, and else each device
    holds all of them.

    Args:
        config: of the model.
        format: as :meth:`qpaged.CacheFormat.of` takes it.
        memory_bytes: the memory of one device.
        context: tokens of the longest sequence.
        weights_bytes: of the whole model.
        dtype: the logical dtype of keys and values.
        page_size: tokens of a page.
        mesh_size: devices.
        hbm_utilization: between 0 and 1.
        name: what to call the format; its spelling if None.

    Raises:
        ValueError: the weights do not fit, or not one page does, or a format that does not go with the model.
    """
    weights = -(-weights_bytes // mesh_size)
    free = memory_bytes - weights
    if free <= 0:
        raise ValueError(
            f"memory_bytes must be more than the weights, {weights:,} bytes on each device, but came as "
            f"{memory_bytes:,}; give larger devices, or more of them."
        )
    shards = mesh_size if config.num_key_value_heads % mesh_size == 0 else 1
    formats = CacheFormat.of(format)
    metadata = PagedAttentionCacheMetaData.create(
        mesh=None,
        batch_size=1,
        num_hidden_layers=config.num_hidden_layers,
        max_sequences=context,
        page_size=page_size,
        num_kv_heads=config.num_key_value_heads // shards,
        kv_head_dim_size=config.head_dim,
        hbm_utilization=hbm_utilization,
        dtype=dtype,
        quantizer=formats,
        memory_bytes=free,
    )
    cache = jax.eval_shape(lambda: PagedAttentionCache.init_cache(None, dtype, metadata, quantizer=formats))
    keys = [_parts(view.key_pages) for view in cache.views]
    values = [_parts(view.value_pages) for view in cache.views]
    return Plan(
        format=name or str(formats),
        metadata=metadata,
        memory=memory_bytes,
        weights=weights,
        reserve=free - int(free * metadata.hbm_utilization),
        key_codes=sum(codes for codes, _ in keys),
        key_scales=sum(scales for _, scales in keys),
        value_codes=sum(codes for codes, _ in values),
        value_scales=sum(scales for _, scales in values),
        context=context,
        shards=shards,
    )


def device_memory() -> int | None:
    """Bytes of the default device's memory; None where it does not tell."""
    stats = jax.devices()[0].memory_stats() or {}
    limit = stats.get("bytes_reservable_limit", stats.get("bytes_limit"))
    return None if limit is None else int(limit)


def _parts(pool: Any) -> tuple[int, int]:
    """Bytes of a pool's codes, and of all that goes with them."""
    codes = _nbytes(pool.folded if isinstance(pool, QuantizedArray) else pool)
    return codes, _nbytes(pool) - codes


def _nbytes(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(tree))
