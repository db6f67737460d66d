"""The static configuration of a cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from qpaged._arguments import byte_count, check_count, check_type, positive
from qpaged.arrays import float_dtype, is_dtype
from qpaged.cache._budget import PagePool, available_bytes, cache_bytes, default_device
from qpaged.cache._fresh import MakePages, PoolFormat, Sequences, check_takes_zeros, round_to_shards
from qpaged.cache._head_sizes import HeadSizes, LayerSizes, checked_layer_sizes
from qpaged.cache._placement import Placement
from qpaged.cache._serializable import Serializable
from qpaged.cache._sharding import Resolver, check_layout
from qpaged.formats import CacheFormat, ExactFormat, PoolQuantizer, Quantizer

LARGEST_INDEX = 2**31 - 2  # one past the last page must still be an int32

AnyQuantizer: TypeAlias = CacheFormat | PoolQuantizer | MakePages | str | Path | None
"""What every ``quantizer=`` takes: a spelling, a file, a quantizer, a cache format, a function, or None."""
CachePages: TypeAlias = CacheFormat | MakePages
"""What a ``quantizer=`` stands for: the formats of all pools, or a function that makes the pages of each."""

COUNTS = (
    "batch_size",
    "num_hidden_layers",
    "num_pages_per_layer",
    "num_pages_per_sequence",
    "max_sequences",
    "page_size",
    "num_kv_heads",
    "kv_head_dim_size",
)


@dataclass(frozen=True)
class PagedAttentionCacheMetaData(Serializable):
    """The static, hashable configuration of a paged cache.

    Attributes:
        batch_size: sequences decoded at once, at most.
        num_hidden_layers: layers of the model; each has a pool of keys and one of values.
        num_pages_per_layer: pages of a pool; as an index, "no page".
        num_pages_per_sequence: pages of the longest sequence.
        max_sequences: tokens of the longest sequence (the name is historical).
        page_size: tokens of a page.
        num_kv_heads: key/value heads.
        kv_head_dim_size: the size of a head.
        hbm_utilization: the share of a device's memory that the cache takes, between 0 and 1.
        quantizer: the format the pages were counted for; None if any.
        dtype: the name of the logical dtype the pages were counted for; None if any.
        value_head_dim_size: the size of a head of values; None if it is that of keys.
        values_in_keys: True if values are the first ``value_head_dim_size`` channels of the keys, which are
            stored once: the latent of multi-head latent attention (DeepSeek-V2), with the rotary part behind
            it.
        layer_sizes: the layers whose heads are others than the fields above say, in ascending order; given as
            a mapping from layers to :class:`HeadSizes`. Views have the metadata of their own layer.

    Raises:
        TypeError: a count that is not an integer.
        ValueError: a count that is not positive or too large for int32 indices, a utilization outside (0, 1).
    """

    batch_size: int
    num_hidden_layers: int
    num_pages_per_layer: int
    num_pages_per_sequence: int
    max_sequences: int
    page_size: int
    num_kv_heads: int
    kv_head_dim_size: int
    hbm_utilization: float
    quantizer: CachePages | None = None
    dtype: str | None = None
    value_head_dim_size: int | None = None
    values_in_keys: bool = False
    layer_sizes: LayerSizes = ()

    later_fields = frozenset({"value_head_dim_size", "values_in_keys", "layer_sizes"})

    def __post_init__(self) -> None:
        for name in COUNTS:
            object.__setattr__(self, name, positive(name, getattr(self, name)))
        object.__setattr__(self, "hbm_utilization", _utilization(self.hbm_utilization))
        if self.quantizer is not None:
            object.__setattr__(self, "quantizer", cache_pages(self.quantizer))
            check_layers(self.quantizer, self.num_hidden_layers)
        if self.dtype is not None:
            object.__setattr__(self, "dtype", logical_dtype(self.dtype).name)
        if self.value_head_dim_size is not None:
            size = positive("value_head_dim_size", self.value_head_dim_size)
            object.__setattr__(self, "value_head_dim_size", size)
        if self.values_in_keys and self.value_dim > self.kv_head_dim_size:
            raise ValueError(
                f"value_head_dim_size must be at most kv_head_dim_size for values that lie in the keys, but "
                f"came as {self.value_dim} with {self.kv_head_dim_size}; give the size of a whole key to the "
                f"latter."
            )
        usual = HeadSizes(self.num_kv_heads, self.kv_head_dim_size, self.value_head_dim_size)
        sizes = checked_layer_sizes(self.layer_sizes, usual, self.num_hidden_layers)
        object.__setattr__(self, "layer_sizes", sizes)
        for layer, _ in sizes:
            self.of_layer(layer)  # which checks that values lie in the keys
        advice = "use fewer or larger pages"
        _indexable("num_pages_per_layer", self.num_pages_per_layer, advice)
        tokens = self.num_pages_per_sequence * self.page_size
        _indexable("num_pages_per_sequence * page_size", tokens, "use fewer or smaller pages")

    @classmethod
    def create(
        cls,
        mesh: Mesh | None,
        batch_size: int,
        num_hidden_layers: int,
        max_sequences: int,
        page_size: int,
        num_kv_heads: int,
        kv_head_dim_size: int,
        hbm_utilization: float,
        dtype: DTypeLike = jnp.bfloat16,
        *,
        quantizer: AnyQuantizer = None,
        memory_bytes: int | None = None,
        partition_manager: Resolver | None = None,
        value_head_dim_size: int | None = None,
        values_in_keys: bool = False,
        layer_sizes: Mapping[int, HeadSizes] | LayerSizes = (),
    ) -> Self:
        """Return the configuration whose pools fill ``hbm_utilization`` of a device's memory.

        Args:
            mesh: the devices; None for the default device. Each device holds its shard of every pool; what
                is replicated counts on each.
            max_sequences: tokens of the longest sequence.
            dtype: the logical dtype of keys and values.
            quantizer: None, a spelling, a quantizer, a cache format, or a callable that turns a pool's zeros
                into pages. Its own arrays say how many bytes a page takes.
            memory_bytes: the memory of one device; what the devices report if None.
            partition_manager: how pools are laid over the mesh; see :class:`PartitionManager`.

        Raises:
            TypeError: as the class, and for a mesh, dtype, quantizer or manager of another kind.
            ValueError: as the class; when not one page fits; when ``memory_bytes`` is not given for a mesh of
                several processes, which must all plan the same size.
        """
        check_layout(mesh, partition_manager)
        utilization = _utilization(hbm_utilization)
        num_layers = positive("num_hidden_layers", num_hidden_layers)
        check_count("num_hidden_layers", num_layers)  # the format of each is looked at
        page_size = positive("page_size", page_size)
        kv_heads = positive("num_kv_heads", num_kv_heads)
        head_dim = positive("kv_head_dim_size", kv_head_dim_size)
        pages_per_sequence = -(-positive("max_sequences", max_sequences) // page_size)
        _indexable(
            "max_sequences, in whole pages,",
            pages_per_sequence * page_size,
            "give the tokens of the longest sequence",
        )
        memory_bytes = None if memory_bytes is None else byte_count("memory_bytes", memory_bytes)
        if value_head_dim_size is not None:
            value_head_dim_size = positive("value_head_dim_size", value_head_dim_size)
        dtype = logical_dtype(dtype)
        formats = cache_pages(quantizer)
        usual = HeadSizes(kv_heads, head_dim, value_head_dim_size)
        other_sizes = dict(checked_layer_sizes(layer_sizes, usual, num_layers))
        page_pools = []
        for layer in range(num_layers):
            sizes = other_sizes.get(layer, usual)
            key_format, value_format = layer_formats(formats, layer)
            page_pools.append(PagePool(key_format, sizes.num_kv_heads, page_size, sizes.kv_head_dim_size))
            if not values_in_keys:
                channels = sizes.value_head_dim_size or sizes.kv_head_dim_size
                page_pools.append(PagePool(value_format, sizes.num_kv_heads, page_size, channels))
        sequences = Sequences(positive("batch_size", batch_size), pages_per_sequence)
        page_bytes, beside = cache_bytes(page_pools, dtype, sequences, mesh, partition_manager)
        device = default_device() if mesh is None else mesh.devices.flat[0]
        room = available_bytes(mesh, device, utilization, memory_bytes)
        placement = Placement.of(mesh, partition_manager, (kv_heads, 1, page_size, head_dim))
        devices = 1 if placement is None else placement.context_size  # that share the pages of a sequence
        pages = min(int((room - beside) / page_bytes), LARGEST_INDEX // devices) * devices
        for pool in set(page_pools):
            pages = round_to_shards(pages, pool[1:], mesh, partition_manager)
        if pages < 1:
            has_exact = any(isinstance(pool.quantizer, ExactFormat) for pool in page_pools)
            others = f"exact pages of {batch_size} sequences" if has_exact else "static scales"
            others = f", and {others} {beside:,}" if beside else ""
            raise ValueError(
                f"memory: one page of {num_layers} layers takes {int(page_bytes):,} bytes on a device"
                f"{others}, but the cache may take {max(room, 0):,}; raise memory_bytes or hbm_utilization, "
                f"choose a smaller {'batch_size, ' if has_exact else ''}page_size or format, or partition "
                f"the KV heads over more devices."
            )
        return cls(
            batch_size=batch_size,
            num_hidden_layers=num_layers,
            num_pages_per_layer=pages,
            num_pages_per_sequence=pages_per_sequence,
            max_sequences=max_sequences,
            page_size=page_size,
            num_kv_heads=kv_heads,
            kv_head_dim_size=head_dim,
            hbm_utilization=utilization,
            quantizer=formats,
            dtype=dtype.name,
            value_head_dim_size=value_head_dim_size,
            values_in_keys=values_in_keys,
            layer_sizes=tuple(other_sizes.items()),
        )

    def of_layer(self, layer: int) -> Self:
        """Return the configuration with the head sizes of a layer as those of all: that of its view."""
        sizes = dict(self.layer_sizes).get(layer)
        if sizes is None:
            return self.replace(layer_sizes=()) if self.layer_sizes else self
        return self.replace(**sizes._asdict(), layer_sizes=())

    @classmethod
    def check_record(cls, fields: Mapping[str, Any]) -> None:
        """Raise ValueError for what the constructor takes, and no record has: the name of a format, say."""
        counts = {name: fields[name] for name in COUNTS}
        wrong = {name: value for name, value in counts.items() if type(value) is not int}
        if not isinstance(fields["quantizer"], Mapping | None):
            wrong["quantizer"] = fields["quantizer"]
        if not isinstance(fields["dtype"], str | None):
            wrong["dtype"] = fields["dtype"]
        if type(fields.get("value_head_dim_size")) not in (int, type(None)):
            wrong["value_head_dim_size"] = fields["value_head_dim_size"]
        if type(fields.get("values_in_keys", False)) is not bool:
            wrong["values_in_keys"] = fields["values_in_keys"]
        if not isinstance(fields.get("layer_sizes", []), list):
            wrong["layer_sizes"] = fields["layer_sizes"]
        if wrong:
            raise ValueError(
                f"data of a {cls.__name__} must hold integers, a CacheFormat and the name of a dtype, "
                f"but holds {wrong}."
            )

    @property
    def sequences(self) -> Sequences:
        """How many sequences are decoded at once, at most, and the pages of the longest."""
        return Sequences(self.batch_size, self.num_pages_per_sequence)

    @property
    def pool_shape(self) -> tuple[int, int, int, int]:
        """The logical shape of a pool of keys: (kv_heads, pages, page_size, head_dim)."""
        return self.num_kv_heads, self.num_pages_per_layer, self.page_size, self.kv_head_dim_size

    @property
    def value_pool_shape(self) -> tuple[int, int, int, int]:
        """The logical shape of a pool of values, likewise."""
        return *self.pool_shape[:3], self.value_dim

    @property
    def value_dim(self) -> int:
        """The size of a head of values."""
        return self.kv_head_dim_size if self.value_head_dim_size is None else self.value_head_dim_size


def cache_pages(quantizer: AnyQuantizer) -> CachePages:
    """Return what ``quantizer=`` stands for: a cache format, or a function that makes pages."""
    is_format_class = isinstance(quantizer, type) and issubclass(quantizer, Quantizer)
    if isinstance(quantizer, PoolQuantizer | CacheFormat) or is_format_class or is_dtype(quantizer):
        return CacheFormat.of(quantizer)  # which refuses the classes, though they are callable
    if callable(quantizer):
        check_takes_zeros(quantizer)
        return quantizer
    return CacheFormat.of(quantizer)


def logical_dtype(dtype: DTypeLike) -> np.dtype:
    """Return the dtype of keys and values, or raise TypeError if it is none of floats."""
    advice = "give that of keys and values, such as 'bfloat16'; for pages of codes give quantizer='int8', say"
    return float_dtype("dtype", dtype, advice)


def check_metadata(metadata: object, advice: str) -> None:
    """Raise TypeError unless ``metadata`` is the configuration of a cache."""
    rule = "a qpaged.PagedAttentionCacheMetaData"
    check_type("metadata", metadata, PagedAttentionCacheMetaData, rule, advice)


def check_layers(formats: CachePages, num_layers: int) -> None:
    """Raise ValueError where a format is given for a layer that is not there."""
    if not isinstance(formats, CacheFormat):
        return
    beyond = [index for index, _ in formats.layers if index >= num_layers]
    if beyond:
        raise ValueError(
            f"quantizer must name layers of the model's {num_layers}, counted from 0, but names {beyond}."
        )


def layer_formats(formats: CachePages, layer: int) -> tuple[PoolFormat, PoolFormat]:
    """Return the formats of a layer's keys and of its values."""
    if isinstance(formats, CacheFormat):
        return formats.layer(layer)
    return formats, formats


def agreed_formats(
    metadata: PagedAttentionCacheMetaData, quantizer: AnyQuantizer, dtype: DTypeLike
) -> CachePages:
    """Return the formats asked for.

    Raises:
        ValueError: the metadata's pages were counted for another format, or another dtype.
    """
    formats, dtype = cache_pages(quantizer), logical_dtype(dtype)
    check_layers(formats, metadata.num_hidden_layers)
    if metadata.quantizer is not None and metadata.quantizer != formats:
        raise ValueError(
            f"quantizer must be the one the metadata was made for, {metadata.quantizer}, but came as "
            f"{formats}; give both the same, so that the bytes counted are the bytes allocated. "
            f"None asks for plain arrays."
        )
    if metadata.dtype is not None and metadata.dtype != dtype.name:
        raise ValueError(
            f"dtype must be the one the metadata was made for, {metadata.dtype}, but came as {dtype.name}; "
            f"give both the same, so that the bytes counted are the bytes allocated."
        )
    return formats


def _utilization(value: Any) -> float:
    if not isinstance(value, int | float | np.floating) or not 0 < value < 1:
        raise ValueError(
            f"hbm_utilization must lie between 0 and 1, both excluded, but came as {value}; "
            f"0.9 takes nine tenths of a device's memory."
        )
    return float(value)


def _indexable(name: str, value: int, advice: str) -> None:
    if value > LARGEST_INDEX:
        raise ValueError(
            f"{name} must be at most {LARGEST_INDEX:,} so that int32 can index it, but came as {value:,}; "
            f"{advice}."
        )
