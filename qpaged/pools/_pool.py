"""The interface of a pool: what each kind implements."""

import abc
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from qpaged.arrays import QuantizedArray

Slots: TypeAlias = jax.Array | QuantizedArray
"""Slots of one sequence, (kv_heads, n, head_dim), as attention reads them."""
Pages: TypeAlias = Any
"""A pool as a cache holds it: a plain array, an implicit array, or a :class:`Pool`."""


class SlotMapping(NamedTuple):
    """Where tokens go; out of range is dropped.

    Attributes:
        page: (tokens,) int32.
        slot: (tokens,) int32; within the page.
    """

    page: jax.Array
    slot: jax.Array


class PoolBytes(NamedTuple):
    """What a pool takes in memory: its codes, or plain numbers, and all that goes with them."""

    codes: int
    scales: int

    @property
    def total(self) -> int:
        return self.codes + self.scales


class Pool(abc.ABC):
    """What can be done to pages (kv_heads, pages, page_size, head_dim) of one kind.

    The kinds of this package wrap the array that a cache holds. A pytree of a new kind subclasses this class
    itself and returns ``self``'s like from the methods that change pages; it has ``shape`` and ``dtype``, the
    logical ones, and its ``tree_leaves`` are arrays.
    """

    needs_implicit_args: bool = False
    """Whether what reads the pages must run under ``use_implicit_args``."""

    @property
    def is_narrow_float(self) -> bool:
        """Whether the pages are stored as floats of fewer than 32 bits, which XLA on CPU copies whole."""
        return False

    @abc.abstractmethod
    def write_slots(self, mapping: SlotMapping, rows: jax.Array) -> Pages:
        """Return the pages with ``rows`` (tokens, kv_heads, head_dim) written."""

    @abc.abstractmethod
    def gather_slots(self, pages: jax.Array) -> Slots:
        """Return slots (kv_heads, n * page_size, head_dim) of ``pages`` (n,); zeros where out of range."""

    @abc.abstractmethod
    def clear_pages(self, pages: jax.Array) -> Pages:
        """Return the pages with ``pages`` (n,) as they were before anything was written to them."""

    @abc.abstractmethod
    def copy_pages(self, source: jax.Array, target: jax.Array) -> Pages:
        """Return the pages with ``source`` (n,) copied to ``target`` (n,), bit for bit."""

    @abc.abstractmethod
    def count_bytes(self) -> PoolBytes:
        """Return what the pages take in memory; shapes are enough."""

    def fill_lane_rows(self) -> Pages:
        """Return fresh pages stored in rows that fill a TPU's lanes, where the kind has such a form."""
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
        f"only plain and QuantizedArray pages and named formats can be written to a record, but a "
        f"{type(value).__name__} came; use a registered quantizer instead."
    )


def bytes_of(tree: Any) -> int:
    """Return the bytes of the arrays, or of the shapes, in a pytree."""
    leaves = jax.tree_util.tree_leaves(tree)
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
