"""PageAllocator: whatever is asked, in whatever order, each page has one owner or none."""

import copy
import functools
import operator
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from support.caches import config

import qpaged

PAGES, SEQUENCE_PAGES, PAGE_SIZE = 7, 4, 3
METADATA = config(num_pages_per_layer=PAGES, num_pages_per_sequence=SEQUENCE_PAGES, page_size=PAGE_SIZE)
NAMES = st.sampled_from(["a", "b", 3, (4, "c")])


class Allocation(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.allocator = qpaged.PageAllocator(METADATA)
        self.model = {}

    def state(self):
        return self.allocator.num_free, {s: list(self.allocator.page_table([s])[0]) for s in self.model}

    @rule(name=NAMES, length=st.integers(0, PAGE_SIZE * SEQUENCE_PAGES + 2))
    def allocate(self, name, length):
        held = self.model.get(name, [])
        pages = -(-length // PAGE_SIZE)
        missing = max(pages - len(held), 0)
        before = self.state()
        if pages > SEQUENCE_PAGES or missing > self.allocator.num_free:
            with pytest.raises(qpaged.AllocationError):
                self.allocator.allocate(name, length)
            assert self.state() == before
            return
        given = self.allocator.allocate(name, length)
        assert len(given) == missing
        self.model[name] = held + given

    @rule(name=NAMES)
    def free(self, name):
        before = self.state()
        if name not in self.model:
            with pytest.raises(qpaged.AllocationError, match="holds no pages"):
                self.allocator.free(name)
            assert self.state() == before
            return
        assert self.allocator.free(name) == self.model.pop(name)

    @rule(names=st.lists(st.one_of(st.none(), NAMES), max_size=4))
    def page_table(self, names):
        if any(name is not None and name not in self.model for name in names):
            with pytest.raises(qpaged.AllocationError, match="holds no pages"):
                self.allocator.page_table(names)
            return
        table = self.allocator.page_table(names)
        assert (table.dtype, table.shape) == (np.int32, (len(names), SEQUENCE_PAGES))
        for row, name in zip(table, names, strict=True):
            pages = self.model.get(name, [])
            assert list(row) == pages + [PAGES] * (SEQUENCE_PAGES - len(pages))

    @invariant()
    def every_page_has_one_owner_or_none(self):
        owned = [page for pages in self.model.values() for page in pages]
        assert len(owned) == len(set(owned))
        assert set(owned) <= set(range(PAGES))
        assert self.allocator.num_free == PAGES - len(owned)

    def teardown(self):
        for name in list(self.model):
            self.allocator.free(name)
        assert self.allocator.num_free == PAGES
        whole = [self.allocator.allocate(("last", i), PAGE_SIZE) for i in range(PAGES)]
        assert sorted(functools.reduce(operator.iadd, whole, [])) == list(range(PAGES))


Allocation.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAllocation = Allocation.TestCase


@pytest.fixture
def allocator():
    return qpaged.PageAllocator(METADATA)


def test_a_sequence_is_given_only_what_it_lacks(allocator):
    first = allocator.allocate("a", 4)
    assert len(first) == 2
    assert allocator.allocate("a", 6) == []
    assert allocator.allocate("a", 1) == []  # it keeps what it has
    second = allocator.allocate("a", 7)
    assert len(second) == 1
    assert list(allocator.page_table(["a"])[0]) == [*first, *second, PAGES]


def test_a_sequence_of_no_tokens(allocator):
    assert allocator.allocate("a", 0) == []
    assert (allocator.page_table(["a"]) == PAGES).all()
    assert allocator.free("a") == []


def test_numpy_lengths(allocator):
    assert len(allocator.allocate("a", np.int64(4))) == 2
    assert len(allocator.allocate("b", np.uint8(3))) == 1


def test_too_long_a_sequence(allocator):
    with pytest.raises(qpaged.AllocationError, match=r"at most 12 tokens, but got 13 for sequence 'a'"):
        allocator.allocate("a", 13)
    with pytest.raises(
        qpaged.AllocationError, match=r"sequence 'a' holds no pages; allocate it, or pass None"
    ):
        allocator.page_table(["a"])


def test_too_few_pages_are_free(allocator):
    held = allocator.allocate("a", 12)
    with pytest.raises(
        qpaged.AllocationError, match=r"sequence 'b' needs 4 more pages for 10 tokens, but 3 are free"
    ):
        allocator.allocate("b", 10)
    assert allocator.num_free == 3
    allocator.allocate("b", 3)
    with pytest.raises(
        qpaged.AllocationError, match=r"sequence 'b' needs 3 more pages for 12 tokens, but 2 are free"
    ):
        allocator.allocate("b", 12)
    assert allocator.free("a") == held
    assert len(allocator.allocate("b", 12)) == 3


def test_free_of_what_is_not_there(allocator):
    with pytest.raises(qpaged.AllocationError, match=r"sequence 'a' holds no pages: it was never allocated"):
        allocator.free("a")
    allocator.allocate("a", 1)
    allocator.free("a")
    with pytest.raises(qpaged.AllocationError, match=r"'a' holds no pages"):
        allocator.free("a")


def test_tables_are_the_callers_own(allocator):
    allocator.allocate("a", 12)
    expected = allocator.page_table(["a"])
    allocator.page_table(["a"])[:] = 0
    given = allocator.allocate("b", 3)
    given.append(99)
    assert (allocator.page_table(["a"]) == expected).all()
    assert 99 not in allocator.page_table(["b"])


def test_an_empty_table(allocator):
    assert allocator.page_table([]).shape == (0, SEQUENCE_PAGES)


@pytest.mark.parametrize("length", [-1, -PAGE_SIZE, -100])
def test_a_negative_length_is_refused(allocator, length):
    with pytest.raises(ValueError, match=str(length)):
        allocator.allocate("a", length)
    with pytest.raises(qpaged.AllocationError):  # it was not made
        allocator.free("a")


@pytest.mark.parametrize("length", [3.0, "3", None])
def test_a_length_that_is_not_an_integer_is_refused(allocator, length):
    with pytest.raises(TypeError, match="length"):
        allocator.allocate("a", length)
    with pytest.raises(qpaged.AllocationError):
        allocator.free("a")


def test_none_names_no_sequence(allocator):
    """A page table reads None as a row without a sequence, so pages given to None could not be found."""
    with pytest.raises((TypeError, ValueError), match="None"):
        allocator.allocate(None, 3)
    assert allocator.num_free == PAGES


def test_allocation_errors_are_runtime_errors():
    assert issubclass(qpaged.AllocationError, RuntimeError)


def test_threads_lose_no_pages():
    allocator = qpaged.PageAllocator(config(num_pages_per_layer=24, num_pages_per_sequence=8))
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads are interrupted within a call

    def serve(worker):
        for turn in range(2_000):
            try:
                pages = allocator.allocate(worker, 4 * (1 + turn % 8))
            except qpaged.AllocationError:
                continue
            assert len(set(pages)) == len(pages)
            allocator.free(worker)

    try:
        with ThreadPoolExecutor(8) as executor:
            list(executor.map(serve, range(8)))
    finally:
        sys.setswitchinterval(switch)
    pages = [page for sequence in range(3) for page in allocator.allocate(sequence, 32)]
    assert sorted(pages) == list(range(24))


def test_a_copy_is_an_allocator_of_its_own():
    allocator = qpaged.PageAllocator(config(num_pages_per_layer=4, num_pages_per_sequence=4))
    allocator.allocate("a", 5)
    for copied in (copy.deepcopy(allocator), pickle.loads(pickle.dumps(allocator))):
        assert repr(copied) == repr(allocator) == "PageAllocator(2 of 4 pages free, 1 sequences)"
        copied.free("a")
    assert allocator.num_free == 2
