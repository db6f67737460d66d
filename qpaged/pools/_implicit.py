"""Pools of other implicit arrays: written and read as their class handles the primitives of a plain pool."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from qpaged import arrays
from qpaged.implicit import ImplicitArray, use_implicit_args
from qpaged.pools._array import write_slots
from qpaged.pools._pool import Pool, PoolBytes, SlotMapping, Slots, bytes_of, no_record_of


@dataclass(frozen=True)
class ImplicitPool(Pool):
    """A pool that is an implicit array of a class that this package does not know.

    Programs read it under ``use_implicit_args``, where it is a plain array: :meth:`gather_slots` is then
    asked of a plain pool.
    """

    pages: ImplicitArray

    @property
    def needs_implicit_args(self) -> bool:
        return True

    def write_slots(self, mapping: SlotMapping, rows: jax.Array) -> ImplicitArray:
        return self._apply(write_slots, mapping, rows)

    def gather_slots(self, indices: jax.Array) -> Slots:
        raise TypeError(
            f"pages of type {type(self.pages).__name__} must be read under "
            f"qpaged.implicit.use_implicit_args, but came outside of it; give it the function "
            f"that reads them."
        )

    def clear_pages(self, indices: jax.Array) -> ImplicitArray:
        return self._apply(arrays.clear_pages, indices)

    def copy_pages(self, source: jax.Array, target: jax.Array) -> ImplicitArray:
        return self._apply(arrays.copy_pages, source, target)

    def count_bytes(self) -> PoolBytes:
        return PoolBytes(codes=bytes_of(self.pages), scales=0)

    def fill_lane_rows(self) -> ImplicitArray:
        return self.pages

    def to_record(self) -> Any:
        raise no_record_of(self.pages)

    def _apply(self, update: Callable[..., jax.Array], *args: jax.Array | SlotMapping) -> ImplicitArray:
        """Return the pages after ``update``, which must leave them of their class."""
        updated = use_implicit_args(update)(self.pages, *args)
        if type(updated) is not type(self.pages):
            raise TypeError(
                f"pages of type {type(self.pages).__name__} must stay what they are when written to, but "
                f"scatter made them a plain array; give the class a handler of the primitive 'scatter'."
            )
        return updated
