"""Laws 1 and 2: what is read back, and that the order of writing does not show."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from qpaged.testing import _draws as draws
from qpaged.testing._law import law
from qpaged.testing._pool import ELSEWHERE, PAGES, SMALLEST, TABLE, TOKENS, differing, moved, pools
from qpaged.testing._subject import LARGE, Subject, narrowed

Found = dict[str, np.ndarray]


def error(subject: Subject, rows: np.ndarray, chunks: list[np.ndarray], case: str = "rows") -> None:
    """Law 1: in whatever order tokens are written, each reads back within the format's bound."""
    within_bound(subject, subject.in_chunks(subject.fresh(), rows, chunks), rows, case)


def within_bound(subject: Subject, view: Any, rows: np.ndarray, case: str = "rows", number: int = 1) -> None:
    """What a view holds differs from ``rows`` by what the format allows, and is rounded to its dtype once."""
    keeps = law(number, subject)
    for (name, pages), found in zip(pools(view), subject.read(view, rows), strict=True):
        off = np.abs(found["values"].astype(np.float64) - found["want"])
        over = off - found["bound"].astype(np.float64) - SMALLEST
        at = np.unravel_index(np.argmax(np.where(np.isnan(over), np.inf, over)), over.shape)
        keeps(
            (over <= 0).all(),
            f"of {case}, {found['want'][at]!s} among the {name} reads back as {found['values'][at]!s}, "
            f"off by {off[at]:.6g} where error_bound allows {found['bound'][at]:.6g}",
        )
        largest = np.float32(jnp.finfo(pages.dtype).max)
        once = np.clip(found["values"], -largest, largest).astype(pages.dtype)
        same = found["materialized"].dtype == once.dtype and (found["materialized"] == once).all()
        keeps(same, f"{case} read in {once.dtype} are not the {name} read in float32, rounded once")


def worth_stating(subject: Subject) -> None:
    """Law 1: the bound says something.

    Of gaussian values a format must lose less than reading zeros would, in the mean square, and state a bound
    below the largest magnitude there is. The bound of a format that transforms channels covers the worst of
    sums over all of them, so that it may be larger by the square root of their number, which is what an
    orthonormal map can make of errors as large as the values.
    """
    keeps = law(1, subject)
    rows = draws.rows(draws.GAUSSIAN, 0, subject.shape)
    for found in subject.read(subject.prefilled(rows), rows):
        want = found["want"]
        lost, had = (np.sqrt(np.mean(x**2)) for x in (found["values"] - want, want))
        keeps(lost < had, f"of gaussian values, {lost:.3g} of {had:.3g} is lost, root mean squared")
        most = np.abs(want).max() * np.sqrt(want.shape[-1] if subject.quantizer.transforms else 1)
        stated = found["bound"].max()
        keeps(
            stated < most,
            f"error_bound states {stated:.3g} for gaussian values, of which zeros keep {most:.3g}",
        )


def order(subject: Subject, rows: np.ndarray, chunks: list[np.ndarray], case: str = "rows") -> None:
    """Law 2: one prefill and any chunks in any order leave the same bits, or what the format declares."""
    whole, apart = subject.prefilled(rows), subject.in_chunks(subject.fresh(), rows, chunks)
    for name in ("keys", "values"):
        same_but_for_order(subject, whole, apart, rows, name, case)


def same_but_for_order(
    subject: Subject, one: Any, other: Any, rows: np.ndarray, name: str, case: str
) -> None:
    """A pool of two views holds the same, bit for bit, or within the order bound that the format declares."""
    keeps, found = law(2, subject), differing(one, other, name)
    declared = subject.quantizer.order_bound
    if declared != 0:
        here, there = (read_pool(subject, view, rows, name)["units"] for view in (one, other))
        off = np.abs(here.astype(np.float64) - there).max()
        keeps(
            off <= declared,
            f"{case} leave {name} {off:g} scales from one prefill's, beyond order_bound {declared:g}",
        )
        found = [part for part in found if "codes" not in part]
    keeps(not found, f"{case} leave other bits than one prefill of the same in {', '.join(found)}")


def read_pool(subject: Subject, view: Any, rows: np.ndarray, name: str) -> Found:
    """What the keys or the values of a view hold."""
    return dict(zip(("keys", "values"), subject.read(view, rows), strict=True))[name]


def decodes(subject: Subject, rows: np.ndarray, prefilled: int, case: str = "rows") -> None:
    """Law 2: decode steps, beside an inactive row, behind a prefill or none, leave what a prefill leaves."""
    rows, tokens = narrowed(rows, LARGE[1]), np.arange(TOKENS, dtype=np.int32)
    whole = subject.prefilled(rows)
    first = subject.in_chunks(subject.fresh(), rows, [tokens[:prefilled]])
    batch = np.stack([np.full_like(rows, 1e6), rows], axis=1)
    position = np.stack([np.full(TOKENS, -1, np.int32), np.where(tokens < prefilled, -1, tokens)], axis=1)
    view = subject.decode(subject.enlarged(first), batch, position, np.stack([ELSEWHERE, ELSEWHERE]))
    back = moved(view, ELSEWHERE, TABLE, PAGES)
    same_but_for_order(subject, whole, back, rows, "keys", case)
    if prefilled == 0:
        within_bound(subject, back, rows, case)
