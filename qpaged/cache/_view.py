"""One layer's pools of keys and values."""

from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qpaged.arrays import QuantizedArray, float_dtype, write_rows
from qpaged.cache._config import PagedAttentionCacheMetaData, agreed_format, layer_formats
from qpaged.cache._indices import as_indices, slots_of
from qpaged.cache._metadata import PagedAttentionMetadata
from qpaged.cache._pages import allocate_pages, warn_of_narrow_floats
from qpaged.cache._record import Record
from qpaged.implicit import ImplicitArray, use_implicit_args


@dataclass(frozen=True)
class PagedAttentionCacheView(Record):
    """The pages of one layer. A pytree whose leaves are the pools' arrays; methods return new views.

    Jit what writes, and donate the old view, to update in place.

    Attributes:
        metadata: static configuration of the cache.
        layer_index: static; the layer this is.
        key_pages: (kv_heads, pages, page_size, head_dim), an array or an implicit array.
        value_pages: likewise.
    """

    metadata: PagedAttentionCacheMetaData
    layer_index: int
    key_pages: Any
    value_pages: Any

    @classmethod
    def init(
        cls,
        mesh: Mesh | None,
        dtype: Any,
        metadata: PagedAttentionCacheMetaData,
        layer_index: int,
        partition_manager: Any = None,
        quantizer: Any = None,
    ) -> Self:
        """Fresh pools, which read as zeros.

        Args:
            mesh: the devices; None for the default device.
            dtype: the logical dtype of keys and values.
            partition_manager: anything with ``resolve(axes, mode=, shape=) -> PartitionSpec``; None for
                the default rules of :class:`PartitionManager`.
            quantizer: the format; see :meth:`PagedAttentionCacheMetaData.create`.

        Raises:
            ValueError: the metadata was made for another format or dtype.
        """
        formats = layer_formats(agreed_format(metadata, quantizer, dtype), layer_index)
        shape, dtype = metadata.pool_shape, float_dtype("dtype", dtype)
        keys, values = (allocate_pages(part, shape, dtype, mesh, partition_manager) for part in formats)
        warn_of_narrow_floats(keys, values)
        return cls(metadata, layer_index, keys, values)

    def write_prefill_to_cache(self, key: Any, value: Any, metadata: PagedAttentionMetadata) -> Self:
        """The view with a prefill's keys and values written.

        Token i goes to position ``prefill_position[i]``; tokens from ``prefill_length`` on are padding.

        Args:
            key: (padded_len, kv_heads, head_dim) floats.
            value: (padded_len, kv_heads, head_dim) floats.
            metadata: of a prefill, or of a prefill and a decode.

        Raises:
            TypeError, ValueError: floats, shapes or a mode other than these.
        """
        if metadata.is_decode_mode():
            return self._nothing_to_write("write_prefill_to_cache", metadata)
        position = as_indices("prefill_position", metadata.prefill_position)
        counts = jnp.arange(len(position)) < as_indices("prefill_length", metadata.prefill_length)
        table = as_indices("prefill_page_table", metadata.prefill_page_table)
        return self._write(key, value, jnp.where(counts, position, -1), table, "prefill_position")

    def write_decodes_to_cache(self, key: Any, value: Any, metadata: PagedAttentionMetadata) -> Self:
        """The view with one token's keys and values written for each row.

        Args:
            key: (batch, kv_heads, head_dim) floats.
            value: (batch, kv_heads, head_dim) floats.
            metadata: of a decode, or of a prefill and a decode.

        Raises:
            TypeError, ValueError: floats, shapes or a mode other than these.
        """
        if metadata.is_prefill_mode():
            return self._nothing_to_write("write_decodes_to_cache", metadata)
        position = as_indices("decodes_position", metadata.decodes_position)
        table = as_indices("decodes_page_table", metadata.decodes_page_table)
        return self._write(key, value, position, table, "decodes_position")

    def reset_pages(self, pages: Any) -> Self:
        """The view with these pages fresh: codes and scales cleared, in O(pages); out of range is dropped.

        Args:
            pages: (n,) integers. Whoever gives a page to a new sequence resets it; no write ever does.
        """
        pages = jnp.atleast_1d(as_indices("pages", pages))
        keys, values = (_reset(pool, pages) for pool in (self.key_pages, self.value_pages))
        return self.replace(key_pages=keys, value_pages=values)

    def concatenate_to_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Not applicable to pages.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "concatenate_to_cache does not apply to pages; use write_prefill_to_cache or "
            "write_decodes_to_cache."
        )

    def _nothing_to_write(self, method: str, metadata: PagedAttentionMetadata) -> Self:
        if metadata.is_prefill_mode() and metadata.is_decode_mode():
            return self
        raise ValueError(
            f"metadata must hold what {method} writes, but holds only the other mode; "
            f"ask is_prefill_mode() and is_decode_mode() first, or build it with .prefill or .decode."
        )

    def _write(self, key: Any, value: Any, position: jax.Array, table: jax.Array, rows: str) -> Self:
        config = self.metadata
        for name, array in (("key", key), ("value", value)):
            _check_rows(name, array, (len(position), config.num_kv_heads, config.kv_head_dim_size), rows)
        places = slots_of(position, table, config.page_size, config.num_pages_per_layer)
        return self.replace(
            key_pages=_write(self.key_pages, places, key), value_pages=_write(self.value_pages, places, value)
        )


jax.tree_util.register_dataclass(
    PagedAttentionCacheView, data_fields=["key_pages", "value_pages"], meta_fields=["metadata", "layer_index"]
)


def _write(pool: Any, places: tuple[jax.Array, jax.Array], rows: Any) -> Any:
    """``rows`` (tokens, kv_heads, head_dim) put at (page, slot); foreign implicit pages write as they can."""
    rows = jnp.asarray(rows)
    if isinstance(pool, ImplicitArray) and not isinstance(pool, QuantizedArray):
        return use_implicit_args(lambda pool: write_rows(pool, (1, 2), places, rows))(pool)
    return write_rows(pool, (1, 2), places, rows)


def _reset(pool: Any, pages: jax.Array) -> Any:
    if isinstance(pool, QuantizedArray):
        shape = (pool.shape[0], len(pages), *pool.shape[2:])
        zeros = pool.quantizer.quantize(jnp.zeros((1, 1, *pool.shape[2:]), pool.dtype))
        fresh = jax.tree_util.tree_map(
            lambda leaf: jnp.broadcast_to(leaf[0], (len(pages), shape[0], *leaf.shape[2:])), zeros
        )
        return write_rows(pool, (1,), (pages,), fresh)
    rows = jnp.zeros((len(pages), pool.shape[0], *pool.shape[2:]), pool.dtype)
    return use_implicit_args(lambda pool: write_rows(pool, (1,), (pages,), rows))(pool)


def _check_rows(name: str, array: Any, shape: tuple[int, ...], rows: str) -> None:
    array = jnp.asarray(array)
    if tuple(array.shape) != shape:
        raise ValueError(
            f"{name} must have shape (len({rows}), kv_heads, head_dim) = {shape}, but came with shape "
            f"{tuple(array.shape)}."
        )
    float_dtype(name, array.dtype)
