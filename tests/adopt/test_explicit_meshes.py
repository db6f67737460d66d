"""Steps on meshes with Explicit axes, whose types have shardings, are adopted as others are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support.cache_programs import Program, inputs, programs_with_each_choice
from support.long import first_short

from qpaged import adopt
from qpaged._compat import has_explicit_meshes
from qpaged.arrays import is_quantized

pytestmark = pytest.mark.skipif(not has_explicit_meshes(), reason="this JAX has no Explicit meshes")
NEED_ANOTHER_SHARDING = [  # of which JAX itself cannot tell how an axis of heads that is divided comes out
    program
    for program in programs_with_each_choice()
    if program.layout == "kbsd" or program.grouping == "repeated"
]
CASES = [(1, Program(grouping="repeated")), (1, Program(stacking="scanned"))]
CASES += [(2, program) for program in programs_with_each_choice() if program not in NEED_ANOTHER_SHARDING]


def explicit_mesh(devices):
    return jax.make_mesh((devices,), ("x",), (AxisType.Explicit,), devices=jax.devices()[:devices])


def by_heads(mesh, axis, array):
    spec = PartitionSpec(*[None] * axis, "x" if mesh.size > 1 else None)
    return jax.device_put(array, NamedSharding(mesh, spec))


def run(step, cache, x):
    jitted, outs = jax.jit(step), []
    for position in (3, 4):
        out, cache = jitted(x, jnp.int32(position), cache)
        outs.append(np.asarray(out))
    return outs, out, cache


@pytest.mark.parametrize("case", first_short(6, CASES), ids=str)
@pytest.mark.parametrize("quantizer", first_short(1, ["int8", "int4:token"]))
def test_a_step_gives_what_it_gives_without_a_mesh(quantizer, case):
    devices, program = case
    plain = adopt.quantize_cache(program.step, quantizer, example=(inputs(1), jnp.int32(0), program.cache()))
    want, _, _ = run(plain, plain.init(program.cache()), inputs(1))
    mesh = explicit_mesh(devices)
    with jax.set_mesh(mesh):
        x = by_heads(mesh, 2, inputs(1))
        axis = program.axes().index("heads")
        cache = jax.tree_util.tree_map(lambda array: by_heads(mesh, axis, array), program.cache())
        step = adopt.quantize_cache(program.step, quantizer, example=(x, jnp.int32(0), cache), strict=True)
        got, out, after = run(step, step.init(cache), x)
        float_out, _ = jax.jit(program.step)(x, jnp.int32(0), cache)
    assert out.sharding.is_equivalent_to(float_out.sharding, out.ndim)
    for leaf in jax.tree_util.tree_leaves(after, is_leaf=is_quantized):
        assert is_quantized(leaf)
        assert leaf.stored.sharding.spec[axis] == ("x" if devices > 1 else None)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)  # sums of dots over shards, in another order


@pytest.mark.filterwarnings("ignore::qpaged.implicit.MaterializeWarning")
def test_a_step_that_decodes_its_cache_runs():
    program, mesh = Program(update="indexed"), explicit_mesh(2)

    def centered(x, position, cache):
        out, cache = program.step(x, position, cache)
        return out + cache[0]["k"].mean(), cache

    with jax.set_mesh(mesh):
        x = by_heads(mesh, 2, inputs(1))
        cache = jax.tree_util.tree_map(lambda array: by_heads(mesh, 2, array), program.cache())
        step = adopt.quantize_cache(centered, "int8", example=(x, jnp.int32(0), cache))
        _, out, _ = run(step, step.init(cache), x)
        want, _ = jax.jit(centered)(x, jnp.int32(4), jax.jit(centered)(x, jnp.int32(3), cache)[1])
    np.testing.assert_allclose(out, want, atol=0.1)
    assert len(step.report()) == 1
