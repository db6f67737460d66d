"""The tutorial's formats: the laws that they keep, and the statements of the tutorial about them."""

import os
import re
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import normal
from support.doc_scripts import PLUGIN, ROOT, script

import qpaged
from qpaged.models import load_tiny
from qpaged.testing import QuantizerConformance, Subject
from quantizers import Rotate

TUTORIAL = (ROOT / "docs/writing-a-format.md").read_text()
SWEEP = (ROOT / "docs/includes/nf4_sweep.txt").read_text()
nf4 = script(PLUGIN / "qpaged_nf4/__init__.py")
TPU = qpaged.attention_backends()[0]
OFFSET = 0.9677083  # the largest quantile of QLoRA's rule


def example(name):
    """Import an example format of the tutorial."""
    return script(ROOT / "docs/includes" / f"{name}.py")


class TestTutorialFormats(QuantizerConformance):
    """The first of them keeps the laws; with EVERY_FORMAT in the environment, all three are tested."""

    format = (
        example("floor6").Floor6(),
        example("nearest6").Nearest6(),
        example("signs").Signs(inner=Rotate(inner=nf4.Nf4())),
    )[: 3 if os.environ.get("EVERY_FORMAT") else 1]


def test_levels_follow_the_papers_rule():
    quantile = np.vectorize(statistics.NormalDist().inv_cdf)
    above = quantile(np.linspace(OFFSET, 0.5, 9)[:-1])
    below = quantile(np.linspace(OFFSET, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([above, [0], -below]))
    np.testing.assert_allclose(nf4.PUBLISHED, levels / np.abs(levels).max(), atol=2e-7)


def test_levels_are_exact_in_queries_dtypes_and_near_the_published_ones():
    assert (nf4.LEVELS.astype("bfloat16").astype(np.float32) == nf4.LEVELS).all()
    assert np.abs(nf4.LEVELS / 16 - nf4.PUBLISHED).max() < 0.002


def test_the_docstring_states_the_bound():
    assert round(nf4.Nf4.bound, 2) == 2.44 and round(nf4.Nf4.bound / 16, 3) == 0.152
    assert "2.44 s or 0.152 absmax" in nf4.Nf4.__doc__


class Inexact(nf4.Nf4):
    """NF4 with the published levels."""

    def decode(self, codes, dtype):
        return jnp.take(jnp.asarray(16 * nf4.PUBLISHED, dtype), codes, mode="clip")


def test_the_failure_that_the_tutorial_shows_is_the_kits():
    (shown,) = re.findall(r"^    (law \d, .*\n .*)$", TUTORIAL, re.MULTILINE)
    with pytest.raises(AssertionError) as broken:
        QuantizerConformance().test_law_7_sameness_in_bfloat16(Subject(Inexact()))
    assert str(broken.value).replace(" (Inexact)", "") == " ".join(shown.split())


def test_an_installed_plugin_is_found(plugin):
    assert "nf4" in qpaged.available_quantizers()
    assert {"nf4:group32+rotate", "nf4:token"} <= set(qpaged.available_formats(wrapped=True))
    assert qpaged.get_quantizer("nf4").bits == 4


def test_the_sweep_that_is_shown_is_of_the_command_above_it(plugin):
    """Compare formats and bytes; CI's lane ``plugin`` compares the rest."""
    (formats,) = re.findall(r"^qpaged sweep --formats (\S+)", TUTORIAL, re.MULTILINE)
    lines = [line.replace(" *", "").split() for line in SWEEP.splitlines()]
    rows = [line for line in lines if len(line) == 9 and line[7].endswith("%")]
    assert [row[0] for row in rows] == ["plain", *formats.split(",")]
    config, _ = load_tiny()
    heads = config.num_hidden_layers * config.num_key_value_heads
    bytes_per_token = script(ROOT / "docs/includes/sizes.py").bytes_per_token
    for spelling, shown, *_ in rows[1:]:
        pair = qpaged.CacheFormat.of(spelling)
        key_bytes = bytes_per_token(pair.key, "bfloat16", config.head_dim)
        value_bytes = bytes_per_token(pair.value, "bfloat16", config.head_dim)
        assert f"{heads * (key_bytes + value_bytes):,.0f}" == shown


def decoded(view, rows, query, metadata, backend=None):
    """Write and attend to one decode step."""
    return qpaged.paged_attention(
        query, view.write_decodes_to_cache(rows, -rows, metadata), metadata, backend=backend
    )


def decode_step(quantizer):
    """Return the arguments of :func:`decoded` for two sequences."""
    config = qpaged.PagedAttentionCacheMetaData(2, 1, 4, 2, 32, 16, 2, 128, 0.5)
    view = qpaged.PagedAttentionCacheView.init(None, jnp.float32, config, 0, None, quantizer)
    metadata = qpaged.PagedAttentionMetadata.decode(position=np.array([0, 17]), page_table=[[2, 4], [0, 3]])
    return view, normal(2, 2, 128, seed=1), normal(2, 4, 128, seed=2), metadata


@pytest.mark.skipif(not TPU.available, reason=f"the tpu backend {TPU.reason}")
def test_a_plugin_whose_functions_run_on_tiles_has_the_tpu_kernels():
    from jax.experimental.pallas import tpu as pltpu

    step = decode_step(example("nearest6").Nearest6())
    program = jax.jit(decoded, static_argnames="backend")
    lowered = program.trace(*step).lower(lowering_platforms=("tpu",)).as_text()
    assert lowered.count("@tpu_custom_call") == 3  # the writes of keys and of values, and attention
    with pltpu.force_tpu_interpret_mode():
        out = program(*step, backend="tpu")
    np.testing.assert_allclose(out, program(*step, backend="reference"), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not TPU.available, reason=f"the tpu backend {TPU.reason}")
def test_a_plugin_of_other_functions_is_told_why_it_has_no_kernels():
    view, _, query, metadata = step = decode_step(nf4.Nf4())
    reasons = {backend.name: backend.reason for backend in qpaged.attention_backends(query, view, metadata)}
    assert reasons["tpu"].startswith("keys: decode of nf4 uses ") and reasons["xla"] is None
    with pytest.raises(ValueError, match="'tpu' declines: it keys: decode of nf4 uses"):
        decoded(*step, backend="tpu")
