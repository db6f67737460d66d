"""What a write would drop, and why: the question that no write asks, since indices never raise there."""

from dataclasses import dataclass

import numpy as np

from qpaged.cache._config import PagedAttentionCacheMetaData
from qpaged.cache._metadata import PagedAttentionMetadata


@dataclass(frozen=True)
class DroppedToken:
    """A token that a write drops.

    Attributes:
        mode: "prefill", "decode" or "ragged".
        index: of the token in the prefill or the ragged batch, or of its row in the decode.
        position: where it was to go.
        reason: why it goes nowhere.
    """

    mode: str
    index: int
    position: int
    reason: str

    def __str__(self) -> str:
        return f"{self.mode} token {self.index} at position {self.position}: {self.reason}"


def dropped_tokens(step: PagedAttentionMetadata, metadata: PagedAttentionCacheMetaData) -> list[DroppedToken]:
    """Return the tokens of a step that a write drops, in order; padding is left out.

        print(*qpaged.dropped_tokens(step, cache.metadata), sep="\\n")

    This is for debugging: it reads the step's values, and so waits for them. Inside ``jit``, pass the step
    through ``jax.debug.callback``.

    Args:
        step: positions and page tables, of values that are known.
        metadata: that of the cache, which has the size and the number of its pages.
    """
    dropped: list[DroppedToken] = []
    if np.ndim(step.prefill_position):
        position, table = np.asarray(step.prefill_position), np.asarray(step.prefill_page_table)
        for index in range(min(int(np.asarray(step.prefill_length)), len(position))):
            dropped += _dropped("prefill", index, int(position[index]), table, metadata)
    if np.ndim(step.decodes_position):
        position, tables = np.asarray(step.decodes_position), np.asarray(step.decodes_page_table)
        for index, table in enumerate(tables):
            dropped += _dropped("decode", index, int(position[index]), table, metadata)
    ragged = step.ragged_tokens()
    if ragged is not None:
        position, tables, starts = map(np.asarray, ragged)
        starts = np.clip(starts, 0, len(position))
        for sequence, table in enumerate(tables):
            for index in range(starts[sequence], starts[sequence + 1]):
                dropped += _dropped("ragged", index, int(position[index]), table, metadata)
    return dropped


def _dropped(
    mode: str, index: int, position: int, table: np.ndarray, metadata: PagedAttentionCacheMetaData
) -> list[DroppedToken]:
    """Return the token in a list if it goes nowhere; else an empty list."""
    reason = _reason(position, table, metadata)
    return [] if reason is None else [DroppedToken(mode, index, position, reason)]


def _reason(position: int, table: np.ndarray, metadata: PagedAttentionCacheMetaData) -> str | None:
    """Return why a position of a sequence with this page table is written nowhere; None if it is written."""
    pages, size = metadata.num_pages_per_layer, metadata.page_size
    if position < 0:
        return "its position is negative, as of an inactive row"
    entry = position // size
    if entry >= len(table):
        return f"its page table has {len(table)} pages of {size} tokens, which end at {len(table) * size}"
    page = int(table[entry])
    if page == pages:
        return f"entry {entry} of its page table is {pages}, which means no page"
    if not 0 <= page < pages:
        return f"entry {entry} of its page table is {page}, but a layer has pages 0 to {pages - 1}"
    return None
