"""The checks of the laws catch what they are for: each fails on pages that are written in breach of it."""

import jax.numpy as jnp
import numpy as np
import pytest

from qpaged.testing import Subject
from qpaged.testing import _laws_places as places
from qpaged.testing import _laws_values as values
from qpaged.testing._pool import HEADS, PAGE_SIZE, TABLE, TOKENS

ROWS = np.random.default_rng(0).normal(size=(TOKENS, HEADS, 16)).astype(np.float32)
ROWS *= 2.0 ** (np.arange(TOKENS) // 4)[:, None, None]  # scales differ from page to page
ONE_BY_ONE = [np.array([token]) for token in range(TOKENS)]
SHUFFLED = np.array_split(np.random.default_rng(1).permutation(TOKENS), 5)


def on_keys(view, change):
    return view.replace(key_pages=change(view.key_pages))


def with_scales(pages, change):
    return pages.like(pages.codes, change(pages.scales))


class SwappedScales(Subject):
    """The scales of two pages swapped."""

    def write(self, view, rows, position, table=TABLE):
        view = super().write(view, rows, position, table)
        swap = jnp.array([0, 3, 2, 1, 4, 5])
        return on_keys(view, lambda pages: with_scales(pages, lambda s: s[:, swap]))


class DroppedScale(Subject):
    """A scale that a write should have grown, left as it was."""

    def write(self, view, rows, position, table=TABLE):
        after = super().write(view, rows, position, table)
        old = view.key_pages.scales
        return on_keys(after, lambda pages: with_scales(pages, lambda s: jnp.where(old > 0, old, s)))


class OneSlotOff(Subject):
    """Every row written one slot further."""

    def write(self, view, rows, position, table=TABLE):
        return super().write(view, rows, np.where(position >= 0, position + 1, position), table)


class Wrapping(Subject):
    """Negative positions count from the end, and large ones wrap."""

    def write(self, view, rows, position, table=TABLE):
        return super().write(view, rows, position % (len(table) * PAGE_SIZE), table)


class Drifting(Subject):
    """Codes that drift at every write."""

    def write(self, view, rows, position, table=TABLE):
        view = super().write(view, rows, position, table)
        return on_keys(view, lambda pages: pages.quantizer.quantize(pages.dequantize() * 0.9))


class Leaking(Subject):
    """A write that touches a bit of another page."""

    def write(self, view, rows, position, table=TABLE):
        view = super().write(view, rows, position, table)
        return on_keys(view, lambda pages: pages.like(pages.codes.at[0, 0, 0, 0].add(1), pages.scales))


class ForgetfulReset(Subject):
    """A reset that clears the codes and leaves the scales."""

    def reset(self, view, pages):
        old = view.key_pages.scales
        return on_keys(super().reset(view, pages), lambda pages: with_scales(pages, lambda s: old))


class NoReset(Subject):
    """A reset that does nothing."""

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
    "error": lambda subject: values.error(subject, ROWS, ONE_BY_ONE),
    "order": lambda subject: values.order(subject, ROWS, SHUFFLED),
    "locality": lambda subject: places.locality(subject, ROWS, 5, ROWS[0] * 100),
    "totality": lambda subject: places.totality(
        subject, ROWS, np.arange(-3, TOKENS - 3, dtype=np.int32), np.array([4, -1, 3], np.int32)
    ),
    "reuse": lambda subject: places.reuse(subject, ROWS * 64, ROWS, SHUFFLED),
}


@pytest.mark.parametrize("format", ["int8", "int8:channel", "fp8_e4m3"])
@pytest.mark.parametrize(
    ("law", "mutant"), [(law, mutant) for law, all_ in MUTANTS.items() for mutant in all_]
)
def test_a_check_fails_on_a_mutant(law, mutant, format):
    with pytest.raises(AssertionError, match=f"{law}: {format} breaks it"):
        CHECKS[law](mutant(format))


@pytest.mark.parametrize("format", ["int8", "int8:channel", "fp8_e4m3"])
@pytest.mark.parametrize("law", CHECKS)
def test_a_check_passes_on_the_real_thing(law, format):
    CHECKS[law](Subject(format))
