"""Frequencies of rotary positions, and their scalings for longer contexts."""

import dataclasses

import numpy as np
import pytest

from qpaged.models import LinearScaling, Llama3Scaling, Rope
from qpaged.models.families import decoder_config

SIZES = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
}


def config(**fields):
    return decoder_config(SIZES | fields)


def test_frequencies_follow_base_scaling_and_rotary_dim():
    plain = Rope(theta=100.0)
    np.testing.assert_allclose(plain.frequencies(8), [1, 100**-0.25, 0.1, 100**-0.75], rtol=1e-6)
    linear = dataclasses.replace(plain, scaling=LinearScaling(4.0))
    np.testing.assert_allclose(linear.frequencies(8), plain.frequencies(8) / 4, rtol=1e-6)
    partial = dataclasses.replace(plain, partial_rotary_factor=0.5)
    np.testing.assert_allclose(partial.frequencies(16), plain.frequencies(8), rtol=1e-6)


def test_llama3_keeps_high_frequencies_and_divides_low_ones():
    """With an original context of 64 tokens, turns of 16 to 64 tokens are blended."""
    scaling = Llama3Scaling(8.0, 1.0, 4.0, 64)
    tokens_per_turn = np.array([1, 15.9, 16.1, 32, 63.9, 64.1, 1000])
    frequencies = 2 * np.pi / tokens_per_turn
    factors = scaling(frequencies) / frequencies
    blend = (64 / 32 - 1) / (4 - 1)
    expected = np.array([1, 1, 1, blend + (1 - blend) / 8, 1 / 8, 1 / 8, 1 / 8])
    np.testing.assert_allclose(factors, expected, atol=0.03)
    exact = [0, 1, 3, 5, 6]  # the others are near the ends of the blend
    np.testing.assert_allclose(factors[exact], expected[exact], rtol=1e-12)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}


@pytest.mark.parametrize(
    ("fields", "factors"),
    [
        # 32 turns in 2048 tokens are those of pair 2.02, and one turn is that of pair 5.03.
        ({}, [1, 1, 1, 0.8125, 0.625, 0.4375, 0.25, 0.25]),
        ({"truncate": True, "beta_fast": None}, [1, 1, 1, 0.8125, 0.625, 0.4375, 0.25, 0.25]),
        ({"truncate": False}, [1, 1, 1, 0.754842, 0.505697, 0.256553, 0.25, 0.25]),
        ({"truncate": None}, [1, 1, 1, 0.754842, 0.505697, 0.256553, 0.25, 0.25]),
        # 8 turns are those of pair 3.22, and 2 turns are those of pair 4.42.
        ({"beta_fast": 8, "beta_slow": 2}, [1, 1, 1, 1, 0.625, 0.25, 0.25, 0.25]),
    ],
)
def test_yarn_keeps_high_frequencies_and_divides_low_ones(fields, factors):
    """The numbers follow from section 3.2 of Peng et al. 2023 and the rounding of their code."""
    rope = config(rope_scaling=YARN | fields).rope
    np.testing.assert_allclose(rope.frequencies(16) / Rope().frequencies(16), factors, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "amplitude"),
    [
        ({}, 1.138629),  # 1 + 0.1 ln 4
        ({"factor": 0.5}, 1),
        ({"attention_factor": 1.5}, 1.5),
        ({"factor": 40, "mscale": 1, "mscale_all_dim": 0.5}, 1.155722),  # (1 + 0.1 ln 40) / (1 + 0.05 ln 40)
        ({"factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707}, 1),
        ({"factor": 40, "mscale": 1}, 1.368888),
    ],
)
def test_yarn_has_the_amplitude_of_its_factor_or_its_own(fields, amplitude):
    rope = config(rope_scaling=YARN | fields).rope
    assert rope.scaling.amplitude == pytest.approx(amplitude, rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "longest"),
    [
        ({"max_position_embeddings": 2048}, 8192),
        ({"max_position_embeddings": 8192}, 8192),
        ({"max_position_embeddings": 10_000}, 10_000),
        ({"max_position_embeddings": 1000, "original_max_position_embeddings": None}, 4000),
    ],
)
def test_yarn_extends_the_longest_sequence(fields, longest):
    scaling = YARN | {name: value for name, value in fields.items() if name.startswith("original")}
    model = config(max_position_embeddings=fields["max_position_embeddings"], rope_scaling=scaling)
    assert model.max_position_embeddings == longest and model.for_context(longest) is model
    with pytest.raises(ValueError, match=f"length must be at most {longest:,}, the longest"):
        model.for_context(longest + 1)
