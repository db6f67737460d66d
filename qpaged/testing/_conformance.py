"""The suite of tests that a format's test file subclasses."""

from typing import ClassVar

import numpy as np
import pytest

import qpaged
from qpaged.testing import _inputs as inputs
from qpaged.testing import _laws_cost as cost
from qpaged.testing import _laws_error as errors
from qpaged.testing import _laws_exact as exact
from qpaged.testing import _laws_locality as locality
from qpaged.testing import _laws_sameness as sameness
from qpaged.testing import _laws_travel as travel
from qpaged.testing._exact_subject import ExactSubject
from qpaged.testing._subject import Subject

Format = str | qpaged.Quantizer


class QuantizerConformance:
    """Every law of the cache, as tests of a format. Subclass it in a test file::

        from qpaged.testing import QuantizerConformance

        class TestMyFormat(QuantizerConformance):
            format = "myformat"

    Attributes:
        format: a spelling, a quantizer, or a list of them, each of which every test then runs for.
    """

    format: ClassVar[Format | list[Format] | tuple[Format, ...]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run a test that takes a ``subject`` for every format; those of one format run one after another."""
        made = {"subject": Subject, "exact_subject": ExactSubject}
        fixture = next((name for name in made if name in metafunc.fixturenames), None)
        if fixture is None:
            return
        if not hasattr(self, "format"):
            raise pytest.UsageError(f"{type(self).__name__} must name a format to test: format = 'myformat'.")
        formats = self.format if isinstance(self.format, list | tuple) else [self.format]
        parameters = []
        for each in formats:
            subject = made[fixture](each)
            marks = []
            if metafunc.config.pluginmanager.hasplugin("xdist"):
                # One process runs all tests of a format, so that it compiles their programs once.
                marks = [pytest.mark.xdist_group(str(each))]
            if fixture == "subject" and qpaged.get_quantizer(each).needs_exact_pages:
                marks.append(pytest.mark.skip("its pages are packed whole: see the laws with exact pages"))
            parameters.append(pytest.param(subject, id=str(subject), marks=marks))
        metafunc.parametrize(fixture, parameters, scope="class")

    def test_law_1_error(self, subject: Subject) -> None:
        """Values of every magnitude read back within the bound, in whatever order they were written."""
        for turn, (name, rows) in enumerate(inputs.every_kind(subject.shape)):
            order, chunks = inputs.write_order(turn)
            errors.error(subject, rows, chunks, f"{name} written {order}")

    def test_law_1_error_is_worth_stating(self, subject: Subject) -> None:
        """The stated bound excludes something, and most of a value survives."""
        errors.worth_stating(subject)

    def test_law_1_error_of_what_is_not_finite(self, subject: Subject) -> None:
        """NaN and infinities have the documented outcome."""
        for bad in inputs.NOT_FINITE:
            locality.not_finite(subject, inputs.rows(inputs.GAUSSIAN, 2, subject.shape), bad)

    def test_law_2_order(self, subject: Subject) -> None:
        """Chunks, permutations and single tokens leave the bits that one prefill leaves."""
        for turn, (name, rows) in enumerate(inputs.every_kind(subject.shape, seeds=1)):
            order, chunks = inputs.write_order(turn)
            errors.order(subject, rows, chunks, f"{name} written {order}")

    def test_law_2_order_of_decodes(self, subject: Subject) -> None:
        """Decode steps leave the bits that one prefill leaves."""
        for kind, prefilled in ((inputs.GAUSSIAN, 0), ("growing", 11), ("wild", 3)):
            case = f"{kind} values decoded behind a prefill of {prefilled} tokens"
            errors.decodes(subject, inputs.rows(kind, 1, subject.shape), prefilled, case)

    def test_law_2_order_of_scales(self, subject: Subject) -> None:
        """A larger value never has a smaller scale."""
        errors.scale_rule(subject)

    def test_law_3_locality(self, subject: Subject) -> None:
        """A write leaves other pages, heads and blocks alone."""
        for turn, (name, rows) in enumerate(inputs.every_kind(subject.shape, seeds=1)):
            kind = "wild" if turn % 2 else inputs.GAUSSIAN
            new = inputs.rows(kind, turn, subject.shape)
            locality.locality(subject, rows, 7 * turn % len(rows), new[0], name)

    def test_law_3_locality_of_what_is_not_finite(self, subject: Subject) -> None:
        """NaN and infinities harm no other block."""
        for bad in inputs.NOT_FINITE:
            locality.not_finite_alone(subject, inputs.rows(inputs.GAUSSIAN, 2, subject.shape), bad)

    def test_law_4_totality(self, subject: Subject) -> None:
        """Rows out of range are dropped, never clamped or wrapped."""
        for seed in range(6):
            kind = inputs.GAUSSIAN if seed % 2 else "growing"
            rows = inputs.rows(kind, seed, subject.shape)
            locality.totality(subject, rows, *inputs.indices_out_of_range(seed))

    def test_law_4_totality_of_other_steps(self, subject: Subject) -> None:
        """Decodes, resets and copies out of range are dropped, too, and reads there are NaN."""
        locality.totality_of_other_steps(subject, inputs.rows(inputs.GAUSSIAN, 0, subject.shape))

    def test_law_5_cost_of_a_decode(self, subject: Subject) -> None:
        """A decode write costs its rows, whatever the pool."""
        cost.decode_cost(subject, inputs.rows(inputs.GAUSSIAN, 0, subject.shape))

    def test_law_5_cost_of_attention(self, subject: Subject) -> None:
        """Attention makes nothing of the size of the pool."""
        cost.attention_cost(subject)

    def test_law_5_cost_of_a_copy(self, subject: Subject) -> None:
        """A copy of pages costs its pages, whatever the pool."""
        cost.copy_cost(subject)

    def test_law_6_truth(self, subject: Subject) -> None:
        """The bytes that are planned and reported are those that are allocated."""
        cost.truth(subject)

    def test_law_6_truth_of_bits(self, subject: Subject) -> None:
        """Codes have the bits, and scales the dtypes, that the format states."""
        cost.bits(subject)

    def test_law_7_sameness(self, subject: Subject) -> None:
        """Pages have the shapes and dtypes of plain ones."""
        sameness.looks(subject, inputs.rows(inputs.GAUSSIAN, 0, subject.shape))

    def test_law_7_sameness_of_attention(self, subject: Subject) -> None:
        """Attention over pages is attention over the values that they hold."""
        rows = inputs.rows(inputs.GAUSSIAN, 0, subject.shape)
        sameness.attention(subject, rows, sameness.queries(subject.shape))

    def test_law_7_sameness_in_bfloat16(self, subject: Subject) -> None:
        """Codes are exact in the dtype that dots take."""
        for name, rows in inputs.every_kind(subject.shape, seeds=1):
            sameness.exact_in_queries_dtypes(subject, rows, name)

    def test_law_8_travel(self, subject: Subject) -> None:
        """Scales go where their codes go."""
        travel.copies(subject, inputs.rows("growing", 0, subject.shape))

    def test_law_8_travel_by_copy_pages(self, subject: Subject) -> None:
        """Codes and scales are copied together, sources before targets, and nothing else is touched."""
        travel.copied_pages(subject, inputs.rows("growing", 0, subject.shape))

    def test_law_8_travel_of_the_format(self, subject: Subject) -> None:
        """A format survives its configuration and its spelling."""
        travel.identity(subject)

    def test_law_8_travel_to_files(self, subject: Subject) -> None:
        """A view survives JSON, and one of another format is refused."""
        if not travel.registered(subject.quantizer):
            pytest.skip(f"{subject} has no entry point in qpaged.quantizers, by which records are read")
        travel.records(subject, inputs.rows(inputs.GAUSSIAN, 0, subject.shape))

    def test_law_9_reuse(self, subject: Subject) -> None:
        """A page that was reset carries nothing of its earlier sequence."""
        for turn, kinds in enumerate((("huge", "tiny"), ("growing", "zeros"), ("wild", inputs.GAUSSIAN))):
            rows = inputs.rows(kinds[0], turn, subject.shape)
            later = inputs.rows(kinds[1], turn, subject.shape)
            _, chunks = inputs.write_order(turn)
            locality.reuse(subject, rows, later, chunks, f"{kinds[0]} values")

    def test_law_9_reuse_of_fresh_pages(self, subject: Subject) -> None:
        """Fresh pages read as exact zeros."""
        locality.fresh_pages(subject, inputs.rows(inputs.GAUSSIAN, 0, subject.shape))

    def test_law_1_error_with_exact_pages(self, exact_subject: ExactSubject) -> None:
        """With exact pages, the newest and first tokens read as written, and the others within the bound."""
        for turn, (name, rows) in enumerate(inputs.every_kind(exact_subject.shape, seeds=1)):
            order, chunks = exact.write_order(turn)
            exact.keeps_tokens(exact_subject, rows, chunks, f"{name} written {order}")
        exact.rewinds(exact_subject, *_gaussians(exact_subject))

    def test_law_2_order_with_exact_pages(self, exact_subject: ExactSubject) -> None:
        """With exact pages, chunks, decodes and rejected drafts leave the bits that one prefill leaves."""
        for turn, kind in enumerate((inputs.GAUSSIAN, "growing", "wild"), start=1):
            rows = inputs.rows(kind, turn, exact_subject.shape)
            order, chunks = exact.write_order(turn)
            exact.order(exact_subject, rows, chunks, f"{kind} values written {order}")
        exact.order_of_decodes(exact_subject, inputs.rows("growing", 0, exact_subject.shape))

    def test_law_3_locality_with_exact_pages(self, exact_subject: ExactSubject) -> None:
        """With exact pages, a sequence leaves others' bits alone; pages packed early are within the bound."""
        exact.locality(exact_subject, *_gaussians(exact_subject))

    def test_law_4_totality_with_exact_pages(self, exact_subject: ExactSubject) -> None:
        """With exact pages, what is out of range is dropped, and packs nothing."""
        exact.totality(exact_subject, inputs.rows("growing", 0, exact_subject.shape))

    def test_law_5_cost_with_exact_pages(self, exact_subject: ExactSubject) -> None:
        """With exact pages, a decode step and attention make nothing of the size of the pool."""
        exact.cost(exact_subject)

    def test_law_6_truth_with_exact_pages(self, exact_subject: ExactSubject) -> None:
        """The bytes of exact pages are planned and reported, too."""
        exact.truth(exact_subject)

    def test_law_7_sameness_with_exact_pages(self, exact_subject: ExactSubject) -> None:
        """With exact pages, attention is attention over what packed and exact pages hold."""
        rows, _ = _gaussians(exact_subject)
        exact.sameness(exact_subject, rows, exact.queries(exact_subject.shape))

    def test_law_8_travel_with_exact_pages(self, exact_subject: ExactSubject) -> None:
        """Exact pages are copied, packed and saved with what they hold."""
        exact.travel(exact_subject, inputs.rows("growing", 0, exact_subject.shape))

    def test_law_9_reuse_with_exact_pages(self, exact_subject: ExactSubject) -> None:
        """Pages that were exact and are reset are fresh, and leave their room to others."""
        exact.reuse(exact_subject, inputs.rows("huge", 0, exact_subject.shape), _gaussians(exact_subject)[0])


def _gaussians(subject: ExactSubject) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of two sequences."""
    first, second = (inputs.rows(inputs.GAUSSIAN, seed, subject.shape) for seed in (0, 2))
    return first, second
