"""What calls of the allocator return, and the checks of their arguments."""

from collections.abc import Hashable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from qpaged._arguments import check_type, shown, whole_number


class AllocationError(RuntimeError):
    """A call that asked for what the allocator cannot give; nothing was changed."""


class PageTableUpdates(NamedTuple):
    """Entries of a page table that have changed: ``table.at[row, column].set(page, mode="drop")`` sets them.

    Filled up to a power of two with rows past the end, which are dropped.

    Attributes:
        row: (n,) int32; the place of the sequence in the list that the call was given.
        column: (n,) int32; the page's place in its sequence.
        page: (n,) int32.
    """

    row: np.ndarray
    column: np.ndarray
    page: np.ndarray


class PageCounts(NamedTuple):
    """What an allocator's pages are used for, and how often prefixes were found.

    Attributes:
        free: pages that hold nothing.
        parked: pages that no sequence holds, but whose tokens are still found; they are given out when no
            page is free, the one first that was parked first.
        held: pages that sequences hold, or that are on their way to the host.
        shared: those of them that several hold.
        pinned: those of them that were swapped out and not released yet.
        looked_up: tokens that were looked for by ``match_prefix``.
        matched: those of them that were found.
    """

    free: int
    parked: int
    held: int
    shared: int
    pinned: int
    looked_up: int
    matched: int

    @property
    def hit_rate(self) -> float:
        """The share of tokens that were found; 0 if none was looked for."""
        return self.matched / max(self.looked_up, 1)


def checked_length(length: object) -> int:
    """Return a number of tokens, or raise TypeError or ValueError if it is none."""
    number = whole_number("length", length)
    if number < 0:
        raise ValueError(f"length must be a number of tokens, but got {number}; give 0 or more.")
    return number


def checked_counts(name: str, counts: ArrayLike, rows: int) -> list[int]:
    """Return as many numbers of tokens as there are rows, or raise TypeError or ValueError."""
    array = np.asarray(counts)
    if array.shape != (rows,):
        raise ValueError(
            f"{name} must have shape ({rows},), one for each sequence, but came with {array.shape}."
        )
    if rows and array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, but got {shown(counts)}; give numbers of tokens.")
    numbers = [int(number) for number in array]
    if min(numbers, default=0) < 0:
        raise ValueError(f"{name} must be numbers of tokens, but got {min(numbers)}; give 0 or more.")
    return numbers


def checked_names(sequences: object) -> list[Hashable | None]:
    """Return a list of sequences, or raise TypeError if it is none."""
    if isinstance(sequences, str | bytes) or not isinstance(sequences, Iterable):
        raise TypeError(f"sequences must be a list, but got {sequences!r}; give [{sequences!r}].")
    names = list(sequences)
    for name in names:
        check_hashable(name)
    return names


def check_new(sequence: object) -> None:
    """Raise TypeError or ValueError unless ``sequence`` can name a new sequence."""
    check_hashable(sequence)
    if sequence is None:
        raise ValueError(
            "sequence must not be None, which stands for an inactive row in page_table; give it a name."
        )


def check_hashable(sequence: object) -> None:
    """Raise TypeError unless ``sequence`` can name a sequence."""
    try:
        hash(sequence)
    except TypeError as error:
        raise TypeError(
            f"sequence must be hashable, but got {shown(sequence)}; name it by a number, a string or a tuple."
        ) from error


def check_salt(salt: object) -> None:
    check_type("salt", salt, str, "a string", "join several parts to one")
