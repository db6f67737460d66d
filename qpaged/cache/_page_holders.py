"""How many hold each page: the part of the allocator that knows pages, and no sequences."""

from collections.abc import Mapping, Sequence
from typing import Any

from qpaged.cache._allocation import AllocationError
from qpaged.cache._free_pages import FreePages
from qpaged.cache._page_changes import PageChanges, PendingChanges
from qpaged.cache._prefixes import Prefixes


class PageHolders:
    """Gives out pages, counts who holds them, and collects what that asks of the cache.

    A page is free, parked, or held: by sequences, or by a swap that is under way. See :class:`FreePages` for
    the arguments.
    """

    def __init__(self, pages: int, devices: int):
        self._free = FreePages(pages, devices)
        self._holders = [0] * pages
        self._prefixes = Prefixes()
        self._changes = PendingChanges(no_page=pages)

    @property
    def num_free(self) -> int:
        """Pages that nobody holds, parked ones among them."""
        return len(self._free) + self.num_parked

    @property
    def num_parked(self) -> int:
        return self._prefixes.num_parked

    @property
    def num_shared(self) -> int:
        return sum(holders > 1 for holders in self._holders)

    def holders(self, page: int) -> int:
        """Return how many hold a page."""
        return self._holders[page]

    def awaits_content(self, page: int) -> bool:
        """Return True if a page was given to be overwritten, and the changes were not taken since."""
        return self._changes.awaits_content(page)

    def fresh(self) -> int:
        """Return a page for one holder, which is as before any write once the changes are made."""
        page = self._take()
        self._changes.give(page)
        return page

    def to_overwrite(self) -> int:
        """Return a page for one holder, who overwrites it whole."""
        page = self._take()
        self._changes.give_to_overwrite(page)
        return page

    def copy(self, page: int) -> int:
        """Return a page for one of the holders of ``page``, who holds its copy from now on."""
        target = self._take()
        self._changes.copy(page, target)
        self._holders[page] -= 1
        return target

    def _take(self) -> int:
        """Return a free page, else the one that was parked first; it has one holder."""
        if self._free:
            page = self._free.take()
        else:
            page_hash, page = self._prefixes.evict()
            self._changes.evict(page_hash, page)
        self._holders[page] = 1
        return page

    def hold(self, page: int | None) -> None:
        """Note one holder more."""
        if page is not None:
            self._prefixes.hold(page)
            self._holders[page] += 1

    def drop(self, pages: Sequence[int | None]) -> list[int]:
        """Note one holder less of each page; return those that are free now.

        The last ones are parked first, and so evicted before those that they are found by.
        """
        freed = []
        for page in reversed(pages):
            if page is None:
                continue
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if self._prefixes.park(page):
                self._changes.park(page)
            else:
                self._changes.drop(page)
                self._free.add(page)
                freed.append(page)
        return freed[::-1]

    def find(self, page_hash: bytes) -> int | None:
        """Return the page that is found by a hash, or None if there is none."""
        return self._prefixes.find(page_hash)

    def share(self, page_hash: bytes, page: int) -> bool:
        """Let a page be found by its hash; return False if another one is."""
        is_added = self._prefixes.add(page_hash, page)
        if is_added:
            self._changes.keep(page_hash)
        return is_added

    def forget(self, page: int) -> None:
        """Let a page no longer be found, if it was: its content is about to change."""
        page_hash = self._prefixes.forget(page)
        if page_hash is not None:
            self._changes.evict(page_hash, page)

    def check_free(self, who: str, pages: int, purpose: str) -> None:
        """Raise AllocationError unless so many pages are free or parked."""
        if pages > self.num_free:
            raise AllocationError(
                f"{who} {pages} more pages {purpose}, but {self.num_free} are free; free a sequence, "
                f"or make a cache with more pages."
            )

    @property
    def has_changes(self) -> bool:
        """True if something is asked of the cache that was not taken yet."""
        return bool(self._changes)

    def to_record(self) -> dict[str, Any]:
        """Return free pages and prefixes as plain JSON; who holds the others, their holders know."""
        return {"free": list(self._free), **self._prefixes.to_record()}

    def restore(self, record: Mapping[str, Any], holders: list[int]) -> None:
        """Take over what :meth:`to_record` returned, and how many hold each page."""
        self._free.restore(record["free"])
        self._holders = holders
        self._prefixes.restore(record)

    def take_changes(self) -> PageChanges:
        """Return what is asked of the cache since the last call."""
        return self._changes.take()
