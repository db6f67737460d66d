"""Who holds which page: host-side, no JAX."""

import copy
import threading
from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from qpaged._arguments import positive, shown
from qpaged.cache._allocation import (
    AllocationError,
    PageCounts,
    PageTableUpdates,
    check_hashable,
    check_new,
    check_salt,
    checked_counts,
    checked_length,
    checked_names,
)
from qpaged.cache._config import PagedAttentionCacheMetaData, check_metadata
from qpaged.cache._page_changes import PageChanges, filled_up
from qpaged.cache._page_holders import PageHolders
from qpaged.cache._prefixes import as_tokens, page_hashes, root_hash
from qpaged.cache._sequence_pages import Growth, SequencePages, SequenceTable


class PageAllocator:
    """Hands out the pages of a cache to sequences; every call succeeds whole or changes nothing.

    Sequences may share pages: those of a fork, and those of a prefix that was found. A page that several hold
    is copied before one of them writes to it. What that asks of the cache is collected: after calls, and
    before anything else is done to the cache, do ``cache = cache.apply_changes(allocator.take_changes())``.

    Several threads may use one.

    Args:
        metadata: the configuration of the cache, all of whose pages are fresh.
        salt: tells prefixes of one model and format from those of others, where hashes leave the process.
        devices: how many share the pages of a sequence, along the mesh axis ``cp``: each page is taken from
            the one that has the most free.

    Raises:
        TypeError, ValueError: arguments of another kind, or devices that do not divide the pages.
    """

    def __init__(self, metadata: PagedAttentionCacheMetaData, salt: str = "", devices: int = 1):
        check_metadata(metadata, "give the one that the cache is made for")
        check_salt(salt)
        pages = metadata.num_pages_per_layer
        self.metadata = metadata
        self.salt = salt
        self.devices = positive("devices", devices)
        self._pages = PageHolders(pages, self.devices)
        self._pinned: set[int] = set()
        self._sequences = SequenceTable(metadata.page_size, metadata.num_pages_per_sequence)
        self._looked_up = self._matched = 0
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        pages = self.metadata.num_pages_per_layer
        return f"PageAllocator({self.num_free} of {pages} pages free, {len(self._sequences)} sequences)"

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes over: all but the lock, of which it needs its own."""
        with self._lock:
            state = {name: value for name, value in vars(self).items() if name != "_lock"}
            names = {id(name): name for name in self._sequences}  # which stay what they are
            return copy.deepcopy(state, names | {id(self.metadata): self.metadata})

    def __deepcopy__(self, memo: dict[int, Any]) -> "PageAllocator":
        made = object.__new__(type(self))
        memo[id(self)] = made
        made.__setstate__(self.__getstate__())  # whose names are these, not copies
        return made

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    @property
    def num_free(self) -> int:
        """Pages that no sequence holds."""
        return self._pages.num_free

    def allocate(self, sequence: Hashable, length: int) -> list[int]:
        """Give ``sequence`` the pages it lacks to hold ``length`` tokens; a new one is made.

        Returns:
            the fresh pages among those newly given, for ``cache.reset_pages``; :meth:`take_changes` has them
            too.

        Raises:
            AllocationError: more tokens than a sequence may have, or than there are pages free; or a sequence
                that is swapped out.
            TypeError, ValueError: a length that is no count, or None for a sequence.
        """
        check_new(sequence)
        length = checked_length(length)
        with self._lock:
            if sequence in self._sequences:
                held = self._sequences.present(sequence)
            else:
                held = SequencePages(self._root(""))
            given = self._sequences.grow([Growth(0, sequence, held, length)], self._pages)
            self._sequences[sequence] = held
            return [new.page for new in given if new.is_fresh]

    def extend(self, sequences: Iterable[Hashable | None], lengths: ArrayLike) -> PageTableUpdates:
        """Give each sequence the pages it lacks to hold so many tokens; None stands for an inactive row.

        Where a sequence is to write to a page that it shares, it gets a copy. A length that a sequence has
        already changes nothing.

        Args:
            lengths: (len(sequences),) integers.

        Returns:
            the changes of ``page_table(sequences)``.

        Raises:
            AllocationError: as :meth:`allocate`; or a sequence that holds nothing, or comes twice.
            TypeError, ValueError: lengths that are no counts, or not as many as sequences.
        """
        names = checked_names(sequences)
        tokens = checked_counts("lengths", lengths, len(names))
        with self._lock:
            given = self._sequences.grow(self._sequences.growths(names, tokens), self._pages)
            return self._updates(names, [(new.row, new.column, new.page) for new in given])

    def fork(self, source: Hashable, target: Hashable, length: int | None = None) -> None:
        """Make a sequence ``target`` of the first ``length`` tokens of ``source``, on the same pages.

        Args:
            length: tokens that were written; None for all that ``source`` has pages for.

        Raises:
            AllocationError: ``source`` holds nothing, has fewer tokens or has released so many, or is
                swapped out; or there is a ``target`` already.
            TypeError, ValueError: a length that is no count, or None for a sequence.
        """
        check_new(target)
        with self._lock:
            held = self._sequences.present(source)
            self._sequences.check_absent(target)
            end = held.length if length is None else self._sequences.checked_end(source, held, length)
            pages = held.pages[: self._sequences.pages_of(end)]
            for page in pages:
                self._pages.hold(page)
            hashes = held.hashes[: end // self.metadata.page_size]
            self._sequences[target] = SequencePages(held.root, end, pages, hashes, held.released)

    def free(self, sequence: Hashable) -> list[int]:
        """Take back all pages of ``sequence``, and return those that hold nothing now.

        Pages that another sequence holds stay as they are, and those of a prefix that is shared are parked.

        Raises:
            AllocationError: the sequence holds nothing.
        """
        check_hashable(sequence)
        with self._lock:
            held = self._sequences.pop(sequence, None)
            if held is None:
                raise AllocationError(
                    f"sequence {shown(sequence)} holds no pages: it was never allocated, or is freed "
                    f"already; free each sequence once."
                )
            return self._pages.drop(held.pages)

    def truncate(self, sequence: Hashable, length: int) -> list[int]:
        """Take back the pages past the first ``length`` tokens, as after rejected drafts.

        Returns:
            the pages that hold nothing now.

        Raises:
            AllocationError: the sequence holds nothing, has fewer tokens or has released so many, or is
                swapped out.
            TypeError, ValueError: a length that is no count.
        """
        with self._lock:
            held = self._sequences.present(sequence)
            held.length = self._sequences.checked_end(sequence, held, length)
            pages = self._sequences.pages_of(held.length)
            dropped = held.pages[pages:]
            del held.pages[pages:], held.hashes[held.length // self.metadata.page_size :]
            return self._pages.drop(dropped)

    def release_prefix(self, sequences: Iterable[Hashable | None], positions: ArrayLike) -> PageTableUpdates:
        """Take back the pages before each position, which a sliding window will not reach any more.

        Args:
            positions: (len(sequences),) integers; the first position that is still needed.

        Returns:
            the changes of ``page_table(sequences)``: "no page". A table that is kept must follow.

        Raises:
            AllocationError: a sequence that holds nothing, has fewer tokens, is swapped out, or comes twice.
            TypeError, ValueError: positions that are no counts, or not as many as sequences.
        """
        names = checked_names(sequences)
        firsts = checked_counts("positions", positions, len(names))
        page_size = self.metadata.page_size
        with self._lock:
            given = self._sequences.growths(names, firsts)
            for _, name, held, first in given:
                self._sequences.checked_part(name, held, first, "positions")
            entries = []
            for row, _, held, first in given:
                columns = range(held.released, first // page_size)
                self._pages.drop([held.pages[column] for column in columns])
                for column in columns:
                    held.pages[column] = None
                    entries.append((row, column, self.metadata.num_pages_per_layer))
                held.released = max(held.released, columns.stop)
            return self._updates(names, entries)

    def match_prefix(self, sequence: Hashable, tokens: ArrayLike, salt: str = "") -> int:
        """Make a sequence of the first of these tokens whose keys and values are in the cache already.

        At least one token is left, for the model to go on from.

        Args:
            tokens: (n,) integers; those of the whole prompt.
            salt: what else decides keys and values: an adapter, a tenant, what an image's tokens stand for.
                Prefixes are found under the salt that they were shared with.

        Returns:
            how many tokens were found: a multiple of the page size, perhaps 0.

        Raises:
            AllocationError: there is such a sequence already, or more tokens than one may have.
            TypeError, ValueError: tokens that are none, or None for a sequence.
        """
        check_new(sequence)
        check_salt(salt)
        prompt = as_tokens(tokens)
        with self._lock:
            self._sequences.check_absent(sequence)
            self._sequences.check_longest(sequence, len(prompt))
            held = SequencePages(self._root(salt))
            for page_hash in page_hashes(held.root, prompt[:-1], self.metadata.page_size):
                page = self._pages.find(page_hash)
                if page is None:
                    break
                self._pages.hold(page)
                held.pages.append(page)
                held.hashes.append(page_hash)
            held.length = len(held.pages) * self.metadata.page_size
            self._sequences[sequence] = held
            self._looked_up += len(prompt)
            self._matched += held.length
            return held.length

    def share_prefix(self, sequence: Hashable, tokens: ArrayLike) -> dict[bytes, int]:
        """Let the full pages of these tokens, which are written, be found by :meth:`match_prefix`.

        They are found until they are evicted, also when the sequence is freed.

        Args:
            tokens: (n,) integers; the first ones of the sequence. Those of pages that are shared already are
                not read again.

        Returns:
            the page of each hash that is found now and was not before.

        Raises:
            AllocationError: the sequence holds nothing, has fewer tokens, or is swapped out.
            TypeError, ValueError: tokens that are none.
        """
        written, page_size = as_tokens(tokens), self.metadata.page_size
        with self._lock:
            held = self._sequences.present(sequence)
            self._sequences.checked_part(sequence, held, len(written), "tokens")
            first = len(held.hashes)
            parent = held.hashes[-1] if first else held.root
            added = {}
            for page_hash in page_hashes(parent, written[first * page_size :], page_size):
                page = held.pages[len(held.hashes)]
                held.hashes.append(page_hash)
                if page is not None and self._pages.share(page_hash, page):
                    added[page_hash] = page
            return added

    def prefix_hashes(self, tokens: ArrayLike, salt: str = "") -> list[bytes]:
        """Return the hash of each full page of tokens (n,): of the tokens in it, those before it, and salts.

        Raises:
            TypeError, ValueError: tokens that are none.
        """
        check_salt(salt)
        return list(page_hashes(self._root(salt), as_tokens(tokens), self.metadata.page_size))

    def swap_out(self, sequence: Hashable) -> np.ndarray:
        """Return the pages that ``sequence`` alone holds, to be taken out of the cache; it holds the others.

        They are given to nobody before :meth:`release`: call it when they are on the host. The sequence has
        to be swapped in before anything but :meth:`free` is done with it.

        Returns:
            (n,) int32, for ``cache.take_pages``; filled up to a power of two with "no page".

        Raises:
            AllocationError: the sequence holds nothing, or is swapped out already.
        """
        with self._lock:
            held = self._sequences.present(sequence)
            held.swapped, pages = [], []
            for column, page in enumerate(held.pages):
                if page is not None and self._pages.holders(page) == 1:
                    held.swapped.append(column)
                    held.pages[column] = None
                    pages.append(page)
            self._pinned.update(pages)
            return self._filled_up(pages)

    def release(self, pages: ArrayLike) -> list[int]:
        """Take back pages of :meth:`swap_out`, and return those that hold nothing now.

        Raises:
            AllocationError: pages that are not swapped out, or released already.
            TypeError: pages that are no integers.
        """
        array = np.asarray(pages)
        if array.size and array.dtype.kind not in "iu":
            raise TypeError(f"pages must be integers, but got {shown(pages)}; give what swap_out returned.")
        given = [int(page) for page in array if page != self.metadata.num_pages_per_layer]
        with self._lock:
            unknown = sorted(set(given) - self._pinned)
            if unknown or len(set(given)) != len(given):
                raise AllocationError(
                    f"pages must be those of one swap_out, but {unknown or given} are not swapped out, or "
                    f"come twice; release them once."
                )
            self._pinned.difference_update(given)
            return self._pages.drop(given)

    def swap_in(self, sequence: Hashable) -> np.ndarray:
        """Give a sequence pages in place of those that were swapped out.

        Apply the changes, and put the pages, before anything else is done with the sequence.

        Returns:
            (n,) int32, for ``cache.put_pages``, in the order of :meth:`swap_out` and as many.

        Raises:
            AllocationError: the sequence is not swapped out, or too few pages are free.
        """
        check_hashable(sequence)
        with self._lock:
            held = self._sequences.get(sequence)
            if held is None or held.swapped is None:
                raise AllocationError(
                    f"sequence {shown(sequence)} is not swapped out; swap_in goes with a swap_out before it."
                )
            self._pages.check_free(f"sequence {shown(sequence)} needs", len(held.swapped), "to be swapped in")
            pages = [self._pages.to_overwrite() for _ in held.swapped]
            for column, page in zip(held.swapped, pages, strict=True):
                held.pages[column] = page
            held.swapped = None
            return self._filled_up(pages)

    def take_changes(self) -> PageChanges:
        """Return what the calls since the last one of this ask of the cache, for ``cache.apply_changes``."""
        with self._lock:
            return self._pages.take_changes()

    def page_table(self, sequences: Iterable[Hashable | None]) -> np.ndarray:
        """Return a page table (len(sequences), num_pages_per_sequence), int32.

        Entries are "no page" (``num_pages_per_layer``) where a sequence has none, and all of them for None,
        which stands for an inactive row.

        Raises:
            AllocationError: a sequence that holds nothing, or is swapped out.
            TypeError: no list of sequences.
        """
        names, config = checked_names(sequences), self.metadata
        no_page = config.num_pages_per_layer
        table = np.full((len(names), config.num_pages_per_sequence), no_page, np.int32)
        with self._lock:
            for row, name in enumerate(names):
                if name is not None:
                    pages = self._sequences.present(name, "allocate it, or pass None").pages
                    table[row, : len(pages)] = [no_page if page is None else page for page in pages]
        return table

    def length(self, sequence: Hashable) -> int:
        """Return how many tokens a sequence has pages for.

        Raises:
            AllocationError: it holds nothing, or is swapped out.
        """
        with self._lock:
            return self._sequences.present(sequence).length

    def counts(self) -> PageCounts:
        """Return what pages are used for now, and how many tokens were found so far, for metrics."""
        with self._lock:
            pages = self._pages
            return PageCounts(
                free=pages.num_free - pages.num_parked,
                parked=pages.num_parked,
                held=self.metadata.num_pages_per_layer - pages.num_free,
                shared=pages.num_shared,
                pinned=len(self._pinned),
                looked_up=self._looked_up,
                matched=self._matched,
            )

    def _root(self, salt: str) -> bytes:
        return root_hash(self.metadata, self.salt, salt)

    def _filled_up(self, pages: Collection[int]) -> np.ndarray:
        """Return pages as int32, filled up with "no page"; one entry at least, for ``take_pages``."""
        return filled_up(pages, self.metadata.num_pages_per_layer, least=1)

    def _updates(
        self, names: Sequence[Hashable | None], entries: Sequence[tuple[int, int, int]]
    ) -> PageTableUpdates:
        """Return (row, column, page) entries of the page table of ``names``."""
        rows, columns, pages = zip(*entries, strict=True) if entries else ((), (), ())
        no_page = self.metadata.num_pages_per_layer
        return PageTableUpdates(filled_up(rows, len(names)), filled_up(columns, 0), filled_up(pages, no_page))
