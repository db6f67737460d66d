"""The numbers of a sweep, against their formulas in float64, term by term."""

import math

import numpy as np
import pytest

from qpaged.sweep._metrics import kl_divergence, log_softmax, measure_accuracy, standard_error, true_bits

SEQUENCES, TOKENS, VOCABULARY = 3, 40, 7


def logits(seed, spread=3.0):
    shape = SEQUENCES, TOKENS, VOCABULARY
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * np.float32(spread)


def truth():
    return np.random.default_rng(9).integers(0, VOCABULARY, (SEQUENCES, TOKENS))


def probabilities(row):
    weights = [math.exp(x) for x in row.tolist()]
    return [weight / math.fsum(weights) for weight in weights]


def divergence(p_row, q_row):
    pairs = zip(probabilities(p_row), probabilities(q_row), strict=True)
    return math.fsum(p * math.log(p / q) for p, q in pairs)


def test_log_softmax_of_logits_too_large_for_exp():
    rows = np.array([[1e4, 1e4 - 1.0, -1e4]], np.float32)
    expected = [-math.log1p(math.exp(-1)), -1 - math.log1p(math.exp(-1))]
    np.testing.assert_allclose(log_softmax(rows)[0, :2], expected, rtol=1e-12)
    assert np.isfinite(log_softmax(rows)).all()


def test_kl_is_the_sum_of_p_log_p_over_q():
    p, q = logits(0), logits(1)
    expected = [[divergence(a, b) for a, b in zip(*rows, strict=True)] for rows in zip(p, q, strict=True)]
    np.testing.assert_allclose(kl_divergence(log_softmax(p), log_softmax(q)), expected, rtol=1e-11)


def test_kl_of_nearly_equal_predictions_is_not_lost_to_rounding():
    p = logits(0)[0, :1].astype(np.float64)
    step = np.zeros(VOCABULARY)
    step[2] = 1e-5
    share = probabilities(p[0])[2]  # KL of a small step d in one logit is p (1 - p) d^2 / 2
    found = kl_divergence(log_softmax(p), log_softmax(p + step))
    np.testing.assert_allclose(found, share * (1 - share) * 0.5e-10, rtol=1e-3)


def test_bits_are_those_of_the_true_token():
    rows, right = logits(2), truth()
    expected = [
        [-math.log2(probabilities(row)[token]) for row, token in zip(*pair, strict=True)]
        for pair in zip(rows, right, strict=True)
    ]
    np.testing.assert_allclose(true_bits(log_softmax(rows), right), expected, rtol=1e-11)


def test_accuracy_summarizes_them():
    p, q, right = logits(0), logits(0) + logits(1, 0.1), truth()
    kl = kl_divergence(log_softmax(p), log_softmax(q))
    bits = true_bits(log_softmax(q), right)
    found = measure_accuracy(p, q, right)
    ordered = np.sort(kl, axis=None)
    assert found.kl_mean == pytest.approx(kl.sum() / kl.size)
    assert found.kl_median == pytest.approx((ordered[59] + ordered[60]) / 2)
    assert found.kl_p999 == pytest.approx(ordered[-1] - 0.119 * (ordered[-1] - ordered[-2]))
    assert found.kl_max == ordered[-1]
    assert found.bits_per_byte == pytest.approx(bits.mean())
    assert found.bits_per_byte_se == pytest.approx(standard_error(bits))
    assert found.kl_mean_se == pytest.approx(standard_error(kl))
    assert found.same_top == (p.argmax(-1) == q.argmax(-1)).mean() < 1


def test_a_run_beside_itself_is_exact():
    found = measure_accuracy(logits(0), logits(0), truth())
    assert (found.kl_mean, found.kl_max, found.same_top) == (0, 0, 1)


def test_the_standard_error_is_that_of_the_sequences_means():
    values = np.array([[1.0, 3.0], [2.0, 4.0], [6.0, 8.0]])  # means 2, 3, 7: variance 7
    assert standard_error(values) == pytest.approx(math.sqrt(7 / 3))
    assert standard_error(values[:1]) is None


def test_logits_that_are_not_finite_are_refused():
    broken = logits(0)
    broken[1, 2, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        measure_accuracy(logits(0), broken, truth())
