"""The stress suite: metrics of known value, the rotation, a small run, and targets that can be missed."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import stress
from stress_cases import CASES, Case, Sizes, make_case, rotate
from stress_figure import Dot, dots_of, front_of
from stress_metrics import kl_divergence, log_attention, mean_entropy, mean_losses, measure_losses
from stress_targets import Target, describe, judge

from qpaged.models.rope import Rope, rotary_angles
from qpaged.models.rope import rotate as models_rotate

SMALL = Sizes(tokens=64, kv_heads=1, queries_per_head=2, head_dim=32, query_step=4)


def two_tokens(query=1.0):
    """Return a case of two tokens with keys 0 and 1 in the first of 4 channels, and a query at the second."""
    key = np.zeros((1, 2, 4))
    key[0, 1, 0] = 1
    value = np.ones((1, 2, 4))
    value[0, 1] = 2
    key[0, 1, 1:] = 1e-9  # the loss of a channel is relative to its std, which must not be 0
    return Case(np.array([[[2 * query, 0, 0, 0]]]), np.array([1]), key, value)


def test_nothing_is_lost_where_nothing_changes():
    case = make_case("bias_fast", SMALL)
    losses = measure_losses(case, case.key, case.value)
    assert (losses.key_rms, losses.attention_kl, losses.output_error, losses.worst_channel) == (0, 0, 0, 0)


def test_losses_of_known_value():
    case = two_tokens(query=math.log(3))  # p = 1/4, 3/4
    halves = np.zeros_like(case.key)  # p̂ = 1/2, 1/2
    losses = measure_losses(case, halves, case.value)
    assert losses.attention_kl == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert losses.key_rms == pytest.approx(1)
    assert losses.worst_channel == pytest.approx(1)
    assert losses.output_error == pytest.approx(0.25 / 1.75)


def test_a_constant_error_of_keys_is_no_loss_of_attention():
    case = make_case("gaussian", SMALL)
    losses = measure_losses(case, case.key + 100, case.value)
    assert losses.key_rms > 50
    assert losses.attention_kl < 1e-12 and losses.worst_channel < 1e-12


def test_attention_is_causal():
    case = make_case("gaussian", SMALL)
    p = np.exp(log_attention(case, case.key))
    seen = case.query_position[:, None] >= np.arange(SMALL.tokens)
    np.testing.assert_allclose(p.sum(axis=-1), 1)
    assert (p[:, ~seen] == 0).all() and (p[:, seen] > 0).all()


def test_kl_is_finite_where_a_weight_underflows():
    log_p, log_q = np.log([0.5, 0.5]), np.array([0.0, -800.0])
    assert kl_divergence(log_p, log_q) == pytest.approx(400 - math.log(2))


def test_a_loss_that_is_not_finite_is_none():
    case = two_tokens()
    losses = mean_losses([measure_losses(case, case.key * np.nan, case.value)])
    assert losses == dict.fromkeys(losses)


def test_the_rotation_is_the_decoders():
    x = np.random.default_rng(0).normal(size=(9, 1, 32))
    position = np.arange(20, 29)
    rotation = rotary_angles(Rope(), 32, jnp.asarray(position))
    expected = models_rotate(jnp.asarray(x, jnp.float32), rotation)
    rotated = rotate(x[:, 0], position)
    np.testing.assert_allclose(rotated, expected[:, 0], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(rotated, axis=-1), np.linalg.norm(x[:, 0], axis=-1))


@pytest.mark.parametrize("name", [name for name in CASES if name != "near_zero_as_is"])
def test_attention_of_a_case_is_neither_uniform_nor_on_one_token(name):
    entropy = mean_entropy(make_case(name, stress.SIZES))
    uniform = np.log(stress.SIZES.query_position + 1).mean()
    assert 0.1 * uniform < entropy < 0.95 * uniform


@pytest.mark.parametrize(("name", "norm"), [("bias_slow", 605), ("bias_fast", 605), ("gaussian", 0)])
def test_biases_have_their_norm(name, norm):
    """Rotated back by their positions, the keys of a head have the bias as their mean."""
    key = make_case(name, stress.SIZES).key
    mean = rotate(key, -np.arange(stress.SIZES.tokens)).mean(axis=1)
    np.testing.assert_allclose(np.linalg.norm(mean, axis=-1), norm, atol=1)


def test_scales_by_token_lose_less_than_scales_by_page():
    results = json.loads(json.dumps(stress.run(["int8", "int8:token"], [16], SMALL), allow_nan=False))
    page, token = results["runs"]
    for case in CASES:
        assert all(loss > 0 for loss in page["losses"][case].values() if case != "near_zero_as_is")
        assert token["losses"][case]["key_rms"] < page["losses"][case]["key_rms"] < 0.1
    assert (page["key_bits"], token["key_bits"]) == (8 + 8 / (16 * 32), 9)
    assert len(results["targets"]) == len(stress.TARGETS)


def test_plain_pages_lose_nothing_and_values_have_their_own_format():
    plain, pair = stress.run(["plain", "plain/int8"], [24], SMALL)["runs"]
    assert all(loss == 0 for losses in plain["losses"].values() for loss in losses.values())
    losses = pair["losses"]["gaussian"]
    assert losses["key_rms"] == 0 and losses["output_error"] > 0
    assert pair["key_bits"] == 32 and pair["value_bits"] < 9


def run_of(format, bits, kl):
    """Return a run with one case and one metric."""
    losses = {"gaussian": {"attention_kl": kl}}
    return {"format": format, "page_size": 16, "key_bits": bits, "value_bits": bits, "losses": losses}


RUNS = [run_of("a", 8.5, 0.01), run_of("b", 9.5, 0.001), run_of("c", 4, 0.1), run_of("d", 4, None)]


@pytest.mark.parametrize(
    ("target", "best", "met", "line"),
    [
        (Target("gaussian", "attention_kl", 0.01, max_bits=9), "a", True, "met "),
        (Target("gaussian", "attention_kl", 0.009, max_bits=9), "a", False, "MISSED "),
        (Target("gaussian", "attention_kl", 0.009), "b", True, "met "),
        (Target("gaussian", "attention_kl", max_bits=6), "c", None, "- "),
        (Target("gaussian", "attention_kl", 0.05, format="c"), "c", False, "MISSED "),
        (Target("gaussian", "attention_kl", 0.05, max_bits=3), None, False, "MISSED "),
        (Target("gaussian", "attention_kl", 0.05, format="d"), None, False, "MISSED "),
    ],
)
def test_targets_are_met_and_missed(target, best, met, line):
    verdict = judge(target, RUNS)
    assert verdict["met"] is met
    assert (verdict["best"] and verdict["best"]["format"]) == best
    assert describe(verdict).startswith(line)


def test_the_front_of_the_figure_is_the_pareto_front():
    small, same, worse, large = Dot("a", 4.01, 0.5), Dot("b", 4.04, 0.4), Dot("c", 5, 0.6), Dot("d", 8, 0.1)
    assert front_of([large, worse, small, same]) == [same, large]


def test_page_sizes_of_the_same_outcome_share_a_dot_and_exact_formats_have_none():
    runs = [run | {"page_size": size} for size in (16, 64) for run in (*RUNS, run_of("e", 8, 0.0))]
    runs.append(run_of("f", 8, 0.2))
    names = [dot.name for dot in dots_of({"runs": runs}, "gaussian")]
    assert names == ["a", "b", "c", "f (16)"]
