"""Keys and values in one array, as vLLM's and SGLang's engines for TPUs keep them."""

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from qpaged.arrays import final_targets
from qpaged.arrays._scatter import gather_rows, scatter_rows
from qpaged.pools._pool import Pages, Pool, PoolBytes, SlotMapping, bytes_of

KEYS, VALUES = 0, 1
PAGE = (0,)
PAGE_AND_SLOT = (0, 1)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["pages", "scales"],
    meta_fields=["kv_heads", "head_dim", "dtype", "side"],
)
@dataclass(frozen=True)
class InterleavedPages(Pool):
    """Keys and values of a layer in turns along the heads: those of head h at 2 h and 2 h + 1.

    A slot's heads fill 32-bit words together: ``packing`` of them go to one, 2 of bfloat16 and 4 of 8 bits.
    Heads are filled up to whole words, and head_dim to a multiple of 128.

    Attributes:
        pages: (pages, page_size, ceil(2 * kv_heads / packing), packing, stored head_dim); floats, or int8.
        scales: (2,) float32, the factor of all keys and that of all values; None for plain floats.
        kv_heads: static.
        head_dim: static; channels that are used.
        dtype: static; the logical dtype.
        side: static; whether keys are read, 0, or values, 1. Both are written.
    """

    pages: jax.Array
    scales: jax.Array | None
    kv_heads: int
    head_dim: int
    dtype: np.dtype
    side: int = KEYS

    @property
    def shape(self) -> tuple[int, int, int, int]:
        pages, page_size = self.pages.shape[:2]
        return self.kv_heads, pages, page_size, self.head_dim

    @property
    def is_narrow_float(self) -> bool:
        return jnp.issubdtype(self.pages.dtype, jnp.floating) and self.pages.dtype.itemsize < 4

    def values_within(self) -> "InterleavedPages":
        return dataclasses.replace(self, side=VALUES)

    def write_slots(self, mapping: SlotMapping, rows: jax.Array) -> Pages:
        raise TypeError("keys and values in one array are written together; write through a view.")

    def write_both(
        self, mapping: SlotMapping, keys: jax.Array, values: jax.Array | None
    ) -> "InterleavedPages":
        assert values is not None  # which a view checks
        rows = jnp.stack([self._encode(keys, KEYS), self._encode(values, VALUES)], axis=2)
        words, packing, stored_dim = self.pages.shape[2:]
        heads = rows.reshape(len(rows), 2 * self.kv_heads, self.head_dim)
        missing = words * packing - heads.shape[1], stored_dim - self.head_dim
        heads = jnp.pad(heads, ((0, 0), *((0, count) for count in missing)))
        index = jnp.stack([mapping.page, mapping.slot], axis=-1)
        slots = heads.reshape(-1, words, packing, stored_dim)
        return self._with(scatter_rows(self.pages, PAGE_AND_SLOT, index, slots))

    def gather_slots(self, indices: jax.Array) -> jax.Array:
        page_size, words, packing, stored_dim = self.pages.shape[1:]
        slot = jnp.tile(jnp.arange(page_size, dtype=jnp.int32), len(indices))
        index = jnp.stack([jnp.repeat(indices, page_size), slot], axis=-1)
        rows = gather_rows(self.pages, PAGE_AND_SLOT, index).astype(jnp.float32)
        # XLA on TPUs lays the whole pool out anew for a slice of every other head, but not for a sum.
        heads = rows.reshape(-1, words * packing, stored_dim)
        is_own = jnp.arange(words * packing, dtype=jnp.int32) % 2 == self.side
        pairs = jnp.where(is_own[:, None], heads, 0).reshape(len(rows), -1, 2, stored_dim)
        codes = pairs.sum(axis=2)[:, : self.kv_heads, : self.head_dim].swapaxes(0, 1)
        return (codes if self.scales is None else codes * self.scales[self.side]).astype(self.dtype)

    def clear_pages(self, indices: jax.Array) -> "InterleavedPages":
        zeros = jnp.zeros((len(indices), *self.pages.shape[1:]), self.pages.dtype)
        return self._with(scatter_rows(self.pages, PAGE, indices[:, None], zeros))

    def copy_pages(self, source: jax.Array, target: jax.Array) -> "InterleavedPages":
        target = final_targets(source, target, len(self.pages))
        rows = gather_rows(self.pages, PAGE, source[:, None])
        return self._with(scatter_rows(self.pages, PAGE, target[:, None], rows))

    def take_pages(self, indices: jax.Array, sequences: int) -> "InterleavedPages":
        return self._with(gather_rows(self.pages, PAGE, indices[:, None]))

    def put_pages(self, taken: "InterleavedPages", target: jax.Array) -> "InterleavedPages":
        target = final_targets(jnp.arange(len(target)), target, len(self.pages), len(target))
        return self._with(scatter_rows(self.pages, PAGE, target[:, None], taken.pages))

    def count_bytes(self) -> PoolBytes:
        return PoolBytes(codes=bytes_of(self.pages), scales=bytes_of(self.scales))

    def _with(self, pages: jax.Array) -> "InterleavedPages":
        return dataclasses.replace(self, pages=pages)

    def _encode(self, rows: jax.Array, side: int) -> jax.Array:
        """Return rows as they are stored: rounded, and saturated where they have scales."""
        stored = self.pages.dtype
        if self.scales is None:
            return rows.astype(stored)
        scaled = rows.astype(jnp.float32) / self.scales[side]
        if jnp.issubdtype(stored, jnp.integer):
            largest = float(jnp.iinfo(stored).max)
            return jnp.clip(jnp.round(jnp.nan_to_num(scaled)), -largest, largest).astype(stored)
        largest = float(jnp.finfo(stored).max)
        return jnp.clip(scaled, -largest, largest).astype(stored)
