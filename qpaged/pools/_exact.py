"""Pools with exact pages: the newest pages of each sequence as they were written, the others quantized.

A page is quantized once, from all of its rows, when its sequence leaves it behind: scales see the whole page
before they are chosen, and rows that are written again, as after a rejected draft, never touch a scale.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qpaged import arrays
from qpaged.arrays import QuantizedArray
from qpaged.formats import ExactFormat
from qpaged.pools import _exact_write
from qpaged.pools._pool import Pool, PoolBytes, SlotMapping, bytes_of
from qpaged.pools._quantized import QuantizedPool
from qpaged.pools._sharding import keep_sharding

POOLS = "codes", "rows"  # the fields that are pools themselves


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "rows", "page", "opened", "is_full", "is_sink"],
    meta_fields=["window", "sinks"],
)
@dataclass(frozen=True)
class ExactPages(Pool):
    """A pool of quantized pages, and beside it a small one of exact pages.

    A write to logical page i of a sequence packs what is exact of the pages before the last ``window`` up to
    i, but for the first ``sinks``. Where there are more than there is room for, the full page that has been
    exact for longest is packed early, then open ones, and sinks last.

    Attributes:
        codes: (kv_heads, pages, page_size, head_dim); of a page that is exact, undefined.
        rows: (kv_heads, exact pages, page_size, head_dim); the exact pages, raw.
        page: (exact pages,) int32; which page each is, and ``pages`` if none.
        opened: (exact pages,) int32; ascending in the order in which pages became exact.
        is_full: (exact pages,) bool; True if the last slot was written.
        is_sink: (exact pages,) bool.
        window: static; pages of a sequence that are exact, counted back from the newest.
        sinks: static; first pages of a sequence that are exact.
    """

    codes: QuantizedArray
    rows: QuantizedArray
    page: jax.Array
    opened: jax.Array
    is_full: jax.Array
    is_sink: jax.Array
    window: int
    sinks: int

    @classmethod
    def fresh(cls, codes: QuantizedArray, rows: QuantizedArray, window: int, sinks: int) -> "ExactPages":
        """Return a pool in which no page is exact yet, from fresh pools of codes and of exact rows."""
        capacity, pages = rows.shape[1], codes.shape[1]
        nothing = jnp.zeros(capacity, bool)
        return cls(
            codes,
            rows,
            page=jnp.full(capacity, pages, jnp.int32),
            opened=jnp.zeros(capacity, jnp.int32),
            is_full=nothing,
            is_sink=nothing,
            window=window,
            sinks=sinks,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.codes.dtype

    @property
    def format(self) -> ExactFormat:
        """The format, with as many exact tokens as the pages give room for."""
        page_size = self.shape[-2]  # with layers in front, if they are stacked
        tokens, sinks = (self.window - 1) * page_size + 1, self.sinks * page_size
        return ExactFormat(self.codes.quantizer, tokens, sinks)  # type: ignore[arg-type]  # a cache's is one

    @property
    def capacity(self) -> int:
        """How many pages may be exact at once."""
        return self.rows.shape[1]

    @property
    def static_scales(self) -> jax.Array | None:
        return QuantizedPool(self.codes).static_scales

    def with_static_scales(self, scales: jax.Array) -> "ExactPages":
        return dataclasses.replace(self, codes=QuantizedPool(self.codes).with_static_scales(scales))

    def write_slots(self, mapping: SlotMapping, rows: jax.Array) -> "ExactPages":
        if mapping.logical_page is None or mapping.page_table is None:
            raise TypeError(
                "slot_mapping must have the logical pages and page tables of its tokens for pages with exact "
                "ones, but came without; write through a view, or give a qpaged.pools.SlotMapping with them."
            )
        if not len(rows):
            return self
        return keep_sharding(_exact_write.write, self)(self, mapping, rows)

    def gather_slots(self, indices: jax.Array) -> jax.Array:
        number = self.find(indices)
        is_exact = jnp.repeat(number < self.capacity, self.shape[2])[:, None]  # of slots
        return jnp.where(
            is_exact, _exact_write.gather(self.rows, number), _exact_write.gather(self.codes, indices)
        )

    def gather_exact(self, indices: jax.Array) -> jax.Array:
        """Return what :meth:`gather_slots` does of exact pages, and zeros of others."""
        return _exact_write.gather(self.rows, self.find(indices))

    def clear_pages(self, indices: jax.Array) -> "ExactPages":
        return keep_sharding(_exact_write.clear_pages, self)(self, indices)

    def copy_pages(self, source: jax.Array, target: jax.Array) -> "ExactPages":
        return keep_sharding(_exact_write.copy_pages, self)(self, source, target)

    def take_pages(self, indices: jax.Array, sequences: int) -> "ExactPages":
        capacity = sequences * (self.window + self.sinks)
        take = functools.partial(_exact_write.take_pages, capacity=capacity)
        return keep_sharding(take, self)(self, indices)

    def put_pages(self, taken: "ExactPages", target: jax.Array) -> "ExactPages":
        return keep_sharding(_exact_write.put_pages, self)(self, taken, target)

    def pack_pages(self, indices: jax.Array, lengths: jax.Array) -> "ExactPages":
        return keep_sharding(_exact_write.pack_pages, self)(self, indices, lengths)

    def count_bytes(self) -> PoolBytes:
        codes = bytes_of((self.codes.stored, self.rows))
        return PoolBytes(codes, bytes_of(self) - codes)

    def fill_lane_rows(self) -> "ExactPages":
        codes, rows = arrays.fill_lane_rows(self.codes), arrays.fill_lane_rows(self.rows)
        return dataclasses.replace(self, codes=codes, rows=rows)

    def to_record(self) -> dict[str, Any]:
        record = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        pools = {name: QuantizedPool(record[name]).to_record() for name in POOLS}
        return {"type": "ExactPages", **record, **pools}

    @property
    def has_exact_pages(self) -> bool:
        return True

    def is_exact(self, indices: jax.Array) -> jax.Array:
        return self.find(indices) < self.capacity

    def packed(self) -> QuantizedArray:
        return self.codes

    def with_packed(self, pages: QuantizedArray) -> "ExactPages":
        return dataclasses.replace(self, codes=pages)

    def find(self, pages: jax.Array) -> jax.Array:
        """Return each page's number among the exact ones, capacity if it has none; of any shape."""
        order = jnp.argsort(self.page)
        ascending = self.page[order]
        place = jnp.searchsorted(ascending, pages.reshape(-1)).reshape(pages.shape)
        place = jnp.minimum(place, self.capacity - 1)
        is_there = (ascending[place] == pages) & (pages < self.shape[1])
        return jnp.where(is_there, order[place], self.capacity).astype(jnp.int32)


def from_record(data: Mapping[str, Any]) -> ExactPages:
    """Return the pool that :meth:`ExactPages.to_record` wrote, whose pools and arrays have been read already.

    Raises:
        ValueError: parts are missing, or the exact pages are not each a page of its own.
    """
    names = [field.name for field in dataclasses.fields(ExactPages)]
    missing = [name for name in names if name not in data]
    if missing:
        raise ValueError(f"data holds pages that are not whole: it lacks {', '.join(missing)}.")
    pool = ExactPages(**{name: data[name] for name in names})
    page, num_pages = np.asarray(pool.page), pool.shape[1]
    used = page[page != num_pages]
    if len(set(used.tolist())) != len(used) or ((used < 0) | (used > num_pages)).any():
        raise ValueError(
            f"page must name each of the {num_pages} pages once at most, but came as {page.tolist()}; the "
            f"data was not written whole."
        )
    return pool
