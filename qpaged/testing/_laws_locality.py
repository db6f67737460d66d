"""Laws 3, 4 and 9: which blocks a write changes, indices out of range, and pages that are reset."""

import numpy as np

from qpaged.testing._inputs import Chunks
from qpaged.testing._law import law
from qpaged.testing._laws_error import within_bound
from qpaged.testing._pools import (
    LARGE_TABLE,
    LARGEST_INDEX,
    MANY_PAGES,
    PAGE_SIZE,
    PAGES,
    TABLE,
    TOKENS,
    View,
    differences,
    has_static,
    parts,
    pools,
    zero_inside,
)
from qpaged.testing._subject import Subject

PAGES_OUT_OF_RANGE = (
    np.array([PAGES, LARGEST_INDEX, -LARGEST_INDEX - 1], np.int32),
    np.array([-1, -PAGES, 4 * PAGES], np.int32),
)
POISONED = 9, 1, 5  # token, head and channel of the one value that is not finite


def locality(subject: Subject, rows: np.ndarray, token: int, new: np.ndarray, case: str = "rows") -> None:
    """Law 3: writing one more row changes the blocks it writes into, and no other bit."""
    before = subject.prefilled(rows)
    overwritten = rows.copy()
    overwritten[token] = new
    position = np.full(TOKENS, -1, np.int32)
    position[0] = token
    after = subject.write(before, np.broadcast_to(new, rows.shape), position)
    within_bound(subject, after, overwritten, f"{case}, one of them overwritten", number=3)
    same_outside_token(subject, before, after, token, f"writing token {token} of {case} again")


def same_outside_token(
    subject: Subject,
    before: View,
    after: View,
    token: int,
    case: str,
    element: tuple[int, int] | None = None,
) -> None:
    """Check that two views differ only in the blocks of a token, or of one ``element`` (head, channel) of it.

    A block may span the slots of a page and the channels of a head, but never pages or heads. Static scales,
    which do, no write changes: only the element's own code.
    """
    check = law(3, subject)
    page = TABLE[token // PAGE_SIZE]
    slot = token % PAGE_SIZE
    # A transform, and second-level scales, spread a change over all channels of the token.
    spreads = subject.quantizer.transform is not None or subject.quantizer.global_scale is not None
    for (name, old), (_, new) in zip(pools(before), pools(after), strict=True):
        heads, _, _, channels = old.shape
        block = (1,) * old.ndim if subject.quantizer.has_static_scales else old.block
        box = [(0, heads), (page, page + 1), block_span(slot, block[2]), (0, channels)]
        if element is not None:
            head, channel = element
            box[0] = head, head + 1
            if not spreads:
                box[3] = block_span(channel, block[3])
        # One code an element, since those of one channel may lie in several bytes.
        new_parts = parts(new) | {"codes": np.asarray(new.unpacked())}
        for part, stored in (parts(old) | {"codes": np.asarray(old.unpacked())}).items():
            old_rest, new_rest = stored, new_parts[part]
            if not has_static(old, part):
                old_rest = zero_inside(stored, old.shape, box)
                new_rest = zero_inside(new_parts[part], old.shape, box)
            check(
                old_rest.tobytes() == new_rest.tobytes(),
                f"{case} changes the {part} of other blocks of the {name}",
            )


def block_span(index: int, extent: int) -> tuple[int, int]:
    """Return (from, to) of the block of ``extent`` elements that holds an index."""
    start = index // extent * extent
    return start, start + extent


def not_finite(subject: Subject, rows: np.ndarray, bad: float) -> None:
    """Law 1: NaN is stored as 0 and an infinity as the largest number; without scales they may be kept."""
    poisoned = rows.copy()
    poisoned[POISONED] = bad
    view = subject.prefilled(poisoned)
    stored = [reading["values"][POISONED] for reading in subject.read(view, poisoned)]
    if subject.quantizer.scale_dtype is None and np.array_equal(stored, [bad, -bad], equal_nan=True):
        return
    within_bound(subject, view, poisoned, f"values of which one is {bad}")


def not_finite_alone(subject: Subject, rows: np.ndarray, bad: float) -> None:
    """Law 3: one NaN or infinity changes no other block."""
    poisoned = rows.copy()
    poisoned[POISONED] = bad
    token, head, channel = POISONED
    clean = subject.prefilled(rows)
    dirty = subject.prefilled(poisoned)
    same_outside_token(subject, clean, dirty, token, f"one {bad}", (head, channel))


def totality(subject: Subject, rows: np.ndarray, position: np.ndarray, table: np.ndarray) -> None:
    """Law 4: rows whose position or page is out of range are dropped, never clamped or wrapped."""
    check = law(4, subject)
    in_range = (position >= 0) & (position < len(table) * PAGE_SIZE)
    page = table[np.where(in_range, position // PAGE_SIZE, 0)]
    in_range &= (page >= 0) & (page < PAGES)
    where = f"at {position[~in_range].tolist()} in pages {table.tolist()} of {PAGES}"
    base = subject.prefilled(rows[::-1].copy())

    written = subject.write(base, rows, position, table)
    valid_rows = np.where(in_range[:, None, None], rows, 0)
    expected = subject.write(base, valid_rows, np.where(in_range, position, -1), table)
    changed = differences(written, expected)
    check(not changed, f"rows out of range, {where}, were written to {', '.join(changed)}")

    nothing_written = subject.write(base, rows, np.where(in_range, -1, position), table)
    changed = differences(nothing_written, base)
    check(not changed, f"a write of nothing but rows out of range, {where}, changed {', '.join(changed)}")


def totality_of_other_steps(subject: Subject, rows: np.ndarray) -> None:
    """Law 4: resets, copies and decodes out of range do nothing; reads there give NaN, as of a plain pool."""
    view = subject.prefilled(rows)
    resets_out_of_range(subject, view)
    copies_out_of_range(subject, view)
    decodes_out_of_range(subject, view, rows)


def resets_out_of_range(subject: Subject, view: View) -> None:
    """Check that a reset of pages out of range changes nothing."""
    for pages in PAGES_OUT_OF_RANGE:
        changed = differences(subject.reset(view, pages), view)
        law(4, subject)(
            not changed, f"a reset of pages {pages.tolist()} of {PAGES} changed {', '.join(changed)}"
        )


def copies_out_of_range(subject: Subject, view: View) -> None:
    """Check that a copy to pages out of range changes nothing, and that a read past the end is NaN."""
    check = law(4, subject)
    target = PAGES_OUT_OF_RANGE[0]
    copied, past_end = subject.copied(view, TABLE, target)
    changed = differences(copied, view)
    check(not changed, f"copying to pages {target.tolist()} of {PAGES} changed {', '.join(changed)}")
    all_nan = all(np.isnan(np.asarray(pages, np.float32)).all() for pages in past_end)
    check(all_nan, "a read past the end is not NaN, as it is of a plain pool; Quantizer.nan_scale says how")


def decodes_out_of_range(subject: Subject, view: View, rows: np.ndarray) -> None:
    """Check that decode steps change nothing if each row's position or page is out of range."""
    invalid_positions = np.array([-1, -LARGEST_INDEX - 1, len(TABLE) * PAGE_SIZE, LARGEST_INDEX], np.int32)
    invalid_table = np.array([MANY_PAGES, -1, LARGEST_INDEX], np.int32)
    position = np.stack([np.resize(invalid_positions, TOKENS), np.arange(TOKENS, dtype=np.int32)], axis=1)
    table = np.stack([LARGE_TABLE, invalid_table])
    decoded = subject.decode(subject.enlarged(view), np.stack([rows, rows], axis=1), position, table)
    changed = differences(decoded, subject.enlarged(view))
    law(4, subject)(
        not changed, f"decode steps of nothing but rows out of range changed {', '.join(changed)}"
    )


def reuse(subject: Subject, rows: np.ndarray, later: np.ndarray, chunks: Chunks, case: str = "rows") -> None:
    """Law 9: a page that was reset carries nothing of its earlier sequence."""
    reset = subject.reset(subject.prefilled(rows), TABLE)
    reused = subject.in_chunks(reset, later, chunks)
    expected = subject.in_chunks(subject.fresh(), later, chunks)
    changed = differences(reused, expected)
    law(9, subject)(not changed, f"pages that held {case} and were reset remember it in {', '.join(changed)}")


def fresh_pages(subject: Subject, rows: np.ndarray) -> None:
    """Law 9: fresh pages read as exact zeros, and those that were reset hold the same bits."""
    check = law(9, subject)
    view = subject.fresh()
    for (name, _), reading in zip(pools(view), subject.read(view, np.zeros_like(rows)), strict=True):
        check(not reading["values"].any(), f"fresh {name} do not read as exact zeros")
    changed = differences(subject.reset(subject.prefilled(rows), TABLE), view)
    check(not changed, f"pages that were reset differ from fresh ones in {', '.join(changed)}")
