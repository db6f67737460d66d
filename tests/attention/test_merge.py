"""Log-sum-exps are those of a float64 oracle, and attention over parts of a sequence adds up to the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import normal
from support.attention_oracle import attention_and_lse
from support.filled_pages import LENGTHS, PAGE_SIZE, combined_step, decode_step, filled_view

import qpaged

HEADS, HEAD_DIM = (6, 2), 32
SINKS = normal(HEADS[0], seed=7)
OPTIONS = {
    "plain": {},
    "window and cap": {"sliding_window": 11, "logits_soft_cap": 3.0},
    "sinks": {"sinks": SINKS},
}
# float32 sums of some tens of products in other orders, through an exponential
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@functools.partial(jax.jit, static_argnames=("backend", "sliding_window", "logits_soft_cap"))
def attend(query, view, metadata, **options):
    return qpaged.paged_attention(query, view, metadata, return_lse=True, **options)


@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize("name", OPTIONS)
def test_log_sum_exps_are_those_of_the_oracle(backend, name):
    options = OPTIONS[name]
    view, table = filled_view("int8:token+rotate", HEADS[1], HEAD_DIM)
    metadata, position, tables = decode_step(table)
    query = normal(len(LENGTHS), HEADS[0], HEAD_DIM, seed=5)
    pools = [np.asarray(pool.dequantize()) for pool in (view.key_pages, view.value_pages)]
    cap, window = options.get("logits_soft_cap"), options.get("sliding_window")
    want, want_lse = attention_and_lse(
        np.asarray(query), *pools, position, tables, HEAD_DIM**-0.5, window, cap, options.get("sinks")
    )
    out, lse = attend(query, view, metadata, backend=backend, **options)
    assert (out.dtype, lse.dtype, lse.shape) == (jnp.float32, jnp.float32, (len(LENGTHS), HEADS[0]))
    assert np.isneginf(lse[0]).all() and not out[0].any()  # the inactive row, which has no sink either
    np.testing.assert_allclose(out, want, **TOLERANCE)
    np.testing.assert_allclose(lse, want_lse, **TOLERANCE)


def decode(position, table):
    return qpaged.PagedAttentionMetadata.decode(position=position, page_table=table)


@pytest.mark.parametrize("sinks", [None, SINKS])
@pytest.mark.parametrize("spelling", [None, "int8", "int4:channel+offset/int4:token+rotate"])
def test_parts_of_a_sequence_merge_to_the_whole(spelling, sinks):
    """The first page on one device, say, and the others on another, whose positions begin at 0 again."""
    view, table = filled_view(spelling, HEADS[1], HEAD_DIM)
    _, position, _ = decode_step(table)
    query = normal(len(position), HEADS[0], HEAD_DIM, seed=5).astype(jnp.bfloat16)
    options = {} if sinks is None else {"sinks": sinks}
    want, want_lse = attend(query, view, decode(position, table), **options)
    first = decode(np.minimum(position, PAGE_SIZE - 1), table[:, :1])
    others = decode(np.maximum(position - PAGE_SIZE, -1), table[:, 1:])
    partials = [attend(query, view, first, **options), attend(query, view, others)]
    out, lse = jax.jit(qpaged.merge_attention)(partials)
    tolerance = {"rtol": 2**-7, "atol": 2**-7}  # of weights in bfloat16
    np.testing.assert_allclose(out, want, **tolerance)
    np.testing.assert_allclose(lse, want_lse, **tolerance)
    assert np.isneginf(lse[0]).all() and not out[0].any()


def test_a_query_keeps_its_dtype_without_log_sum_exps():
    view, table = filled_view("int8", HEADS[1], HEAD_DIM)
    step = combined_step(table)
    count = len(step.prefill_tokens()[0]) + len(LENGTHS)
    query = normal(count, HEADS[0], HEAD_DIM, seed=6).astype(jnp.bfloat16)
    out = qpaged.paged_attention(query, view, step)
    with_lse, lse = qpaged.paged_attention(query, view, step, return_lse=True)
    assert out.dtype == jnp.bfloat16 and lse.shape == query.shape[:2]
    np.testing.assert_array_equal(out, with_lse.astype(jnp.bfloat16))


def test_what_sees_nothing_has_no_weight():
    out, nothing = normal(3, 2, 8), jnp.full((3, 2), -jnp.inf)
    merged, lse = qpaged.merge_attention([(out, jnp.zeros((3, 2))), (out * 1e30, nothing)])
    np.testing.assert_array_equal(merged, out)
    np.testing.assert_array_equal(lse, 0)
    merged, lse = qpaged.merge_attention([(jnp.zeros_like(out), nothing)] * 2)
    assert not merged.any() and np.isneginf(lse).all()


def test_gradients_are_finite_where_a_row_sees_nothing():
    view, table = filled_view(None, HEADS[1], HEAD_DIM)
    view = jax.tree_util.tree_map(jnp.nan_to_num, view)  # whose unwritten slots are NaN
    metadata, _, _ = decode_step(table)
    query = normal(len(LENGTHS), HEADS[0], HEAD_DIM, seed=5)

    def loss(query, sinks):
        out = qpaged.paged_attention(query, view, metadata, sinks=sinks, backend="reference")
        return (out**2).sum()

    gradients = jax.grad(loss, argnums=(0, 1))(query, SINKS)
    step = 1e-2
    for gradient, shifts in zip(gradients, ((step, 0), (0, step)), strict=True):
        assert np.isfinite(gradient).all()
        slope = (loss(query + shifts[0], SINKS + shifts[1]) - loss(query - shifts[0], SINKS - shifts[1])) / (
            2 * step
        )
        # a central difference of sums in float32
        np.testing.assert_allclose(gradient.sum(), slope, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("partials", "error", "message"),
    [
        ([], ValueError, "partials must be at least one"),
        (None, TypeError, r"partials must be a sequence of \(out, lse\), but got None"),
        ([(jnp.zeros((1, 2, 8), int), jnp.zeros((1, 2)))], TypeError, r"partials\[0\]\[0\] must have a real"),
        ([(jnp.zeros(8), jnp.zeros(()))], ValueError, r"partials\[0\] must have shapes \(tokens, q_heads"),
        (
            [jnp.zeros((1, 2, 8))],
            TypeError,
            r"partials\[0\] must be \(out, lse\), but came as a .*return_lse=True",
        ),
        (
            [(jnp.zeros((1, 2, 8)), jnp.zeros((1, 3)))],
            ValueError,
            r"partials\[0\] must have shapes .* \(1, 2, 8\) and \(1, 3\)",
        ),
        (
            [(jnp.zeros((1, 2, 8)), jnp.zeros((1, 2))), (jnp.zeros((3, 2, 8)), jnp.zeros((3, 2)))],
            ValueError,
            r"of the same queries, .*\(1, 2, 8\), \(3, 2, 8\)",
        ),
    ],
)
def test_partials_that_do_not_fit_are_refused(partials, error, message):
    with pytest.raises(error, match=message):
        qpaged.merge_attention(partials)


def test_partials_are_merged_in_a_loop():
    """What is merged is of the tree that is given, as a loop over devices or pages carries it."""
    partial = (normal(3, 2, 8), jnp.zeros((3, 2)))
    (out, lse), _ = jax.lax.scan(
        lambda total, _: (qpaged.merge_attention([total, partial]), None), partial, None, length=3
    )
    np.testing.assert_allclose(out, partial[0], rtol=1e-6)
    np.testing.assert_allclose(lse, np.log(4), rtol=1e-6)
