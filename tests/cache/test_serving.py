"""Allocator, cache and attention together: no answer has a token of a stranger, or lacks one of its own."""

import dataclasses
import random

import jax
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from support.long import first_short
from support.serving import OPERATIONS, WINDOW, Serving, serve

import qpaged
from qpaged import pools
from qpaged.cache import _allocator, _page_changes, _page_holders

FORMATS = [
    None,
    "int8",
    "int4:token+rotate+exact8",
    "raw",
    "int8:token",
    "int8:channel+exact4+sink4",
    "nvfp4",
]


class Served(RuleBasedStateMachine):
    """Finds the shortest sequence of requests whose answers are wrong."""

    def __init__(self):
        super().__init__()
        self.serving = Serving()

    @rule(operation=st.sampled_from(list(OPERATIONS)), seed=st.integers(0, 2**16))
    def do(self, operation, seed):
        getattr(self.serving, operation)(random.Random(seed))

    @rule()
    def check(self):
        self.serving.check()

    def teardown(self):
        self.serving.check()


Served.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestServed = Served.TestCase


@pytest.mark.parametrize("format", first_short(3, FORMATS))
def test_random_requests(format):
    serving = Serving(format)
    serve(serving, seed=1, steps=400)
    events = ("answers", "tokens found", "forks", "copies", "rewinds", "swaps", "evictions")
    assert min(serving.done[event] for event in events) > 0


def test_pages_that_a_window_has_left_are_released():
    serving = Serving("int8", window=WINDOW)
    serve(serving, seed=1, steps=400)
    assert serving.done["pages released"] > 0


@pytest.fixture
def mutant(request, monkeypatch):
    MUTANTS[request.param](monkeypatch)
    jax.clear_caches()  # of the programs without the mutant
    yield
    jax.clear_caches()


def _reset_forgotten(monkeypatch):
    monkeypatch.setattr(_page_changes.PendingChanges, "give", lambda self, page: None)


def _scale_not_copied(monkeypatch):
    copy_pages = pools.copy_pages

    def without_scales(pages, source, target):
        return dataclasses.replace(copy_pages(pages, source, target), scales=pages.scales)

    monkeypatch.setattr(pools, "copy_pages", without_scales)


def _fork_not_counted(monkeypatch):
    hold = _page_holders.PageHolders.hold

    def hold_but_of_shared(self, page):
        if page is not None and not self.holders(page):
            hold(self, page)

    monkeypatch.setattr(_page_holders.PageHolders, "hold", hold_but_of_shared)


def _parent_not_hashed(monkeypatch):
    page_hashes = _allocator.page_hashes

    def of_pages_alone(parent, tokens, page_size):
        for start in range(0, len(tokens) - page_size + 1, page_size):
            yield from page_hashes(b"", tokens[start : start + page_size], page_size)

    monkeypatch.setattr(_allocator, "page_hashes", of_pages_alone)


def _copy_not_made(monkeypatch):
    monkeypatch.setattr(_page_changes.PendingChanges, "copy", lambda self, source, target: None)


def _found_after_it_was_written(monkeypatch):
    monkeypatch.setattr(_page_holders.PageHolders, "forget", lambda self, page: None)


def _pin_not_kept(monkeypatch):
    monkeypatch.setattr(_page_holders.PageHolders, "to_overwrite", lambda self: 0)


MUTANTS = {
    "reset forgotten": _reset_forgotten,
    "scale not copied": _scale_not_copied,
    "fork not counted": _fork_not_counted,
    "parent not hashed": _parent_not_hashed,
    "copy not made": _copy_not_made,
    "found after it was written": _found_after_it_was_written,
    "put over others": _pin_not_kept,
}


@pytest.mark.parametrize("mutant", MUTANTS, indirect=True)
def test_what_is_broken_is_caught(mutant):
    def serve_some():
        for seed in range(10):
            serve(Serving("int8"), seed, steps=1_500)

    with pytest.raises((AssertionError, IndexError, qpaged.AllocationError)) as caught:
        serve_some()
    assert "of seed" in caught.value.__notes__[0]
