"""The suite of tests that a format's test file subclasses."""

from typing import Any, ClassVar

import pytest

from qpaged.testing import _draws as draws
from qpaged.testing import _laws_cost as cost
from qpaged.testing import _laws_places as places
from qpaged.testing import _laws_sameness as sameness
from qpaged.testing import _laws_travel as travel
from qpaged.testing import _laws_values as values
from qpaged.testing._subject import Subject


class QuantizerConformance:
    """Every law of the cache, as tests of a format. Subclass it in a test file::

        from qpaged.testing import QuantizerConformance

        class TestMyFormat(QuantizerConformance):
            format = "myformat"

    Attributes:
        format: a spelling, a quantizer, or a list of them, each of which every test then runs for.
    """

    format: ClassVar[Any]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run a test that takes a ``subject`` for every format; those of one format run one after another."""
        if "subject" not in metafunc.fixturenames:
            return
        if not hasattr(self, "format"):
            raise pytest.UsageError(f"{type(self).__name__} must name a format to test: format = 'myformat'.")
        formats = self.format if isinstance(self.format, list | tuple) else [self.format]
        together = metafunc.config.pluginmanager.hasplugin("xdist")  # in one process: they share programs
        marks = [[pytest.mark.xdist_group(str(format))] if together else [] for format in formats]
        params = [
            pytest.param(Subject(format), id=str(Subject(format)), marks=mark)
            for format, mark in zip(formats, marks, strict=True)
        ]
        metafunc.parametrize("subject", params, scope="class")

    def test_law_1_error(self, subject):
        """Values of every magnitude read back within the bound, in whatever order they were written."""
        for turn, (name, rows) in enumerate(draws.every_kind(subject.shape)):
            way, chunks = draws.a_way(turn)
            values.error(subject, rows, chunks, f"{name} written {way}")

    def test_law_1_error_is_worth_stating(self, subject):
        """The bound says something, and so does the format."""
        values.worth_stating(subject)

    def test_law_1_error_of_what_is_not_finite(self, subject):
        """NaN and infinities have the documented outcome."""
        for bad in draws.NOT_FINITE:
            places.not_finite(subject, draws.rows(draws.GAUSSIAN, 2, subject.shape), bad)

    def test_law_2_order(self, subject):
        """Chunks, permutations and single tokens leave the bits that one prefill leaves."""
        for turn, (name, rows) in enumerate(draws.every_kind(subject.shape, seeds=1)):
            way, chunks = draws.a_way(turn)
            values.order(subject, rows, chunks, f"{name} written {way}")

    def test_law_2_order_of_decodes(self, subject):
        """Decode steps leave the bits that one prefill leaves."""
        for kind, prefilled in ((draws.GAUSSIAN, 0), ("growing", 11), ("wild", 3)):
            case = f"{kind} values decoded behind a prefill of {prefilled} tokens"
            values.decodes(subject, draws.rows(kind, 1, subject.shape), prefilled, case)

    def test_law_3_locality(self, subject):
        """A write leaves other pages, heads and blocks alone."""
        for turn, (name, rows) in enumerate(draws.every_kind(subject.shape, seeds=1)):
            new = draws.rows("wild" if turn % 2 else draws.GAUSSIAN, turn, subject.shape)
            places.locality(subject, rows, 7 * turn % len(rows), new[0], name)

    def test_law_3_locality_of_what_is_not_finite(self, subject):
        """NaN and infinities harm no other block."""
        for bad in draws.NOT_FINITE:
            places.not_finite_alone(subject, draws.rows(draws.GAUSSIAN, 2, subject.shape), bad)

    def test_law_4_totality(self, subject):
        """Rows out of range are dropped, never clamped or wrapped."""
        for seed in range(6):
            rows = draws.rows(draws.GAUSSIAN if seed % 2 else "growing", seed, subject.shape)
            places.totality(subject, rows, *draws.places(seed))

    def test_law_4_totality_of_other_steps(self, subject):
        """So are decodes, resets and copies out of range, and what is read there is NaN."""
        places.nowhere(subject, draws.rows(draws.GAUSSIAN, 0, subject.shape))

    def test_law_5_cost_of_a_decode(self, subject):
        """A decode write costs its rows, whatever the pool."""
        cost.decode_cost(subject, draws.rows(draws.GAUSSIAN, 0, subject.shape))

    def test_law_5_cost_of_attention(self, subject):
        """Attention makes nothing of the size of the pool."""
        cost.attention_cost(subject)

    def test_law_6_truth(self, subject):
        """The bytes that are planned and reported are those that are allocated."""
        cost.truth(subject)

    def test_law_6_truth_of_bits(self, subject):
        """Codes and scales are what the format says of them."""
        cost.bits(subject)

    def test_law_7_sameness(self, subject):
        """Pages pass for plain ones."""
        sameness.looks(subject, draws.rows(draws.GAUSSIAN, 0, subject.shape))

    def test_law_7_sameness_of_attention(self, subject):
        """Attention over pages is attention over the values that they hold."""
        rows = draws.rows(draws.GAUSSIAN, 0, subject.shape)
        sameness.attention(subject, rows, sameness.queries(subject.shape))

    def test_law_7_sameness_in_bfloat16(self, subject):
        """Codes are exact in the dtype that dots take."""
        for name, rows in draws.every_kind(subject.shape, seeds=1):
            sameness.exact_in_bfloat16(subject, rows, name)

    def test_law_8_travel(self, subject):
        """Scales go where their codes go."""
        travel.copies(subject, draws.rows("growing", 0, subject.shape))

    def test_law_8_travel_of_the_format(self, subject):
        """A format survives its configuration and its spelling."""
        travel.identity(subject)

    def test_law_8_travel_to_files(self, subject):
        """A view survives JSON, and one of another format is refused."""
        if not travel.registered(subject.quantizer):
            pytest.skip(f"{subject} has no entry point in qpaged.quantizers, by which records are read")
        travel.records(subject, draws.rows(draws.GAUSSIAN, 0, subject.shape))

    def test_law_9_reuse(self, subject):
        """A page that was reset carries nothing of its earlier sequence."""
        for turn, kinds in enumerate((("huge", "tiny"), ("growing", "zeros"), ("wild", draws.GAUSSIAN))):
            rows, later = (draws.rows(kind, turn, subject.shape) for kind in kinds)
            places.reuse(subject, rows, later, draws.a_way(turn)[1], f"{kinds[0]} values")

    def test_law_9_reuse_of_fresh_pages(self, subject):
        """Fresh pages read as exact zeros."""
        places.fresh_pages(subject, draws.rows(draws.GAUSSIAN, 0, subject.shape))
