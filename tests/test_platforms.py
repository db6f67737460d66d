"""by_platform: which programs have the kernel, and which have the default."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qpaged._compat import has_explicit_meshes
from qpaged._platforms import by_platform

needs_meshes = pytest.mark.skipif(not has_explicit_meshes(), reason="needs jax.shard_map and axis types")
X, Y = np.arange(6, dtype=np.float32), np.float32(2)


def default(x, by):
    return {"out": jnp.sin(x) * by, "count": jnp.int32(len(x))}


def kernel(x, by):
    return {"out": jnp.cos(x) * by, "count": jnp.int32(len(x))}


def computed(x, by=Y):
    return by_platform(x, by, default=default, tpu=kernel)


def has_kernel(function, *arguments, platforms=("tpu",)):
    """Return whether the lowered program has the kernel, and whether it has the default."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=platforms).as_text()
    return "stablehlo.cosine" in text, "stablehlo.sine" in text


def test_the_platform_of_the_lowering_chooses_the_kernel():
    assert has_kernel(computed, X) == (True, False)
    assert has_kernel(computed, X, platforms=("cpu",)) == (False, True)
    assert has_kernel(computed, X, platforms=("cpu", "tpu")) == (True, True)
    assert has_kernel(lambda x: jax.lax.scan(lambda x, _: (computed(x)["out"], None), x, length=2), X)[0]


def test_an_eager_call_traces_the_default_once():
    traced = []

    def counted(x, by):
        traced.append(x)
        return default(x, by)

    for _ in range(3):
        out = by_platform(X, Y, default=counted, tpu=kernel)
    assert len(traced) == 1 and out["count"] == len(X)
    np.testing.assert_allclose(out["out"], np.sin(X) * Y, rtol=1e-6)


def test_derivatives_and_batches_are_those_of_the_default():
    out, tangent = jax.jvp(lambda x: computed(x)["out"], (X,), (np.ones_like(X),))
    np.testing.assert_allclose(tangent, np.cos(X) * Y, rtol=1e-6)
    assert jax.jvp(computed, (X, Y), (X, Y))[1]["count"].dtype == jax.dtypes.float0
    np.testing.assert_allclose(jax.grad(lambda x: computed(x)["out"].sum())(X), tangent)
    batch = jax.vmap(computed, in_axes=(0, None))(np.stack([X, -X]), Y)
    np.testing.assert_array_equal(batch["out"], [out, -out])
    assert batch["count"].shape == (2,)
    # by_platform of an operand that is not differentiated keeps its kernel.
    assert has_kernel(lambda x, by: jax.jvp(lambda by: computed(x)["out"] * by, (by,), (by,)), X, Y)[0]


@needs_meshes
def test_partitioned_programs_use_the_default():
    """The compiler cannot partition a kernel; within shard_map it has nothing to partition."""
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2,), ("a",), axis_types=(auto,))
    two = jax.make_mesh((2, 2), ("a", "b"), axis_types=(auto, auto))
    spec = PartitionSpec("a")
    placed = jax.device_put(X, NamedSharding(mesh, spec))
    assert has_kernel(computed, placed) == (False, True)
    with jax.set_mesh(mesh):
        assert has_kernel(computed, X) == (False, True)
    over = functools.partial(jax.shard_map, in_specs=spec, out_specs=spec)
    for check_vma in (True, False):
        each = over(lambda x: computed(x)["out"], mesh=mesh, check_vma=check_vma)
        assert has_kernel(each, placed) == (True, False)
    np.testing.assert_allclose(each(placed), np.sin(X) * Y, rtol=1e-6)
    partly = over(lambda x: computed(x)["out"], mesh=two, axis_names={"a"})
    assert has_kernel(partly, X) == (False, True)
