"""The formats of the tutorial: what it says of them, and the laws that they keep."""

import re
import statistics

import jax.numpy as jnp
import numpy as np
import pytest
from scripts import PLUGIN, ROOT, script

import qpaged
from qpaged.models import load_tiny
from qpaged.testing import QuantizerConformance, Subject
from quantizers import Rotate

TUTORIAL = (ROOT / "docs/writing-a-format.md").read_text()
SWEEP = (ROOT / "docs/includes/nf4_sweep.txt").read_text()
nf4 = script(PLUGIN / "qpaged_nf4/__init__.py")
OFFSET = 0.9677083  # of the paper's rule


def example(name):
    return script(ROOT / "docs/includes" / f"{name}.py")


class TestTutorialFormats(QuantizerConformance):
    format = (
        example("floor6").Floor6(),
        example("nearest6").Nearest6(),
        example("signs").Signs(inner=Rotate(inner=nf4.Nf4())),
    )


def test_levels_are_those_of_the_papers_rule():
    quantile = np.vectorize(statistics.NormalDist().inv_cdf)
    above, below = (quantile(np.linspace(OFFSET, 0.5, count)[:-1]) for count in (9, 8))
    levels = np.sort(np.concatenate([above, [0], -below]))
    np.testing.assert_allclose(nf4.PUBLISHED, levels / np.abs(levels).max(), atol=2e-7)


def test_levels_are_exact_in_bfloat16_and_near_the_published_ones():
    assert (nf4.LEVELS.astype("bfloat16").astype(np.float32) == nf4.LEVELS).all()
    assert np.abs(nf4.LEVELS / 16 - nf4.PUBLISHED).max() < 0.002


def test_bounds_are_those_that_the_docstring_states():
    assert round(nf4.Nf4.bound, 2) == 2.44 and round(nf4.Nf4.bound / 16, 3) == 0.152
    assert "2.44 s or 0.152 absmax" in nf4.Nf4.__doc__


class Inexact(nf4.Nf4):
    """NF4 with the published levels."""

    def decode(self, codes, dtype):
        return jnp.take(jnp.asarray(16 * nf4.PUBLISHED, dtype), codes, mode="clip")


def test_the_law_that_is_shown_as_broken_is():
    (shown,) = re.findall(r"^    (law \d, .*\n .*)$", TUTORIAL, re.MULTILINE)
    with pytest.raises(AssertionError) as broken:
        QuantizerConformance().test_law_7_sameness_in_bfloat16(Subject(Inexact()))
    assert str(broken.value).replace(" (Inexact)", "") == " ".join(shown.split())


def test_the_plugin_is_found(plugin):
    assert "nf4" in qpaged.available_quantizers()
    assert {"nf4:group32+rotate", "nf4:token"} <= set(qpaged.available_formats(wrapped=True))
    assert qpaged.get_quantizer("nf4").bits == 4


def test_the_sweep_that_is_shown_is_the_one_that_is_told(plugin):
    """Formats and bytes; the lane ``plugin`` compares the rest."""
    (told,) = re.findall(r"^qpaged sweep --formats (\S+)", TUTORIAL, re.MULTILINE)
    lines = [line.replace(" *", "").split() for line in SWEEP.splitlines()]
    rows = [line for line in lines if len(line) == 9 and line[6].endswith("%")]
    assert [row[0] for row in rows] == ["plain", *told.split(",")]
    config, _ = load_tiny()
    heads = config.num_hidden_layers * config.num_key_value_heads
    bytes_per_token = script(ROOT / "docs/includes/sizes.py").bytes_per_token
    for spelling, shown, *_ in rows[1:]:
        format = qpaged.CacheFormat.of(spelling)
        taken = sum(bytes_per_token(f, "bfloat16", config.head_dim) for f in (format.key, format.value))
        assert f"{heads * taken:,.0f}" == shown
