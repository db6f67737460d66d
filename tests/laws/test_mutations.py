"""The checks of the laws catch what they are for: each fails on a subject that breaks its law."""

import jax.numpy as jnp
import laws
import numpy as np
import pytest

ROWS = np.random.default_rng(0).normal(size=(laws.TOKENS, laws.HEADS, laws.HEAD_DIM)).astype(np.float32)
ROWS *= 2.0 ** (np.arange(laws.TOKENS) // 4)[:, None, None]  # scales differ from page to page
ONE_BY_ONE = [np.array([token]) for token in range(laws.TOKENS)]
SHUFFLED = np.array_split(np.random.default_rng(1).permutation(laws.TOKENS), 5)


def on_keys(view, change):
    return view.replace(key_pages=change(view.key_pages))


def with_scales(pages, change):
    return pages.like(pages.codes, change(pages.scales))


class SwappedScales(laws.Subject):
    """The scales of two pages swapped."""

    def write(self, view, rows, position, table=laws.TABLE, write=laws.WRITE):
        view = super().write(view, rows, position, table, write)
        swap = jnp.array([0, 3, 2, 1, 4, 5])
        return on_keys(view, lambda pages: with_scales(pages, lambda s: s[:, swap]))


class DroppedScale(laws.Subject):
    """A scale that a write should have grown, left as it was."""

    def write(self, view, rows, position, table=laws.TABLE, write=laws.WRITE):
        after = super().write(view, rows, position, table, write)
        old = view.key_pages.scales
        return on_keys(after, lambda pages: with_scales(pages, lambda s: jnp.where(old > 0, old, s)))


class OneSlotOff(laws.Subject):
    """Every row written one slot further."""

    def write(self, view, rows, position, table=laws.TABLE, write=laws.WRITE):
        return super().write(view, rows, np.where(position >= 0, position + 1, position), table, write)


class Wrapping(laws.Subject):
    """Negative positions count from the end, and large ones wrap."""

    def write(self, view, rows, position, table=laws.TABLE, write=laws.WRITE):
        return super().write(view, rows, position % (len(table) * laws.PAGE_SIZE), table, write)


class Drifting(laws.Subject):
    """Codes that drift at every write."""

    def write(self, view, rows, position, table=laws.TABLE, write=laws.WRITE):
        view = super().write(view, rows, position, table, write)
        return on_keys(view, lambda pages: pages.quantizer.quantize(pages.dequantize() * 0.9))


class Leaking(laws.Subject):
    """A write that touches a bit of another page."""

    def write(self, view, rows, position, table=laws.TABLE, write=laws.WRITE):
        view = super().write(view, rows, position, table, write)
        return on_keys(view, lambda pages: pages.like(pages.codes.at[0, 0, 0, 0].add(1), pages.scales))


class ForgetfulReset(laws.Subject):
    """A reset that clears the codes and leaves the scales."""

    def reset(self, view, pages):
        old = view.key_pages.scales
        return on_keys(super().reset(view, pages), lambda pages: with_scales(pages, lambda s: old))


class NoReset(laws.Subject):
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
    "error": lambda subject: laws.error(subject, ROWS, ONE_BY_ONE),
    "order": lambda subject: laws.order(subject, ROWS, SHUFFLED),
    "locality": lambda subject: laws.locality(subject, ROWS, 5, ROWS[0] * 100),
    "totality": lambda subject: laws.totality(
        subject, ROWS, np.arange(-3, laws.TOKENS - 3, dtype=np.int32), np.array([4, -1, 3], np.int32)
    ),
    "reuse": lambda subject: laws.reuse(subject, ROWS * 64, ROWS, SHUFFLED),
}


@pytest.mark.parametrize("format", ["int8", "int8:channel", "fp8_e4m3"])
@pytest.mark.parametrize(
    ("law", "mutant"), [(law, mutant) for law, all_ in MUTANTS.items() for mutant in all_]
)
def test_a_check_fails_on_a_mutant(law, mutant, format):
    with pytest.raises(AssertionError):
        CHECKS[law](mutant(format))


@pytest.mark.parametrize("format", ["int8", "int8:channel", "fp8_e4m3"])
@pytest.mark.parametrize("law", CHECKS)
def test_a_check_passes_on_the_real_thing(law, format):
    CHECKS[law](laws.Subject(format))
