"""PagedAttentionMetadata: where the tokens of one step go, and which pages their sequences have."""

import dataclasses
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qpaged._arguments import check_type
from qpaged.arrays import clip_to_int32
from qpaged.cache._serializable import Serializable
from qpaged.cache._slot_mapping import as_indices


@dataclass(frozen=True)
class PagedAttentionMetadata(Serializable):
    """One step's positions and page tables, for a prefill, a decode, or both (by the constructor itself).

    Token at position p of a sequence lies in slot p mod page_size of page page_table[p // page_size]. The
    index ``num_pages_per_layer`` (one past the last) in a table means "no page". Any index out of range is
    dropped, never clamped.

    Attributes:
        prefill_length: () int32; how many tokens the prefill has; what follows is padding. 0 in a decode.
        prefill_position: (padded_len,) int32; where each token goes. () if not in prefill.
        prefill_page_table: (pages,) int32; the sequence's pages. () if not in prefill.
        decodes_position: (batch,) int32; where each row's token goes; negative for an inactive row. () if not
            in decode.
        decodes_page_table: (batch, pages_per_sequence) int32; each row's pages. () if not in decode.
    """

    prefill_length: ArrayLike
    prefill_position: ArrayLike
    prefill_page_table: ArrayLike
    decodes_position: ArrayLike
    decodes_page_table: ArrayLike

    def __post_init__(self) -> None:
        # A jitted function would take host integers of 64 bits modulo 2^32. Those beyond int32 become its
        # ends, which are out of range, too, and so dropped.
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray | np.integer) and value.dtype.kind in "iu" and value.itemsize > 2:
                object.__setattr__(self, field.name, clip_to_int32(value))

    def check_fields(self) -> None:
        """Raise ValueError or TypeError unless fields are integers that fit each other; files are read so."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                raise ValueError(f"{field.name} must be an array of integers, but a list came.")
            as_indices(field.name, value)
        # Both check the shapes of what they return.
        self.prefill_tokens()
        self.decodes_tokens()

    @classmethod
    def prefill(cls, *, position: ArrayLike, page_table: ArrayLike, length: ArrayLike | None = None) -> Self:
        """Return the metadata of a prefill of one sequence, or of a chunk of it.

        Args:
            position: (padded_len,) integers; token i goes to position[i].
            page_table: (pages,) integers; the sequence's pages in order.
            length: how many of the tokens count; all of them if None.

        Raises:
            TypeError: not integers. ValueError: another number of axes.
        """
        position = _shaped("position", position, "(padded_len,)", 1)
        length = len(position) if length is None else length
        return cls(
            prefill_length=_shaped("length", length, "()", 0),
            prefill_position=position,
            prefill_page_table=_shaped("page_table", page_table, "(pages,)", 1),
            decodes_position=_absent(),
            decodes_page_table=_absent(),
        )

    @classmethod
    def decode(cls, *, position: ArrayLike, page_table: ArrayLike) -> Self:
        """Return the metadata of a decode step: one token for each row.

        Args:
            position: (batch,) integers; where each row's token goes, negative for an inactive row.
            page_table: (batch, pages_per_sequence) integers; each row's pages in order.

        Raises:
            TypeError: not integers. ValueError: another number of axes, or another batch.
        """
        position = _shaped("position", position, "(batch,)", 1)
        page_table = _shaped("page_table", page_table, "(batch, pages_per_sequence)", 2)
        _check_batch("", position, page_table)
        return cls(
            prefill_length=jnp.int32(0),
            prefill_position=_absent(),
            prefill_page_table=_absent(),
            decodes_position=position,
            decodes_page_table=page_table,
        )

    @classmethod
    def init_empty(cls) -> Self:
        """Return a placeholder in which both modes are True, and which writes and attends to nothing."""
        return cls(
            prefill_length=jnp.int32(0),
            prefill_position=_absent(),
            prefill_page_table=_absent(),
            decodes_position=_absent(),
            decodes_page_table=_absent(),
        )

    def prefill_tokens(self) -> tuple[jax.Array, jax.Array] | None:
        """Return (position, page_table) of the prefill, padding at negative positions; None in a decode.

        Raises:
            TypeError, ValueError: fields of other kinds or shapes than the class says.
        """
        if self.is_decode_mode():
            return None
        position = _shaped("prefill_position", self.prefill_position, "(padded_len,)", 1)
        length = _shaped("prefill_length", self.prefill_length, "()", 0)
        is_token = jnp.arange(len(position), dtype=jnp.int32) < length
        table = _shaped("prefill_page_table", self.prefill_page_table, "(pages,)", 1)
        return jnp.where(is_token, position, -1), table

    def decodes_tokens(self) -> tuple[jax.Array, jax.Array] | None:
        """Return (position, page_table) of the decode, int32; None in a prefill.

        Raises:
            TypeError, ValueError: fields of other kinds or shapes than the class says.
        """
        if self.is_prefill_mode():
            return None
        position = _shaped("decodes_position", self.decodes_position, "(batch,)", 1)
        table = _shaped("decodes_page_table", self.decodes_page_table, "(batch, pages_per_sequence)", 2)
        _check_batch("decodes_", position, table)
        return position, table

    def is_prefill_mode(self) -> bool:
        """Return True if there is no decode: its arrays have shape (). True of a placeholder, too."""
        return np.ndim(self.decodes_position) == 0

    def is_decode_mode(self) -> bool:
        """Return True if there is no prefill: its arrays have shape (). True of a placeholder, too."""
        return np.ndim(self.prefill_position) == 0


def check_step(metadata: object) -> None:
    """Raise TypeError unless ``metadata`` is that of a step."""
    rule = "a qpaged.PagedAttentionMetadata"
    advice = "PagedAttentionMetadata.prefill and .decode make it"
    check_type("metadata", metadata, PagedAttentionMetadata, rule, advice)


def _shaped(name: str, values: ArrayLike, shape: str, ndim: int) -> jax.Array:
    """Return ``values`` as int32 indices, or raise unless they have ``ndim`` axes, written as ``shape``."""
    indices = as_indices(name, values)
    if indices.ndim != ndim:
        raise ValueError(f"{name} must have shape {shape}, but came with shape {indices.shape}.")
    return indices


def _check_batch(prefix: str, position: jax.Array, page_table: jax.Array) -> None:
    if len(position) != len(page_table):
        raise ValueError(
            f"{prefix}position and {prefix}page_table must have one row for each sequence, "
            f"but came with {len(position)} and {len(page_table)} rows."
        )


def _absent() -> jax.Array:
    """Return what stands for the arrays of a mode that a step is not in, of shape ()."""
    return jnp.int32(0)


jax.tree_util.register_dataclass(
    PagedAttentionMetadata,
    data_fields=[
        "prefill_length",
        "prefill_position",
        "prefill_page_table",
        "decodes_position",
        "decodes_page_table",
    ],
    meta_fields=[],
)
