"""Each law's check fails on pages that are written in breach of the law."""

import jax.numpy as jnp
import numpy as np
import pytest

from qpaged.testing import Subject
from qpaged.testing import _laws_error as errors
from qpaged.testing import _laws_locality as locality
from qpaged.testing._pools import HEADS, PAGE_SIZE, TABLE, TOKENS

ROWS = np.random.default_rng(0).normal(size=(TOKENS, HEADS, 16)).astype(np.float32)
ROWS *= 2.0 ** (np.arange(TOKENS) // 4)[:, None, None]  # scales differ from page to page
ONE_BY_ONE = [np.array([token]) for token in range(TOKENS)]
SHUFFLED = np.array_split(np.random.default_rng(1).permutation(TOKENS), 5)


def on_keys(view, change):
    """Return the view with its keys changed."""
    return view.replace(key_pages=change(view.key_pages))


def with_scales(pages, change):
    """Return the pages with their scales changed."""
    return pages.like(pages.codes, pages.parts._replace(scales=change(pages.scales)))


class SwappedScales(Subject):
    """Swaps the scales of two pages."""

    def write(self, view, rows, position, table=TABLE):
        view = super().write(view, rows, position, table)
        swap = jnp.array([0, 3, 2, 1, 4, 5])
        return on_keys(view, lambda pages: with_scales(pages, lambda scales: scales[:, swap]))


class DroppedScale(Subject):
    """Leaves scales as they were where a write should have grown them."""

    def write(self, view, rows, position, table=TABLE):
        after = super().write(view, rows, position, table)
        old = view.key_pages.scales
        return on_keys(
            after, lambda pages: with_scales(pages, lambda scales: jnp.where(old > 0, old, scales))
        )


class OneSlotOff(Subject):
    """Writes every row one slot too far."""

    def write(self, view, rows, position, table=TABLE):
        return super().write(view, rows, np.where(position >= 0, position + 1, position), table)


class Wrapping(Subject):
    """Counts negative positions from the end, and wraps large ones."""

    def write(self, view, rows, position, table=TABLE):
        return super().write(view, rows, position % (len(table) * PAGE_SIZE), table)


class Drifting(Subject):
    """Quantizes all pages anew at every write, so that codes drift."""

    def write(self, view, rows, position, table=TABLE):
        view = super().write(view, rows, position, table)
        return on_keys(view, lambda pages: pages.quantizer.quantize(pages.dequantize() * 0.9))


class Leaking(Subject):
    """Changes a bit of another page at every write."""

    def write(self, view, rows, position, table=TABLE):
        view = super().write(view, rows, position, table)
        return on_keys(view, lambda pages: pages.like(pages.codes.at[0, 0, 0, 0].add(1), pages.parts))


class ForgetfulReset(Subject):
    """Resets the codes and leaves the scales."""

    def reset(self, view, pages):
        old = view.key_pages.scales
        return on_keys(super().reset(view, pages), lambda pages: with_scales(pages, lambda _: old))


class NoReset(Subject):
    """Resets nothing."""

    def reset(self, view, pages):
        return view


MUTANTS = {
    "error": [SwappedScales, DroppedScale, OneSlotOff],
    "order": [SwappedScales, DroppedScale, Drifting],
    "locality": [SwappedScales, OneSlotOff, Leaking],
    "totality": [Wrapping, SwappedScales],
    "reuse": [ForgetfulReset, NoReset],
}

CHECKS = {
    "error": lambda subject: errors.error(subject, ROWS, ONE_BY_ONE),
    "order": lambda subject: errors.order(subject, ROWS, SHUFFLED),
    "locality": lambda subject: locality.locality(subject, ROWS, 5, ROWS[0] * 100),
    "totality": lambda subject: locality.totality(
        subject, ROWS, np.arange(-3, TOKENS - 3, dtype=np.int32), np.array([4, -1, 3], np.int32)
    ),
    "reuse": lambda subject: locality.reuse(subject, ROWS * 64, ROWS, SHUFFLED),
}


@pytest.mark.parametrize("format", ["int8", "int8:channel", "fp8_e4m3"])
@pytest.mark.parametrize(
    ("law", "mutant"), [(law, mutant) for law, mutants in MUTANTS.items() for mutant in mutants]
)
def test_a_check_fails_on_a_mutant(law, mutant, format):
    with pytest.raises(AssertionError, match=f"{law}: {format} breaks it"):
        CHECKS[law](mutant(format))


@pytest.mark.parametrize("format", ["int8", "int8:channel", "fp8_e4m3"])
@pytest.mark.parametrize("law", CHECKS)
def test_a_check_passes_on_pages_that_are_written_as_usual(law, format):
    CHECKS[law](Subject(format))
