"""The sequences of a step, in the forms that JAX's kernels take."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qpaged.cache import PagedAttentionCacheView, PagedAttentionMetadata


class RaggedSequences(NamedTuple):
    """A step's sequences, in the order in which ``tpu.ragged_paged_attention`` takes them after the pages.

    Attributes:
        kv_lens: (sequences,) int32, the slots of each sequence.
        page_indices: (sequences, pages_per_sequence) int32, the page table; 0 for entries that are no page.
        cu_q_lens: (sequences + 1,) int32, the cumulative number of queries: sequence i has the queries
            ``cu_q_lens[i]`` to ``cu_q_lens[i + 1] - 1``.
        num_seqs: (1,) int32, the number of sequences.
    """

    kv_lens: jax.Array
    page_indices: jax.Array
    cu_q_lens: jax.Array
    num_seqs: jax.Array


def decode_sequences(
    view: PagedAttentionCacheView, metadata: PagedAttentionMetadata
) -> tuple[jax.Array, jax.Array]:
    """Return the sequences of a decode as ``tpu.paged_attention`` and ``gpu.paged_attention`` take them.

    Args:
        view: the layer's pages.
        metadata: a decode. All slots up to a row's position must lie on pages, because these kernels do not
            mask missing ones.

    Returns:
        ``lengths`` (batch,) int32: positions + 1, and 0 for inactive rows and positions past the page table;
        and ``page_indices`` (batch, pages_per_sequence) int32, which the GPU kernel calls ``block_tables``:
        the page table, with 0 for entries that are no page, because the kernels read from them before they
        mask.

    Raises:
        ValueError: the metadata is not a decode alone.
    """
    tokens = metadata.decodes_tokens()
    if tokens is None or not metadata.is_decode_mode():
        raise ValueError(
            f"metadata must be of a decode alone, since the kernels take one query for each sequence, but is "
            f"{_mode(metadata)}; build it with PagedAttentionMetadata.decode."
        )
    position, table = tokens
    return _lengths(view, position, table), _page_indices(view, table)


def ragged_sequences(view: PagedAttentionCacheView, metadata: PagedAttentionMetadata) -> RaggedSequences:
    """Return the sequences of a step as ``tpu.ragged_paged_attention`` takes them.

    The kernel takes the queries of a sequence as its last tokens, in order, and at least one slot for each
    sequence. Inactive rows and rows whose position is past the page table therefore get one slot, the first
    of their first page. Ignore the output of these rows, and of a prefill's padding.

    Args:
        view: the layer's pages.
        metadata: of a ragged batch or a prefill, in which the positions of a sequence ascend by one and lie
            on pages, or of a decode. Sequences of a ragged batch that have no tokens come last.

    Raises:
        ValueError: the metadata is of a prefill and a decode in one, or of neither.
    """
    steps = metadata.steps()
    if len(steps) != 1:
        raise ValueError(
            f"metadata must be of a ragged batch, a prefill or a decode, but is {_mode(metadata)}; make both "
            f"one with PagedAttentionMetadata.ragged, or call the kernel once for each."
        )
    position, table, starts, _ = steps[0].divided(1)
    num_seqs = jnp.full((1,), len(table), jnp.int32)
    if starts is not None:
        num_seqs = (starts[1:] > starts[:-1]).sum(keepdims=True, dtype=jnp.int32)
        position = jnp.append(position, -1)[jnp.where(starts[1:] > starts[:-1], starts[1:] - 1, -1)]
    elif metadata.is_decode_mode():
        starts = jnp.arange(len(position) + 1, dtype=jnp.int32)
    else:
        starts = jnp.stack([jnp.int32(0), (position >= 0).sum(dtype=jnp.int32)])
        position = position.max(keepdims=True, initial=-1)
    lengths = jnp.maximum(_lengths(view, position, table), 1)
    return RaggedSequences(lengths, _page_indices(view, table), starts, num_seqs)


def _lengths(
    view: PagedAttentionCacheView,
    position: jax.Array,  # (sequences,)
    table: jax.Array,  # (sequences, pages_per_sequence)
) -> jax.Array:
    """Return the slots up to each position, that one included; 0 for a position outside the page table."""
    in_table = (position >= 0) & (position // view.metadata.page_size < table.shape[-1])
    return jnp.where(in_table, position, -1) + 1


def _page_indices(view: PagedAttentionCacheView, table: jax.Array) -> jax.Array:
    """Return the page table, with 0 for the entries that are no page."""
    return jnp.where((table >= 0) & (table < view.metadata.num_pages_per_layer), table, 0)


def _mode(metadata: PagedAttentionMetadata) -> str:
    """Return what a step consists of, for messages."""
    if metadata.is_ragged_mode():
        return "of a ragged batch"
    if metadata.is_prefill_mode():
        return "of neither" if metadata.is_decode_mode() else "of a prefill"
    return "of a decode" if metadata.is_decode_mode() else "of a prefill and a decode"
