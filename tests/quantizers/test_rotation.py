"""+rotate: the Hadamard matrix, and attention and lazy programs over rotated pages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qpaged
from qpaged.implicit import use_implicit_args

HEAD_DIMS = {1: 1, 7: 1, 16: 16, 48: 16, 80: 16, 96: 32, 128: 128}
LAZY = ["fp8_e4m3+rotate", "int2+rotate", "int4+offset+rotate", "int8+rotate", "int8:channel+offset+rotate"]
LAZY += ["int8:token+rotate", "mxfp4+rotate", "nvfp4+rotate"]
TRANSFORM = qpaged.get_quantizer("int8:token+rotate")


def hadamard(n):
    """Sylvester's matrix of n channels."""
    return np.ones((1, 1)) if n == 1 else np.kron(np.array([[1, 1], [1, -1]]), hadamard(n // 2))


@functools.cache
def turned(head_dim):
    """The transform and the inverse as matrices, by what they make of unit vectors."""
    unit = np.eye(head_dim, dtype=np.float32)
    both = jax.jit(lambda x: (TRANSFORM.transform.forward(x, -1), TRANSFORM.transform.inverse(x, -1)))
    return tuple(np.asarray(part).astype(np.float64) for part in both(unit))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_runs_of_a_power_of_two_are_rotated_each_by_itself(head_dim):
    n = HEAD_DIMS[head_dim]
    matrix = np.kron(np.eye(head_dim // n), hadamard(n))
    transform, inverse = turned(head_dim)
    np.testing.assert_array_equal(matrix @ matrix, n * np.eye(head_dim))
    np.testing.assert_array_equal(transform, matrix / n)
    np.testing.assert_array_equal(inverse, matrix)
    np.testing.assert_array_equal(transform @ inverse, np.eye(head_dim))


@pytest.mark.parametrize("head_dim", [48, 80, 96, 128])
def test_energy_is_kept_up_to_the_factor(head_dim):
    x = np.random.default_rng(0).normal(size=(50, head_dim)).astype(np.float32)
    y = np.asarray(jax.jit(lambda x: TRANSFORM.transform.forward(x, -1))(x)).astype(np.float64)
    energy = (x.astype(np.float64) ** 2).sum(axis=1)
    np.testing.assert_allclose((y**2).sum(axis=1) * HEAD_DIMS[head_dim], energy, rtol=4e-5)


@pytest.mark.parametrize("head_dim", [48, 80, 96, 128])
def test_sums_are_exact_of_values_rounded_to_a_common_power_of_two(head_dim):
    """In steps of n 2^-24 to n 2^-23 of the largest of a run."""
    n = HEAD_DIMS[head_dim]
    rng = np.random.default_rng(9)
    x = (
        rng.normal(size=(300, head_dim))
        * 10.0 ** rng.uniform(-30, 30, (300, 1))
        * 10.0 ** rng.uniform(-4, 0, head_dim)
    )
    x = x.astype(np.float32)
    runs = x.reshape(300, -1, n).astype(np.float64)
    largest = np.abs(runs).max(axis=-1, keepdims=True)
    step = np.ldexp(1.0, np.frexp(largest)[1] - 24) * n
    assert (step <= largest * n * 2.0**-23).all()
    want = (np.rint(runs / step) @ hadamard(n)) / n * step
    got = jax.jit(lambda x: TRANSFORM.transform.forward(x, -1))(x)
    np.testing.assert_array_equal(got, want.reshape(x.shape))


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_channels_may_lie_on_any_axis(axis):
    x = np.random.default_rng(1).normal(size=(48, 48, 48)).astype(np.float32)
    there = jax.jit(
        lambda x: (
            TRANSFORM.transform.forward(x, axis),
            TRANSFORM.transform.inverse(TRANSFORM.transform.forward(x, axis), axis),
        )
    )
    got, back = there(x)
    want = np.moveaxis(np.moveaxis(x.astype(np.float64), axis, -1) @ turned(48)[0], -1, axis)
    np.testing.assert_allclose(got, want, atol=5e-6)
    np.testing.assert_allclose(back, x, atol=1e-5)


def test_integers_come_back_exactly():
    """Sums of small integers are exact, so that only the format could lose them."""
    x = np.random.default_rng(2).integers(-100, 100, (20, 128)).astype(np.float32)
    back = jax.jit(lambda x: TRANSFORM.transform.inverse(TRANSFORM.transform.forward(x, -1), -1))(x)
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("head_dim", [48, 128])
def test_the_largest_numbers_do_not_overflow(head_dim):
    largest = np.finfo(np.float32).max
    x = np.stack(
        [np.full(head_dim, largest), np.resize([largest, -largest], head_dim), np.full(head_dim, -largest)]
    )
    read = jax.jit(lambda x: TRANSFORM.quantize(x).dequantize())(x)
    assert np.isfinite(read).all()
    np.testing.assert_allclose(read, x, rtol=1 / 127)


def test_an_outlier_is_spread():
    """What the format is for: a channel 30 times the others."""
    x = np.random.default_rng(3).normal(size=(200, 128)).astype(np.float32)
    x[:, 17] *= 30

    def rms(spelling):
        read = jax.jit(lambda x: qpaged.get_quantizer(spelling).quantize(x).dequantize())(x)
        return np.sqrt(np.mean((np.asarray(read) - x) ** 2))

    assert rms("int4:token+rotate") < 0.6 * rms("int4:token")
    assert rms("int8:token+rotate") < 0.6 * rms("int8:token")


PAGES, SLOTS, HEADS, QUERIES, TOKENS, BATCH = 6, 8, 2, 4, 19, 3


@functools.cache
def filled(spelling, head_dim):
    """A view of gaussian pages."""
    config = qpaged.PagedAttentionCacheMetaData(BATCH, 1, PAGES, 3, 24, SLOTS, HEADS, head_dim, 0.5)
    pools = np.random.default_rng(4).normal(size=(2, HEADS, PAGES, SLOTS, head_dim)).astype(np.float32)
    quantize = jax.jit(qpaged.get_quantizer(spelling).quantize)
    return qpaged.PagedAttentionCacheView(config, 0, *map(quantize, pools))


TABLE = np.array([4, 0, 3], np.int32)
POSITION = np.array([TOKENS - 1, 11, 3], np.int32)
STEP = qpaged.PagedAttentionMetadata.decode(position=POSITION, page_table=np.stack([TABLE] * BATCH))


def attention(query, keys, values):
    """float64 attention of (batch, q_heads, head_dim) over dequantized (heads, tokens, head_dim)."""
    out = np.zeros(query.shape)
    for row, head in np.ndindex(*query.shape[:2]):
        kept = slice(POSITION[row] + 1)
        k, v = (part[head * HEADS // query.shape[1], kept].astype(np.float64) for part in (keys, values))
        scores = k @ query[row, head] / np.sqrt(query.shape[2])
        weights = np.exp(scores - scores.max())
        out[row, head] = weights @ v / weights.sum()
    return out


@pytest.mark.parametrize(
    ("spelling", "head_dim"),
    [
        ("int8+rotate", 128),
        ("int8:token+rotate", 80),
        ("int8:channel+offset+rotate", 48),
    ],
)
def test_attention_is_that_over_the_dequantized_pages(spelling, head_dim):
    view = filled(spelling, head_dim)
    dense = jax.jit(lambda view: (view.key_pages.dequantize(), view.value_pages.dequantize()))(view)
    keys, values = (np.asarray(pool)[:, TABLE].reshape(HEADS, -1, head_dim) for pool in dense)
    query = np.random.default_rng(5).normal(size=(BATCH, QUERIES, head_dim)).astype(np.float32)

    def both(query, view):
        return [qpaged.paged_attention(query, view, STEP, backend=b) for b in ("xla", "reference")]

    want = attention(query, keys, values)
    for got in jax.jit(both)(query, view):
        np.testing.assert_allclose(got, want, atol=3e-5)


def inner_jaxprs(equation):
    found = jax.tree_util.tree_leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns"))
    return [getattr(p, "jaxpr", p) for p in found if hasattr(p, "eqns")]


def primitives(jaxpr, looped=False):
    """(primitive, whether inside a loop) of every equation."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, looped
        for inner in inner_jaxprs(equation):
            yield from primitives(inner, looped or equation.primitive.name in ("while", "scan"))


def counted(spelling, metadata, rows):
    view = filled(spelling, 128)
    query = jax.ShapeDtypeStruct((rows, QUERIES, 128), jnp.float32)
    made = jax.make_jaxpr(lambda q, view: qpaged.paged_attention(q, view, metadata))(query, view)
    return list(primitives(made.jaxpr))


@pytest.mark.parametrize(
    ("spelling", "mode"),
    [("int8+rotate", "decode"), ("int4:token+offset+rotate", "decode"), ("int8:token+rotate", "prefill")],
)
def test_queries_and_outputs_are_turned_once_a_call_and_the_cache_never(spelling, mode):
    """Nothing is added to what the loops over rows and blocks do without the rotation."""
    prefill = qpaged.PagedAttentionMetadata.prefill(position=np.arange(TOKENS), page_table=TABLE)
    metadata, rows = (STEP, BATCH) if mode == "decode" else (prefill, TOKENS)
    plain, turned = (counted(s, metadata, rows) for s in (spelling.replace("+rotate", ""), spelling))
    looped = [sorted(name for name, inside in found if inside) for found in (plain, turned)]
    assert looped[0] == looped[1] and "dot_general" in looped[0]
    products = [
        sum(name == "dot_general" and not inside for name, inside in found) for found in (plain, turned)
    ]
    assert products[1] - products[0] == 2  # of the query and of the output


@pytest.mark.parametrize("spelling", LAZY)
def test_lazy_products_decode_nothing(spelling):
    """A warning that something was materialized is an error here."""
    head_dim = 32
    x = np.random.default_rng(6).normal(size=(HEADS, PAGES, SLOTS, head_dim)).astype(np.float32)
    query = np.random.default_rng(7).normal(size=(HEADS, 5, head_dim)).astype(np.float32)
    weights = np.random.default_rng(8).uniform(size=(HEADS, 5, PAGES * SLOTS)).astype(np.float32)

    def program(query, weights, pool):
        keys = pool.reshape(HEADS, PAGES * SLOTS, head_dim)
        scores = jnp.einsum("hqd,hkd->hqk", query, keys)
        return scores, jnp.einsum("hqk,hkd->hqd", weights, keys)

    def all_of_it(query, weights, x):
        pool = qpaged.get_quantizer(spelling).quantize(x)
        dense = pool.dequantize()
        return use_implicit_args(program)(query, weights, pool), program(query, weights, dense)

    for got, want in zip(*jax.jit(all_of_it)(query, weights, x), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-4 * float(np.abs(want).max()))


def test_a_product_that_must_decode_says_so():
    """So that the test above can fail."""
    x = np.ones((4, 16), np.float32)
    with pytest.warns(UserWarning, match="sin"):  # of another class on the lane of qax
        jax.jit(lambda x: use_implicit_args(jnp.sin)(TRANSFORM.quantize(x)))(x)
