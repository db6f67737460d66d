"""The interface of a pool: what each kind implements.

``Pages`` are what a cache stores. A ``Pool`` is the interface through which everything is done to them: it
wraps the pages or, in a new kind, is the pages.
"""

import abc
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from qpaged.arrays import QuantizedArray

Slots: TypeAlias = jax.Array | QuantizedArray
"""Slots of gathered pages, (kv_heads, n, head_dim), as attention reads them."""
Pages: TypeAlias = Any
"""A pool as a cache holds it: a plain array, an implicit array, or a :class:`Pool`."""


class SlotMapping(NamedTuple):
    """Where tokens go; out of range is dropped.

    Attributes:
        page: (tokens,) int32.
        slot: (tokens,) int32; within the page.
        logical_page: (tokens,) int32; the page's place in its sequence. None if not known.
        page_table: (sequences, pages_per_sequence) int32. None if not known.
        sequence: (tokens,) int32, the row of the page table; any for tokens that are dropped. None if all
            tokens are of one sequence, or each of its own, in order.
    """

    page: jax.Array
    slot: jax.Array
    logical_page: jax.Array | None = None
    page_table: jax.Array | None = None
    sequence: jax.Array | None = None


class PoolBytes(NamedTuple):
    """The bytes of a pool: ``codes`` those of codes or plain values, ``scales`` those of all other arrays."""

    codes: int
    scales: int

    @property
    def total(self) -> int:
        return self.codes + self.scales


class Pool(abc.ABC):
    """What can be done to pages (kv_heads, pages, page_size, head_dim) of one kind.

    The kinds of this package wrap the array that a cache holds. A pytree of a new kind subclasses this class
    itself, and returns an instance of itself from the methods that change pages. It has the logical ``shape``
    and ``dtype``, and all its leaves are arrays.
    """

    @property
    def needs_implicit_args(self) -> bool:
        """True if what reads the pages must run under ``use_implicit_args``."""
        return False

    @property
    def is_narrow_float(self) -> bool:
        """True if the pages are floats of fewer than 32 bits, which XLA on CPU copies whole at each write."""
        return False

    @property
    def has_exact_pages(self) -> bool:
        """True if :meth:`is_exact` tells pages apart."""
        return False

    @property
    def format(self) -> Any:
        """The format that fresh pages like these are made with; None if a quantizer does not make them."""
        return None

    @property
    def static_scales(self) -> jax.Array | None:
        """The given scales (kv_heads or 1, 1, 1, 1) that all the pages share; None if they share none."""
        return None

    def with_static_scales(self, scales: jax.Array) -> Pages:
        """Return the pages with other :attr:`static_scales`; codes stay as they are.

        Raises:
            TypeError: the kind has none.
        """
        raise TypeError(f"pages of type {type(self).__name__} have no static scales.")

    @abc.abstractmethod
    def write_slots(self, mapping: SlotMapping, rows: jax.Array) -> Pages:
        """Return the pages with ``rows`` (tokens, kv_heads, head_dim) written; out of range is dropped."""

    def write_both(self, mapping: SlotMapping, keys: jax.Array, values: jax.Array | None) -> Pages:
        """Return pages, within which values lie too, with keys and values written.

        Of most kinds values are a part of the keys, and there are none but these.
        """
        return self.write_slots(mapping, keys)

    def values_within(self) -> Pages:
        """Return the pool that attention reads as values, where they lie within these pages of keys."""
        return self

    @abc.abstractmethod
    def gather_slots(self, indices: jax.Array) -> Slots:
        """Return the slots (kv_heads, n * page_size, head_dim) of pages (n,); zeros where out of range."""

    @abc.abstractmethod
    def clear_pages(self, indices: jax.Array) -> Pages:
        """Return the pages with those at ``indices`` (n,) as before any write; out of range is dropped."""

    @abc.abstractmethod
    def copy_pages(self, source: jax.Array, target: jax.Array) -> Pages:
        """Return the pages with those at ``source`` (n,) copied to ``target`` (n,), bit for bit.

        All sources are read before any target is written. A pair with a page out of range is dropped; of
        several pairs with one target the last counts.
        """

    @abc.abstractmethod
    def count_bytes(self) -> PoolBytes:
        """Return the bytes of the pages, whose leaves may be ShapeDtypeStructs."""

    def is_exact(self, indices: jax.Array) -> jax.Array | None:
        """Return, for page indices of any shape, True where a page is to be read by :meth:`gather_slots`.

        None for kinds without such pages, all of whose pages are in :meth:`packed`.
        """
        return None

    def packed(self) -> Pages:
        """Return the pool that attention reads where pages are not exact."""
        return self

    def with_packed(self, pages: Pages) -> Pages:
        """Return the pages with others in the place of :meth:`packed`."""
        return pages

    def pack_pages(self, indices: jax.Array, lengths: jax.Array) -> Pages:
        """Return the pages with those at ``indices`` (n,) packed, slots from ``lengths`` (n,) on as zeros."""
        return self

    def take_pages(self, indices: jax.Array, sequences: int) -> Pages:
        """Return the pages at ``indices`` (n,) as pages (kv_heads, n, page_size, head_dim) of the same kind.

        Bit for bit; any where out of range. Exact pages are packed if they are more than those of so many
        sequences.

        Raises:
            TypeError: the kind cannot take its pages out of their pool.
        """
        raise self._not_taken()

    def put_pages(self, taken: Pages, target: jax.Array) -> Pages:
        """Return the pages with those of :meth:`take_pages` at ``target`` (n,), as :meth:`copy_pages` does.

        Raises:
            TypeError: the kind cannot take pages of another pool.
        """
        raise self._not_taken()

    def _not_taken(self) -> TypeError:
        kind = type(getattr(self, "pages", self)).__name__
        return TypeError(
            f"pages of type {kind} cannot be taken out of their pool or put into it, since only their class "
            f"knows their parts; copy_pages moves them within it."
        )

    def fill_lane_rows(self) -> Pages:
        """Return pages, to which nothing was written yet, in rows that fill a TPU's lanes, if possible."""
        return self

    def as_quantized(self) -> QuantizedArray | None:
        """Return the quantized array that the pages are, for kernels that read codes; else None."""
        return None

    def to_record(self) -> Any:
        """Return the pages as a record holds them: an array, or a dictionary of plain values and arrays.

        Raises:
            TypeError: the kind has no such form.
        """
        raise no_record_of(self)


def no_record_of(value: object) -> TypeError:
    """Return the error for what cannot be written to a record."""
    return TypeError(
        f"only plain and QuantizedArray pages and named formats can be written to a record, but got a "
        f"{type(value).__name__}; use a registered quantizer instead."
    )


def bytes_of(tree: Any) -> int:
    """Return the bytes of the arrays, or of the shapes, in a pytree."""
    leaves = jax.tree_util.tree_leaves(tree)
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
