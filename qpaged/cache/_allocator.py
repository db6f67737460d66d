"""Who owns which page: host-side, no JAX."""

import threading
from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np

from qpaged._arguments import shown, whole_number
from qpaged.cache._config import PagedAttentionCacheMetaData, check_metadata


class AllocationError(RuntimeError):
    """A call that asked for what the allocator cannot give; nothing was changed."""


class PageAllocator:
    """Hands out the pages of a cache to sequences; every call succeeds whole or changes nothing.

    Several threads may use one.

    Args:
        metadata: the configuration of the cache.
    """

    def __init__(self, metadata: PagedAttentionCacheMetaData):
        check_metadata(metadata, "give the one that the cache is made for")
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
        _check_hashable(sequence)
        length = whole_number("length", length)
        if length < 0:
            raise ValueError(f"length must be a number of tokens, but got {length}; give 0 or more.")
        if sequence is None:
            raise ValueError(
                "sequence must not be None, which stands for an inactive row in page_table; give it a name."
            )
        config = self.metadata
        pages_needed = -(-length // config.page_size)
        if pages_needed > config.num_pages_per_sequence:
            limit = config.num_pages_per_sequence * config.page_size
            raise AllocationError(
                f"length must be at most {limit} tokens, but got {length} for sequence {sequence!r}; "
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
        _check_hashable(sequence)
        with self._lock:
            pages = self._pages.pop(sequence, None)
            if pages is None:
                raise AllocationError(
                    f"sequence {sequence!r} holds no pages: it was never allocated, or is freed already; "
                    f"free each sequence once."
                )
            self._free.extend(reversed(pages))
            return pages

    def page_table(self, sequences: Iterable[Hashable | None]) -> np.ndarray:
        """Return a page table (len(sequences), num_pages_per_sequence), int32.

        Entries are "no page" (``num_pages_per_layer``) where a sequence has none, and all of them for None,
        which stands for an inactive row.

        Raises:
            AllocationError: a sequence that holds nothing.
            TypeError: no list of sequences.
        """
        if isinstance(sequences, str | bytes) or not isinstance(sequences, Iterable):
            raise TypeError(f"sequences must be a list, but got {sequences!r}; give [{sequences!r}].")
        rows, config = list(sequences), self.metadata
        table = np.full((len(rows), config.num_pages_per_sequence), config.num_pages_per_layer, np.int32)
        for row, sequence in enumerate(rows):
            _check_hashable(sequence)
            if sequence is None:
                continue
            pages = self._pages.get(sequence)
            if pages is None:
                raise AllocationError(f"sequence {sequence!r} holds no pages; allocate it, or pass None.")
            table[row, : len(pages)] = pages
        return table


def _check_hashable(sequence: object) -> None:
    """Raise TypeError unless ``sequence`` can name a sequence."""
    try:
        hash(sequence)
    except TypeError as error:
        raise TypeError(
            f"sequence must be hashable, but got {shown(sequence)}; name it by a number, a string or a tuple."
        ) from error
