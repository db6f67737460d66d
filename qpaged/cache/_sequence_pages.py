"""Which pages each sequence holds, and what may be done with them."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from qpaged._arguments import shown
from qpaged.cache._allocation import AllocationError, check_hashable, checked_length
from qpaged.cache._page_holders import PageHolders


@dataclass
class SequencePages:
    """The pages of a sequence.

    Attributes:
        root: the hash before that of its first page.
        length: its tokens.
        pages: in order; None for those that are released, or swapped out.
        hashes: those of its first pages, as far as they are shared.
        released: how many of its first pages are released.
        swapped: the columns of its pages that are swapped out; None if it is not.
    """

    root: bytes
    length: int = 0
    pages: list[int | None] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    released: int = 0
    swapped: list[int] | None = None


class Growth(NamedTuple):
    """What a sequence is to grow to: ``length`` tokens. ``row`` is its place in the list of a call."""

    row: int
    name: Hashable
    held: SequencePages
    length: int


class NewPage(NamedTuple):
    """A page that a sequence was given: a fresh one, or a copy of one that it shared."""

    row: int
    column: int
    page: int
    is_fresh: bool


class SequenceTable(dict[Hashable, SequencePages]):
    """The pages of all sequences, by their names, and the checks of what is to be done with them.

    Args:
        page_size: tokens of a page.
        longest: pages of the longest sequence.
    """

    def __init__(self, page_size: int, longest: int):
        super().__init__()
        self.page_size = page_size
        self.longest = longest

    def __reduce__(self) -> Any:  # a dictionary's own would call the constructor without arguments
        return type(self), (self.page_size, self.longest), None, None, iter(self.items())

    def pages_of(self, length: int) -> int:
        """Return how many pages so many tokens take."""
        return -(-length // self.page_size)

    def present(self, name: Hashable, advice: str = "allocate it") -> SequencePages:
        """Return the pages of a sequence that is not swapped out."""
        check_hashable(name)
        held = self.get(name)
        if held is None:
            raise AllocationError(f"sequence {shown(name)} holds no pages; {advice}.")
        if held.swapped is not None:
            raise AllocationError(f"sequence {shown(name)} is swapped out; swap_in brings it back.")
        return held

    def growths(self, names: Sequence[Hashable | None], lengths: Sequence[int]) -> list[Growth]:
        """Return what each sequence that is not None is to have; all must be present, and come once."""
        given = [name for name in names if name is not None]
        growths = [
            Growth(row, name, self.present(name), lengths[row])
            for row, name in enumerate(names)
            if name is not None
        ]
        if len(set(given)) != len(given):
            twice = next(name for name in given if given.count(name) > 1)
            raise AllocationError(f"sequences must be different ones, but {shown(twice)} comes twice.")
        return growths

    def check_absent(self, name: Hashable) -> None:
        """Raise AllocationError if there is such a sequence."""
        if name in self:
            raise AllocationError(
                f"sequence {shown(name)} holds pages already; free it, or give another name."
            )

    def check_longest(self, name: Hashable, length: int) -> None:
        """Raise AllocationError for more tokens than a sequence may have."""
        if self.pages_of(length) > self.longest:
            raise AllocationError(
                f"length must be at most {self.longest * self.page_size} tokens, but got {length} for "
                f"sequence {shown(name)}; make the metadata with a larger max_sequences."
            )

    def checked_part(
        self, name: Hashable, held: SequencePages, length: object, argument: str = "length"
    ) -> int:
        """Return a number of the sequence's tokens, or raise AllocationError if it has fewer."""
        number = checked_length(length)
        if number > held.length:
            raise AllocationError(
                f"{argument} must be at most the {held.length} tokens of sequence {shown(name)}, but got "
                f"{number}; extend makes it longer."
            )
        return number

    def checked_end(self, name: Hashable, held: SequencePages, length: object) -> int:
        """Return a number of the sequence's tokens after which it may go on: not one that is released."""
        number = self.checked_part(name, held, length)
        first = held.released * self.page_size
        if number < first:
            raise AllocationError(
                f"length must be at least the {first} tokens that sequence {shown(name)} has released, but "
                f"got {number}; they cannot be written again."
            )
        return number

    def grow(self, growths: Sequence[Growth], pages: PageHolders) -> list[NewPage]:
        """Give sequences the pages they lack for their lengths; all of them or none."""
        missing, writers = 0, Counter[int]()
        for growth in growths:
            self.check_longest(growth.name, growth.length)
            missing += max(self.pages_of(growth.length) - len(growth.held.pages), 0)
            written = self._written_page(growth)
            if written is None:
                continue
            if pages.awaits_content(written):
                raise AllocationError(
                    f"sequence {shown(growth.name)} was swapped in, and its pages are not there yet; apply "
                    f"the changes and put them before anything else."
                )
            writers[written] += 1
        copies = sum(min(count, pages.holders(page) - 1) for page, count in writers.items())
        tokens = sum(growth.length for growth in growths)
        who = (
            f"sequence {shown(growths[0].name)} needs"
            if len(growths) == 1
            else f"{len(growths)} sequences need"
        )
        pages.check_free(who, missing + copies, f"for {tokens} tokens")
        return [given for growth in growths for given in self._grow_one(growth, pages)]

    def _grow_one(self, growth: Growth, pages: PageHolders) -> list[NewPage]:
        row, _, held, length = growth
        given = []
        written = self._written_page(growth)
        if written is not None and pages.holders(written) > 1:
            column = held.length // self.page_size
            page = held.pages[column] = pages.copy(written)
            given.append(NewPage(row, column, page, is_fresh=False))
        elif written is not None:
            pages.forget(written)
        for column in range(len(held.pages), self.pages_of(length)):
            page = pages.fresh()
            held.pages.append(page)
            given.append(NewPage(row, column, page, is_fresh=True))
        held.length = max(held.length, length)
        return given

    def _written_page(self, growth: Growth) -> int | None:
        """Return the page with some tokens already that a sequence will write to; None if there is none."""
        column, slot = divmod(growth.held.length, self.page_size)
        return growth.held.pages[column] if slot and growth.length > growth.held.length else None
