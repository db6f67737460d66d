"""PagedAttentionMetadata: where the tokens of one step go, and which pages their sequences have."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qpaged._arguments import check_type, shown
from qpaged.arrays import clip_to_int32
from qpaged.cache._serializable import Serializable
from qpaged.cache._slot_mapping import as_indices
from qpaged.cache._step_tokens import StepTokens

FIRST_GROUP = 0
ABSENT = np.int32(0)  # in place of the arrays of a mode that a step is not in, of shape ()


@dataclass(frozen=True)
class PagedAttentionMetadata(Serializable):
    """One step's positions and page tables: of a prefill, of a decode, or of a ragged batch, which has both.

    The constructor itself makes a prefill and a decode in one.

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
        ragged_position: (tokens,) int32; where each token of a ragged batch goes, negative for inactive ones.
            () if there is none.
        ragged_page_tables: (sequences, pages_per_sequence) int32; each sequence's pages. () likewise.
        ragged_starts: (sequences + 1,) int32; the first token of each sequence, and one past the last token
            of all. () likewise. (groups, sequences_per_group + 1) where sequences are divided over devices.
        prefill_group: () int32; the group that the prefill's sequence is of, where there are several.
    """

    later_fields: ClassVar[frozenset[str]] = frozenset(
        {"ragged_position", "ragged_page_tables", "ragged_starts", "prefill_group"}
    )

    prefill_length: ArrayLike
    prefill_position: ArrayLike
    prefill_page_table: ArrayLike
    decodes_position: ArrayLike
    decodes_page_table: ArrayLike
    ragged_position: ArrayLike = ABSENT
    ragged_page_tables: ArrayLike = ABSENT
    ragged_starts: ArrayLike = ABSENT
    prefill_group: ArrayLike = ABSENT

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
        self.steps()  # which checks the shapes of what it returns
        if self.is_ragged_mode():
            _check_ascending("ragged_starts", np.asarray(self.ragged_starts), np.size(self.ragged_position))

    @classmethod
    def prefill(
        cls,
        *,
        position: ArrayLike,
        page_table: ArrayLike,
        length: ArrayLike | None = None,
        group: ArrayLike = FIRST_GROUP,
    ) -> Self:
        """Return the metadata of a prefill of one sequence, or of a chunk of it.

        Args:
            position: (padded_len,) integers; token i goes to position[i].
            page_table: (pages,) integers; the sequence's pages in order.
            length: how many of the tokens count; all of them if None.
            group: the group of devices that has the sequence's pages, where there are several.

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
            prefill_group=ABSENT if group is FIRST_GROUP else _shaped("group", group, "()", 0),
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
    def ragged(cls, *, position: ArrayLike, page_tables: ArrayLike, starts: ArrayLike) -> Self:
        """Return the metadata of any number of sequences with any number of tokens each.

        Whole prompts, chunks of prompts, decodes and drafts go through one call of
        :meth:`PagedAttentionCacheView.write_to_cache` and one of :func:`paged_attention`. Compiled programs
        depend on the three shapes alone: fill up tokens and sequences to a few sizes.

            # A prompt of 5 tokens, a decode at position 40, and room for a third sequence and 2 more tokens.
            PagedAttentionMetadata.ragged(
                position=[0, 1, 2, 3, 4, 40, 0, 0], page_tables=page_tables, starts=[0, 5, 6, 6]
            )

        Args:
            position: (tokens,) integers; where each token goes, those of one sequence after another.
            page_tables: (sequences, pages_per_sequence) integers; each sequence's pages in order.
            starts: (sequences + 1,) integers, ascending from 0: sequence i has the tokens from starts[i] to
                starts[i + 1] - 1, or none. Tokens from starts[-1] on are padding. Where sequences are divided
                over devices, tokens and sequences come group by group, as many of each, and starts is
                (groups, sequences_per_group + 1), each line counting within its group.

        Raises:
            TypeError: not integers. ValueError: another number of axes or of sequences, or starts that are
                known and do not ascend from 0 to at most the number of tokens.
        """
        position = _shaped("position", position, "(tokens,)", 1)
        page_tables = _shaped("page_tables", page_tables, "(sequences, pages_per_sequence)", 2)
        known = starts
        starts = _starts("starts", starts)
        _check_starts("", starts, page_tables, position)
        if not isinstance(known, jax.core.Tracer):
            _check_ascending("starts", np.asarray(known), len(position))
        return cls.init_empty().replace(
            ragged_position=position, ragged_page_tables=page_tables, ragged_starts=starts
        )

    @classmethod
    def init_empty(cls) -> Self:
        """Return a placeholder, in which the prefill and the decode mode are True and nothing is written."""
        return cls(
            prefill_length=jnp.int32(0),
            prefill_position=_absent(),
            prefill_page_table=_absent(),
            decodes_position=_absent(),
            decodes_page_table=_absent(),
        )

    def prefill_tokens(self) -> tuple[jax.Array, jax.Array] | None:
        """Return (position, page_table) of the prefill, padding at negative positions; None without one.

        Raises:
            TypeError, ValueError: fields of other kinds or shapes than the class says.
        """
        if np.ndim(self.prefill_position) == 0:
            return None
        position = _shaped("prefill_position", self.prefill_position, "(padded_len,)", 1)
        length = _shaped("prefill_length", self.prefill_length, "()", 0)
        is_token = jnp.arange(len(position), dtype=jnp.int32) < length
        table = _shaped("prefill_page_table", self.prefill_page_table, "(pages,)", 1)
        return jnp.where(is_token, position, -1), table

    def decodes_tokens(self) -> tuple[jax.Array, jax.Array] | None:
        """Return (position, page_table) of the decode, int32; None without one.

        Raises:
            TypeError, ValueError: fields of other kinds or shapes than the class says.
        """
        if np.ndim(self.decodes_position) == 0:
            return None
        position = _shaped("decodes_position", self.decodes_position, "(batch,)", 1)
        table = _shaped("decodes_page_table", self.decodes_page_table, "(batch, pages_per_sequence)", 2)
        _check_batch("decodes_", position, table)
        return position, table

    def ragged_tokens(self) -> tuple[jax.Array, jax.Array, jax.Array] | None:
        """Return (position, page_tables, starts) of the ragged batch, int32; None without one.

        Raises:
            TypeError, ValueError: fields of other kinds or shapes than the class says.
        """
        if not self.is_ragged_mode():
            return None
        position = _shaped("ragged_position", self.ragged_position, "(tokens,)", 1)
        tables = _shaped("ragged_page_tables", self.ragged_page_tables, "(sequences, pages_per_sequence)", 2)
        starts = _starts("ragged_starts", self.ragged_starts)
        _check_starts("ragged_", starts, tables, position)
        return position, tables, starts

    def steps(self) -> list[StepTokens]:
        """Return the tokens of the prefill, of the decode and of the ragged batch, as there are.

        Raises:
            TypeError, ValueError: fields of other kinds or shapes than the class says.
        """
        steps = []
        prefill, decode, ragged = self.prefill_tokens(), self.decodes_tokens(), self.ragged_tokens()
        if prefill is not None:
            position, table = prefill
            group = _shaped("prefill_group", self.prefill_group, "()", 0)
            steps.append(StepTokens(position, table[None], group=group))
        if decode is not None:
            steps.append(StepTokens(*decode))
        if ragged is not None:
            steps.append(StepTokens(*ragged))
        return steps

    def is_prefill_mode(self) -> bool:
        """Return True if there is neither a decode nor a ragged batch. True of a placeholder, too."""
        return np.ndim(self.decodes_position) == 0 and not self.is_ragged_mode()

    def is_decode_mode(self) -> bool:
        """Return True if there is neither a prefill nor a ragged batch. True of a placeholder, too."""
        return np.ndim(self.prefill_position) == 0 and not self.is_ragged_mode()

    def is_ragged_mode(self) -> bool:
        """Return True if there is a ragged batch."""
        return np.ndim(self.ragged_position) != 0


def check_step(metadata: object) -> None:
    """Raise TypeError unless ``metadata`` is that of a step."""
    rule = "a qpaged.PagedAttentionMetadata"
    advice = "PagedAttentionMetadata.prefill, .decode and .ragged make it"
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


def _starts(name: str, starts: ArrayLike) -> jax.Array:
    """Return starts as int32 indices, or raise unless they have an axis, or two."""
    if np.ndim(starts) == 2:
        return as_indices(name, starts)
    return _shaped(name, starts, "(sequences + 1,)", 1)


def _check_starts(prefix: str, starts: jax.Array, page_tables: jax.Array, position: jax.Array) -> None:
    groups, entries = starts.shape if starts.ndim == 2 else (1, len(starts))
    if not groups or not entries:
        raise ValueError(
            f"{prefix}starts must have an entry for each sequence and one more, but came with shape "
            f"{starts.shape}."
        )
    if groups * (entries - 1) != len(page_tables):
        raise ValueError(
            f"{prefix}starts must have one entry more than {prefix}page_tables has rows, in each group, but "
            f"came with {entries} in {groups} for {len(page_tables)}; the last is one past the last token."
        )
    if len(position) % groups:
        raise ValueError(
            f"{prefix}position must have as many tokens for each of the {groups} groups, but has "
            f"{len(position)}; fill them up with positions of -1."
        )


def _check_ascending(name: str, starts: np.ndarray, tokens: int) -> None:
    """Raise unless starts divide so many tokens; once they are traced, nobody can."""
    lines = starts.astype(np.int64).reshape(-1, starts.shape[-1])
    if lines[:, 0].any() or (lines[:, -1] > tokens // len(lines)).any() or (np.diff(lines) < 0).any():
        raise ValueError(
            f"{name} must ascend from 0 to at most the number of tokens, {tokens // len(lines)}, but came as "
            f"{shown(starts.tolist())}; fill it up with its last entry."
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
        "ragged_position",
        "ragged_page_tables",
        "ragged_starts",
        "prefill_group",
    ],
    meta_fields=[],
)
