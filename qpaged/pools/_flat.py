"""The pools of all layers in one, so that a scan over layers carries it and updates it in place."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from qpaged._promotion import promoting_ranks
from qpaged.pools import _kinds
from qpaged.pools._pool import Pages, Pool, PoolBytes, SlotMapping, Slots


@functools.partial(jax.tree_util.register_dataclass, data_fields=["pages", "layer"], meta_fields=["layers"])
@dataclass(frozen=True)
class FlatPool(Pool):
    """The pages of one layer, or of each, in a pool that holds the layers one after the other.

    Page i of layer l is page l * pages + i of the whole.

    Attributes:
        pages: (kv_heads, layers * pages, page_size, head_dim), a pool of another kind.
        layer: () int32, counted from 0. None for the pages of every layer, which are reset, copied, packed,
            taken and put in each, and neither written nor read.
        layers: static; how many there are.
    """

    pages: Pages
    layer: jax.Array | None
    layers: int

    @property
    def shape(self) -> tuple[int, ...]:
        kv_heads, pages, *slot = self.pages.shape
        return kv_heads, pages // self.layers, *slot

    @property
    def dtype(self) -> jnp.dtype:
        return self.pages.dtype

    def at(self, layer: ArrayLike) -> "FlatPool":
        """Return the pages of a layer; there are none where it is out of range."""
        return dataclasses.replace(self, layer=jnp.asarray(layer, jnp.int32))

    def of_all(self) -> "FlatPool":
        """Return the pages of every layer."""
        return dataclasses.replace(self, layer=None)

    @promoting_ranks
    def place(self, indices: jax.Array) -> jax.Array:
        """Return where pages of a layer are in the whole, one past its last where they are out of range.

        Those are told before the layer's first page is added: "no page" would be the next layer's first.

        Raises:
            ValueError: the pages are those of every layer.
        """
        if self.layer is None:
            raise ValueError(
                "view must be of one layer to be written or read, but is of all of a flat cache; give "
                "cache.layer(i)."
            )
        is_page = (indices >= 0) & (indices < self.shape[1]) & (self.layer >= 0) & (self.layer < self.layers)
        return jnp.where(is_page, self.layer * self.shape[1] + indices, self.pages.shape[1])

    def places(self, indices: jax.Array) -> jax.Array:
        """Return :meth:`place` of pages [n], those of every layer [layers * n] where none is chosen."""
        if self.layer is not None:
            return self.place(indices)
        layers = jnp.arange(self.layers, dtype=jnp.int32)
        return jax.vmap(lambda layer: self.at(layer).place(indices))(layers).reshape(-1)

    def write_slots(self, mapping: SlotMapping, rows: jax.Array) -> "FlatPool":
        table = None if mapping.page_table is None else self.place(mapping.page_table)
        mapping = mapping._replace(page=self.place(mapping.page), page_table=table)
        return self.with_pages(_kinds.write_slots(self.pages, mapping, rows))

    def gather_slots(self, indices: jax.Array) -> Slots:
        return _kinds.gather_slots(self.pages, self.place(indices))

    def clear_pages(self, indices: jax.Array) -> "FlatPool":
        return self.with_pages(_kinds.clear_pages(self.pages, self.places(indices)))

    def copy_pages(self, source: jax.Array, target: jax.Array) -> "FlatPool":
        return self.with_pages(_kinds.copy_pages(self.pages, self.places(source), self.places(target)))

    def pack_pages(self, indices: jax.Array, lengths: jax.Array) -> "FlatPool":
        if self.layer is None:
            lengths = jnp.tile(lengths, self.layers)
        return self.with_pages(_kinds.pack_pages(self.pages, self.places(indices), lengths))

    def take_pages(self, indices: jax.Array, sequences: int) -> Pages:
        """Return pages of a layer as a pool of their own, and those of every layer as a flat one."""
        if self.layer is not None:
            return _kinds.take_pages(self.pages, self.place(indices), sequences)
        return self.with_pages(_kinds.take_pages(self.pages, self.places(indices), sequences * self.layers))

    def put_pages(self, taken: Pages, target: jax.Array) -> "FlatPool":
        taken = taken.pages if isinstance(taken, FlatPool) else taken
        return self.with_pages(_kinds.put_pages(self.pages, taken, self.places(target)))

    def with_pages(self, pages: Pages) -> "FlatPool":
        """Return the pool with another whole."""
        return dataclasses.replace(self, pages=pages)

    def count_bytes(self) -> PoolBytes:
        """Return the bytes of the whole, whichever layer is chosen."""
        return _kinds.count_bytes(self.pages)

    def is_exact(self, indices: jax.Array) -> jax.Array | None:
        return _kinds.is_exact(self.pages, self.place(indices))

    def packed(self) -> "FlatPool":
        return self.with_pages(_kinds.packed(self.pages))

    def with_packed(self, pages: "FlatPool | None") -> "FlatPool":
        whole = None if pages is None else pages.pages
        return self.with_pages(_kinds.with_packed(self.pages, whole))

    def fill_lane_rows(self) -> "FlatPool":
        return self.with_pages(_kinds.fill_lane_rows(self.pages))

    @property
    def format(self) -> Any:
        return _kinds.format_of(self.pages)

    @property
    def static_scales(self) -> jax.Array | None:
        return _kinds.static_scales(self.pages)

    @property
    def has_exact_pages(self) -> bool:
        return _kinds.has_exact_pages(self.pages)

    @property
    def is_narrow_float(self) -> bool:
        return _kinds.is_narrow_float(self.pages)

    @property
    def needs_implicit_args(self) -> bool:
        return _kinds.needs_implicit_args(self.pages)


def at_layer(pages: Pages, layer: ArrayLike) -> Pages:
    """Return the pages of a layer, where those of all lie in one pool."""
    return pages.at(layer) if isinstance(pages, FlatPool) else pages


def of_all_layers(pages: Pages) -> Pages:
    """Return the pages of every layer, where they lie in one pool."""
    return pages.of_all() if isinstance(pages, FlatPool) else pages


def as_flat(pages: Pages) -> FlatPool | None:
    """Return the pages, if they lie in one pool with those of other layers; else None."""
    return pages if isinstance(pages, FlatPool) else None
