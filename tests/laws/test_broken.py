"""The kit catches what it is for: a format that breaks a law, by that law's test, whose sound twin passes."""

import broken
import pytest

from qpaged.testing import LAWS, QuantizerConformance, Subject
from quantizers import Fp8E4M3, Int8Floor, Int8Token

PAGE, TOKEN = Subject(Int8Floor()), Subject(Int8Token())
CASES = [
    ("test_law_1_error", Subject(broken.Overconfident()), TOKEN),
    ("test_law_1_error_is_worth_stating", Subject(broken.Vague()), TOKEN),
    ("test_law_2_order", Subject(broken.RoundsAgain()), PAGE),
    ("test_law_2_order", Subject(broken.Undeclared()), Subject(Fp8E4M3())),
    ("test_law_3_locality_of_what_is_not_finite", Subject(broken.AcrossHeads()), TOKEN),
    ("test_law_3_locality", Subject(broken.AcrossPages()), PAGE),
    ("test_law_4_totality_of_other_steps", Subject(broken.ZerosPastTheEnd()), PAGE),
    ("test_law_5_cost_of_a_decode", broken.WholePool(Int8Token()), TOKEN),
    ("test_law_5_cost_of_attention", broken.WholePoolRead(Int8Token()), TOKEN),
    ("test_law_6_truth_of_bits", Subject(broken.WideCodes()), TOKEN),
    ("test_law_6_truth_of_bits", Subject(broken.SpareScales()), TOKEN),
    ("test_law_7_sameness_in_bfloat16", Subject(broken.Thirds()), PAGE),
    ("test_law_8_travel", Subject(broken.AcrossPages()), PAGE),
    ("test_law_8_travel", broken.LateScales(Int8Token()), TOKEN),
    ("test_law_8_travel_of_the_format", Subject(broken.Forgetful("channel")), PAGE),
    ("test_law_9_reuse_of_fresh_pages", Subject(broken.NeverEmpty()), PAGE),
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
