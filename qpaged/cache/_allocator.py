"""Who owns which page: host-side, no JAX."""

import operator
import threading
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from qpaged.cache._config import PagedAttentionCacheMetaData


class AllocationError(RuntimeError):
    """A call that asked for what the allocator cannot give; nothing was changed."""


class PageAllocator:
    """Hands out the pages of a cache to sequences; every call succeeds whole or changes nothing.

    Several threads may use one.

    Args:
        metadata: the configuration of the cache.
    """

    def __init__(self, metadata: PagedAttentionCacheMetaData):
        self.metadata = metadata
        self._free = list(range(metadata.num_pages_per_layer - 1, -1, -1))
        self._pages: dict[Hashable, list[int]] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        pages = self.metadata.num_pages_per_layer
        return f"PageAllocator({self.num_free} of {pages} pages free, {len(self._pages)} sequences)"

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes over: all but the lock, of which it needs its own."""
        with self._lock:
            return {
                "metadata": self.metadata,
                "_free": list(self._free),
                "_pages": {sequence: list(pages) for sequence, pages in self._pages.items()},
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    @property
    def num_free(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def allocate(self, sequence: Hashable, length: int) -> list[int]:
        """Give ``sequence`` the pages it lacks to hold ``length`` tokens; a new one is made.

        Returns:
            the pages newly given, for ``cache.reset_pages``.

        Raises:
            AllocationError: more tokens than a sequence may have, or than there are pages free.
            TypeError, ValueError: a length that is no count, or None for a sequence.
        """
        try:
            length = operator.index(length)
        except TypeError:
            raise TypeError(f"length must be a whole number of tokens, but came as {length!r}.") from None
        if length < 0 or sequence is None:
            raise ValueError(
                f"sequence and length must be a name other than None and a count of tokens, but came as "
                f"{sequence!r} and {length}; None stands for an inactive row in page_table."
            )
        config = self.metadata
        pages_needed = -(-length // config.page_size)
        if pages_needed > config.num_pages_per_sequence:
            limit = config.num_pages_per_sequence * config.page_size
            raise AllocationError(
                f"length must be at most {limit} tokens, but {length} came for sequence {sequence!r}; "
                f"make the metadata with a larger max_sequences."
            )
        with self._lock:
            owned = self._pages.get(sequence, [])
            missing = pages_needed - len(owned)
            if missing > len(self._free):
                raise AllocationError(
                    f"sequence {sequence!r} needs {missing} more pages for {length} tokens, but "
                    f"{len(self._free)} are free; free a sequence, or make a cache with more pages."
                )
            added = [self._free.pop() for _ in range(max(missing, 0))]
            self._pages[sequence] = owned + added
            return added

    def free(self, sequence: Hashable) -> list[int]:
        """Take back all pages of ``sequence``, and return them.

        Raises:
            AllocationError: the sequence holds nothing.
        """
        with self._lock:
            pages = self._pages.pop(sequence, None)
            if pages is None:
                raise AllocationError(
                    f"sequence {sequence!r} holds no pages; it was never allocated or is freed."
                )
            self._free.extend(reversed(pages))
            return pages

    def page_table(self, sequences: Sequence[Hashable]) -> np.ndarray:
        """Return a page table (len(sequences), num_pages_per_sequence), int32.

        Entries are "no page" (``num_pages_per_layer``) where a sequence has none, and all of them for None,
        which stands for an inactive row.

        Raises:
            AllocationError: a sequence that holds nothing.
        """
        config = self.metadata
        table = np.full((len(sequences), config.num_pages_per_sequence), config.num_pages_per_layer, np.int32)
        for row, sequence in enumerate(sequences):
            if sequence is None:
                continue
            pages = self._pages.get(sequence)
            if pages is None:
                raise AllocationError(f"sequence {sequence!r} holds no pages; allocate it, or pass None.")
            table[row, : len(pages)] = pages
        return table
