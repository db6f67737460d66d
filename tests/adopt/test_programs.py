"""Programs of many kinds are adopted: their cache is found, and results are those of its decoded values."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from support.cache_programs import BATCH, LENGTH, Program, all_programs, inputs, programs_with_each_choice

import qpaged
from qpaged import adopt

FORMATS = ("int8", "int8:token", "fp8_e4m3", "int4:channel", "int8:channel+offset", "int4:token+rotate")


def adopted(program, quantizer="int8", **options):
    example = (inputs(1), jnp.int32(0), program.cache())
    return adopt.quantize_cache(program.step, quantizer, example=example, **options)


def is_quantized(leaf):
    return isinstance(leaf, qpaged.QuantizedArray)


def decoded(cache):
    """Return a cache with the values of its quantized arrays."""
    return jax.tree_util.tree_map(
        lambda leaf: leaf.dequantize() if is_quantized(leaf) else leaf, cache, is_leaf=is_quantized
    )


@pytest.mark.parametrize("program", programs_with_each_choice(), ids=str)
def test_the_cache_is_found(program):
    found = adopt.find_cache(program.step, inputs(1), jnp.int32(0), program.cache())
    leaves = jax.tree_util.tree_leaves(program.cache())
    assert [leaf.shape for leaf in found.leaves] == [leaf.shape for leaf in leaves]
    assert {leaf.axes for leaf in found.leaves} == {program.axes()}
    assert all(leaf.output for leaf in found.leaves)
    roles = [leaf.role for leaf in found.leaves]
    assert roles == (
        ["key and value"] if program.stacking == "pair" else ["key", "value"] * (len(leaves) // 2)
    )
    layers = [leaf.layer for leaf in found.leaves]
    assert layers == ([0, 0, 1, 1] if program.stacking == "apart" else [None] * len(leaves))


@pytest.mark.short(5)
@pytest.mark.parametrize("program", programs_with_each_choice(), ids=str)
def test_nothing_is_materialized_and_the_cache_comes_back(program):
    step = adopted(program, strict=True)
    assert not step.report()
    jitted = jax.jit(step, donate_argnums=2)
    cache = step.init(program.cache())
    structure = jax.tree_util.tree_structure(cache)
    for position in range(7, 10):
        _, cache = jitted(inputs(1), jnp.int32(position), cache)
        assert jax.tree_util.tree_structure(cache) == structure
    assert jitted._cache_size() == 1


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.sampled_from(all_programs(layers=1)), st.sampled_from(FORMATS), st.integers(0, 40))
def test_the_result_is_that_of_the_decoded_values(program, spelling, position):
    """A layer's result is that of attention to the values that it stores: nothing else is rounded."""
    step = jax.jit(adopted(program, spelling))
    _, cache = step(inputs(5, seed=1), jnp.int32(0), adopted(program, spelling).init(program.cache()))
    x = inputs(5, seed=2)
    got, after = step(x, jnp.int32(position), cache)
    want = program.read(x, *program.layer_of(decoded(after), 0), position)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("spelling", ["int8", "int4:token+rotate"])
def test_a_step_may_be_vmapped(spelling):
    program = Program(layers=1)
    step = adopted(program, spelling)
    xs = jnp.stack([inputs(2, seed=seed) for seed in (1, 2, 3)])
    caches = jax.tree_util.tree_map(lambda part: jnp.stack([part] * 3), step.init(program.cache()))
    got, _ = jax.jit(jax.vmap(step, in_axes=(0, None, 0)))(xs, jnp.int32(3), caches)
    for x, out in zip(xs, got, strict=True):
        want, _ = jax.jit(step)(x, jnp.int32(3), step.init(program.cache()))
        np.testing.assert_allclose(out, want, rtol=2e-4, atol=2e-5)


@pytest.mark.short(1)
@pytest.mark.parametrize("spelling", ["int8", "int8:channel+offset", "int4:token+rotate"])
def test_gradients_of_queries_are_those_of_the_decoded_values(spelling):
    program = Program(layers=1)
    step = adopted(program, spelling)
    _, (cache,) = jax.jit(step)(inputs(7, seed=1), jnp.int32(0), step.init(program.cache()))
    position = jnp.int32(6)
    x = inputs(1, seed=3)

    def loss(x, k, v):
        return (program.read(x, k, v, position) ** 2).sum()

    got = jax.jit(jax.grad(qpaged.implicit.use_implicit_args(loss)))(x, cache["k"], cache["v"])
    want = jax.grad(loss)(x, *(array.dequantize() for array in (cache["k"], cache["v"])))
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_a_prompt_may_begin_at_any_position(page_size):
    """A prompt written at once from an unaligned position leaves the codes that token by token leaves."""
    program = Program(layers=1)
    start = 13
    step = adopted(program, page_size=page_size)
    x = inputs(9, seed=4)
    run = jax.jit(step)
    _, at_once = run(x[:, :6], jnp.int32(start), step.init(program.cache()))
    _, at_once = run(x[:, 6:7], jnp.int32(start + 6), at_once)
    one_by_one = step.init(program.cache())
    for index in range(7):
        _, one_by_one = run(x[:, index : index + 1], jnp.int32(start + index), one_by_one)
    first = at_once[0]["k"]
    assert first.block[1] == min(page_size, LENGTH)
    for a, b in zip(*(jax.tree_util.tree_leaves(c[0]) for c in (at_once, one_by_one)), strict=True):
        np.testing.assert_array_equal(a, b)
    x_kv = jnp.einsum(f"bskd->{program.layout}", x[:, :7, : first.shape[2]])
    rows = first.dequantize()[:, start : start + 7]
    assert float(jnp.abs(rows - x_kv).max()) <= 0.5 * float(first.multipliers().max())
    assert rows.shape[0] == BATCH
