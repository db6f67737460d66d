"""The static configuration of a cache."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qpaged.arrays import float_dtype
from qpaged.cache._budget import available_bytes, bytes_per_page, default_device
from qpaged.cache._pages import PagesFormat, whole_shards
from qpaged.cache._record import Record
from qpaged.quantizer import CacheFormat, Quantizer

LARGEST_INDEX = 2**31 - 2  # one past the last page must still be an int32

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
class PagedAttentionCacheMetaData(Record):
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
    quantizer: CacheFormat | Callable[[jax.Array], Any] | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name in COUNTS:
            object.__setattr__(self, name, _positive(name, getattr(self, name)))
        object.__setattr__(self, "hbm_utilization", _utilization(self.hbm_utilization))
        if self.quantizer is not None:
            object.__setattr__(self, "quantizer", cache_format(self.quantizer))
            check_layers(self.quantizer, self.num_hidden_layers)
        if self.dtype is not None:
            object.__setattr__(self, "dtype", float_dtype("dtype", self.dtype).name)
        _indexable("num_pages_per_layer", self.num_pages_per_layer)
        _indexable("num_pages_per_sequence * page_size", self.num_pages_per_sequence * self.page_size)

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
        dtype: Any = jnp.bfloat16,
        *,
        quantizer: Any = None,
        memory_bytes: int | None = None,
        partition_manager: Any = None,
    ) -> Self:
        """The configuration whose pools fill ``hbm_utilization`` of a device's memory.

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
            ValueError: as the class, and when not one page fits.
        """
        utilization = _utilization(hbm_utilization)
        layers, page_size = (
            _positive("num_hidden_layers", num_hidden_layers),
            _positive("page_size", page_size),
        )
        shape = (
            _positive("num_kv_heads", num_kv_heads),
            page_size,
            _positive("kv_head_dim_size", kv_head_dim_size),
        )
        dtype = float_dtype("dtype", dtype)
        format = cache_format(quantizer)
        pools = [part for layer in range(layers) for part in layer_formats(format, layer)]
        page_bytes = bytes_per_page(pools, shape, dtype, mesh, partition_manager)
        device = default_device() if mesh is None else mesh.devices.flat[0]
        room = available_bytes(mesh, device, utilization, memory_bytes)
        pages = min(int(room / page_bytes), LARGEST_INDEX)
        pages = whole_shards(pages, shape, mesh, partition_manager)
        if pages < 1:
            raise ValueError(
                f"memory: one page of {layers} layers takes {int(page_bytes):,} bytes on a device, but the "
                f"cache may take {max(room, 0):,}; raise memory_bytes or hbm_utilization, choose a smaller "
                f"page_size or format, or partition the KV heads over more devices."
            )
        sequence_pages = -(-_positive("max_sequences", max_sequences) // page_size)
        return cls(
            batch_size, layers, pages, sequence_pages, max_sequences, page_size, shape[0], shape[2],
            utilization, quantizer=format, dtype=dtype.name,
        )  # fmt: skip

    @property
    def pool_shape(self) -> tuple[int, int, int, int]:
        """The logical shape of a pool: (kv_heads, pages, page_size, head_dim)."""
        return self.num_kv_heads, self.num_pages_per_layer, self.page_size, self.kv_head_dim_size


def cache_format(quantizer: Any) -> "CacheFormat | Callable[[jax.Array], Any]":
    """What ``quantizer=`` stands for: a cache format, or a callable that makes pages."""
    if isinstance(quantizer, type) and issubclass(quantizer, Quantizer):
        raise TypeError(f"quantizer must be an instance, but the class came; give {quantizer.__name__}().")
    if callable(quantizer) and not isinstance(quantizer, Quantizer | CacheFormat):
        return quantizer
    return CacheFormat.of(quantizer)


def check_layers(format: Any, layers: int) -> None:
    """ValueError where a format is given for a layer that is not there."""
    beyond = [index for index, _ in getattr(format, "layers", ()) if index >= layers]
    if beyond:
        raise ValueError(
            f"quantizer must name layers of the model's {layers}, counted from 0, but names {beyond}."
        )


def layer_formats(format: Any, layer: int) -> tuple[PagesFormat, PagesFormat]:
    """The formats of a layer's keys and of its values."""
    return format.layer(layer) if isinstance(format, CacheFormat) else (format, format)


def agreed_format(metadata: PagedAttentionCacheMetaData, quantizer: Any, dtype: Any) -> Any:
    """The format asked for; ValueError if the metadata's pages were counted for another, or another dtype."""
    format, dtype = cache_format(quantizer), float_dtype("dtype", dtype)
    check_layers(format, metadata.num_hidden_layers)
    if metadata.quantizer is not None and metadata.quantizer != format:
        raise ValueError(
            f"quantizer must be the one the metadata was made for, {metadata.quantizer}, but came as "
            f"{format}; give both the same, so that the bytes counted are the bytes allocated. "
            f"None asks for plain arrays."
        )
    if metadata.dtype is not None and metadata.dtype != dtype.name:
        raise ValueError(
            f"dtype must be the one the metadata was made for, {metadata.dtype}, but came as {dtype.name}; "
            f"give both the same, so that the bytes counted are the bytes allocated."
        )
    return format


def _positive(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, but came as {value!r}; give a whole number.") from None
    if number < 1:
        raise ValueError(f"{name} must be positive, but came as {number}; give at least 1.")
    return number


def _utilization(value: Any) -> float:
    if not isinstance(value, int | float | np.floating) or not 0 < value < 1:
        raise ValueError(
            f"hbm_utilization must lie between 0 and 1, both excluded, but came as {value}; "
            f"0.9 takes nine tenths of a device's memory."
        )
    return float(value)


def _indexable(name: str, value: int) -> None:
    if value > LARGEST_INDEX:
        raise ValueError(
            f"{name} must be at most {LARGEST_INDEX:,} so that int32 can index it, but came as {value:,}; "
            f"use fewer or larger pages."
        )
