"""One layer's pools of keys and values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike

from qpaged import pools
from qpaged._arguments import check_type
from qpaged.cache import _pool_calls
from qpaged.cache._config import (
    AnyQuantizer,
    PagedAttentionCacheMetaData,
    agreed_formats,
    check_metadata,
    layer_formats,
    logical_dtype,
)
from qpaged.cache._fresh import PoolFormat, allocate_pages, warn_of_narrow_floats
from qpaged.cache._metadata import PagedAttentionMetadata, check_step
from qpaged.cache._page_changes import PageChanges
from qpaged.cache._placement import Placement, num_groups
from qpaged.cache._scales import set_scales
from qpaged.cache._serializable import Serializable
from qpaged.cache._sharding import Resolver, check_layout
from qpaged.cache._step_tokens import StepTokens
from qpaged.cache._view_checks import (
    check_alike,
    check_pages,
    checked_keys_and_values,
    checked_layer,
    page_indices,
    with_stored_heads,
)
from qpaged.pools import Pages, ValuesInKeys


@dataclass(frozen=True)
class PagedAttentionCacheView(Serializable):
    """One layer's pools. A pytree whose leaves are the pools' arrays; methods return new views.

    Writes update in place if the function that writes is jitted, and the old view donated to it.

    Attributes:
        metadata: static; the configuration of the cache, with the head sizes of this layer. The ``metadata``
            of methods is that of a step.
        layer_index: the layer's number, counted from 0. A Python int is static; an int32 scalar is a leaf, as
            :meth:`PagedAttentionCache.with_layer_leaves` makes it. None for all the layers of a flat cache,
            of which :meth:`PagedAttentionCache.layer` gives one.
        key_pages: (kv_heads, pages, page_size, head_dim); a plain or implicit array, or another kind of pool.
        value_pages: likewise, of the values' head_dim; where they lie in the keys, a
            :class:`qpaged.pools.ValuesInKeys`.
        placement: static; how the pools lie over a mesh, by which calls divide themselves. None on one
            device, and where the compiler is to divide them.
    """

    later_fields: ClassVar[frozenset[str]] = frozenset({"placement"})

    metadata: PagedAttentionCacheMetaData
    layer_index: int | jax.Array | None
    key_pages: Pages
    value_pages: Pages
    placement: Placement | None = None

    def __repr__(self) -> str:
        keys, values = pools.describe(self.key_pages), pools.describe(self.value_pages)
        described = f"keys and values {keys}" if keys == values else f"keys {keys}, values {values}"
        layer = "all layers" if self.layer_index is None else f"layer {self.layer_index}"
        return f"PagedAttentionCacheView({layer}, {described})"

    @classmethod
    def init(
        cls,
        mesh: Mesh | None,
        dtype: DTypeLike,
        metadata: PagedAttentionCacheMetaData,
        layer_index: int,
        partition_manager: Resolver | None = None,
        quantizer: AnyQuantizer = None,
    ) -> Self:
        """Return a view of fresh pools, which read as zeros.

        Args:
            mesh: the devices; None for the default device.
            dtype: the logical dtype of keys and values.
            metadata: the configuration of the cache.
            layer_index: the layer, counted from 0.
            partition_manager: anything with ``resolve(axes, mode=, shape=) -> PartitionSpec``; None for
                the default rules of :class:`PartitionManager`.
            quantizer: the format; see :meth:`PagedAttentionCacheMetaData.create`.

        Raises:
            TypeError: the dtype is not a floating-point one, or an argument is of another kind.
            ValueError: there is no such layer, or the metadata was made for another format or dtype.
        """
        view = cls.fresh(mesh, dtype, metadata, layer_index, partition_manager, quantizer)
        warn_of_narrow_floats(view.key_pages, view.value_pages)
        return view

    @classmethod
    def fresh(
        cls,
        mesh: Mesh | None,
        dtype: DTypeLike,
        metadata: PagedAttentionCacheMetaData,
        layer_index: int,
        partition_manager: Resolver | None,
        quantizer: AnyQuantizer,
    ) -> Self:
        """Return what :meth:`init` does, without its warning, which a cache of many layers gives once."""
        check_metadata(metadata, "arguments go in the order mesh, dtype, metadata, layer_index")
        check_layout(mesh, partition_manager)
        layer_index = checked_layer(layer_index, metadata.num_hidden_layers)
        formats = agreed_formats(metadata, quantizer, dtype)
        metadata = metadata.of_layer(layer_index)
        key_format, value_format = layer_formats(formats, layer_index)
        dtype, sequences = logical_dtype(dtype), metadata.sequences
        keys = allocate_pages(key_format, metadata.pool_shape, dtype, sequences, mesh, partition_manager)
        shape = metadata.value_pool_shape
        if metadata.values_in_keys:
            values: Pages = ValuesInKeys(shape, dtype)
        else:
            values = allocate_pages(value_format, shape, dtype, sequences, mesh, partition_manager)
        placement = Placement.of(mesh, partition_manager, metadata.pool_shape)
        return cls(metadata, layer_index, keys, values, placement)

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries and lists; arrays stay arrays.

        Raises:
            ValueError: the view is of several layers, stacked for a scan or flat.
        """
        layer = self.layer_index
        if layer is None:
            raise ValueError(
                "a record is of one layer, but this view is of a flat cache; qpaged.save takes it."
            )
        if np.ndim(layer):
            raise ValueError(
                f"a record is of one layer, but layer_index has shape {np.shape(layer)}, as of stacked "
                f"layers; take them apart first: tree_map(lambda leaf: leaf[i], view)."
            )
        if self.placement is not None:  # whoever reads the record has other devices
            return self.replace(placement=None).to_dict()
        return {**super().to_dict(), "layer_index": int(layer)}

    @classmethod
    def check_record(cls, fields: Mapping[str, Any]) -> None:
        """Raise ValueError for a placement, which no record has."""
        if fields.get("placement") is not None:
            raise ValueError("placement must not be in data, since whoever reads it has other devices.")

    def check_fields(self) -> None:
        """Raise ValueError unless layer and pools are as the metadata says; files are read so."""
        layer = checked_layer(self.layer_index, self.metadata.num_hidden_layers)
        formats: tuple[PoolFormat, PoolFormat] | None = None
        if self.metadata.quantizer is not None:
            formats = layer_formats(self.metadata.quantizer, layer)
        shapes = self.metadata.pool_shape, self.metadata.value_pool_shape
        for index, name in enumerate(("key_pages", "value_pages")):
            pages = getattr(self, name)
            quantizer = pools.format_of(pages) if formats is None else formats[index]
            check_pages(name, pages, quantizer, shapes[index], self.metadata)

    def write_prefill_to_cache(
        self, key: ArrayLike, value: ArrayLike | None, metadata: PagedAttentionMetadata
    ) -> Self:
        """Return the view with a prefill's keys and values written.

        Token i goes to position ``prefill_position[i]``; tokens from ``prefill_length`` on are padding. A
        slot may be written again, as after a rejected draft, but a scale that it shares with its page has
        grown for good: reset the page and write its rows again, or take a format by token.

        Args:
            key: (padded_len, kv_heads, head_dim) floats.
            value: (padded_len, kv_heads, head_dim of the values) floats; None where they lie in the keys.
            metadata: of a prefill, or of a prefill and a decode.

        Raises:
            TypeError, ValueError: floats, shapes or a mode other than these.
        """
        check_step(metadata)
        tokens = metadata.prefill_tokens()
        if tokens is None:
            return self._nothing_to_write("prefill", metadata)
        return self._write(key, value, metadata.steps()[0], "prefill_position")

    def write_decodes_to_cache(
        self, key: ArrayLike, value: ArrayLike | None, metadata: PagedAttentionMetadata
    ) -> Self:
        """Return the view with one token's keys and values written for each sequence of a batch.

        Args:
            key: (batch, kv_heads, head_dim) floats.
            value: (batch, kv_heads, head_dim of the values) floats; None where they lie in the keys.
            metadata: of a decode, or of a prefill and a decode.

        Raises:
            TypeError, ValueError: floats, shapes or a mode other than these.
        """
        check_step(metadata)
        tokens = metadata.decodes_tokens()
        if tokens is None:
            return self._nothing_to_write("decode", metadata)
        return self._write(key, value, StepTokens(*tokens), "decodes_position")

    def write_to_cache(
        self, key: ArrayLike, value: ArrayLike | None, metadata: PagedAttentionMetadata
    ) -> Self:
        """Return the view with the keys and values of all tokens of a step written, whatever its kind.

        Args:
            key: (tokens, kv_heads, head_dim) floats, in the order in which :func:`paged_attention` takes
                queries.
            value: (tokens, kv_heads, head_dim of the values) floats; None where they lie in the keys.
            metadata: of a ragged batch, of a prefill, of a decode, or of the last two.

        Raises:
            TypeError, ValueError: floats or shapes other than these.
        """
        check_step(metadata)
        steps = metadata.steps()
        if not steps:
            return self
        if len(steps) == 1:
            mode = "decodes" if metadata.is_decode_mode() else "prefill"
            name = "ragged_position" if metadata.is_ragged_mode() else f"{mode}_position"
            return self._write(key, value, steps[0], name)
        tokens = sum(len(step.position) for step in steps)
        keys, values = checked_keys_and_values(key, value, tokens, here(self).metadata, "query")
        view, start = self, 0
        for step in steps:
            rows = slice(start, start + len(step.position))
            of_step = None if values is None else values[rows]
            view = view._write(keys[rows], of_step, step, "query")
            start = rows.stop
        return view

    def reset_pages(self, pages: ArrayLike) -> Self:
        """Return the view with these pages fresh: codes and scales cleared, in O(n).

        Reset a page when it is given to a new sequence: writes never do. Pages out of range are dropped.

        Args:
            pages: (n,) integers, or one.

        Raises:
            TypeError: the pages are not integers.
            ValueError: they have more than one axis.
        """
        return self._change(pools.clear_pages, page_indices("pages", pages))

    def copy_pages(self, source: ArrayLike, target: ArrayLike) -> Self:
        """Return the view with pages ``source`` copied to pages ``target``, codes and scales bit for bit.

        O(n), and in place where the view is donated. All sources are read before any target is written,
        so pages may be swapped. A pair with a page out of range is dropped; of several pairs with one target
        the last counts.

        Args:
            source: (n,) integers, or one.
            target: (n,) integers, or one.

        Raises:
            TypeError: the pages are not integers.
            ValueError: there are not as many targets as sources, or they have more than one axis.
        """
        sources, targets = page_indices("source", source), page_indices("target", target)
        if len(sources) != len(targets):
            raise ValueError(
                f"source and target must have one page each for every copy, but came with {len(sources)} and "
                f"{len(targets)} pages."
            )
        return self._change(pools.copy_pages, sources, targets)

    def pack_pages(self, pages: ArrayLike, lengths: ArrayLike) -> Self:
        """Return the view with these pages quantized now, if they are exact, from their first slots.

        For pages that are parked or shared: an exact page takes the place of a sequence that decodes. Pages
        that are packed already, out of range, or of a format without exact pages stay as they are.

        Args:
            pages: (n,) integers, or one.
            lengths: (n,) integers, or one: how many slots of each page were written. The others become
                zeros, since rows of rejected drafts may lie there.

        Raises:
            TypeError: pages or lengths are not integers.
            ValueError: there are not as many lengths as pages, or they have more than one axis.
        """
        indices, counts = page_indices("pages", pages), page_indices("lengths", lengths)
        if len(indices) != len(counts):
            raise ValueError(
                f"pages and lengths must be as many, but came with {len(indices)} and {len(counts)}; give "
                f"the length of each page."
            )
        return self._change(pools.pack_pages, indices, counts)

    def apply_changes(self, changes: PageChanges) -> Self:
        """Return the view after what a :class:`PageAllocator` asks for: copies, then packs, then resets.

        O(n), and in place where the view is donated. Exact pages that are packed make room for the copies
        first, if they are not what is copied.

        Args:
            changes: of :meth:`PageAllocator.take_changes`.

        Raises:
            TypeError: of another kind.
        """
        advice = "give what take_changes of a PageAllocator returned"
        check_type("changes", changes, PageChanges, "a qpaged.PageChanges", advice)
        if not len(changes.reset):
            return self
        view, lengths = self, np.full(len(changes.pack), self.metadata.page_size, np.int32)
        if pools.has_exact_pages(self.key_pages, self.value_pages):
            pack, source = (
                part.reshape(num_groups(self.placement), -1) for part in (changes.pack, changes.source)
            )
            is_source = (pack[:, :, None] == source[:, None]).any(axis=2).reshape(-1)
            others = jnp.where(is_source, self.metadata.num_pages_per_layer, changes.pack)
            view = view.pack_pages(others, lengths)
        view = view.copy_pages(changes.source, changes.target)
        return view.pack_pages(changes.pack, lengths).reset_pages(changes.reset)

    def take_pages(self, pages: ArrayLike, sequences: int = 1) -> Self:
        """Return a view of these pages alone, numbered from 0: codes, scales and exact rows, bit for bit.

        To swap sequences out (``jax.device_get`` brings a view to the host), to send them to another cache,
        or to keep them. :meth:`put_pages` puts them back, in this cache or in one like it. Fill up ``pages``
        to a few sizes with ``num_pages_per_layer``: what stands for these entries is of no use.

        Args:
            pages: (n,) integers, or one.
            sequences: how many sequences the pages are of. A format with exact pages has room for theirs;
                those of more are packed.

        Raises:
            TypeError: the pages are not integers, or of a kind that cannot be taken out of their pool.
            ValueError: they have more than one axis, or there is no page or no sequence.
        """
        indices, config = page_indices("pages", pages), self.metadata
        if not len(indices):
            raise ValueError("pages must name at least one page, but are none; give those of a sequence.")
        if sequences < 1:
            raise ValueError(f"sequences must be at least 1, but came as {sequences}.")
        placement = self.placement
        of_group = len(indices) // num_groups(placement)
        return self.replace(
            metadata=config.replace(num_pages_per_layer=of_group, batch_size=sequences),
            key_pages=_pool_calls.take(self.key_pages, placement, indices, sequences),
            value_pages=_pool_calls.take(self.value_pages, placement, indices, sequences),
            placement=placement and placement.without_context,
        )

    def put_pages(self, pages: ArrayLike, taken: "PagedAttentionCacheView") -> Self:
        """Return the view with pages that :meth:`take_pages` took put at ``pages``, bit for bit.

        O(n), and in place where the view is donated. Pages out of range are dropped, and of several with one
        number the last counts. Exact pages stay exact where there is room for them, and are packed where
        there is none. Static scales stay those of this view: give both views the same.

        Args:
            pages: (n,) integers, or one: where each page of ``taken`` goes.
            taken: of a cache with the same format, dtype, page size, KV heads and head size. Its arrays may
                be NumPy's.

        Raises:
            TypeError: the pages are not integers, or of a kind that cannot be put into a pool.
            ValueError: there are not as many as ``taken`` has, or it is of another format or size.
        """
        advice = "give what take_pages of a view returned"
        check_type("taken", taken, PagedAttentionCacheView, "a qpaged.PagedAttentionCacheView", advice)
        indices = page_indices("pages", pages)
        count = taken.metadata.num_pages_per_layer * num_groups(self.placement)
        if len(indices) != count:
            raise ValueError(
                f"pages must be as many as were taken, {count}, but came as {len(indices)}; fill them up "
                f"with num_pages_per_layer, which is no page."
            )
        keys, values = jax.tree_util.tree_map(jnp.asarray, (taken.key_pages, taken.value_pages))
        kv_heads = self.metadata.num_kv_heads
        if taken.metadata.num_kv_heads == kv_heads:
            keys = with_stored_heads(keys, self.key_pages, kv_heads)
            values = with_stored_heads(values, self.value_pages, kv_heads)
        for name, own, others in (("keys", self.key_pages, keys), ("values", self.value_pages, values)):
            check_alike(name, own, others)
        put, placement = _pool_calls.put, self.placement
        return self.replace(
            key_pages=_pool_calls.apply(put, self.key_pages, placement, indices, keys),
            value_pages=_pool_calls.apply(put, self.value_pages, placement, indices, values),
        )

    def with_scales(self, key: ArrayLike | None = None, value: ArrayLike | None = None) -> Self:
        """Return the view with static scales, of a format that has them, as ``fp8_e4m3:tensor``.

        Give them before anything is written: codes stay as they are, and stand for other values then. Fresh
        pages have scales of 1. Resets, copies and writes keep scales.

        Args:
            key: one number, or (kv_heads,) where each head has its own; None leaves keys as they are.
            value: likewise for values.

        Raises:
            TypeError: scales that are no numbers.
            ValueError: pages without static scales, another shape, or scales that are not positive and
                finite.
        """
        return self.replace(
            key_pages=set_scales("key", self.key_pages, key),
            value_pages=set_scales("value", self.value_pages, value),
        )

    def concatenate_to_cache(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise NotImplementedError: pages are written by the methods above.

        It exists because caches of contiguous arrays, whose interface this is, have it.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "concatenate_to_cache does not apply to pages; use write_prefill_to_cache, "
            "write_decodes_to_cache or write_to_cache."
        )

    def _change(self, change: Callable[..., Pages], *indices: jax.Array) -> Self:
        """Return the view with both pools changed; pages (n,) are those of one group after the other."""
        return self.replace(
            key_pages=_pool_calls.apply(change, self.key_pages, self.placement, *indices),
            value_pages=_pool_calls.apply(change, self.value_pages, self.placement, *indices),
        )

    def _nothing_to_write(self, mode: str, metadata: PagedAttentionMetadata) -> Self:
        """Return the view unchanged for a placeholder; raise ValueError for metadata of another mode."""
        if not metadata.steps():
            return self
        other = "a decode" if mode == "prefill" else "a prefill"
        if metadata.is_ragged_mode():
            other = "a ragged batch"
        raise ValueError(
            f"metadata must be that of a {mode} (PagedAttentionMetadata.{mode}) for this write, but got that "
            f"of {other}; write_to_cache takes any."
        )

    def _write(
        self,
        key: ArrayLike,  # [tokens, kv_heads, head_dim]
        value: ArrayLike | None,  # [tokens, kv_heads, head_dim of values]
        step: StepTokens,
        position_name: str,
    ) -> Self:
        """Return the view with a row written for each token; ``position_name`` is for messages."""
        config = here(self).metadata
        keys, values = checked_keys_and_values(key, value, len(step.position), config, position_name)
        pair = _pool_calls.PoolPair(self.key_pages, self.value_pages)
        pair = _pool_calls.write(pair, self.placement, step, _pool_calls.Rows(keys, values))
        return self.replace(key_pages=pair.keys, value_pages=pair.values)


def here(view: PagedAttentionCacheView) -> PagedAttentionCacheView:
    """Return a view whose metadata has the heads that its pools have, as within a ``shard_map``.

    Where calls divide themselves, the heads are those of the model. Where devices share the pages of a group,
    the pages are those of this one.
    """
    config, placement = view.metadata, view.placement
    kv_heads, pages, *_ = view.key_pages.shape
    if placement is not None and placement.open_heads:
        kv_heads = config.num_kv_heads
    if placement is not None and (placement.open_groups or placement.open_context):
        pages = config.num_pages_per_layer
    if (kv_heads, pages) == (config.num_kv_heads, config.num_pages_per_layer):
        return view
    return view.replace(metadata=config.replace(num_kv_heads=kv_heads, num_pages_per_layer=pages))


def _flatten_with_keys(view: PagedAttentionCacheView) -> tuple[Any, Any]:
    children, aux = _flatten(view)
    return tuple(zip(CHILDREN, children, strict=True)), aux


def _flatten(view: PagedAttentionCacheView) -> tuple[Any, Any]:
    is_static = isinstance(view.layer_index, int)
    static = view.metadata, view.layer_index if is_static else None, view.placement
    return (view.key_pages, view.value_pages, None if is_static else view.layer_index), static


def _unflatten(aux: Any, children: Any) -> PagedAttentionCacheView:
    metadata, layer_index, placement = aux
    key_pages, value_pages, layer_leaf = children
    layer_index = layer_leaf if layer_index is None else layer_index
    return PagedAttentionCacheView(metadata, layer_index, key_pages, value_pages, placement)


CHILDREN = tuple(map(jax.tree_util.GetAttrKey, ("key_pages", "value_pages", "layer_index")))
jax.tree_util.register_pytree_with_keys(PagedAttentionCacheView, _flatten_with_keys, _unflatten, _flatten)
