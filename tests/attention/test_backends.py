"""The reference against a float64 oracle, and every other backend against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import normal
from support.attention_oracle import attention
from support.filled_pages import LENGTHS, PAGES, decode, filled, prefill
from support.formats import CACHES

import qpaged

CASES = {
    "grouped 4": {"heads": (8, 2)},
    "grouped 1, window": {"heads": (2, 2), "sliding_window": 11},
    "grouped 8, soft cap, sinks": {"heads": (8, 1), "logits_soft_cap": 3.0, "sinks": True},
    "window of one, scale": {"heads": (6, 2), "sliding_window": 1, "softmax_scale": 0.3},
}
ANYWHERE = [backend.name for backend in qpaged.attention_backends() if backend.platform is None]
# float32 sums of some tens of products in other orders, through an exponential
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@functools.partial(jax.jit, static_argnames=("softmax_scale", "sliding_window", "logits_soft_cap"))
def everything(query, view, metadata, sinks, **options):
    """All backends' results, and the pools' values."""
    outs = {
        name: qpaged.paged_attention(query, view, metadata, sinks=sinks, backend=name, **options)
        for name in ANYWHERE
    }
    pools = [
        pool.dequantize() if isinstance(pool, qpaged.QuantizedArray) else pool
        for pool in (view.key_pages, view.value_pages)
    ]
    return outs, pools


def run(case, format, metadata_of, rows, dtype=jnp.float32, head_dim=32):
    """Results by backend, and the oracle's."""
    options = dict(case)
    q_heads, kv_heads = options.pop("heads")
    sinks = normal(q_heads, seed=7) if options.pop("sinks", False) else None
    view, table = filled(format, kv_heads, head_dim)
    metadata, position, row_table = metadata_of(table)
    query = normal(rows, q_heads, head_dim, seed=5).astype(dtype)
    outs, (keys, values) = everything(query, view, metadata, sinks, **options)
    want = attention(
        np.asarray(query, np.float32), np.asarray(keys), np.asarray(values), position, row_table,
        options.get("softmax_scale", head_dim**-0.5), options.get("sliding_window"),
        options.get("logits_soft_cap"), None if sinks is None else np.asarray(sinks, np.float64),
    )  # fmt: skip
    return outs, want


@pytest.mark.parametrize(
    ("format", "name"),
    [(format, name) for format in CACHES for name in CASES if format in (None, "int8") or "sinks" in name],
)
def test_decode(format, name):
    outs, want = run(CASES[name], format, decode, len(LENGTHS))
    assert not outs["reference"][0].any()
    np.testing.assert_allclose(outs["reference"], want, **TOLERANCE)
    np.testing.assert_allclose(outs["xla"], outs["reference"], **TOLERANCE)


@pytest.mark.parametrize(
    ("format", "name"), [(None, "grouped 4"), *((format, "grouped 1, window") for format in CACHES)]
)
def test_prefill(format, name):
    outs, want = run(CASES[name], format, prefill, 16)
    assert not outs["reference"][13:].any()
    np.testing.assert_allclose(outs["reference"], want, **TOLERANCE)
    np.testing.assert_allclose(outs["xla"], outs["reference"], **TOLERANCE)


@pytest.mark.parametrize("format", ["int8", "int8:channel", "raw", None])
def test_both_modes_in_one_call(format):
    view, table = filled(format, 2, 32)
    prefilled = prefill(table)[0]
    decoded = decode(table)[0]
    both = prefilled.replace(
        decodes_position=decoded.decodes_position, decodes_page_table=decoded.decodes_page_table
    )
    query = normal(16 + len(LENGTHS), 4, 32, seed=6)
    together = qpaged.paged_attention(query, view, both)
    np.testing.assert_allclose(
        together[:16], qpaged.paged_attention(query[:16], view, prefilled), **TOLERANCE
    )
    np.testing.assert_allclose(together[16:], qpaged.paged_attention(query[16:], view, decoded), **TOLERANCE)


@pytest.mark.parametrize("format", ["int8", "int8:token", "int8:channel", "fp8_e4m3", "raw"])
def test_bfloat16_queries(format):
    outs, want = run(CASES["grouped 4"], format, decode, len(LENGTHS), jnp.bfloat16)
    assert {out.dtype for out in outs.values()} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(outs["reference"].astype(np.float32), want, rtol=2**-8, atol=1e-5)
    # xla rounds scaled queries, weights and scaled weights to bfloat16: each 2^-9 of values up to 4
    np.testing.assert_allclose(outs["xla"].astype(np.float32), want, rtol=2**-7, atol=4 * 3 * 2**-9)


def test_many_blocks_and_tiles(monkeypatch):
    from qpaged.attention import _xla

    monkeypatch.setattr(_xla, "KV_TILE", 16)
    monkeypatch.setattr(_xla, "Q_TILE", 4)
    everything.clear_cache()
    for case in ("grouped 1, window", "grouped 8, soft cap, sinks"):
        for metadata_of, rows in ((decode, len(LENGTHS)), (prefill, 16)):
            outs, want = run(CASES[case], "int8", metadata_of, rows)
            np.testing.assert_allclose(outs["xla"], want, **TOLERANCE)
    everything.clear_cache()


@pytest.mark.parametrize("backend", ANYWHERE)
def test_a_permuted_pool_gives_the_same_bits(backend):
    view, table = filled("int8", 2, 16)
    order = np.random.default_rng(3).permutation(PAGES)
    place = np.append(np.argsort(order), PAGES)
    moved = jax.tree_util.tree_map(lambda leaf: leaf[:, order], view)
    query = normal(len(LENGTHS), 4, 16, seed=5)
    outs = [
        qpaged.paged_attention(query, v, decode(t)[0], backend=backend)
        for v, t in ((view, table), (moved, place[table]))
    ]
    np.testing.assert_array_equal(*outs)


def test_nothing_to_attend_to():
    view, _ = filled("int8", 2, 16)
    out = qpaged.paged_attention(normal(3, 4, 16), view, qpaged.PagedAttentionMetadata.init_empty())
    assert out.shape == (3, 4, 16) and not out.any()


def test_reference_has_a_gradient():
    view, table = filled("int8", 2, 16)
    metadata = decode(table)[0]

    def loss(query, backend):
        return (qpaged.paged_attention(query, view, metadata, backend=backend) ** 2).sum()

    query = normal(len(LENGTHS), 4, 16, seed=5)
    gradient = jax.jit(jax.grad(loss), static_argnums=1)(query, "reference")
    step = normal(*query.shape, seed=9) * 1e-2
    slope = (loss(query + step, "reference") - loss(query - step, "reference")) / 2
    np.testing.assert_allclose((gradient * step).sum(), slope, rtol=2e-2)


BAD = [
    ({"backend": "npu"}, ValueError, "one of tpu, gpu, xla, reference, or None, but came as 'npu'"),
    ({"backend": "gpu"}, ValueError, "takes the call, but 'gpu' declines: it "),
    ({"backend": "tpu"}, ValueError, "but 'tpu' declines: it .*"),
    ({"sliding_window": 0}, ValueError, "sliding_window must be at least 1, .* came as 0"),
    ({"sliding_window": 2.5}, TypeError, "float"),
    ({"logits_soft_cap": -1.0}, ValueError, "logits_soft_cap must be positive and finite, .* came as -1.0"),
    ({"sinks": np.zeros(3)}, ValueError, r"sinks must have shape \(q_heads,\) = \(4,\), .* \(3,\)"),
    ({"query": np.zeros((6, 4, 8), np.float32)}, ValueError, r"query must have shape .* \(6, 4, 8\)"),
    (
        {"query": np.zeros((6, 3, 16), np.float32)},
        ValueError,
        r"multiple of the 2 KV heads, .* \(6, 3, 16\)",
    ),
    ({"query": np.zeros((5, 4, 16), np.float32)}, ValueError, r"with 6 tokens, .* \(5, 4, 16\)"),
    (
        {"query": np.zeros((6, 4, 16), np.int32)},
        TypeError,
        "query must have a real floating-point dtype, .* int32",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments(change, error, message):
    view, table = filled("int8", 2, 16)
    arguments = {
        "query": np.zeros((6, 4, 16), np.float32),
        "view": view,
        "metadata": decode(table)[0],
    } | change
    with pytest.raises(error, match=message):
        qpaged.paged_attention(arguments.pop("query"), **arguments)
