"""The cache of a whole model."""

from dataclasses import dataclass
from typing import Any, Self

import jax
from jax.sharding import Mesh

from qpaged.cache._config import PagedAttentionCacheMetaData
from qpaged.cache._pages import warn_of_narrow_floats
from qpaged.cache._record import Record
from qpaged.cache._view import PagedAttentionCacheView


@dataclass(frozen=True)
class PagedAttentionCache(Record):
    """The pages of all layers: a pytree whose leaves are the pools' arrays.

    Attributes:
        views: one view for each layer.
    """

    views: list[PagedAttentionCacheView]

    @classmethod
    def init_cache(
        cls,
        mesh: Mesh | None,
        dtype: Any,
        metadata: PagedAttentionCacheMetaData,
        partition_manager: Any = None,
        quantizer: Any = None,
    ) -> Self:
        """Fresh pools for every layer; the arguments are those of :meth:`PagedAttentionCacheView.init`.

        Raises:
            ValueError: the metadata was made for another format or dtype.
        """
        layers = range(metadata.num_hidden_layers)
        fresh = PagedAttentionCacheView.fresh
        views = [fresh(mesh, dtype, metadata, i, partition_manager, quantizer) for i in layers]
        warn_of_narrow_floats(*(pages for view in views for pages in (view.key_pages, view.value_pages)))
        return cls(views)

    def check_record(self) -> None:
        """ValueError unless there is a view for every layer, in order."""
        layers = [view.layer_index for view in self.views]
        if layers and layers != list(range(self.views[0].metadata.num_hidden_layers)):
            raise ValueError(f"views must be those of all layers in order, but layers {layers} came.")

    def init_empty(self, *args: Any, **kwargs: Any) -> None:
        """Not used for pages; returns None."""
        return None

    def reset_pages(self, pages: Any) -> Self:
        """The cache with these pages fresh in every layer, as :meth:`PagedAttentionCacheView.reset_pages`."""
        return self.replace(views=[view.reset_pages(pages) for view in self.views])

    @property
    def nbytes(self) -> int:
        """Bytes of all pools, scales included."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(self))


jax.tree_util.register_dataclass(PagedAttentionCache, data_fields=["views"], meta_fields=[])
