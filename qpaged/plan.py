"""Plans memory: how many pages and tokens of each format fit beside a model's weights."""

import numbers
from dataclasses import dataclass
from typing import Any

import jax
from jax.typing import DTypeLike

from qpaged._arguments import byte_count, check_type, shown, whole_number
from qpaged._bad_argument import BadArgumentError
from qpaged._deprecated import renamed_argument
from qpaged.cache import PagedAttentionCache, PagedAttentionCacheMetaData
from qpaged.cache._budget import PagePool, cache_bytes
from qpaged.cache._config import LARGEST_INDEX, layer_formats
from qpaged.cache._fresh import Sequences
from qpaged.formats import CacheFormat
from qpaged.models import CacheSizes, DecoderConfig
from qpaged.pools import count_bytes


@dataclass(frozen=True)
class Plan:
    """The cache of one format on one device; bytes are those of that device.

    Attributes:
        format: the name of the format.
        metadata: as :meth:`PagedAttentionCacheMetaData.create` returns it for this memory and as many
            sequences as fit; its KV heads are those of one device.
        memory: bytes of the device.
        weights: bytes of the model's weights on one device.
        reserve: bytes that are left to everything else: activations, programs, fragmentation.
        key_codes, key_scales, value_codes, value_scales: bytes in the pools of all layers; scales include
            everything else that goes with codes, such as offsets.
        context: tokens of a sequence.
        shards: devices that the KV heads are divided over; 1 if each has all of them.
        tpu_padding: bytes that a TPU allocates beyond :attr:`cache`, out of what is left to everything else:
            it stores scales of one byte for KV heads in fours, and a device may hold fewer.
        groups: groups of such devices, each with sequences of its own.
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
    tpu_padding: int = 0
    groups: int = 1

    @property
    def cache(self) -> int:
        """Bytes of the whole cache."""
        return self.key_codes + self.key_scales + self.value_codes + self.value_scales

    @property
    def unused(self) -> int:
        """Bytes that are too few for one more page."""
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
        """Whole sequences of :attr:`context` tokens that fit, each with its exact pages; of all groups."""
        of_group = min(self.metadata.batch_size, self.pages // self.metadata.num_pages_per_sequence)
        return of_group * self.groups

    @property
    def bytes_per_token(self) -> float:
        """Bytes of the cache on one device for each token."""
        return self.cache / self.tokens


@renamed_argument("format", "quantizer")
def plan(
    config: DecoderConfig | CacheSizes,
    quantizer: Any,
    *,
    memory_bytes: int,
    context: int,
    weights_bytes: int = 0,
    dtype: DTypeLike = "bfloat16",
    page_size: int = 16,
    mesh_size: int = 1,
    groups: int = 1,
    hbm_utilization: float = 0.9,
    name: str | None = None,
) -> Plan:
    """Return the largest cache that fits beside a model's weights.

    ``hbm_utilization`` of what the weights leave of each device's memory goes to the cache. On a mesh,
    weights are divided over the devices of a group. So are KV heads: fewer heads than devices are stored as
    often as the devices ask, and where neither number divides the other, each device holds all heads.

    Args:
        config: of the model, or its sizes alone.
        quantizer: as :meth:`qpaged.CacheFormat.of` takes it.
        memory_bytes: the memory of one device.
        context: tokens of the longest sequence.
        weights_bytes: of the whole model.
        dtype: the logical dtype of keys and values.
        page_size: tokens of a page.
        mesh_size: devices of a group, over which weights and KV heads are divided.
        groups: groups of devices, each with all weights, and with sequences of its own.
        hbm_utilization: between 0 and 1.
        name: the name of the format in the plan; its spelling if None.

    Raises:
        TypeError: an argument of another kind.
        ValueError: an argument is out of its range, the weights or a single page do not fit, or the format
            does not go with the model.
    """
    advice = "qpaged.models.read_cache_sizes(path) reads the sizes of a checkpoint"
    rule = "a qpaged.models.DecoderConfig or CacheSizes"
    check_type("config", config, DecoderConfig | CacheSizes, rule, advice)
    memory_bytes = byte_count("memory_bytes", memory_bytes)
    weights_bytes = byte_count("weights_bytes", weights_bytes)
    context, page_size = whole_number("context", context), whole_number("page_size", page_size)
    mesh_size = whole_number("mesh_size", mesh_size)
    groups = whole_number("groups", groups)
    _check_ranges(context, page_size, mesh_size, hbm_utilization)
    if groups < 1:
        raise BadArgumentError("groups", f"must be at least 1, but came as {groups:,}.")
    weights = -(-weights_bytes // mesh_size)
    free = memory_bytes - weights
    if free <= 0:
        raise BadArgumentError(
            "memory_bytes",
            f"must be more than the weights, {readable_bytes(weights)} on each device, but came as "
            f"{readable_bytes(memory_bytes)}; give more, or divide the model over more devices.",
        )
    stored_heads = max(config.num_key_value_heads, mesh_size)  # fewer heads than devices are stored again
    divides = stored_heads % mesh_size == 0 and stored_heads % config.num_key_value_heads == 0
    shards = mesh_size if divides else 1
    cache_format = CacheFormat.of(quantizer)
    kv_heads = stored_heads // mesh_size if divides else config.num_key_value_heads
    pools = [
        PagePool(part, kv_heads, page_size, config.head_dim)
        for layer in range(config.num_hidden_layers)
        for part in layer_formats(cache_format, layer)
    ]
    per_sequence = -(-context // page_size)
    of_page, beside = cache_bytes(pools, dtype, Sequences(1, per_sequence), None, None)
    _, beside_two = cache_bytes(pools, dtype, Sequences(2, per_sequence), None, None)
    page_bytes = int(of_page) + beside
    room = int(free * hbm_utilization)
    if page_bytes > room:
        raise BadArgumentError(
            "memory_bytes",
            f"must leave the cache room for a page of every layer, {readable_bytes(page_bytes)}, but leaves "
            f"it {readable_bytes(room)}; give more memory, or smaller pages.",
        )
    of_sequence = per_sequence * of_page + beside_two - beside  # with the exact pages of one more sequence
    room_for_sequences = room - (2 * beside - beside_two)
    metadata = PagedAttentionCacheMetaData.create(
        mesh=None,
        batch_size=max(1, int(room_for_sequences // of_sequence)),
        num_hidden_layers=config.num_hidden_layers,
        max_sequences=context,
        page_size=page_size,
        num_kv_heads=kv_heads,
        kv_head_dim_size=config.head_dim,
        hbm_utilization=hbm_utilization,
        dtype=dtype,
        quantizer=cache_format,
        memory_bytes=free,
    )

    def init_cache() -> PagedAttentionCache:
        return PagedAttentionCache.init_cache(None, dtype, metadata, quantizer=cache_format)

    cache = jax.eval_shape(init_cache)  # shapes alone: nothing is allocated
    keys = [count_bytes(view.key_pages) for view in cache.views]
    values = [count_bytes(view.value_pages) for view in cache.views]
    return Plan(
        format=name or str(cache_format),
        metadata=metadata,
        memory=memory_bytes,
        weights=weights,
        reserve=free - room,
        key_codes=sum(pool.codes for pool in keys),
        key_scales=sum(pool.scales for pool in keys),
        value_codes=sum(pool.codes for pool in values),
        value_scales=sum(pool.scales for pool in values),
        context=context,
        shards=shards,
        tpu_padding=_tpu_padding(cache),
        groups=groups,
    )


def _tpu_padding(cache: PagedAttentionCache) -> int:
    """Return the bytes that a TPU adds to scales of a byte a page (kv_heads, pages, 1, 1).

    The compiler lays pages along the lanes of its tiles and KV heads along the sublanes, four bytes of which
    fill one.
    """
    leaves = jax.tree.leaves(cache.views)
    alone = [leaf for leaf in leaves if leaf.shape[2:] == (1, 1) and leaf.dtype.itemsize == 1]
    return sum(-leaf.shape[0] % 4 * leaf.shape[1] for leaf in alone)


def _check_ranges(context: int, page_size: int, mesh_size: int, hbm_utilization: float) -> None:
    """Raise BadArgumentError for a number that no cache has."""
    for argument, count in (("context", context), ("page_size", page_size), ("mesh_size", mesh_size)):
        if count < 1:
            raise BadArgumentError(argument, f"must be at least 1, but came as {count:,}.")
    if page_size > LARGEST_INDEX:
        raise BadArgumentError("page_size", f"must be at most {LARGEST_INDEX:,}, but came as {page_size:,}.")
    longest = LARGEST_INDEX // page_size * page_size
    if context > longest:
        raise BadArgumentError("context", f"must be at most {longest:,}, but came as {context:,}.")
    is_number = isinstance(hbm_utilization, numbers.Real)
    if not is_number or not 0 < hbm_utilization < 1:
        came = f"{hbm_utilization:g}" if is_number else shown(hbm_utilization)
        raise BadArgumentError("hbm_utilization", f"must be between 0 and 1, as 0.9, but came as {came}.")


def readable_bytes(count: int) -> str:
    """Return a number of bytes in the largest unit that it fills."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count:,} B"


def device_memory() -> int | None:
    """Return the bytes of the default device's memory; None if the device does not report them."""
    stats = jax.devices()[0].memory_stats() or {}
    limit = stats.get("bytes_reservable_limit", stats.get("bytes_limit"))
    if limit is None:
        return None
    return int(limit)
