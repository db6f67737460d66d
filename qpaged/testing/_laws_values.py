"""Laws 1 and 2: what is read back, and that the order of writing does not show."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from qpaged.testing._draws import GAUSSIAN
from qpaged.testing._draws import rows as drawn
from qpaged.testing._law import require
from qpaged.testing._pool import ELSEWHERE, PAGES, SMALLEST, TABLE, TOKENS, differing, moved, pools
from qpaged.testing._subject import LARGE, Subject, narrowed


def error(subject: Subject, rows: np.ndarray, chunks: list[np.ndarray], case: str = "") -> None:
    """Law 1: in whatever order tokens are written, each reads back within the format's bound."""
    view = subject.in_chunks(subject.fresh(), rows, chunks)
    within_bound(subject, view, rows, case)


def within_bound(subject: Subject, view: Any, rows: np.ndarray, case: str = "", law: int = 1) -> None:
    """What a view holds differs from ``rows`` by what the format allows, and is rounded to its dtype once."""
    for (name, pages), found in zip(pools(view), subject.read(view, rows), strict=True):
        off, allowed = np.abs(found["values"].astype(np.float64) - found["want"]), found["bound"].astype(np.float64) + SMALLEST
        worst = np.unravel_index(np.nanargmax(off - allowed), off.shape)
        require(
            (off <= allowed).all(),
            law,
            subject,
            f"of {case}, {found['want'][worst]!s} among the {name} reads back as {found['values'][worst]!s}, which "
            f"is off by {off[worst]:.6g} where error_bound allows {found['bound'][worst]:.6g}",
        )
        rounded_once(subject, name, pages.dtype, found, case)


def rounded_once(subject: Subject, name: str, dtype: Any, found: dict[str, np.ndarray], case: str) -> None:
    """Values in the logical dtype are the float32 ones rounded once, and finite."""
    largest = np.float32(jnp.finfo(dtype).max)
    once = np.clip(found["values"], -largest, largest).astype(dtype)
    same = found["materialized"].dtype == once.dtype and (found["materialized"] == once).all()
    require(same, 1, subject, f"{case} read back in {np.dtype(dtype)} are not the {name} in float32, rounded once")


def worth_stating(subject: Subject) -> None:
    """Law 1: the bound says something.

    Of gaussian values a format must lose less than reading zeros would, in the mean square and in its bound: that
    is below the largest magnitude there is. Formats that transform the channels state a bound for the worst of
    sums over all of them, which may be larger by the square root of their number.
    """
    rows = drawn(GAUSSIAN, 0, subject.shape)
    for found in subject.read(subject.prefilled(rows), rows):
        want, off = found["want"], found["values"] - found["want"]
        lost, had = np.sqrt(np.mean(off**2)), np.sqrt(np.mean(want**2))
        require(lost < had, 1, subject, f"of gaussian values, {lost:.3g} of {had:.3g} is lost, root mean squared")
        most = np.abs(want).max() * np.sqrt(want.shape[-1] if subject.quantizer.transforms else 1)
        stated = found["bound"].max()
        require(stated < most, 1, subject, f"error_bound states {stated:.3g} for gaussian values up to {most:.3g}")


def order(subject: Subject, rows: np.ndarray, chunks: list[np.ndarray], case: str = "") -> None:
    """Law 2: one prefill and any chunks in any order leave the same bits, or what the format declares."""
    whole, apart = subject.prefilled(rows), subject.in_chunks(subject.fresh(), rows, chunks)
    same_but_for_order(subject, whole, apart, rows, case)


def same_but_for_order(
    subject: Subject, one: Any, other: Any, rows: np.ndarray, case: str, of: tuple[str, ...] = ("keys", "values")
) -> None:
    """Pools of two views hold the same, bit for bit, or within the order bound that the format declares."""
    found = [part for name in of for part in differing(one, other, name)]
    declared = subject.quantizer.order_bound
    if declared != 0:
        for name, a, b in zip(("keys", "values"), subject.read(one, rows), subject.read(other, rows), strict=True):
            off = np.abs(a["units"].astype(np.float64) - b["units"]).max()
            what = f"{case} leave {name} {off:g} scales from those of one prefill, where order_bound is {declared:g}"
            require(off <= declared or name not in of, 2, subject, what)
        found = [part for part in found if "codes" not in part]
    require(not found, 2, subject, f"{case} leave other bits than one prefill of the same in {', '.join(found)}")


def decodes(subject: Subject, rows: np.ndarray, prefilled: int, case: str = "") -> None:
    """Law 2: decode steps, beside an inactive row and behind a prefill or none, leave what one prefill leaves."""
    rows, tokens = narrowed(rows, LARGE[1]), np.arange(TOKENS, dtype=np.int32)
    whole = subject.prefilled(rows)
    first = subject.in_chunks(subject.fresh(), rows, [tokens[:prefilled]])
    batch = np.stack([np.full_like(rows, 1e6), rows], axis=1)
    position = np.stack([np.full(TOKENS, -1, np.int32), np.where(tokens < prefilled, -1, tokens)], axis=1)
    view = subject.decode(subject.enlarged(first), batch, position, np.stack([ELSEWHERE, ELSEWHERE]))
    back = moved(view, ELSEWHERE, TABLE, PAGES)
    same_but_for_order(subject, whole, back, rows, case, of=("keys",))
    if prefilled == 0:
        within_bound(subject, back, rows, case)
