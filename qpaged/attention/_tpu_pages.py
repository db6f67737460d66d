"""How the ``tpu`` backend sees pages: as rows of whole lanes, whose scales come to it in the table's order.

A slot's stored elements fill at least one row of 128 lanes, or several slots share a row: its *folds*. A
query is multiplied with one fold by zeros in the lanes of the others, so that nothing is ever brought from
one lane to another. Codes that share a byte are taken apart one place at a time.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qpaged.arrays import QuantizedArray
from qpaged.arrays._tpu_scales import Order
from qpaged.attention._layout import Layout

LANES = 128
HIGHEST = lax.Precision.HIGHEST


@dataclass(frozen=True)
class Pages(Layout):
    """The static description of a pool, and how the kernel reads it."""

    @property
    def lanes(self) -> int:
        """Stored elements of a row."""
        return max(LANES, self.width)

    @property
    def folds(self) -> int:
        """Slots of a row."""
        return self.lanes // self.width

    @property
    def page_rows(self) -> int:
        return self.page_size // self.folds

    def rows_of(self, pool: Any) -> jax.Array:
        """What a pool stores, as (kv_heads, pages, page_rows, lanes): as it lies, if it is a cache's."""
        stored = pool.folded if isinstance(pool, QuantizedArray) else pool
        return stored.reshape(*stored.shape[:2], self.page_rows, self.lanes)

    def spread(self, x: jax.Array) -> jax.Array:
        """(..., head_dim) as (..., places, lanes), each fold with the same."""
        x = x.reshape(*x.shape[:-1], self.width, self.places).swapaxes(-1, -2)
        return jnp.tile(x, self.folds)

    def gathered(self, x: jax.Array) -> jax.Array:
        """(..., places, lanes) as (..., head_dim): the sum of the folds."""
        x = x.reshape(*x.shape[:-1], self.folds, self.width).sum(axis=-2)
        return x.swapaxes(-1, -2).reshape(*x.shape[:-2], self.head_dim)

    def scales_of(self, pool: Any, table: jax.Array, pages: int) -> jax.Array | None:
        """The stored scales of the pages of ``table`` (sequences, table_pages), any where it holds no page.

        (sequences, blocks, kv_heads, ...) for blocks of so many ``pages``. Where slots of a page share them,
        (pages,) if there is one along the channels and (pages, groups) if there are several; else of each
        slot, fold by fold, (folds · rows,) and (folds · groups, rows).
        """
        if not self.groups:
            return None
        heads, count, _, groups = pool.scales.shape
        blocks = jnp.clip(table, 0, count - 1).reshape(len(table), -1, 1, pages)
        head = jnp.arange(heads, dtype=jnp.int32)[:, None]
        if groups > 1 and not self.per_slot:
            rows = pool.scales.reshape(heads * count, groups)
            return rows.at[head * count + blocks].get(mode="promise_in_bounds")
        folds, rows = (self.folds, self.page_rows) if self.per_slot else (1, 1)
        page = jnp.repeat(blocks[..., None, None, :], rows, axis=-1)
        slot = jnp.arange(pages * rows, dtype=jnp.int32) % rows * folds
        slot = slot + jnp.arange(folds, dtype=jnp.int32)[:, None, None]
        group = jnp.arange(groups, dtype=jnp.int32)[:, None]
        order = Order.of(pool.scales)
        at = order.at(head[..., None, None], page, slot, group)
        found = order.flat(pool.scales).at[at].get(mode="promise_in_bounds")
        shape = found.shape[:3]  # of (sequences, blocks, kv_heads, folds, groups, rows)
        return found.reshape(*shape, -1) if groups == 1 else found.reshape(*shape, folds * groups, -1)

    # Inside the kernel.

    def fold(self, x: jax.Array, fold: int) -> jax.Array:
        """``x`` (rows, lanes) with zeros in the lanes of the other folds."""
        if self.folds == 1:
            return x
        return jnp.where(self._lane(x.shape)[1] == fold, x, jnp.zeros((), x.dtype))

    def slots(self, rows: int) -> jax.Array:
        """(rows, lanes): the slot of each element, counted from the block's first."""
        shape = rows, self.lanes
        return lax.broadcasted_iota(jnp.int32, shape, 0) * self.folds + self._lane(shape)[1]

    def decoded(self, stored: jax.Array, dtype: Any) -> list[jax.Array]:
        """For each place the values (rows, lanes) of ``stored`` (pages, page_rows, lanes), in units of their
        scales."""
        return [
            self._values(stored, place).reshape(-1, self.lanes).astype(dtype) for place in range(self.places)
        ]

    def scaled(self, stored: jax.Array, scales: jax.Array, dtype: Any) -> list[jax.Array]:
        """:meth:`decoded` times the ``scales`` of its channels, of one head of a block."""
        factors = self.factors(scales)
        out = []
        for place in range(self.places):
            values, factor = self._values(stored, place), self._of_lanes(factors, place)
            if not self.per_slot:
                factor = factor.reshape(factor.shape[0], 1, self.lanes)
            else:
                values = values.reshape(-1, self.lanes)
            out.append((values * factor).reshape(-1, self.lanes).astype(dtype))
        return out

    def factors(self, scales: jax.Array) -> jax.Array:
        """Stored scales as float32 factors; zeros for those that read as NaN, where nothing was written."""
        return _finite(self.quantizer.multiplier(scales))

    def shifts(self, scales: jax.Array) -> jax.Array:
        """The float32 offsets that stored scales carry."""
        return _finite(self.quantizer.shift(scales))

    def shift_rows(self, scales: jax.Array, place: int) -> jax.Array:
        """The offsets (pages, lanes) of a place's channels, of one head of a block."""
        return self._of_lanes(self.shifts(scales), place)

    def rows_of_pages(self, pages: int) -> jax.Array:
        """(pages, rows): 1 where the row is the page's."""
        shape = pages, pages * self.page_rows
        of_row = lax.div(lax.broadcasted_iota(jnp.int32, shape, 1), self.page_rows)
        return (of_row == lax.broadcasted_iota(jnp.int32, shape, 0)).astype(jnp.float32)

    def _values(self, stored: jax.Array, place: int) -> jax.Array:
        if self.quantizer is None:
            return stored.astype(jnp.float32)
        made_for = jnp.float32 if self.groups else self.dtype
        return self.quantizer.decode(self.codes(stored, place), made_for).astype(jnp.float32)

    def _of_lanes(self, factors: jax.Array, place: int) -> jax.Array:
        """The factors of each lane, from (pages, groups) or (folds · groups, rows)."""
        if self.groups == self.lanes and self.places == 1 and not self.per_slot:
            return factors
        count = self.groups * (self.folds if self.per_slot else 1)
        shape = count, self.lanes
        within, fold = self._lane(shape)
        group = lax.div((within * self.places + place) * self.groups, self.head_dim)
        if self.per_slot:
            group = group + fold * self.groups
        picks = (lax.broadcasted_iota(jnp.int32, shape, 0) == group).astype(jnp.float32)
        numbers = (((0 if self.per_slot else 1,), (0,)), ((), ()))
        return lax.dot_general(factors, picks, numbers, precision=HIGHEST)

    def _lane(self, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Of each element its place within a slot, and its fold."""
        lane = lax.broadcasted_iota(jnp.int32, shape, 1)
        return lax.rem(lane, self.width), lax.div(lane, self.width)


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(x) < jnp.inf, x, 0.0)
