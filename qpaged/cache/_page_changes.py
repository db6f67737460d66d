"""What an allocator asks of a cache: pages to copy, to pack and to reset."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

FEWEST = 8  # entries of an array that has any


def filled_up(values: Collection[int], filler: int, least: int = 0) -> np.ndarray:
    """Return values as int32, filled up to a power of two, so that programs of few sizes are compiled.

    Args:
        least: the array has room for so many at least. Without any it is empty.
    """
    most = max(len(values), least)
    size = max(FEWEST, 1 << (most - 1).bit_length()) if most else 0
    array = np.full(size, filler, np.int32)
    array[: len(values)] = list(values)
    return array


@dataclass(frozen=True)
class PageChanges:
    """What is to be done to the pages of a cache; ``cache.apply_changes(changes)`` does it, in this order.

    A pytree of int32 arrays, all of one length: 0 or a power of two, filled up with "no page". It is false if
    there is nothing to do.

    Attributes:
        source: (n,) pages to be copied, as they were before all changes.
        target: (n,) where each of them goes.
        pack: (n,) pages that no sequence holds any more; those that are exact make room for others.
        reset: (n,) pages that were given to a sequence, to be as before any write.
        evicted: the page that held the tokens of each hash that is no longer found. Not part of the tree.
    """

    source: np.ndarray
    target: np.ndarray
    pack: np.ndarray
    reset: np.ndarray
    evicted: dict[bytes, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return len(self.reset) > 0 or bool(self.evicted)

    @classmethod
    def of_groups(cls, changes: Sequence["PageChanges"], no_page: int) -> "PageChanges":
        """Return the changes of groups of devices, each with an allocator of its own, as those of one cache.

        Args:
            changes: of each group, in order.
            no_page: ``num_pages_per_layer``.

        Returns:
            the pages of one group after those of another, as many of each. :attr:`evicted` is empty, since
            hashes are found in the books of their own group.
        """
        most = max((len(of_group.reset) for of_group in changes), default=0)

        def joined(name: str) -> np.ndarray:
            parts = [getattr(of_group, name) for of_group in changes]
            widths = [(0, most - len(part)) for part in parts]
            filled = [
                np.pad(part, width, constant_values=no_page)
                for part, width in zip(parts, widths, strict=True)
            ]
            return np.concatenate([np.zeros(0, np.int32), *filled])

        return cls(joined("source"), joined("target"), joined("pack"), joined("reset"))


jax.tree_util.register_pytree_node(
    PageChanges,
    lambda changes: ((changes.source, changes.target, changes.pack, changes.reset), None),
    lambda _, arrays: PageChanges(*arrays),
)


class PendingChanges:
    """Collects changes until they are taken. The changes of one page may follow each other in any order.

    Args:
        no_page: the index that stands for no page.
    """

    def __init__(self, no_page: int):
        self._no_page = no_page
        self._clear()

    def _clear(self) -> None:
        self._sources: dict[int, int] = {}  # by target
        self._packed: dict[int, None] = {}
        self._fresh: dict[int, None] = {}
        self._awaiting: set[int] = set()
        self._evicted: dict[bytes, int] = {}

    def __bool__(self) -> bool:
        return bool(self._sources or self._packed or self._fresh or self._evicted)

    def awaits_content(self, page: int) -> bool:
        """Return True if a page is to be overwritten whole, and was not yet."""
        return page in self._awaiting

    def give(self, page: int) -> None:
        """Note that a page is given to a sequence, which may not see what is in it."""
        self._packed.pop(page, None)
        self._fresh[page] = None

    def give_to_overwrite(self, page: int) -> None:
        """Note that a page is given to a sequence that overwrites it whole once the changes are taken."""
        self._packed.pop(page, None)
        self._awaiting.add(page)

    def copy(self, source: int, target: int) -> None:
        """Note that ``target`` is given to a sequence, with the content of ``source``."""
        self._packed.pop(target, None)
        if source in self._fresh:  # it has no content yet, but that of a sequence before
            self._fresh[target] = None
        else:
            self._sources[target] = self._sources.get(source, source)

    def park(self, page: int) -> None:
        """Note that no sequence holds a page any more, and that its content is kept."""
        self._packed[page] = None

    def drop(self, page: int) -> None:
        """Note that no sequence holds a page any more, and that its content is of no use."""
        self._sources.pop(page, None)
        self._fresh.pop(page, None)
        self._awaiting.discard(page)
        self._packed[page] = None

    def evict(self, page_hash: bytes, page: int) -> None:
        """Note that the tokens of a hash are no longer found in ``page``."""
        self._evicted[page_hash] = page

    def keep(self, page_hash: bytes) -> None:
        """Note that the tokens of a hash are found again."""
        self._evicted.pop(page_hash, None)

    def take(self) -> PageChanges:
        """Return all changes since the last call."""
        most = max(len(self._sources), len(self._packed), len(self._fresh))
        changes = PageChanges(
            source=filled_up(self._sources.values(), self._no_page, most),
            target=filled_up(self._sources, self._no_page, most),
            pack=filled_up(self._packed, self._no_page, most),
            reset=filled_up(self._fresh, self._no_page, most),
            evicted=self._evicted,
        )
        self._clear()
        return changes
