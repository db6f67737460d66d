"""Laws 3, 4 and 9: a write stays in its place, none lands out of range, and a reset page forgets."""

from typing import Any

import numpy as np

from qpaged.testing._law import law
from qpaged.testing._laws_values import within_bound
from qpaged.testing._pool import (
    ELSEWHERE,
    LARGEST_INDEX,
    MANY_PAGES,
    PAGE_SIZE,
    PAGES,
    TABLE,
    TOKENS,
    different,
    outside,
    parts,
    pools,
)
from qpaged.testing._subject import Subject

NO_PAGES = (
    np.array([PAGES, LARGEST_INDEX, -LARGEST_INDEX - 1], np.int32),
    np.array([-1, -PAGES, 4 * PAGES], np.int32),
)
POISONED = 9, 1, 5  # token, head, channel


def locality(subject: Subject, rows: np.ndarray, token: int, new: np.ndarray, case: str = "rows") -> None:
    """Law 3: writing one more row changes the blocks it writes into, and no other bit."""
    before = subject.prefilled(rows)
    again = rows.copy()
    again[token] = new
    position = np.full(TOKENS, -1, np.int32)
    position[0] = token
    after = subject.write(before, np.broadcast_to(new, rows.shape), position)
    within_bound(subject, after, again, f"{case}, one of them overwritten", number=3)
    untouched(subject, before, after, token, f"writing token {token} of {case} again")


def untouched(
    subject: Subject, before: Any, after: Any, token: int, case: str, element: tuple[int, int] | None = None
) -> None:
    """Two views differ only in the blocks of a token; or of one ``element`` (head, channel) of it.

    A block may reach over the slots of a page and the channels of a head, never over pages or heads. What is
    transformed, or has second-level scales, may change in all channels of the token.
    """
    keeps = law(3, subject)
    page, slot = TABLE[token // PAGE_SIZE], token % PAGE_SIZE
    for (name, old), (_, new) in zip(pools(before), pools(after), strict=True):
        heads, _, _, channels = old.shape
        box = [(0, heads), (page, page + 1), around(slot, old.block[2]), (0, channels)]
        if element is not None:
            box[0] = element[0], element[0] + 1
            if not (subject.quantizer.transforms or subject.quantizer.outer_dtype):
                box[3] = around(element[1], old.block[3])
        for part, stored in parts(old).items():
            here, there = (outside(array, old.shape, box) for array in (stored, parts(new)[part]))
            keeps(
                here.tobytes() == there.tobytes(), f"{case} changes the {part} of other blocks of the {name}"
            )


def around(index: int, extent: int) -> tuple[int, int]:
    """From where to where the block of an index reaches."""
    return index // extent * extent, index // extent * extent + extent


def not_finite(subject: Subject, rows: np.ndarray, bad: float) -> None:
    """Law 1: NaN is stored as 0 and an infinity as the largest number; without scales they may be kept."""
    poisoned = rows.copy()
    poisoned[POISONED] = bad
    dirty = subject.prefilled(poisoned)
    stored = [found["values"][POISONED] for found in subject.read(dirty, poisoned)]
    kept = subject.quantizer.scale_dtype is None and np.array_equal(stored, [bad, -bad], equal_nan=True)
    if not kept:
        within_bound(subject, dirty, poisoned, f"values of which one is {bad}")


def not_finite_alone(subject: Subject, rows: np.ndarray, bad: float) -> None:
    """Law 3: one NaN or infinity is known to no other block."""
    poisoned = rows.copy()
    poisoned[POISONED] = bad
    token, head, channel = POISONED
    clean, dirty = subject.prefilled(rows), subject.prefilled(poisoned)
    untouched(subject, clean, dirty, token, f"one {bad}", (head, channel))


def totality(subject: Subject, rows: np.ndarray, position: np.ndarray, table: np.ndarray) -> None:
    """Law 4: rows whose position or page is out of range are dropped, never clamped or wrapped."""
    keeps = law(4, subject)
    lands = (position >= 0) & (position < len(table) * PAGE_SIZE)
    page = table[np.where(lands, position // PAGE_SIZE, 0)]
    lands &= (page >= 0) & (page < PAGES)
    base = subject.prefilled(rows[::-1].copy())
    everything = subject.write(base, rows, position, table)
    only = subject.write(base, np.where(lands[:, None, None], rows, 0), np.where(lands, position, -1), table)
    where = f"at {position[~lands].tolist()} in pages {table.tolist()} of {PAGES}"
    found = different(everything, only)
    keeps(not found, f"rows out of range, {where}, were written to {', '.join(found)}")
    found = different(subject.write(base, rows, np.where(lands, -1, position), table), base)
    keeps(not found, f"a write of nothing but rows out of range, {where}, changed {', '.join(found)}")


def nowhere(subject: Subject, rows: np.ndarray) -> None:
    """Law 4: resets, copies and decodes out of range do nothing; reads there give NaN, as of a plain pool."""
    keeps = law(4, subject)
    view = subject.prefilled(rows)
    for pages in NO_PAGES:
        found = different(subject.reset(view, pages), view)
        keeps(not found, f"a reset of pages {pages.tolist()} of {PAGES} changed {', '.join(found)}")
    copies, past = subject.copied(view, TABLE, NO_PAGES[0])
    found = different(copies, view)
    keeps(not found, f"copying to pages {NO_PAGES[0].tolist()} of {PAGES} changed {', '.join(found)}")
    nan = all(np.isnan(np.asarray(pages, np.float32)).all() for pages in past)
    keeps(nan, "a read past the end is not NaN, as it is of a plain pool; Quantizer.past_end says how")

    beyond = np.array([-1, -LARGEST_INDEX - 1, len(TABLE) * PAGE_SIZE, LARGEST_INDEX], np.int32)
    position = np.stack([np.resize(beyond, TOKENS), np.arange(TOKENS, dtype=np.int32)], axis=1)
    table = np.stack([ELSEWHERE, np.array([MANY_PAGES, -1, LARGEST_INDEX], np.int32)])
    decoded = subject.decode(subject.enlarged(view), np.stack([rows, rows], axis=1), position, table)
    found = different(decoded, subject.enlarged(view))
    keeps(not found, f"decode steps of nothing but rows out of range changed {', '.join(found)}")


def reuse(
    subject: Subject, rows: np.ndarray, later: np.ndarray, chunks: list[np.ndarray], case: str = "rows"
) -> None:
    """Law 9: a page that was reset carries nothing of its earlier sequence."""
    again = subject.in_chunks(subject.reset(subject.prefilled(rows), TABLE), later, chunks)
    found = different(again, subject.in_chunks(subject.fresh(), later, chunks))
    law(9, subject)(not found, f"pages that held {case} and were reset remember it in {', '.join(found)}")


def fresh_pages(subject: Subject, rows: np.ndarray) -> None:
    """Law 9: fresh pages read as exact zeros, and those that were reset hold the same bits."""
    keeps, view = law(9, subject), subject.fresh()
    for (name, _), found in zip(pools(view), subject.read(view, np.zeros_like(rows)), strict=True):
        keeps(not found["values"].any(), f"fresh {name} do not read as exact zeros")
    remembered = different(subject.reset(subject.prefilled(rows), TABLE), view)
    keeps(not remembered, f"pages that were reset differ from fresh ones in {', '.join(remembered)}")
