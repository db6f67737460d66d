"""The ``gpu`` backend, interpreted, against the reference; and the calls that it declines."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import normal
from support.filled_pages import decode, filled, prefill

import qpaged
from qpaged.attention import _gpu

GPU = next(backend for backend in qpaged.attention_backends() if backend.name == "gpu")


def interpreter():
    """JAX's interpreter of Mosaic GPU kernels, public since 0.11; None where there is none."""
    if not GPU.available:
        return None
    from jax.experimental.pallas import mosaic_gpu

    return getattr(mosaic_gpu, "force_gpu_interpret_mode", None)


interprets = pytest.mark.skipif(interpreter() is None, reason="this JAX interprets no Mosaic GPU kernels")

SEQUENCES = (0, 100)
# head_dim, page_size, options
CASES = {
    "plain": (64, 64, {"sliding_window": 70}),
    "int8:token+offset/fp8_e4m3": (64, 32, {"sinks": True}),
    "int4:token/int8": (64, 32, {"logits_soft_cap": 3.0, "sinks": True}),
}
# Weights are rounded to bfloat16 before the values are summed up with them.
ROUNDING = 2.0**-8  # that of the weights, and that of the output


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
def test_interpreted(format, monkeypatch):
    monkeypatch.setattr(_gpu, "PROGRAMS", 4)  # a prefill of 2 heads: two splits
    head_dim, page_size, options = CASES[format]
    options = options | ({"sinks": normal(6, seed=7)} if "sinks" in options else {})
    view, table = filled(None if format == "plain" else format, 2, head_dim, page_size, SEQUENCES)
    if format == "plain":
        view = jax.tree_util.tree_map(lambda pool: pool.astype(jnp.bfloat16), view)
    table = table.copy()
    table[1, 1] = -1  # a hole
    metadata = both_modes(table)
    query = normal(16 + len(SEQUENCES), 6, head_dim, seed=5).astype(jnp.bfloat16)
    want = attend(query, view, metadata, backend="reference", **options)
    with interpreter()():
        got = attend(query, view, metadata, backend="gpu", **options)
    assert not got[13:17].any()  # padding, and the inactive row
    largest = 5.0  # of the values: normal numbers, some thousand of them
    np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=ROUNDING, atol=ROUNDING * largest)


def said(format, query_dtype=jnp.bfloat16, q_heads=4, head_dim=128, page_size=16, dtype=jnp.bfloat16):
    """What the backend says to a decode over pages of a format."""
    config = qpaged.PagedAttentionCacheMetaData(2, 1, 8, 4, 4 * page_size, page_size, 2, head_dim, 0.5)
    view = jax.eval_shape(lambda: qpaged.PagedAttentionCacheView.fresh(None, dtype, config, 0, None, format))
    query = jax.ShapeDtypeStruct((2, q_heads, head_dim), query_dtype)
    metadata = qpaged.PagedAttentionMetadata.decode(
        position=np.zeros(2, int), page_table=np.zeros((2, 4), int)
    )
    return qpaged.attention_backends(query, view, metadata)[1].reason


@pytest.mark.parametrize(
    ("tiles", "blocks", "splits"),
    [(8, 2048, 30), (64, 64, 4), (512, 128, 2), (2048, 16, 1), (8, 2, 2), (1, 1, 1)],
)
def test_splits_fill_a_chip(tiles, blocks, splits):
    assert _gpu._num_splits(tiles, blocks) == splits


@pytest.fixture
def anywhere(monkeypatch):
    """A JAX that is new enough, absl-py, and no mesh."""
    monkeypatch.setattr(jax, "__version__", _compat.dotted(_compat.MOSAIC_GPU_JAX))
    monkeypatch.setattr(_gpu.importlib.util, "find_spec", lambda name: name == "absl")
    monkeypatch.setattr(_gpu, "partitioned", lambda: False)
    return monkeypatch


def test_refuses_nothing_there(anywhere):
    assert _gpu.refusal() is None


def test_refuses_an_older_jax(anywhere):
    anywhere.setattr(jax, "__version__", "0.10.2")
    assert _gpu.refusal() == "needs JAX 0.11 or newer, but this is 0.10.2"


def test_refuses_without_absl(anywhere):
    anywhere.setattr(_gpu.importlib.util, "find_spec", lambda name: None)
    assert _gpu.refusal() == "needs absl-py, which JAX's Mosaic GPU imports; pip install absl-py"


def test_refuses_to_be_partitioned(anywhere):
    anywhere.setattr(_gpu, "partitioned", lambda: True)
    assert "call it within jax.shard_map" in _gpu.refusal()


@pytest.mark.skipif(not GPU.available, reason=f"the gpu backend {GPU.reason}")
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"format": "int8", "head_dim": 96}, "takes a head_dim of 64, 128, 256, but it is 96"),
        ({"format": "int8", "page_size": 8}, "takes a page_size of 16, 32, 64, 128, 256, but it is 8"),
        ({"format": "int8", "q_heads": 130}, "takes at most 64 query heads of a KV head, but there are 65"),
        (
            {"format": "int8", "query_dtype": jnp.float32},
            "keys: computes in bfloat16, but they ask for float32",
        ),
        ({"format": "int8/nvfp4"}, "values: nvfp4 has scales of two levels"),
        ({"format": "int8:channel"}, "keys: int8:channel has several scales along the channels"),
        ({"format": "int8", "dtype": jnp.bfloat16}, None),
    ],
)
def test_declines(arguments, reason):
    found = said(**arguments)
    assert found is None if reason is None else reason in found


def test_is_nobodys_default():
    assert qpaged.attention._backends.BACKENDS["gpu"].by_name
