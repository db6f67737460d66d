"""An adopted cache is saved by flax and read again, and an adopted step is exported and runs elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from support.arrays import normal
from support.long import first_short
from test_find_cache import CACHE, step

from qpaged import adopt

QUANTIZERS = ["int8", "int4+rotate+exact8", "int8:token", "int4", "int8:channel+offset/nvfp4"]


@pytest.mark.parametrize("quantizer", first_short(1, QUANTIZERS))
def test_a_step_is_exported_for_every_batch(quantizer):
    batch_sizes = (1, 2, 5)
    run = adopt.quantize_cache(step, quantizer, example=example_of(2))
    (batch,) = export.symbolic_shape("batch")

    def with_any_batch(leaf):
        return jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype)

    x, position, cache = example_of(2)
    arguments = (
        with_any_batch(x),
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.tree_util.tree_map(with_any_batch, run.init(cache)),
    )
    exported = export.export(jax.jit(run))(*arguments)
    for size in batch_sizes:
        x, position, cache = example_of(size)
        cache = run.init(cache)
        out, after = exported.call(x, position, cache)
        want, want_after = jax.jit(run)(x, position, cache)
        np.testing.assert_allclose(out, want, rtol=1e-6)
        assert jax.tree_util.tree_structure(after) == jax.tree_util.tree_structure(want_after)


def test_positions_of_their_own_are_exported_for_every_batch():
    def write_each(x, positions, cache):
        sequences = jnp.arange(x.shape[0])
        cache = {name: a.at[sequences, positions].set(x[:, 0]) for name, a in cache.items()}
        scores = jnp.einsum("bthd,bshd->bhts", x, cache["k"])
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), cache["v"]), cache

    x, _, cache = example_of(2)
    positions = jnp.array([3, 7])
    run = adopt.quantize_cache(write_each, "int8:token", example=(x, positions, cache))
    (batch,) = export.symbolic_shape("batch")
    shapes = jax.tree_util.tree_map(
        lambda leaf: jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype),
        (x, positions, run.init(cache)),
    )
    exported = export.export(jax.jit(run))(*shapes)
    for size in (2, 5):
        x, _, cache = example_of(size)
        positions = jnp.arange(size) * 3
        out, _ = exported.call(x, positions, run.init(cache))
        want, _ = jax.jit(run)(x, positions, run.init(cache))
        np.testing.assert_allclose(out, want, rtol=1e-6)


def example_of(batch):
    cache = {name: normal(batch, 32, 2, 32, seed=len(name)) for name in CACHE}
    return normal(batch, 1, 2, 32, seed=3), jnp.int32(5), cache


def test_an_exported_step_is_read_again():
    run = adopt.quantize_cache(step, "int8:channel+offset", example=example_of(2))
    x, position, cache = example_of(2)
    cache = run.init(cache)
    data = export.export(jax.jit(run))(x, position, cache).serialize()
    out, after = export.deserialize(data).call(x, position, cache)
    want, want_after = jax.jit(run)(x, position, cache)
    np.testing.assert_array_equal(out, want)
    assert jax.tree_util.tree_structure(after) == jax.tree_util.tree_structure(want_after)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_cache_goes_through_flax_and_back(quantizer):
    serialization = pytest.importorskip("flax.serialization")
    run = adopt.quantize_cache(step, quantizer, example=example_of(2))
    _, _, cache = example_of(2)
    cache = run.init(cache)
    target = run.init(target_of(2))
    back = serialization.from_bytes(target, serialization.to_bytes(cache))
    assert jax.tree_util.tree_structure(back) == jax.tree_util.tree_structure(cache)
    for got, want in zip(jax.tree_util.tree_leaves(back), jax.tree_util.tree_leaves(cache), strict=True):
        np.testing.assert_array_equal(got, want)
    other = adopt.quantize_cache(step, "fp8_e4m3", example=example_of(2)).init(target_of(3))
    with pytest.raises(ValueError, match="state must be of a fp8_e4m3 array of shape"):
        serialization.from_bytes(other, serialization.to_bytes(cache))
    with pytest.raises(ValueError, match=r"holds an array of float32, as of a float cache; .* step.init"):
        serialization.from_bytes(target, serialization.to_bytes(target_of(2)))


def target_of(batch):
    return {name: jnp.zeros((batch, 32, 2, 32)) for name in CACHE}
