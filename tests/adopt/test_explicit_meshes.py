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
from qpaged.arrays import PartlyExact, is_cache_array

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


@pytest.mark.short(1)
@pytest.mark.parametrize("case", first_short(3, CASES), ids=str)
@pytest.mark.parametrize("quantizer", first_short(1, ["int8", "int4:token", "int8+exact9"]))
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
    for leaf in jax.tree_util.tree_leaves(after, is_leaf=is_cache_array):
        assert is_cache_array(leaf)
        codes = leaf.codes if isinstance(leaf, PartlyExact) else leaf
        assert codes.stored.sharding.spec[axis] == ("x" if devices > 1 else None)
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


def attend(x, cache, **options):
    scores = jnp.einsum("bthd,bshd->bhts", x, cache["k"], **options)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), cache["v"])


def step(x, position, cache):
    cache = {name: jax.lax.dynamic_update_slice_in_dim(a, x, position, 1) for name, a in cache.items()}
    return attend(x, cache), cache


def step_that_names_a_sharding(x, position, cache):
    _, cache = step(x, position, cache)
    return attend(x, cache, out_sharding=PartitionSpec(None, "x")), cache


def step_with_copied_heads(x, position, cache):
    """Keep one head in the cache, and divide its copies over the mesh."""
    _, cache = step(x[:, :, :1], position, cache)
    copies = {name: jnp.repeat(jax.sharding.reshard(a, PartitionSpec()), 2, 2) for name, a in cache.items()}
    by_head = PartitionSpec(None, None, "x")
    x, *copies = (jax.sharding.reshard(array, by_head) for array in (x, *copies.values()))
    return attend(x, dict(zip("kv", copies, strict=True))), cache


def arrays_on(mesh, heads=2):
    """Return a token and a cache, by heads where there are several."""
    spec = PartitionSpec(None, None, "x") if heads > 1 else PartitionSpec()
    cache = {name: jnp.zeros((2, 32, heads, 16)) for name in "kv"}
    x = jnp.linspace(-1, 1, 64).reshape(2, 1, 2, 16)
    sharding = NamedSharding(mesh, spec)
    return jax.device_put(x, sharding), jax.tree_util.tree_map(lambda a: jax.device_put(a, sharding), cache)


@pytest.mark.parametrize(("program", "heads"), [(step_that_names_a_sharding, 2), (step_with_copied_heads, 1)])
def test_shardings_that_the_step_names_are_kept(program, heads):
    mesh = explicit_mesh(2)
    with jax.set_mesh(mesh):
        x, cache = arrays_on(mesh, heads)
        run_quantized = adopt.quantize_cache(program, "int8", example=(x, jnp.int32(0), cache), strict=True)
        got, _ = jax.jit(run_quantized)(x, jnp.int32(0), run_quantized.init(cache))
        want, _ = jax.jit(program)(x, jnp.int32(0), cache)
    assert got.sharding.is_equivalent_to(want.sharding, got.ndim)
    np.testing.assert_allclose(got, want, atol=0.02)


def test_axes_of_several_kinds():
    kinds = (AxisType.Explicit, AxisType.Auto)
    mesh = jax.make_mesh((2, 2), ("x", "y"), kinds, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        x, cache = arrays_on(mesh)
        run_quantized = adopt.quantize_cache(step, "int8", example=(x, jnp.int32(0), cache), strict=True)
        got, after = jax.jit(run_quantized)(x, jnp.int32(0), run_quantized.init(cache))
        want, _ = jax.jit(step)(x, jnp.int32(0), cache)
    assert after["k"].stored.sharding.spec[2] == "x"
    np.testing.assert_allclose(got, want, atol=0.02)


@pytest.mark.short(2)
@pytest.mark.parametrize("change", [lambda a: jnp.roll(a, -1, 1), lambda a: a[:, :20], lambda a: a * 2.0])
@pytest.mark.parametrize("quantizer", ["int8", "int8:token"])
@pytest.mark.filterwarnings("ignore::qpaged.implicit.MaterializeWarning")
def test_a_cache_that_is_quantized_anew_stays_where_it_is(quantizer, change):
    mesh = explicit_mesh(2)
    with jax.set_mesh(mesh):
        x, cache = arrays_on(mesh)
        cache = jax.tree_util.tree_map(lambda a: a + jnp.arange(32.0).reshape(1, 32, 1, 1), cache)
        run_quantized = adopt.quantize_cache(step, quantizer, example=(x, jnp.int32(0), cache))
        changed = run_quantized.apply(
            lambda cache: jax.tree_util.tree_map(change, cache), run_quantized.init(cache)
        )
    assert changed["k"].stored.sharding.spec[2] == "x"
    np.testing.assert_allclose(changed["k"].materialize(), change(cache["k"]), atol=0.6)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_a_cache_of_shapes_is_made_where_their_shardings_say(kind):
    mesh = jax.make_mesh((2,), ("x",), (kind,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        x, cache = arrays_on(mesh)
        shapes = {
            name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for name, a in cache.items()
        }
        run_quantized = adopt.quantize_cache(step, "int8", example=(x, jnp.int32(0), shapes), strict=True)
        made = run_quantized.init(shapes)
    assert made["k"].stored.sharding.is_equivalent_to(cache["k"].sharding, 4)
