"""Tests of the verdict: the formats that it names, ties, and thresholds that error bars cross."""

import numpy as np
import pytest

from qpaged.sweep import verdict
from qpaged.sweep._numbers import percent, small
from qpaged.sweep.results import is_broken, pareto_front

ORDER: dict[str, int] = {}


def parts(name, mean, error):
    """Return values of a text's parts with this mean and standard error, uncorrelated with other names'."""
    if error is None:
        return [mean]
    row = ORDER.setdefault(name, len(ORDER) + 1)
    angle = np.pi * row * (np.arange(32) + 0.5) / 32  # cosines are orthogonal to each other and to the mean
    return (mean + error * np.sqrt(62) * np.cos(angle)).tolist()


def run(format, bytes_per_token, kl, error=0.0):
    return {
        "format": format,
        "bytes_per_token": bytes_per_token,
        "ratio": 2048 / bytes_per_token,
        "bits_per_element": bytes_per_token / 128,
        "kl_mean": kl,
        "kl_mean_se": error,
        "kl_parts": parts(format, kl, error),
        "same_top": 1 - kl,
    }


PLAIN, RAW = run("plain", 4096, 0.0), run("raw", 2048, 3e-6)
INT8 = run("int8", 1025, 7e-5, 6e-6)
INT4 = run("int4", 576, 4.6e-3, 3e-4)
INT2 = run("int2", 320, 0.16, 0.01)


def results(*runs, **others):
    parts = {name: {} for name in ("model", "text", "reference", "settings", "environment")}
    return parts | {"version": 2, "complete": True, "failures": [], "runs": list(runs)} | others


def test_it_names_what_halves_the_cache_and_what_is_smallest():
    assert verdict(results(PLAIN, RAW, INT8, INT4, INT2)) == (
        "int8 halves the cache for a mean KL of 7.0e-5 ± 0.6e-5 nats a token, and leaves the likeliest token "
        "as it was 99.99 % of the time. "
        "int4 is the smallest that is surely under 0.01 nats of mean KL (4.5 bits, 0.0046 ± 0.0003); "
        "below that, int2 (2.5 bits) costs 0.16 ± 0.01."
    )


def test_a_difference_within_the_error_bars_is_a_tie_and_the_plainest_is_named():
    near = run("int8+rotate", 1025, 6.4e-5, 6e-6)  # 0.7 standard errors below int8
    assert "; tied with int8+rotate." in verdict(results(PLAIN, near, INT8))
    assert verdict(results(PLAIN, near, INT8)).startswith("int8 halves")


def test_a_tie_that_the_error_bars_barely_allow_names_the_closer():
    nearer = run("int8+rotate", 1025, 5.7e-5, 6e-6)  # 1.5 standard errors
    assert verdict(results(PLAIN, nearer, INT8)).startswith("int8+rotate halves")
    assert "; tied with int8." in verdict(results(PLAIN, nearer, INT8))


def test_a_difference_beyond_the_error_bars_is_no_tie():
    closer = run("int8+rotate", 1025, 4e-5, 6e-6)  # 3.5 standard errors
    assert verdict(results(PLAIN, closer, INT8)).startswith("int8+rotate halves")
    assert "tied" not in verdict(results(PLAIN, closer, INT8))


def test_many_ties_are_counted():
    others = [run(f"int8:{name}", 1025, 7e-5, 6e-6) for name in "abcde"]
    assert "tied with int8:a, int8:b, int8:c and 2 more" in verdict(results(PLAIN, INT8, *others))


def test_a_format_whose_error_bar_crosses_the_threshold_is_not_surely_under_it():
    unsure = run("int4:page", 513, 9.5e-3, 4e-4)
    assert "int4 is the smallest that is surely under 0.01" in verdict(results(PLAIN, INT4, unsure))
    assert "int4:page (4.01 bits) costs 0.0095 ± 0.0004" in verdict(results(PLAIN, INT4, unsure))


def test_the_threshold_is_the_readers():
    assert "int2 is the smallest that is surely under 0.2 nats" in verdict(
        results(PLAIN, INT4, INT2, max_kl=0.2)
    )


def test_none_under_the_threshold():
    assert "None is surely under 0.01 nats of mean KL: the closest, int2, has 0.16 ± 0.01." in verdict(
        results(PLAIN, INT2)
    )


def test_one_sequence_has_no_error_bars():
    alone = run("int8", 1025, 7e-5, None)
    assert "a mean KL of 7.0e-5 nats" in verdict(results(PLAIN, alone))


def test_a_cache_that_is_not_halved_is_not_said_to_be():
    assert "int8:t makes the cache 1.8 times smaller" in verdict(results(PLAIN, run("int8:t", 1152, 2e-5)))
    assert "int4 makes the cache 3.6 times smaller" in verdict(results(PLAIN, INT4))


def test_nothing_smaller():
    assert verdict(results(PLAIN, RAW)) == "No format smaller than bfloat16 was measured beside plain."


def test_failures_and_an_early_stop_come_first():
    failures = [{"format": name, "error": "E"} for name in ("x", "y")]
    assert verdict(results(PLAIN, INT8, failures=failures)).startswith("Incomplete: x and y failed. int8")
    stopped = verdict(results(PLAIN, INT8, failures=failures, complete=False))
    assert stopped.startswith("Incomplete: the sweep stopped after 2 formats, and x and y failed.")


def test_the_choice_by_layer_comes_last():
    assert verdict(results(PLAIN, INT8, tune={"verdict": "tuned is better."})).endswith(" tuned is better.")


def test_the_sample(sample):
    assert "int8:channel+offset+rotate makes the cache 1.8 times smaller" in verdict(sample)


def with_noise(kl, error):
    noise = {"conditions": "computing in bfloat16", "kl_mean": kl, "kl_mean_se": error}
    quieter = noise | {"conditions": "chunks of 125", "kl_mean": 1e-14, "kl_parts": parts("chunks", 1e-14, 0)}
    return PLAIN | {"noise": [quieter, noise | {"kl_parts": parts("noise", kl, error)}]}


@pytest.mark.parametrize(
    ("noise", "within"),
    [
        ((1e-3, 1e-5), "int8 is within that noise."),
        ((6.5e-5, 4e-6), "int8 is within that noise."),  # 0.7 standard errors below
        ((2e-5, 1e-6), "no format is within that noise."),
        ((1e-2, 1e-4), "int8 and int4 are within that noise."),
    ],
)
def test_what_is_within_the_noise_of_the_reference(noise, within):
    sentence = f"The reference, computing in bfloat16, is {small(*noise)} from itself: {within}"
    assert verdict(results(with_noise(*noise), INT8, INT4)).endswith(sentence)


def test_another_version_is_refused():
    with pytest.raises(ValueError, match=r"must be of version 2 with all its fields, but came as version 1;"):
        verdict(results(PLAIN, version=1))


@pytest.mark.parametrize(
    ("number", "text"),
    [
        ((0.0, 0.0), "0 ± 0"),
        ((7.334e-5, 5.9e-6), "7.3e-5 ± 0.6e-5"),
        ((7.334e-5, 2e-8), "7.334e-5 ± 0.002e-5"),
        ((0.00462, 0.0003), "0.0046 ± 0.0003"),
        ((0.0262, 0.0008), "0.0262 ± 0.0008"),
        ((1.2, 0.5), "1.2 ± 0.5"),
        ((0.001, 0.002), "0.0010 ± 0.0020"),
        ((12.3,), "12"),
        ((9.96e-6,), "1.0e-5"),
    ],
)
def test_numbers_have_the_digits_that_their_errors_allow(number, text):
    assert small(*number) == text


def test_percent():
    assert (percent(0.99664), percent(0.9966, 0.0012)) == ("99.66 %", "99.66 % ± 0.12")


def test_what_destroys_the_model_is_no_bargain():
    broken = run("int2+offset", 300, 1.9, 0.1)
    assert is_broken(broken) and not is_broken(run("int2", 400, 0.4, 0.1))
    assert broken not in pareto_front([PLAIN, INT8, broken])
    assert "int2+offset" not in verdict(results(PLAIN, INT8, INT4, broken))
    assert "None is surely under 0.01 nats of mean KL: the closest, int2+offset, has 1.9" in verdict(
        results(PLAIN, broken)
    )
