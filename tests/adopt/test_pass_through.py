"""Operations that hand a cache on as it is leave it quantized, and nothing is reported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from support.implicit_arrays import needs_own_implementation
from support.long import first_short

import qpaged
from qpaged import adopt
from qpaged.implicit import use_implicit_args

pytestmark = needs_own_implementation
BATCH, LENGTH, HEADS, HEAD_DIM = 2, 64, 2, 32
CACHE = {name: jnp.zeros((BATCH, LENGTH, HEADS, HEAD_DIM)) for name in ("k", "v")}


def attend(x, position, cache):
    """Write one token into a cache, and attend to what was written."""
    k = lax.dynamic_update_slice_in_dim(cache["k"], x[:, :, 1], position, 1)
    v = lax.dynamic_update_slice_in_dim(cache["v"], x[:, :, 2], position, 1)
    scores = jnp.einsum("bthd,bshd->bhts", x[:, :, 0], k)
    weights = jax.nn.softmax(jnp.where(jnp.arange(LENGTH) <= position, scores, -1e30), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v), {"k": k, "v": v}


def active(new, old):
    """Return new rows of the first sequence alone."""
    return jnp.where(jnp.array([True, False]).reshape(2, 1, 1, 1), new, old)


def if_active(x, position, cache):
    """Run the step on each sequence under a condition, which vmap makes a selection."""

    def one(x, is_active, cache):
        def run():
            out, new = attend(x[None], position, jax.tree_util.tree_map(lambda array: array[None], cache))
            return out[0], jax.tree_util.tree_map(lambda array: array[0], new)

        return lax.cond(is_active, run, lambda: (jnp.zeros((1, HEADS, HEAD_DIM)), cache))

    return jax.vmap(one)(x, jnp.array([True, False]), cache)


def before(change):
    """Return the step with ``change`` applied to each array of the cache first."""
    return lambda x, position, cache: attend(x, position, jax.tree_util.tree_map(change, cache))


@jax.custom_jvp
def with_jvp(x, position, cache):
    return attend(x, position, cache)


with_jvp.defjvp(lambda primals, tangents: (attend(*primals), tangents))


@jax.custom_vjp
def with_vjp(x, position, cache):
    return attend(x, position, cache)


with_vjp.defvjp(lambda *args: (attend(*args), None), lambda residuals, cotangents: (None, None, None))


def constrained(array):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("tp",))
    return lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(None, None, "tp")))


STEPS = {
    "custom_jvp": lambda *args: with_jvp(*args),
    "custom_vjp": lambda *args: with_vjp(*args),
    "stop_gradient": before(lax.stop_gradient),
    "reduce_precision": before(lambda array: lax.reduce_precision(array, 8, 7)),
    "optimization_barrier": lambda *args: attend(*lax.optimization_barrier(args)),
    "device_put": before(jax.device_put),
    "sharding_constraint": before(constrained),
    "rev, twice": before(lambda array: array[:, ::-1][:, ::-1]),
    "pad by nothing": before(lambda array: jnp.pad(array, ((0, 0),) * 4)),
    "copy": before(jnp.copy),
    "pad, then cut": before(lambda array: jnp.pad(array, ((0, 0), (0, 16), (0, 0), (0, 0)))[:, :LENGTH]),
    "roll by pages": before(lambda array: jnp.roll(jnp.roll(array, 32, 1), -32, 1)),
}


@pytest.mark.short(4)
@pytest.mark.parametrize("quantizer", first_short(1, ["int8", "int4"]))
@pytest.mark.parametrize("name", STEPS)
def test_the_cache_stays_quantized(name, quantizer):
    inputs = jax.random.normal(jax.random.key(0), (3, BATCH, 1, 3, HEADS, HEAD_DIM))
    step = adopt.quantize_cache(STEPS[name], quantizer, example=(inputs[0], jnp.int32(0), CACHE), strict=True)
    direct = adopt.quantize_cache(attend, quantizer, example=(inputs[0], jnp.int32(0), CACHE))
    assert [leaf.role for leaf in step.found.leaves] == ["key", "value"]
    run, run_directly = jax.jit(step), jax.jit(direct)
    cache = expected_cache = step.init(CACHE)
    for position, x in enumerate(inputs):
        out, cache = run(x, position, cache)
        expected, expected_cache = run_directly(x, position, expected_cache)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    for leaf, expected_leaf in zip(*map(jax.tree_util.tree_leaves, (cache, expected_cache)), strict=True):
        np.testing.assert_array_equal(leaf, expected_leaf)
    assert len(step.report()) == 0


@pytest.mark.parametrize("quantizer", first_short(1, ["int8", "int4"]))
def test_inactive_sequences_keep_their_rows(quantizer):
    def selected(x, position, cache):
        out, new = attend(x, position, cache)
        return out, jax.tree_util.tree_map(active, new, cache)

    inputs = jax.random.normal(jax.random.key(0), (2, BATCH, 1, 3, HEADS, HEAD_DIM))
    for program in (selected, if_active):
        example = (inputs[0], jnp.int32(0), CACHE)
        step = adopt.quantize_cache(program, quantizer, example=example, strict=True)
        direct = adopt.quantize_cache(attend, quantizer, example=example)
        cache = expected_cache = step.init(CACHE)
        for position, x in enumerate(inputs):
            out, cache = jax.jit(step)(x, position, cache)
            expected, expected_cache = jax.jit(direct)(x, position, expected_cache)
            np.testing.assert_allclose(out[0], expected[0], rtol=1e-5, atol=1e-6)
        for name in "kv":
            values, expected_values = cache[name].dequantize(), expected_cache[name].dequantize()
            np.testing.assert_array_equal(values[0], expected_values[0])
            np.testing.assert_array_equal(values[1], 0)


def test_an_array_is_reversed_with_its_scales():
    values = jax.random.normal(jax.random.key(1), (2, 4, 16, 32)) * jnp.arange(1.0, 5.0)[:, None, None]
    array = qpaged.get_quantizer("int8:token").quantize(values)
    for axes in ((1,), (2,), (1, 3)):
        reversed_array = use_implicit_args(lambda array, axes=axes: lax.rev(array, axes))(array)
        np.testing.assert_array_equal(reversed_array.dequantize(), lax.rev(array.dequantize(), axes))
