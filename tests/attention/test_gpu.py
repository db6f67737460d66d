"""The ``gpu`` backend, interpreted, against the reference; and the calls that it declines."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formats import normal
from sequences import PAGES, decode, filled, prefill

import qpaged

GPU = next(backend for backend in qpaged.attention_backends() if backend.name == "gpu")


def interpreter():
    """JAX's interpreter of Mosaic GPU kernels, public since 0.12; None where there is none."""
    if not GPU.available:
        return None
    from jax.experimental.pallas import mosaic_gpu

    return getattr(mosaic_gpu, "force_gpu_interpret_mode", None)


interprets = pytest.mark.skipif(interpreter() is None, reason="this JAX interprets no Mosaic GPU kernels")

SEQUENCES = (0, 1, 64, 150)
# head_dim, page_size, options
CASES = {
    "plain": (64, 64, {}),
    "int8": (64, 32, {"sliding_window": 11}),
    "int8:token+offset/fp8_e4m3": (64, 64, {"sinks": True}),
    "int4:token/int8:token+offset": (64, 128, {"logits_soft_cap": 3.0, "sinks": True}),
    "fp8_e5m2/int4:page": (128, 64, {"sliding_window": 20}),
}
# Weights are rounded to bfloat16 before the values are summed up with them.
ROUNDING = 2.0**-8


@functools.partial(jax.jit, static_argnames=("backend", "sliding_window", "logits_soft_cap"))
def attend(query, view, metadata, sinks=None, **options):
    return qpaged.paged_attention(query, view, metadata, sinks=sinks, **options)


def both_modes(table):
    """A prefill of the longest sequence's last tokens, and a decode of every sequence."""
    rows = decode(table, SEQUENCES)[0]
    return prefill(table, SEQUENCES)[0].replace(
        decodes_position=rows.decodes_position, decodes_page_table=rows.decodes_page_table
    )


@interprets
@pytest.mark.parametrize("format", CASES)
def test_interpreted(format):
    head_dim, page_size, options = CASES[format]
    options = options | ({"sinks": normal(6, seed=7)} if "sinks" in options else {})
    view, table = filled(None if format == "plain" else format, 2, head_dim, page_size, SEQUENCES)
    if format == "plain":
        view = jax.tree_util.tree_map(lambda pool: pool.astype(jnp.bfloat16), view)
    table = table.copy()
    table[3, 1] = -1  # a hole
    metadata = both_modes(table)
    query = normal(16 + len(SEQUENCES), 6, head_dim, seed=5).astype(jnp.bfloat16)
    want = attend(query, view, metadata, backend="reference", **options)
    with interpreter()():
        got = attend(query, view, metadata, backend="gpu", **options)
    assert not got[13:17].any()  # padding, and the inactive row
    worst = ROUNDING * float(jnp.abs(normal(8)).max())
    np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), atol=0.05)
