"""Arithmetic with a quantized array is done when a piece of its result is read: nothing is decoded whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.arrays import normal
from support.formats import FORMATS
from support.implicit_arrays import needs_own_implementation
from support.long import first_short

import qpaged
from qpaged.arrays import quantize
from qpaged.implicit import MaterializeWarning, use_implicit_args

pytestmark = needs_own_implementation
B, L, H, D = SHAPE = (2, 1100, 2, 32)  # two pieces and a rest
Q = normal(B, 4, D, seed=1)
NEW = normal(B, 1, H, D, seed=2)


def angles(length, width=D):
    """The cosines and sines of rotary embeddings: (1, length, 1, width / 2)."""
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * 10000.0 ** (-jnp.linspace(0, 1, width // 2))
    return jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]


def rotated_by_halves(k):
    cos, sin = angles(k.shape[1])
    left, right = k[..., : D // 2], k[..., D // 2 :]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


def rotated_by_a_split(k):
    cos, sin = angles(k.shape[1])
    left, right = jnp.split(k, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


def rotated_by_a_turn(k):
    cos, sin = (jnp.concatenate([part, part], -1) for part in angles(k.shape[1]))
    turned = jnp.concatenate([-k[..., D // 2 :], k[..., : D // 2]], -1)
    return k * cos + turned * sin


def rotated_by_strides(k):
    cos, sin = angles(k.shape[1])
    even, odd = k[..., ::2], k[..., 1::2]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(k.shape)


def rotated_by_pairs(k):
    cos, sin = angles(k.shape[1])
    pairs = k.reshape(*k.shape[:-1], D // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(k.shape)


def rotated_in_part(k):
    cos, sin = angles(k.shape[1], D // 2)
    left, right, rest = k[..., : D // 4], k[..., D // 4 : D // 2], k[..., D // 2 :]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin, rest], -1)


ROTARY = {
    function.__name__: function
    for function in (
        rotated_by_halves,
        rotated_by_a_split,
        rotated_by_a_turn,
        rotated_by_strides,
        rotated_by_pairs,
        rotated_in_part,
    )
}


def scores(keys):
    return jnp.einsum("bhd,blhd->bhl", Q[:, :H].astype(keys.dtype), keys)


def grouped_scores(keys):
    return jnp.einsum("bhd,blhd->bhl", Q, jnp.repeat(keys, 2, axis=2))


READS = {name: lambda k, rotated=rotated: scores(rotated(k)) for name, rotated in ROTARY.items()} | {
    "with grouped heads": lambda k: grouped_scores(rotated_by_halves(k)),
    "joined to a row first": lambda k: scores(rotated_by_halves(jnp.concatenate([k, NEW], 1))),
    "joined to a row later": lambda k: scores(jnp.concatenate([rotated_by_halves(k), NEW], 1)),
    "joined and turned": lambda k: scores(rotated_by_a_turn(jnp.concatenate([k, NEW], 1))),
    "transposed first": lambda k: jnp.einsum(
        "bhd,bhld->bhl", Q[:, :H], jnp.swapaxes(rotated_by_halves(k), 1, 2) * 2
    ),
    "less a mean": lambda k: scores(k - normal(B, 1, H, D, seed=3)),
    "from a mean": lambda k: scores(normal(B, 1, H, D, seed=3) - k),
    "over a length": lambda k: scores(k / (1 + normal(B, L, H, 1, seed=4) ** 2)),
    "clipped": lambda k: scores(jnp.clip(k, -1, 1)),
    "weighted": lambda k: scores(k * normal(*SHAPE, seed=5)),
    "masked": lambda k: scores(jnp.where(normal(*SHAPE, seed=6) > 0, k, -1)),
    "of other rows": lambda k: scores(rotated_by_halves(k[:, :1]) - k),
    "turned, less as long a batch": lambda k: jnp.einsum(
        "lbhd,lhd->lbh", rotated_by_halves(k[:, :B]).swapaxes(0, 1) - k[:, :B], normal(B, H, D, seed=8)
    ),
    "the difference of two": lambda k: scores(rotated_by_halves(k) - k),
    "keys first": lambda k: jnp.einsum("blhd,bhd->lbh", rotated_by_halves(k), Q[:, :H]),
    "added up along the length": lambda k: jnp.einsum(
        "bhl,blhd->bhd", normal(B, H, L, seed=7), rotated_by_halves(k)
    ),
    "joined, in float16": lambda k: scores(jnp.concatenate([k, NEW], 1).astype(jnp.float16)),
    "in float16": lambda k: scores(rotated_by_halves(k).astype(jnp.float16)),
}  # fmt: skip


def filled(spelling, length=L):
    quantizer = qpaged.get_quantizer(spelling)
    page, channels = quantizer.block((4, D))
    return quantize(normal(B, length, H, D), quantizer, (1, page, 1, channels))


CASES = [(name, spelling) for spelling in ("int8", "int4:token+rotate") for name in READS]
CASES += [("rotated_by_halves", spelling) for spelling in FORMATS]


@pytest.mark.short(10)
@pytest.mark.parametrize("case", first_short(len(READS) + 6, CASES), ids=str)
def test_reads_have_the_values_of_plain_arrays(case):
    name, spelling = case
    array = filled(spelling)
    out = jax.jit(use_implicit_args(READS[name]))(array)
    want = READS[name](array.dequantize())
    assert (out.shape, out.dtype) == (want.shape, want.dtype)
    # a dot's rounding is of the size of its terms, not of their sum; a rotated query is rounded once more
    rounding = 2 * jnp.finfo(out.dtype).eps * np.abs(want).max()
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=max(rounding, 2e-5))


@pytest.mark.short(2)
@pytest.mark.parametrize("name", ["rotated_by_halves", "joined to a row first"])
@pytest.mark.parametrize("spelling", ["int8", "int4"])
def test_a_read_makes_no_array_of_floats_as_large_as_the_cache(spelling, name):
    array = filled(spelling, length=16384)
    program = jax.jit(use_implicit_args(READS[name])).lower(array).compile()
    assert program.memory_analysis().temp_size_in_bytes < array.size * 4 * 0.6


@pytest.mark.filterwarnings("default")
def test_what_cannot_be_deferred_is_said_at_its_line():
    with pytest.warns(MaterializeWarning, match="Deferred has no handler for the primitive 'exp'"):
        out = use_implicit_args(lambda k: jnp.exp(rotated_by_halves(k)))(filled("int8"))
    assert out.shape == SHAPE


@pytest.mark.filterwarnings("default")
def test_the_caller_gets_an_array():
    array = filled("int8")
    with pytest.warns(MaterializeWarning, match="Deferred has no handler for the primitive 'add'") as caught:
        out = use_implicit_args(lambda k: k + NEW)(array)
    assert {warning.filename for warning in caught} == {__file__}
    np.testing.assert_array_equal(out, array.dequantize() + NEW)


def test_gradients_pass_through():
    array = filled("int8")

    def loss(q, k):
        return jnp.einsum("bhd,blhd->bhl", q, rotated_by_halves(k)).sum()

    got = jax.grad(use_implicit_args(loss))(Q[:, :H], array)
    np.testing.assert_allclose(got, jax.grad(loss)(Q[:, :H], array.dequantize()), rtol=1e-5, atol=1e-3)


SMALL = normal(2, 12, 4, 32, seed=9)
GAIN = normal(1, 1, 1, 32, seed=10)
QUERY = normal(2, 4, 32, seed=11)


def small_scores(keys):
    return jnp.einsum("bhd,blhd->bhl", QUERY, keys)


def over(xs, body):
    return lax.scan(lambda carry, x: (carry, body(x)), 0.0, xs)[1]


def repeatedly(k):
    for _ in range(12):
        k = (k + k) * 0.5
    return small_scores(k)


EDGES = {
    "scanned": lambda k: over(jnp.stack([k - SMALL, k + SMALL], 2)[:, :2], lambda x: x.sum(0)),
    "stacked by a scan": lambda k: over(jnp.arange(3.0), lambda x: jnp.stack([k - x, k + x], 2)),
    "turned by a scan": lambda k: over(jnp.arange(3.0), lambda x: jnp.swapaxes(jnp.maximum(k, x), 1, 2)),
    "carried": lambda k: lax.fori_loop(0, 3, lambda _, k: k - GAIN, k),
    "of a branch": lambda k: lax.cond(k[0, 0, 0, 0] > 0, lambda: k - GAIN, lambda: jnp.maximum(k, GAIN)),
    "rows that a plain operand stretches": lambda k: k[:, :1] - jnp.broadcast_to(GAIN, SMALL.shape),
    "heads that a plain operand stretches": lambda k: small_scores(k[:, :, :1] * GAIN - SMALL),
    "integers": lambda k: jnp.einsum(
        "bhd,blhd->bhl", jnp.ones(QUERY.shape, jnp.int32), (k * SMALL * 1e7).astype(jnp.int32)
    ),
    "one head for all": lambda k: small_scores(jnp.broadcast_to((k - GAIN)[:, :, :1], SMALL.shape)),
    "no copies": lambda k: jnp.broadcast_to((k - GAIN)[:, :, :1], (2, 12, 0, 32)),
    "joined, times a gain": lambda k: small_scores(jnp.concatenate([k, SMALL], 1) * GAIN),
    "joined, stretched": lambda k: jnp.concatenate([k[:, :1], SMALL[:, :0]], 1) - SMALL,
    "no rows": lambda k: small_scores(k[:, :0] - jnp.broadcast_to(GAIN, SMALL.shape)[:, :0]),
    "no channels": lambda k: (k - GAIN)[..., :0],
    "within a function of its own": lambda k: small_scores(use_implicit_args(lambda k: k - SMALL)(k)),
    "joined and returned": lambda k: jnp.concatenate([k - SMALL, SMALL], 1),
    "repeated and returned": lambda k: jnp.repeat(k - SMALL, 2, axis=2),
    "used again and again": repeatedly,
}


@pytest.mark.short(6)
@pytest.mark.filterwarnings("ignore::qpaged.implicit.MaterializeWarning")
@pytest.mark.parametrize("name", EDGES)
def test_what_comes_out_is_an_array_with_the_values_of_plain_ones(name):
    array = quantize(normal(2, 12, 4, 32), qpaged.get_quantizer("int8"), (1, 4, 1, 32))
    out = jax.jit(use_implicit_args(EDGES[name]))(array)
    want = EDGES[name](array.dequantize())
    assert isinstance(out, jax.Array) and (out.shape, out.dtype) == (want.shape, want.dtype)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore::qpaged.implicit.MaterializeWarning")
@pytest.mark.parametrize("name", ["joined and returned", "repeated and returned", "turned by a scan"])
def test_arrays_that_vmap_stacks(name):
    arrays = quantize(normal(3, 2, 12, 4, 32), qpaged.get_quantizer("int8"), (1, 1, 4, 1, 32))
    out = jax.vmap(use_implicit_args(EDGES[name]))(arrays)
    np.testing.assert_allclose(out, jax.vmap(EDGES[name])(arrays.dequantize()), rtol=1e-6)


def test_bfloat16_dots_over_the_length():
    array = quantize(
        normal(*SHAPE).astype(jnp.bfloat16), qpaged.get_quantizer("int8"), (1, 4, 1, D), jnp.bfloat16
    )
    weights = normal(L, 3).astype(jnp.bfloat16)

    def read(k):
        return jnp.einsum("lo,blhd->obhd", weights, k + 1)

    out = jax.jit(use_implicit_args(read))(array)
    weights, rows = (np.asarray(array, np.float32) for array in (weights, array.materialize() + 1))
    want = np.einsum("lo,blhd->obhd", weights, rows)
    # one rounding of the result, and one of each row, which XLA may leave out
    scale = np.einsum("lo,blhd->obhd", np.abs(weights), np.abs(rows))
    assert (np.abs(np.asarray(out, np.float32) - want) <= 2**-8 * (np.abs(want) + scale)).all()


@pytest.mark.filterwarnings("ignore::qpaged.implicit.MaterializeWarning")
def test_work_that_is_deferred_is_done_before_it_is_divided_over_devices():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    array = quantize(normal(4, 12, 4, 32), qpaged.get_quantizer("int8"), (1, 4, 1, 32))
    spec = jax.sharding.PartitionSpec("x")

    def read(k):
        divided = jax.shard_map(lambda a: a.sum(1), mesh=mesh, in_specs=spec, out_specs=spec)
        return divided(jnp.maximum(k, 0.3))

    np.testing.assert_allclose(
        jax.jit(use_implicit_args(read))(array), read(array.dequantize()), rtol=1e-5, atol=1e-5
    )
