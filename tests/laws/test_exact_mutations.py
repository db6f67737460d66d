"""Each law's check fails on exact pages that are kept in breach of the law."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qpaged
from qpaged.testing import _laws_exact as laws
from qpaged.testing._exact_subject import EXACT_PAGES, LENGTH, TABLES, ExactSubject

FIRST, SECOND = TABLES
ROWS, OTHER = np.random.default_rng(0).normal(size=(2, LENGTH, 2, 16)).astype(np.float32)
CHUNKS = np.split(np.arange(LENGTH), [5, 12, 13, 30])


def on_pools(view, change):
    """Return the view with its keys and its values changed."""
    return view.replace(key_pages=change(view.key_pages), value_pages=change(view.value_pages))


class StaleExactPage(ExactSubject):
    """Resets the codes and leaves which pages are exact."""

    def reset(self, view, pages):
        after = super().reset(view, pages)
        keys = dataclasses.replace(view.key_pages, codes=after.key_pages.codes)
        values = dataclasses.replace(view.value_pages, codes=after.value_pages.codes)
        return after.replace(key_pages=keys, value_pages=values)


class MissedEviction(ExactSubject):
    """Keeps one page more than the window has."""

    def write(self, view, rows, position, table):
        wide = on_pools(view, lambda pages: dataclasses.replace(pages, window=pages.window + 1))
        written = jax.jit(_prefill)(wide, rows, position, table)
        return on_pools(written, lambda pages: dataclasses.replace(pages, window=pages.window - 1))


class CountedTwice(ExactSubject):
    """Leaves a page among the exact ones twice."""

    def write(self, view, rows, position, table):
        def again(pages):
            free = jnp.argmax(pages.page == EXACT_PAGES)
            return dataclasses.replace(pages, page=pages.page.at[free].set(pages.page.min()))

        return on_pools(super().write(view, rows, position, table), again)


class ForgottenSinks(ExactSubject):
    """Packs the first pages like any others."""

    def write(self, view, rows, position, table):
        without = on_pools(view, lambda pages: dataclasses.replace(pages, sinks=0))
        written = jax.jit(_prefill)(without, rows, position, table)
        return on_pools(written, lambda pages: dataclasses.replace(pages, sinks=1))


class UnmarkedSinks(ExactSubject):
    """Does not remember which pages are the first ones, so that they are packed early like any others."""

    def write(self, view, rows, position, table):
        return on_pools(
            super().write(view, rows, position, table),
            lambda pages: dataclasses.replace(pages, is_sink=jnp.zeros_like(pages.is_sink)),
        )


class PacksWhatIsWritten(ExactSubject):
    """Packs the newest page of the sequence that is written, where there is no room left."""

    def write(self, view, rows, position, table):
        view = super().write(view, rows, position, table)
        if (view.key_pages.page == EXACT_PAGES).any():
            return view
        newest = np.array([table[position.max() // 8], -1, -1, -1, -1], np.int32)
        return self.pack(view, newest, np.full(len(table), 8, np.int32))


class PackedEveryTime(ExactSubject):
    """Packs every page at every write, so that a page is rounded as often as it is written."""

    def write(self, view, rows, position, table):
        view = super().write(view, rows, position, table)
        return self.pack(view, table, np.full(len(table), 8, np.int32))


class ReopensEmpty(ExactSubject):
    """Makes a page exact again without what it held."""

    def write(self, view, rows, position, table):
        page = table[position.max() // 8]
        if not view.key_pages.is_exact(jnp.array([page])).all():
            view = self.reset(view, np.array([page, -1, -1, -1, -1], np.int32))
        return super().write(view, rows, position, table)


class Drifting(ExactSubject):
    """Quantizes all packed pages anew at every write, so that codes drift."""

    def write(self, view, rows, position, table):
        def drift(pages):
            codes = pages.codes.quantizer.quantize(pages.codes.dequantize() * 0.9)
            return dataclasses.replace(pages, codes=codes)

        view = super().write(view, rows, position, table)
        return view.replace(key_pages=drift(view.key_pages))


class ClampedReset(ExactSubject):
    """Resets the last page where a page is out of range."""

    def reset(self, view, pages):
        inside = (pages >= 0) & (pages < EXACT_PAGES)
        return super().reset(view, np.where(inside, pages, EXACT_PAGES - 1).astype(np.int32))


class LengthsForgotten(ExactSubject):
    """Packs whole pages, whatever their lengths."""

    def pack(self, view, pages, lengths):
        return super().pack(view, pages, np.full_like(lengths, 8))


def _prefill(view, rows, position, table):
    metadata = qpaged.PagedAttentionMetadata.prefill(position=position, page_table=table)
    return view.write_prefill_to_cache(rows, -rows, metadata)


CHECKS = {
    "error": lambda subject: (
        laws.keeps_tokens(subject, ROWS, CHUNKS, "rows"),
        laws.rewinds(subject, ROWS, OTHER),
    ),
    "order": lambda subject: laws.order(subject, ROWS, CHUNKS, "chunks"),
    "locality": lambda subject: laws.locality(subject, ROWS, OTHER),
    "totality": lambda subject: laws.totality(subject, ROWS),
    "travel": lambda subject: laws.travel(subject, ROWS),
    "reuse": lambda subject: laws.reuse(subject, ROWS, OTHER),
}
MUTANTS = {
    "error": [MissedEviction, ForgottenSinks, PackedEveryTime, ReopensEmpty],
    "order": [Drifting],
    "locality": [UnmarkedSinks, PacksWhatIsWritten],
    "totality": [ClampedReset],
    "travel": [LengthsForgotten],
    "reuse": [StaleExactPage, CountedTwice],
}


@pytest.mark.parametrize("format", ["int8", "int8:channel"])
@pytest.mark.parametrize(
    ("law", "mutant"), [(law, mutant) for law, mutants in MUTANTS.items() for mutant in mutants]
)
def test_a_check_fails_on_a_mutant(law, mutant, format):
    with pytest.raises(AssertionError, match=rf"{law}: {format}\+exact9\+sink3 breaks it"):
        CHECKS[law](mutant(format))


@pytest.mark.parametrize("format", ["int8", "int8:channel"])
@pytest.mark.parametrize("law", CHECKS)
def test_a_check_passes_on_pages_that_are_kept_as_usual(law, format):
    CHECKS[law](ExactSubject(format))
