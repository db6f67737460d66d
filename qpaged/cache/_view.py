"""One layer's pools of keys and values."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qpaged._compat import automatic, explicit_sharding
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
        view = cls.fresh(mesh, dtype, metadata, layer_index, partition_manager, quantizer)
        warn_of_narrow_floats(view.key_pages, view.value_pages)
        return view

    @classmethod
    def fresh(cls, mesh, dtype, metadata, layer_index, partition_manager, quantizer) -> Self:
        """:meth:`init` without its warning."""
        if not 0 <= layer_index < metadata.num_hidden_layers:
            raise ValueError(
                f"layer_index must be one of the {metadata.num_hidden_layers} layers, counted from 0, "
                f"but came as {layer_index}."
            )
        formats = layer_formats(agreed_format(metadata, quantizer, dtype), layer_index)
        shape, dtype = metadata.pool_shape, float_dtype("dtype", dtype)
        keys, values = (allocate_pages(part, shape, dtype, mesh, partition_manager) for part in formats)
        return cls(metadata, layer_index, keys, values)

    def check_record(self) -> None:
        """ValueError unless the pools have the shape that the metadata says."""
        for name in ("key_pages", "value_pages"):
            shape = tuple(getattr(self, name).shape)
            if shape != self.metadata.pool_shape:
                raise ValueError(
                    f"{name} must have the metadata's shape {self.metadata.pool_shape}, but holds {shape}; "
                    f"the data was not written whole."
                )

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
        tokens = metadata.prefill_tokens()
        if tokens is None:
            return self._nothing_to_write("write_prefill_to_cache", metadata)
        return self._write(key, value, *tokens, "prefill_position")

    def write_decodes_to_cache(self, key: Any, value: Any, metadata: PagedAttentionMetadata) -> Self:
        """The view with one token's keys and values written for each row.

        Args:
            key: (batch, kv_heads, head_dim) floats.
            value: (batch, kv_heads, head_dim) floats.
            metadata: of a decode, or of a prefill and a decode.

        Raises:
            TypeError, ValueError: floats, shapes or a mode other than these.
        """
        tokens = metadata.decodes_tokens()
        if tokens is None:
            return self._nothing_to_write("write_decodes_to_cache", metadata)
        return self._write(key, value, *tokens, "decodes_position")

    def reset_pages(self, pages: Any) -> Self:
        """The view with these pages fresh: codes and scales cleared, in O(pages); out of range is dropped.

        Args:
            pages: (n,) integers. Whoever gives a page to a new sequence resets it; no write ever does.
        """
        pages = jnp.atleast_1d(as_indices("pages", pages))
        if pages.ndim != 1:
            raise ValueError(f"pages must have shape (n,), but came with shape {pages.shape}.")
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
    """``rows`` (tokens, kv_heads, head_dim) put at (page, slot)."""
    return _updated(pool, lambda pool, rows, *places: write_rows(pool, (1, 2), places, rows), rows, *places)


def _reset(pool: Any, pages: jax.Array) -> Any:
    if isinstance(pool, QuantizedArray):
        return _updated(pool, _cleared, pages)
    zeros = jnp.zeros((len(pages), pool.shape[0], *pool.shape[2:]), pool.dtype)
    return _updated(pool, lambda pool, zeros, pages: write_rows(pool, (1,), (pages,), zeros), zeros, pages)


def _cleared(pool: QuantizedArray, pages: jax.Array) -> QuantizedArray:
    """The pool with zeros for every part of these pages: what a page is before anything is written to it."""

    def cleared(part):
        return write_rows(
            part, (1,), (pages,), jnp.zeros((len(pages), part.shape[0], *part.shape[2:]), part.dtype)
        )

    return jax.tree_util.tree_map(cleared, pool)


def _updated(pool: Any, update: Callable[..., Any], *args: Any) -> Any:
    """``update(pool, *args)``, placed as the pool is; foreign implicit pages do it by their own handlers."""
    if not isinstance(pool, ImplicitArray) or isinstance(pool, QuantizedArray):
        if any(explicit_sharding(leaf) is None for leaf in jax.tree_util.tree_leaves(pool)):
            return update(pool, *args)
        return automatic(update, jax.tree_util.tree_map(explicit_sharding, pool))(pool, *args)
    updated = use_implicit_args(lambda pool: update(pool, *args))(pool)
    if type(updated) is not type(pool):
        raise TypeError(
            f"pages of type {type(pool).__name__} must stay what they are when written to, but scatter made "
            f"them a plain array; give the class a handler of the primitive 'scatter'."
        )
    return updated


def _check_rows(name: str, array: Any, shape: tuple[int, ...], rows: str) -> None:
    array = jnp.asarray(array)
    if tuple(array.shape) != shape:
        raise ValueError(
            f"{name} must have shape (len({rows}), kv_heads, head_dim) = {shape}, but came with shape "
            f"{tuple(array.shape)}."
        )
    float_dtype(name, array.dtype)
