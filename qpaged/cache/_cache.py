"""The cache of a whole model."""

from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from qpaged import pools
from qpaged._arguments import check_type
from qpaged.cache._config import AnyQuantizer, PagedAttentionCacheMetaData, check_metadata
from qpaged.cache._flat import flat_view
from qpaged.cache._fresh import warn_of_narrow_floats
from qpaged.cache._head_sizes import HeadSizes
from qpaged.cache._page_changes import PageChanges
from qpaged.cache._scales import check_scales, scales_of_layer
from qpaged.cache._serializable import Serializable
from qpaged.cache._sharding import Resolver
from qpaged.cache._view import PagedAttentionCacheView
from qpaged.cache._view_checks import checked_layer
from qpaged.formats import CacheScales


@dataclass(frozen=True)
class PagedAttentionCache(Serializable):
    """The pages of all layers: a pytree whose leaves are the pools' arrays.

    Attributes:
        views: one view for each layer; in a flat cache one of all layers, of which :meth:`layer` gives each.
    """

    views: list[PagedAttentionCacheView]

    def __post_init__(self) -> None:
        if isinstance(self.views, list | tuple) and not self.views:  # functions of trees make other things
            raise ValueError("views must be a list with a view for each layer, but is empty; see init_cache.")

    def __repr__(self) -> str:
        """Return a line for the layers of each kind, and the bytes of all."""
        layers_by_kind: dict[str, list[Any]] = {}
        for view in self.views:
            _, _, kind = repr(view.replace(layer_index=0)).partition(", ")
            layers_by_kind.setdefault(kind.removesuffix(")"), []).append(view.layer_index)
        lines = [f"\n    {_name_layers(layers)}: {kind}" for kind, layers in layers_by_kind.items()]
        holds_arrays = all(hasattr(leaf, "dtype") for leaf in jax.tree_util.tree_leaves(self))
        size = f", {self.nbytes:,} bytes" if holds_arrays else ""  # functions of trees put other things there
        number = self.views[0].metadata.num_hidden_layers if self.is_flat else len(self.views)
        return f"PagedAttentionCache({number} layers{size}{''.join(lines)})"

    @classmethod
    def init_cache(
        cls,
        mesh: Mesh | None,
        dtype: DTypeLike,
        metadata: PagedAttentionCacheMetaData,
        partition_manager: Resolver | None = None,
        quantizer: AnyQuantizer = None,
        *,
        flat: bool = False,
    ) -> Self:
        """Return fresh pools for every layer.

        Args are those of :meth:`PagedAttentionCacheView.init`, and:
            flat: put the layers in one pool, for a scan over layers that carries the cache: all of one format
                and of the same heads. See :meth:`layer`.

        Raises:
            TypeError: an argument of another kind.
            ValueError: the metadata was made for another format or dtype; or layers that differ, or have
                static scales of their own, cannot lie in one pool.
        """
        check_metadata(metadata, "arguments go in the order mesh, dtype, metadata")
        if flat:
            return cls([flat_view(mesh, dtype, metadata, partition_manager, quantizer)])
        views = []
        for layer in range(metadata.num_hidden_layers):
            views.append(
                PagedAttentionCacheView.fresh(mesh, dtype, metadata, layer, partition_manager, quantizer)
            )
        all_pages = [pages for view in views for pages in (view.key_pages, view.value_pages)]
        warn_of_narrow_floats(*all_pages)
        return cls(views)

    @property
    def metadata(self) -> PagedAttentionCacheMetaData:
        """The configuration of all layers, from those of the views."""
        first = self.views[0].metadata
        configs = {layer: view.metadata for layer, view in enumerate(self.views)}
        others = {
            layer: HeadSizes(config.num_kv_heads, config.kv_head_dim_size, config.value_head_dim_size)
            for layer, config in configs.items()
            if config != first
        }
        return first.replace(layer_sizes=others) if others else first

    def check_fields(self) -> None:
        """Raise ValueError unless there is a view for every layer, in order, and all are of one cache."""
        views = self.views
        if (
            not isinstance(views, list)
            or not all(isinstance(v, PagedAttentionCacheView) for v in views)
            or not views
        ):
            raise ValueError(f"views must be a list with a view for each layer, but got {views!r:.80}.")
        layers, metadata = [view.layer_index for view in views], self.metadata
        if layers == [None]:
            return
        if layers != list(range(metadata.num_hidden_layers)):
            raise ValueError(f"views must be those of all layers in order, but got layers {layers}.")
        if any(view.metadata != metadata.of_layer(layer) for layer, view in enumerate(views)):
            raise ValueError("views must have the same metadata, but those of some layers differ.")

    @property
    def is_flat(self) -> bool:
        """True if the layers lie in one pool."""
        return self.views[0].layer_index is None

    def layer(self, index: ArrayLike) -> PagedAttentionCacheView:
        """Return the view of a layer.

            def block(carry, layer_and_weights):
                cache, x = carry
                layer, weights = layer_and_weights
                ...
                view = cache.layer(layer).write_to_cache(key, value, step)
                attended = qpaged.paged_attention(query, view, step)
                ...
                return (cache.with_layer(view), x), None

            (cache, x), _ = jax.lax.scan(block, (cache, x), (jnp.arange(layers), weights))

        Args:
            index: counted from 0. In a flat cache it may be traced, and a view out of range has no pages.

        Raises:
            ValueError: there is no such layer; or it is traced, and the layers have pools of their own.
        """
        if not self.is_flat:
            return self.views[self._number(index)]
        view = self.views[0]
        if not isinstance(index, jax.core.Tracer):
            index = checked_layer(index, view.metadata.num_hidden_layers)
        layer = jnp.asarray(index, jnp.int32)
        return view.replace(
            layer_index=layer,
            key_pages=pools.at_layer(view.key_pages, layer),
            value_pages=pools.at_layer(view.value_pages, layer),
        )

    def with_layer(self, view: PagedAttentionCacheView) -> Self:
        """Return the cache with a view of :meth:`layer`, which was changed, in its place.

        Raises:
            ValueError: a view of no layer of this cache.
        """
        advice = "give what cache.layer(i), or a method of it, returned"
        check_type("view", view, PagedAttentionCacheView, "a qpaged.PagedAttentionCacheView", advice)
        if not self.is_flat:
            number = self._number(view.layer_index)
            return self.replace(views=[*self.views[:number], view, *self.views[number + 1 :]])
        own, other = pools.as_flat(self.views[0].key_pages), pools.as_flat(view.key_pages)
        if own is None or other is None or (own.layers, own.shape) != (other.layers, other.shape):
            raise ValueError(f"view must be of a layer of this flat cache, but is a {view}; {advice}.")
        whole = view.replace(
            layer_index=None,
            key_pages=pools.of_all_layers(view.key_pages),
            value_pages=pools.of_all_layers(view.value_pages),
        )
        return self.replace(views=[whole])

    def _number(self, index: ArrayLike | None) -> int:
        """Return the number of a layer of a cache that is not flat."""
        if isinstance(index, jax.core.Tracer):
            raise ValueError(
                "index must be known when the call is traced for layers with pools of their own; make the "
                "cache with init_cache(..., flat=True) to scan over its layers."
            )
        return checked_layer(index, len(self.views))

    def init_empty(self, *args: Any, **kwargs: Any) -> None:
        """Return None: it is not used for pages."""
        return None

    def reset_pages(self, pages: ArrayLike) -> Self:
        """Return the cache with these pages fresh in every layer; see
        :meth:`PagedAttentionCacheView.reset_pages`."""
        return self.replace(views=[view.reset_pages(pages) for view in self.views])

    def copy_pages(self, source: ArrayLike, target: ArrayLike) -> Self:
        """Copy pages in every layer, as :meth:`PagedAttentionCacheView.copy_pages` does; return the cache."""
        return self.replace(views=[view.copy_pages(source, target) for view in self.views])

    def pack_pages(self, pages: ArrayLike, lengths: ArrayLike) -> Self:
        """Pack exact pages in every layer, as :meth:`PagedAttentionCacheView.pack_pages` does; return the
        cache."""
        return self.replace(views=[view.pack_pages(pages, lengths) for view in self.views])

    def apply_changes(self, changes: PageChanges) -> Self:
        """Change pages in every layer, as :meth:`PagedAttentionCacheView.apply_changes` does; return the
        cache."""
        return self.replace(views=[view.apply_changes(changes) for view in self.views])

    def take_pages(self, pages: ArrayLike, sequences: int = 1) -> Self:
        """Return a cache of these pages alone; see :meth:`PagedAttentionCacheView.take_pages`."""
        return self.replace(views=[view.take_pages(pages, sequences) for view in self.views])

    def put_pages(self, pages: ArrayLike, taken: "PagedAttentionCache") -> Self:
        """Return the cache with pages that :meth:`take_pages` took put at ``pages`` in every layer; see
        :meth:`PagedAttentionCacheView.put_pages`.

        Raises:
            ValueError: ``taken`` has another number of layers.
        """
        advice = "give what take_pages of a cache returned"
        check_type("taken", taken, PagedAttentionCache, "a qpaged.PagedAttentionCache", advice)
        if len(taken.views) != len(self.views):
            raise ValueError(
                f"taken must have the {len(self.views)} layers of this cache, but has {len(taken.views)}; "
                f"take pages from a cache of the same model."
            )
        views = zip(self.views, taken.views, strict=True)
        return self.replace(views=[view.put_pages(pages, of_layer) for view, of_layer in views])

    @property
    def has_static_scales(self) -> bool:
        """True if any pool has static scales."""
        all_pages = [pages for view in self.views for pages in (view.key_pages, view.value_pages)]
        return any(pools.static_scales(pages) is not None for pages in all_pages)

    def with_scales(self, scales: CacheScales) -> Self:
        """Return the cache with static scales in every pool that has them; see
        :meth:`PagedAttentionCacheView.with_scales`.

        A pool with one scale takes the largest of its heads'; pools without static scales stay as they are.

        Args:
            scales: of every layer; :meth:`qpaged.CacheScales.load` and ``qpaged.models.read_scales`` read
                them.

        Raises:
            TypeError: of another kind.
            ValueError: of another number of layers or KV heads, or chosen for another format; or no pool has
                static scales.
        """
        config = self.metadata
        if config.layer_sizes:
            raise ValueError(
                "scales must be left out for a cache whose layers have different heads, which a CacheScales "
                "does not tell apart; give each view its own with view.with_scales."
            )
        check_scales(scales, config.num_hidden_layers, config.num_kv_heads, self.has_static_scales)
        views = []
        for layer, view in enumerate(self.views):
            views.append(
                view.with_scales(*scales_of_layer(scales, layer, (view.key_pages, view.value_pages)))
            )
        return self.replace(views=views)

    def with_layer_leaves(self) -> Self:
        """Return the cache with the layers' numbers as int32 leaves of their views, beside the pools.

        Views of like layers then have one tree: a jitted function of a view is compiled once for all of them.
        What it returns keeps its layer's number. A flat cache is returned as it is.
        """
        views: list[PagedAttentionCacheView] = []
        if self.is_flat:
            return self
        for view in self.views:
            index = jnp.int32(view.layer_index)
            mesh = pools.mesh_of(view.key_pages)
            if mesh is not None:  # where a program leaves it, so that no second call is compiled anew
                index = jax.device_put(index, NamedSharding(mesh, PartitionSpec()))
            views.append(view.replace(layer_index=index))
        return self.replace(views=views)

    @property
    def nbytes(self) -> int:
        """Bytes of all pools, scales included."""
        return sum(pools.count_bytes(view.key_pages).total for view in self.views) + sum(
            pools.count_bytes(view.value_pages).total for view in self.views
        )


def _name_layers(layers: list[Any]) -> str:
    """Return "layer 2", "layers 0 to 31", or "layers 0, 2, 3": a run of them, or each."""
    if layers == [None]:
        return "all layers in one pool"
    names = list(map(str, layers))  # compared as text: traced and stacked layers have no truth value
    if len(names) == 1:
        return f"layer {names[0]}"
    is_run = names == list(map(str, range(len(names))))
    return f"layers 0 to {names[-1]}" if is_run else f"layers {', '.join(names)}"


jax.tree_util.register_dataclass(PagedAttentionCache, data_fields=["views"], meta_fields=[])
