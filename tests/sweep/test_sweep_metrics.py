"""Tests of the metrics of a sweep against their formulas in float64, term by term."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from qpaged.sweep import METRICS
from qpaged.sweep.measure._metrics import Measurement, Predictions, compare, compute_metrics
from qpaged.sweep.measure._statistics import KL_EDGES, jackknife, kl_histogram, part_means

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


def test_kl_is_the_sum_of_p_log_p_over_q():
    p, q = logits(0), logits(1)
    expected = [[divergence(a, b) for a, b in zip(*rows, strict=True)] for rows in zip(p, q, strict=True)]
    np.testing.assert_allclose(compare(p, q, truth()).kl, expected, rtol=1e-5)


def test_kl_of_nearly_equal_predictions_is_not_lost_to_rounding():
    p = logits(0)[0, :1]
    step = np.zeros(VOCABULARY, np.float32)
    step[2] = 1e-3
    share = probabilities(p[0])[2]  # KL of a small step d in one logit is p (1 - p) d^2 / 2
    found = compare(p, p + step, truth()[0, :1]).kl  # float32 rounds the step itself by 1e-7
    np.testing.assert_allclose(found, share * (1 - share) * 0.5e-6, rtol=2e-3)


def test_logits_too_large_for_exp():
    p = np.array([[1e4, 1e4 - 1.0, -1e4]], np.float32)
    found = compare(p, p[:, [1, 0, 2]], np.array([1]))
    low, high = -1 - math.log1p(math.exp(-1)), -math.log1p(math.exp(-1))
    np.testing.assert_allclose([found.log_p[0], found.log_q[0]], [low, high], rtol=1e-6)
    np.testing.assert_allclose(found.kl, math.exp(high) - math.exp(low), rtol=1e-5)  # sum p d, d = 1 and -1


def test_predictions_far_apart():
    p = np.array([[0.0, -200.0, 3.0]], np.float32)
    q = np.array([[-150.0, 40.0, 3.0]], np.float32)
    np.testing.assert_allclose(compare(p, q, np.array([1])).kl, [divergence(p[0], q[0])], rtol=1e-5)


def test_a_prediction_beside_itself_is_exact():
    found = compare(logits(0), logits(0), truth())
    assert (np.asarray(found.kl) == 0).all() and np.asarray(found.same_top).all()


def in_float64(predictions):
    return Predictions(*(np.asarray(values, np.float64) for values in predictions))


def metrics(predictions, token_bytes):
    """Compute the metrics of some predictions, as attributes; the rest of the measurement does not matter."""
    measurement = Measurement(
        predictions=predictions,
        token_bytes=token_bytes,
        continuations=np.zeros((2, 4)),
        reference_continuations=np.zeros((2, 4)),
        attention=None,
        bytes_per_token=64.0,
        elements_per_token=64,
        decode_seconds_per_step=None,
        prefill_seconds_per_token=None,
    )
    return SimpleNamespace(**compute_metrics(measurement))


@pytest.fixture(scope="module")
def compared():
    """Return predictions that differ a little, and the bytes that each token stands for."""
    predictions = in_float64(compare(logits(0), logits(0) + logits(1, 0.1), truth()))
    return predictions, np.random.default_rng(3).integers(1, 6, (SEQUENCES, TOKENS))


def test_metrics_are_those_of_their_formulas(compared):
    predictions, token_bytes = compared
    kl, log_p, log_q = predictions.kl, predictions.log_p, predictions.log_q
    found = metrics(predictions, token_bytes)
    ordered = np.sort(kl, axis=None)
    assert found.kl_mean == pytest.approx(kl.mean())
    assert found.kl_median == pytest.approx((ordered[59] + ordered[60]) / 2)
    assert found.kl_p90 == pytest.approx(ordered[107] + 0.1 * (ordered[108] - ordered[107]))
    assert found.kl_p999 == pytest.approx(ordered[-1] - 0.119 * (ordered[-1] - ordered[-2]))
    assert found.kl_max == ordered[-1]
    assert len(part_means(kl)) == 9 and np.mean(part_means(kl)) == pytest.approx(kl.mean(), rel=0.02)
    assert found.bits_per_byte == pytest.approx(-log_q.sum() / token_bytes.sum() / math.log(2))
    assert found.perplexity == pytest.approx(math.exp(-log_q.mean()))
    assert found.perplexity_ratio == pytest.approx(math.exp(-log_q.mean()) / math.exp(-log_p.mean()))
    assert found.probability_change_rms == pytest.approx(
        math.sqrt(((np.exp(log_q) - np.exp(log_p)) ** 2).mean())
    )
    assert found.same_top == pytest.approx(predictions.same_top.mean()) != 1
    assert (found.ratio, found.bits_per_element) == (2, 8)
    assert (found.greedy_first_difference, found.greedy_same, found.attention_error) == (4, 1, None)


def test_the_standard_error_of_a_mean_is_that_of_independent_units():
    units = np.array([[2.0, 4.0], [2.0, 6.0], [2.0, 14.0]])  # means 2, 3, 7: variance 7
    mean, error = jackknife(units, lambda total: total[1] / total[0])
    assert (mean, error) == (pytest.approx(4), pytest.approx(math.sqrt(7 / 3)))
    assert jackknife(units[:1], lambda total: total[1] / total[0]) == (2, None)


def test_standard_errors_cover_the_truth_in_68_percent_of_cases():
    rng, covered = np.random.default_rng(0), []
    for _ in range(400):  # the perplexity of tokens that cost an exponentially distributed number of nats
        units = np.stack([np.full(20, 50.0), rng.exponential(1.0, (20, 50)).sum(axis=1)], axis=1)
        found, error = jackknife(units, lambda total: math.exp(total[1] / total[0]))
        covered.append(abs(found - math.e) <= error)
    assert 0.60 < np.mean(covered) < 0.75  # 0.674 for a t distribution of 19 degrees; 0.023 is its own error


def test_errors_are_taken_over_sequences_or_over_stretches_where_these_are_few(compared):
    predictions, token_bytes = compared
    one = Predictions(*(values[:1] for values in predictions))
    assert metrics(one, token_bytes[:1]).kl_mean_se == pytest.approx(
        one.kl.reshape(8, 5).mean(axis=1).std(ddof=1) / math.sqrt(8), rel=1e-4
    )
    many = Predictions(*(np.tile(values, (3, 1)) for values in predictions))
    assert metrics(many, np.tile(token_bytes, (3, 1))).kl_mean_se == pytest.approx(
        many.kl.mean(axis=1).std(ddof=1) / 3, rel=1e-4
    )


def test_the_histogram_counts_every_value_once():
    found = kl_histogram(np.array([0.0, 1e-13, 10**-6.1, 10**-6.2, 1e9]))
    edges, counts = found["log10_edges"], found["counts"]
    assert edges == KL_EDGES.tolist() and len(counts) == len(edges) - 1
    assert found["below"] == 2 and counts[edges.index(-6.25)] == 2 and counts[-1] == 1 and sum(counts) == 3


def test_logits_that_are_not_finite_are_refused():
    broken = logits(0)
    broken[1, 2, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        metrics(in_float64(compare(logits(0), broken, truth())), np.ones(truth().shape))


def test_every_metric_has_a_key_of_its_own_and_a_meaning():
    assert len({metric.key for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.meaning and metric.better in ("lower", "higher")
        if metric.table is not None and metric.table.with_error:
            assert metric.has_error, f"{metric.key} has no standard error to show"
