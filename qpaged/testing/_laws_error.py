"""Laws 1 and 2: values read back within the bound, whatever the order in which they were written."""

import jax
import jax.numpy as jnp
import numpy as np

from qpaged.testing import _inputs as inputs
from qpaged.testing._inputs import Chunks
from qpaged.testing._law import law
from qpaged.testing._pools import (
    LARGE_DTYPES,
    LARGE_TABLE,
    PAGES,
    SMALLEST,
    TABLE,
    TOKENS,
    View,
    move_pages,
    pool_differences,
    pools,
)
from qpaged.testing._subject import Reading, Subject, clip_to_dtype


def error(subject: Subject, rows: np.ndarray, chunks: Chunks, case: str = "rows") -> None:
    """Law 1: in whatever order tokens are written, each reads back within the format's bound."""
    within_bound(subject, subject.in_chunks(subject.fresh(), rows, chunks), rows, case)


def within_bound(subject: Subject, view: View, rows: np.ndarray, case: str = "rows", number: int = 1) -> None:
    """Check that a view holds ``rows`` within the format's bound, rounded to its dtype once."""
    check = law(number, subject)
    for (name, pages), reading in zip(pools(view), subject.read(view, rows), strict=True):
        values = reading["values"]
        off = np.abs(values.astype(np.float64) - reading["want"])
        excess = off - reading["bound"].astype(np.float64) - SMALLEST
        worst = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), excess.shape)
        check(
            (excess <= 0).all(),
            f"of {case}, {reading['want'][worst]!s} among the {name} reads back as {values[worst]!s}, "
            f"off by {off[worst]:.6g} where error_bound allows {reading['bound'][worst]:.6g}",
        )
        largest = np.float32(jnp.finfo(pages.dtype).max)
        rounded = np.clip(values, -largest, largest).astype(pages.dtype)
        materialized = reading["materialized"]
        same = materialized.dtype == rounded.dtype and (materialized == rounded).all()
        check(same, f"{case} read in {rounded.dtype} are not the {name} read in float32, rounded once")


def worth_stating(subject: Subject) -> None:
    """Law 1: the bound excludes something.

    Of gaussian values a format must lose less than reading zeros would, in the mean square, and state a bound
    below the largest magnitude there is. The bound of a format that transforms channels covers the worst of
    sums over all of them, so that it may be larger by the square root of their number, which is what an
    orthonormal map can make of errors as large as the values. A format may state what is lost in the mean
    square instead, as ``gaussian_loss``.
    """
    check = law(1, subject)
    promised = subject.quantizer.gaussian_loss
    rows = inputs.rows(inputs.GAUSSIAN, 0, subject.shape)
    for reading in subject.read(subject.prefilled(rows), rows):
        want = reading["want"]
        lost = np.sqrt(np.mean((reading["values"] - want) ** 2))
        total = np.sqrt(np.mean(want**2))
        check(lost < total, f"of gaussian values, {lost:.3g} of {total:.3g} is lost, root mean squared")
        if promised is not None:
            share = (lost / total) ** 2
            check(share <= promised, f"of gaussian values, {share:.3g} of the power is lost, not {promised}")
            continue
        limit = np.abs(want).max()
        if subject.quantizer.transform is not None:
            limit *= np.sqrt(want.shape[-1])
        stated = reading["bound"].max()
        check(
            stated < limit,
            f"error_bound states {stated:.3g} for gaussian values, of which zeros keep {limit:.3g}",
        )


def order(subject: Subject, rows: np.ndarray, chunks: Chunks, case: str = "rows") -> None:
    """Law 2: chunks in any order leave the bits of one prefill, or differ as little as is declared."""
    expected = subject.prefilled(rows)
    view = subject.in_chunks(subject.fresh(), rows, chunks)
    for name in ("keys", "values"):
        same_in_any_order(subject, expected, view, rows, name, case)


def same_in_any_order(
    subject: Subject, expected: View, view: View, rows: np.ndarray, name: str, case: str
) -> None:
    """Check that a pool of two views is the same, bit for bit or within the declared ``order_bound``."""
    check = law(2, subject)
    differing = pool_differences(expected, view, name)
    order_bound = subject.quantizer.order_bound
    if order_bound != 0:
        expected_units = read_pool(subject, expected, rows, name)["units"]
        units = read_pool(subject, view, rows, name)["units"]
        off = np.abs(expected_units.astype(np.float64) - units).max()
        check(
            off <= order_bound,
            f"{case} leave {name} {off:g} scales from one prefill's, beyond order_bound {order_bound:g}",
        )
        # Codes may differ, but scales are maxima and depend on no order.
        differing = [part for part in differing if "codes" not in part]
    check(not differing, f"{case} leave other bits than one prefill of the same in {', '.join(differing)}")


def scale_rule(subject: Subject) -> None:
    """Law 2: the scale rule does not fall as absmax rises, or a block's scale would depend on the order."""
    quantizer = subject.quantizer
    if quantizer.scale_dtype is None or quantizer.has_static_scales:  # which no write changes
        return
    absmax = np.concatenate([[0], np.logspace(-37, 38, 1501)]).astype(np.float32)
    scales = jax.jit(quantizer.fit)(-absmax, np.zeros_like(absmax))
    factors = np.abs(np.asarray(quantizer.multiplier(scales), np.float64))
    falls = np.flatnonzero(np.diff(factors) < 0)
    where = ", ".join(f"{absmax[index]:g}" for index in falls[:3])
    law(2, subject)(not len(falls), f"its scale falls as absmax rises, beyond {where}")


def read_pool(subject: Subject, view: View, rows: np.ndarray, name: str) -> Reading:
    """Return what the keys or the values of a view hold."""
    keys, values = subject.read(view, rows)
    return {"keys": keys, "values": values}[name]


def decodes(subject: Subject, rows: np.ndarray, prefilled: int, case: str = "rows") -> None:
    """Law 2: decode steps behind a prefill of some tokens leave what one prefill leaves.

    An inactive row decodes beside the sequence.
    """
    rows = clip_to_dtype(rows, LARGE_DTYPES[1])
    tokens = np.arange(TOKENS, dtype=np.int32)
    expected = subject.prefilled(rows)
    start = subject.in_chunks(subject.fresh(), rows, [tokens[:prefilled]])
    inactive = np.full_like(rows, 1e6)  # must land nowhere
    batch = np.stack([inactive, rows], axis=1)
    position = np.stack([np.full(TOKENS, -1, np.int32), np.where(tokens < prefilled, -1, tokens)], axis=1)
    view = subject.decode(subject.enlarged(start), batch, position, np.stack([LARGE_TABLE] * 2))
    view = move_pages(view, LARGE_TABLE, TABLE, PAGES)
    same_in_any_order(subject, expected, view, rows, "keys", case)
    if prefilled == 0:  # the enlarged view has no values of a prefill
        within_bound(subject, view, rows, case)
