"""A format that breaks a law fails that law's test of the kit, and its sound twin passes."""

import pytest
from support import broken_formats

from qpaged.testing import LAWS, QuantizerConformance, Subject
from quantizers import Fp8E4M3, Fp8E4M3Static, Int4, Int8Floor, Int8Token

PAGE, TOKEN = Subject(Int8Floor()), Subject(Int8Token())
STATIC = Fp8E4M3Static("head")
CASES = [
    ("test_law_1_error", Subject(broken_formats.Overconfident()), TOKEN),
    ("test_law_1_error_is_worth_stating", Subject(broken_formats.Vague()), TOKEN),
    ("test_law_2_order", Subject(broken_formats.RoundsAgain()), PAGE),
    ("test_law_2_order", Subject(broken_formats.Undeclared()), Subject(Fp8E4M3())),
    ("test_law_3_locality_of_what_is_not_finite", Subject(broken_formats.AcrossHeads()), TOKEN),
    ("test_law_3_locality", Subject(broken_formats.AcrossPages()), PAGE),
    ("test_law_4_totality_of_other_steps", Subject(broken_formats.ZerosPastTheEnd()), PAGE),
    ("test_law_5_cost_of_a_decode", broken_formats.WholePool(Int8Token()), TOKEN),
    ("test_law_5_cost_of_attention", broken_formats.WholePoolRead(Int8Token()), TOKEN),
    ("test_law_5_cost_of_a_copy", broken_formats.CopiesThePool(Int8Token()), TOKEN),
    ("test_law_6_truth_of_bits", Subject(broken_formats.WideCodes()), TOKEN),
    ("test_law_6_truth_of_bits", Subject(broken_formats.SpareScales()), TOKEN),
    ("test_law_7_sameness_in_bfloat16", Subject(broken_formats.Thirds()), PAGE),
    ("test_law_7_sameness_in_bfloat16", Subject(broken_formats.DividedByThree()), TOKEN),
    ("test_law_7_sameness_in_bfloat16", Subject(broken_formats.Wide()), PAGE),
    ("test_law_8_travel", Subject(broken_formats.AcrossPages()), PAGE),
    ("test_law_8_travel", broken_formats.LateScales(Int8Token()), TOKEN),
    ("test_law_2_order_of_scales", Subject(broken_formats.FallingScale()), TOKEN),
    ("test_law_6_truth_of_bits", Subject(broken_formats.TooManyCodes()), Subject(Int4())),
    ("test_law_8_travel_by_copy_pages", broken_formats.LateScales(Int8Token()), TOKEN),
    ("test_law_8_travel_by_copy_pages", broken_formats.FirstTargetWins(Int8Token()), TOKEN),
    ("test_law_8_travel_of_the_format", Subject(broken_formats.Forgetful("channel")), PAGE),
    ("test_law_9_reuse_of_fresh_pages", Subject(broken_formats.NeverEmpty()), PAGE),
    ("test_law_8_travel_by_copy_pages", broken_formats.ScalesByPage(STATIC), Subject(STATIC)),
    ("test_law_3_locality", broken_formats.ScalesOfTheLast(STATIC), Subject(STATIC)),
    ("test_law_9_reuse_of_fresh_pages", broken_formats.ScalesCleared(STATIC), Subject(STATIC)),
]


@pytest.mark.parametrize(("test", "subject", "twin"), CASES)
def test_a_broken_format_is_caught(test, subject, twin):
    number = int(test.split("_")[2])
    check = getattr(QuantizerConformance(), test)
    with pytest.raises(AssertionError, match=rf"law {number}, {LAWS[number][0]}: .* breaks it"):
        check(subject)
    check(twin)


def test_every_law_has_a_format_that_breaks_it():
    assert {int(test.split("_")[2]) for test, *_ in CASES} == set(LAWS)
