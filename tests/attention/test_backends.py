"""The reference agrees with a float64 oracle, and every other backend with the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import normal
from support.attention_oracle import attention
from support.backends import backends_here, is_here
from support.filled_pages import (
    CHUNK,
    LENGTHS,
    PADDED_CHUNK,
    combined_step,
    decode_step,
    filled_view,
    permute_pages,
    prefill_step,
)
from support.formats import ALWAYS, CACHES

import qpaged

CASES = {
    "grouped 4": {"heads": (8, 2)},
    "grouped 1, window": {"heads": (2, 2), "sliding_window": 11},
    "grouped 8, soft cap, sinks": {"heads": (8, 1), "logits_soft_cap": 3.0, "sinks": True},
    "window of one, scale": {"heads": (6, 2), "sliding_window": 1, "softmax_scale": 0.3},
}
CPU = pytest.param("cpu", marks=pytest.mark.skipif(not is_here("cpu"), reason="the kernel is not compiled"))
NAMES = ", ".join(backend.name for backend in qpaged.attention_backends())
# float32 sums of some tens of products in other orders, through an exponential
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@functools.partial(jax.jit, static_argnames=("softmax_scale", "sliding_window", "logits_soft_cap"))
def attend_on_every_backend(query, view, metadata, sinks, **options):
    """Return the attention of each backend by name, and the dequantized keys and values."""
    outs = {
        name: qpaged.paged_attention(query, view, metadata, sinks=sinks, backend=name, **options)
        for name in backends_here(query, view, metadata)
    }
    pools = [
        pool.dequantize() if isinstance(pool, qpaged.QuantizedArray) else pool
        for pool in (view.key_pages, view.value_pages)
    ]
    return outs, pools


def attend_case(case, spelling, step, tokens, dtype=jnp.float32, head_dim=32):
    """Return the attention of each backend by name, and the oracle's."""
    options = dict(case)
    q_heads, kv_heads = options.pop("heads")
    sinks = normal(q_heads, seed=7) if options.pop("sinks", False) else None
    view, table = filled_view(spelling, kv_heads, head_dim)
    metadata, position, token_tables = step(table)
    query = normal(tokens, q_heads, head_dim, seed=5).astype(dtype)
    outs, (keys, values) = attend_on_every_backend(query, view, metadata, sinks, **options)
    expected = attention(
        np.asarray(query, np.float32), np.asarray(keys), np.asarray(values), position, token_tables,
        options.get("softmax_scale", head_dim**-0.5), options.get("sliding_window"),
        options.get("logits_soft_cap"), None if sinks is None else np.asarray(sinks, np.float64),
    )  # fmt: skip
    return outs, expected


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        pytest.param(spelling, name, marks=[pytest.mark.long] * (spelling not in (None, *ALWAYS)))
        for spelling in CACHES
        for name in CASES
        if spelling in (None, "int8") or "sinks" in name
    ],
)
def test_a_decode_agrees_with_the_oracle(spelling, name):
    outs, expected = attend_case(CASES[name], spelling, decode_step, len(LENGTHS))
    assert not outs["reference"][0].any()  # the inactive row
    for out in outs.values():
        np.testing.assert_allclose(out, expected, **TOLERANCE)


@pytest.mark.short(3)
@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        (None, "grouped 4"),
        *((name, "grouped 1, window") for name in (None, "int8", "int4:channel+offset", "nvfp4")),
    ],
)
def test_a_prefill_agrees_with_the_oracle(spelling, name):
    outs, expected = attend_case(CASES[name], spelling, prefill_step, PADDED_CHUNK)
    assert not outs["reference"][CHUNK:].any()  # padding
    for out in outs.values():
        np.testing.assert_allclose(out, expected, **TOLERANCE)


@pytest.mark.short(2)
@pytest.mark.parametrize("spelling", ["int8", "int8:channel", "raw", None])
def test_a_combined_step_gives_what_a_prefill_and_a_decode_give(spelling):
    view, table = filled_view(spelling, 2, 32)
    query = normal(PADDED_CHUNK + len(LENGTHS), 4, 32, seed=6)
    combined = qpaged.paged_attention(query, view, combined_step(table))
    prefill = qpaged.paged_attention(query[:PADDED_CHUNK], view, prefill_step(table)[0])
    decode = qpaged.paged_attention(query[PADDED_CHUNK:], view, decode_step(table)[0])
    np.testing.assert_allclose(combined[:PADDED_CHUNK], prefill, **TOLERANCE)
    np.testing.assert_allclose(combined[PADDED_CHUNK:], decode, **TOLERANCE)


@pytest.mark.parametrize("spelling", ["int8", "int8:token", "int8:channel", "fp8_e4m3", "raw"])
def test_bfloat16_queries_agree_to_their_rounding(spelling):
    outs, expected = attend_case(CASES["grouped 4"], spelling, decode_step, len(LENGTHS), jnp.bfloat16)
    assert {out.dtype for out in outs.values()} == {jnp.dtype(jnp.bfloat16)}
    for name in outs.keys() - {"xla"}:
        np.testing.assert_allclose(outs[name].astype(np.float32), expected, rtol=2**-8, atol=1e-5)
    # xla rounds scaled queries, weights and scaled weights to bfloat16: each 2^-9 of values up to 4
    np.testing.assert_allclose(outs["xla"].astype(np.float32), expected, rtol=2**-7, atol=4 * 3 * 2**-9)


def test_many_tiles_agree_with_the_oracle(monkeypatch):
    from qpaged.attention import _xla_tiles

    monkeypatch.setattr(_xla_tiles, "KV_TILE", 16)
    monkeypatch.setattr(_xla_tiles, "Q_TILE", 4)
    attend_on_every_backend.clear_cache()
    for name in ("grouped 1, window", "grouped 8, soft cap, sinks"):
        for step, tokens in ((decode_step, len(LENGTHS)), (prefill_step, PADDED_CHUNK)):
            outs, expected = attend_case(CASES[name], "int8", step, tokens)
            np.testing.assert_allclose(outs["xla"], expected, **TOLERANCE)
    attend_on_every_backend.clear_cache()


def test_a_permuted_pool_gives_the_same_bits():
    view, table = filled_view("int8", 2, 16)
    permuted, permuted_table = permute_pages(view, table)
    query = normal(len(LENGTHS), 4, 16, seed=5)
    outs, _ = attend_on_every_backend(query, view, decode_step(table)[0], None)
    permuted_outs, _ = attend_on_every_backend(query, permuted, decode_step(permuted_table)[0], None)
    for name, out in outs.items():
        np.testing.assert_array_equal(out, permuted_outs[name], err_msg=name)


def test_an_empty_step_gives_zeros():
    view, _ = filled_view("int8", 2, 16)
    out = qpaged.paged_attention(normal(3, 4, 16), view, qpaged.PagedAttentionMetadata.init_empty())
    assert out.shape == (3, 4, 16) and not out.any()


def test_the_log_says_which_kernels_are_chosen(caplog):
    view, table = filled_view("int8", 2, 16)
    query, step = normal(len(LENGTHS), 4, 16), decode_step(table)[0]
    with caplog.at_level("DEBUG", logger="qpaged"):
        jax.eval_shape(qpaged.paged_attention, query, view, step)
    assert f"paged_attention of {query.shape}: kernel for " in caplog.text
    assert "xla elsewhere" in caplog.text


def test_the_reference_has_a_gradient():
    view, table = filled_view("int8", 2, 16)
    metadata = decode_step(table)[0]

    def loss(query, backend):
        return (qpaged.paged_attention(query, view, metadata, backend=backend) ** 2).sum()

    query = normal(len(LENGTHS), 4, 16, seed=5)
    gradient = jax.jit(jax.grad(loss), static_argnums=1)(query, "reference")
    step = normal(*query.shape, seed=9) * 1e-2
    difference = (loss(query + step, "reference") - loss(query - step, "reference")) / 2
    np.testing.assert_allclose((gradient * step).sum(), difference, rtol=2e-2)


BAD_ARGUMENTS = [
    ({"backend": "npu"}, ValueError, f"one of {NAMES}, or None, but came as 'npu'"),
    ({"backend": "gpu"}, ValueError, "takes the call, but 'gpu' declines: it "),
    ({"backend": "tpu"}, ValueError, "but 'tpu' declines: it .*"),
    ({"sliding_window": 0}, ValueError, "sliding_window must be at least 1, .* came as 0"),
    ({"sliding_window": 2.5}, TypeError, "sliding_window must be an integer, .* came as 2.5"),
    ({"sliding_window": "2"}, TypeError, "sliding_window must be an integer, .* came as '2'"),
    ({"logits_soft_cap": -1.0}, ValueError, "logits_soft_cap must be from 1.18e-38 to .* came as -1.0"),
    ({"logits_soft_cap": 1e-40}, ValueError, "logits_soft_cap must be from 1.18e-38 to .* came as 1e-40"),
    ({"logits_soft_cap": 1e38}, ValueError, r"logits_soft_cap must be from .* to 1e\+30, .* came as 1e\+38"),
    ({"logits_soft_cap": np.nan}, ValueError, "logits_soft_cap must be from 1.18e-38 to .* came as nan"),
    (
        {"logits_soft_cap": "a"},
        TypeError,
        "logits_soft_cap must be a real number that is known .* came as 'a'",
    ),
    ({"logits_soft_cap": 1 + 0j}, TypeError, r"logits_soft_cap must be a real number .* came as \(1\+0j\)"),
    ({"softmax_scale": [1.0]}, TypeError, r"softmax_scale must be a real number .* came as \[1.0\]; make it"),
    ({"softmax_scale": np.ones(1)}, TypeError, r"softmax_scale must be a real number .* came as array\(\[1"),
    ({"softmax_scale": b"1"}, TypeError, "softmax_scale must be a real number .* came as b'1'"),
    ({"softmax_scale": 10**400}, TypeError, "softmax_scale must be a real number .* came as 1000"),
    ({"softmax_scale": np.complex64(1)}, TypeError, "softmax_scale must be a real number"),
    ({"sinks": np.zeros(4, np.complex64)}, TypeError, "sinks must be real numbers, but came as complex64"),
    ({"sinks": np.zeros(4, bool)}, TypeError, "sinks must be real numbers, but came as bool"),
    ({"softmax_scale": np.inf}, ValueError, "softmax_scale must be at most 65536.0 .* came as inf"),
    ({"softmax_scale": np.nan}, ValueError, "softmax_scale must be at most 65536.0 .* came as nan"),
    ({"softmax_scale": -1e10}, ValueError, "softmax_scale must be at most 65536.0 .* came as -10000000000.0"),
    ({"sinks": np.array([0, 0, np.inf, 0])}, ValueError, "sinks must be logits below infinity, but .* inf"),
    ({"sinks": np.array([0, np.nan, 0, 0])}, ValueError, "sinks must be logits below infinity, but .* nan"),
    ({"sinks": np.zeros(3)}, ValueError, r"sinks must have shape \(q_heads,\) = \(4,\), .* \(3,\)"),
    ({"sliding_window": (1, 2)}, TypeError, r"sliding_window must be an integer, .* came as \(1, 2\)"),
    (
        {"visible_until": [0] * 5},
        ValueError,
        r"visible_until must have shape .* = \(6,\), .* \(5,\); give -1",
    ),
    ({"visible_until": [0.5] * 6}, TypeError, "visible_until must be integers, but came as float64"),
    ({"alibi_slopes": [0.5] * 6}, ValueError, r"alibi_slopes must have shape .* = \(4,\), .* \(6,\)"),
    ({"alibi_slopes": np.arange(4)}, TypeError, "alibi_slopes must have a real floating-point dtype, .* int"),
    ({"alibi_slopes": [0.5, np.nan, 0, 0]}, ValueError, "alibi_slopes must be finite, but came as .*nan"),
    (
        {"metadata": None},
        TypeError,
        "metadata must be a qpaged.PagedAttentionMetadata, but got None; .* make it",
    ),
    ({"query": None}, TypeError, "query must be an array of floats, but got None"),
    ({"query": np.zeros((6, 16), np.float32)}, ValueError, r"query must have shape .* \(6, 16\)"),
    ({"query": np.zeros((6, 4, 8), np.float32)}, ValueError, r"head_dim 16, but has 8; .* \(6, 4, 8\)"),
    (
        {"query": np.zeros((6, 3, 16), np.float32)},
        ValueError,
        r"multiple of the 2 KV heads, but has 3 heads; .* \(6, 3, 16\)",
    ),
    ({"query": np.zeros((5, 4, 16), np.float32)}, ValueError, r"each of the 6 tokens .* but has 5 rows; "),
    (
        {"query": np.zeros((6, 4, 16), np.int32)},
        TypeError,
        "query must have a real floating-point dtype, .* int32",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused(change, error, message):
    view, table = filled_view("int8", 2, 16)
    arguments = {
        "query": np.zeros((6, 4, 16), np.float32),
        "view": view,
        "metadata": decode_step(table)[0],
    } | change
    with pytest.raises(error, match=message):
        qpaged.paged_attention(arguments.pop("query"), **arguments)


TRACED = [
    (
        "logits_soft_cap",
        1,
        TypeError,
        "logits_soft_cap must be .* that is known when .*, or let jax.lax.cond",
    ),
    ("softmax_scale", 1, TypeError, r"softmax_scale must be one real number, but .* int32 of shape \(\)"),
    ("sliding_window", 1.5, TypeError, "sliding_window must be integers, but came as float32"),
    ("sliding_window", [1, 2], ValueError, r"sliding_window must be one integer, .* \(2,\); in a scan"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), TRACED)
def test_a_traced_option_of_another_kind_is_refused(name, value, error, message):
    view, table = filled_view("int8", 2, 16)
    query, metadata = np.zeros((6, 4, 16), np.float32), decode_step(table)[0]
    attend = jax.jit(lambda option: qpaged.paged_attention(query, view, metadata, **{name: option}))
    with pytest.raises(error, match=message):
        attend(jnp.asarray(value))


@pytest.mark.parametrize("number", [2, np.float32(2), np.array(2), jnp.float32(2), jnp.bfloat16(2)])
def test_an_option_may_be_any_scalar(number):
    view, table = filled_view("int8", 2, 16)
    query, metadata = normal(6, 4, 16, seed=5), decode_step(table)[0]
    out = qpaged.paged_attention(query, view, metadata, softmax_scale=number, logits_soft_cap=number)
    same = qpaged.paged_attention(query, view, metadata, softmax_scale=2.0, logits_soft_cap=2.0)
    np.testing.assert_array_equal(out, same)


@pytest.mark.parametrize("backend", ["reference", "xla", CPU])
def test_the_least_cap_leaves_numbers(backend):
    view, table = filled_view("int8", 2, 16)
    cap = float(jnp.finfo(jnp.float32).tiny)
    query, metadata = normal(6, 4, 16, seed=5), decode_step(table)[0]
    out = qpaged.paged_attention(query, view, metadata, logits_soft_cap=cap, backend=backend)
    assert np.isfinite(out).all() and out.any()


@pytest.mark.parametrize("call", [qpaged.paged_attention, qpaged.attention_backends])
def test_a_cache_is_no_view(call):
    view, table = filled_view("int8", 2, 16)
    cache = qpaged.PagedAttentionCache([view])
    with pytest.raises(
        TypeError, match=r"view must be .*, but got a PagedAttentionCache; give cache.views\[i\]"
    ):
        call(np.zeros((6, 4, 16), np.float32), cache, decode_step(table)[0])


def test_a_kernel_that_this_platform_does_not_run_is_named():
    tpu = qpaged.attention_backends()[0]
    if jax.default_backend() != "cpu" or not tpu.available:
        pytest.skip("the kernel runs here, or is not there at all")
    config = qpaged.PagedAttentionCacheMetaData(1, 1, 2, 2, 32, 16, 2, 64, 0.5)
    view = qpaged.PagedAttentionCacheView.init(None, jnp.float32, config, 0, quantizer="int8:token")
    step = qpaged.PagedAttentionMetadata.decode(position=[0], page_table=[[0, 1]])
    with pytest.raises(ValueError, match="backend 'tpu' runs on no CPU; leave it None"):
        qpaged.paged_attention(jnp.zeros((1, 4, 64)), view, step, backend="tpu")


@pytest.mark.parametrize("backend", ["reference", "xla", CPU])
def test_traced_sinks_that_cannot_be_refused_do_the_same_on_every_backend(backend):
    view, table = filled_view("int8", 2, 32)
    metadata = decode_step(table)[0]
    query = normal(len(LENGTHS), 4, 32, seed=5)

    @jax.jit
    def attend(sinks):
        return qpaged.paged_attention(query, view, metadata, sinks=sinks, backend=backend)

    without = qpaged.paged_attention(query, view, metadata, backend=backend)
    out = np.asarray(attend(jnp.array([-jnp.inf, jnp.inf, jnp.nan, -3e38])))
    active = np.asarray(metadata.decodes_position) >= 0
    np.testing.assert_allclose(out[:, [0, 3]], without[:, [0, 3]], **TOLERANCE)
    assert not out[:, 1].any()
    assert np.isnan(out[active, 2]).all() and not out[~active].any()
