"""A cache divided over devices: the same bits as on one device, and each device holds its share."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.caches import (
    SOME,
    bits,
    config,
    decode,
    make_mesh,
    make_view,
    prefill,
    tokens,
    write_decodes,
    write_prefill,
)
from support.long import first_short

import qpaged

HEADS, PAGES = 4, 16
TABLE = np.array([3, 1, 5, 7])
ROWS = np.stack([TABLE, [2, 4, 6, 8]])
KEY, VALUE = tokens(8, heads=HEADS)
MORE = tokens(2, seed=1, heads=HEADS)
QUERY = tokens(2, seed=2, heads=2 * HEADS)[0]

AXIS_TYPES = ["Auto", "Explicit"]


UNCONSTRAINED = PartitionSpec.UNCONSTRAINED


def tp(devices, axis_type="Auto", shape=None, names=("tp",)):
    if axis_type == "Explicit" and not hasattr(jax.sharding, "AxisType"):
        pytest.skip("this JAX has no axis types")
    return make_mesh(shape or (devices,), names, axis_type)


def entered(mesh, axis_type):
    """The mesh as the current one, as programs with Explicit axes have it."""
    return jax.set_mesh(mesh) if axis_type == "Explicit" else contextlib.nullcontext()


def run(view, backend="xla"):
    """A prefill, a decode and a reset, and what the row then attends to."""

    @jax.jit
    def steps(view, key, value, more, query, pages):
        view = view.write_prefill_to_cache(key, value, prefill(jnp.arange(8), TABLE, 7))
        view = view.write_decodes_to_cache(*more, decode(np.array([7, 20]), ROWS))
        out = qpaged.paged_attention(query, view, decode(np.array([7, -1]), ROWS), backend=backend)
        return view, view.reset_pages(pages), out

    return steps(view, KEY, VALUE, MORE, QUERY, np.array([3, PAGES, 3]))


def shards(leaf):
    return {shard.device: shard.data.shape for shard in leaf.addressable_shards}


_alone = {}


def alone(format):
    if format not in _alone:
        _alone[format] = run(make_view(format, num_kv_heads=HEADS))
    return _alone[format]


@pytest.mark.short(1)
@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize("format", first_short(1, ["int8", None]))
def test_writes_and_attention_are_those_of_one_device(format, axis_type):
    mesh = tp(4, axis_type)
    with entered(mesh, axis_type):
        view = make_view(format, mesh=mesh, num_kv_heads=HEADS)
        written, after, out = run(view)
    for got, expected in zip((written, after), alone(format)[:2], strict=True):
        assert bits(got) == bits(expected)
    np.testing.assert_allclose(out, alone(format)[2], rtol=1e-5, atol=1e-6)
    for tree in (view, written, after):
        for leaf in jax.tree_util.tree_leaves(tree):
            assert set(shards(leaf)) == set(mesh.devices.flat)
            assert {shape[0] for shape in shards(leaf).values()} == {1}  # of 4 heads
    assert written.key_pages.shape == (HEADS, PAGES, 4, 32)


@pytest.mark.short(1)
@pytest.mark.parametrize("axis_type", AXIS_TYPES)
def test_explicit_meshes_need_not_be_entered(axis_type):
    """jax.make_mesh makes Explicit axes unless told otherwise."""
    view = make_view("int8", mesh=tp(4, axis_type), num_kv_heads=HEADS)
    written, _, out = run(view)
    assert bits(written) == bits(alone("int8")[0])
    np.testing.assert_allclose(out, alone("int8")[2], rtol=1e-5, atol=1e-6)


@pytest.mark.short(1)
@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize("format", first_short(1, ["int8", None]))
def test_tokens_that_are_divided_too(format, axis_type):
    """As a model with its heads over tp hands them over."""
    mesh = tp(4, axis_type)
    divided = NamedSharding(mesh, PartitionSpec(None, "tp", None))
    with entered(mesh, axis_type):
        view = make_view(format, mesh=mesh, num_kv_heads=HEADS)
        key, value, query = (jax.device_put(x, divided) for x in (KEY, VALUE, QUERY))
        view = write_prefill(view, key, value, prefill(np.arange(8), TABLE, 7))
        more = [jax.device_put(x, divided) for x in MORE]
        view = write_decodes(view, *more, decode(np.array([7, 20]), ROWS))
        out = jax.jit(qpaged.paged_attention)(query, view, decode(np.array([7, -1]), ROWS))
    assert bits(view) == bits(alone(format)[0])
    np.testing.assert_allclose(out, alone(format)[2], rtol=1e-5, atol=1e-6)
    for leaf in jax.tree_util.tree_leaves(view):
        assert {shape[0] for shape in shards(leaf).values()} == {1}


def test_the_reference_is_the_same_over_devices():
    view = make_view(None, mesh=tp(4), num_kv_heads=HEADS)
    np.testing.assert_allclose(run(view, "reference")[2], alone(None)[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", SOME)
@pytest.mark.parametrize("devices", [2, 4])
def test_each_device_holds_its_share(format, devices):
    mesh = tp(devices)
    view = make_view(format, mesh=mesh, num_kv_heads=HEADS)
    total = sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(view))
    held = dict.fromkeys(mesh.devices.flat, 0)
    for leaf in jax.tree_util.tree_leaves(view):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert set(held.values()) == {total // devices}


@pytest.mark.parametrize("axis_type", first_short(1, AXIS_TYPES))
@pytest.mark.parametrize("format", ["int8"])
def test_heads_that_do_not_divide_are_whole_everywhere(format, axis_type):
    mesh = tp(3, axis_type)
    with entered(mesh, axis_type):
        view = make_view(format, mesh=mesh, num_kv_heads=HEADS)
        for leaf in jax.tree_util.tree_leaves(view):
            assert set(shards(leaf).values()) == {leaf.shape}
        written, _, out = run(view)
    assert bits(written) == bits(alone(format)[0])
    np.testing.assert_allclose(out, alone(format)[2], rtol=1e-5, atol=1e-6)


def test_a_mesh_without_the_axis_is_of_replicas():
    view = make_view("int8", mesh=tp(8, shape=(2, 4), names=("data", "fsdp")), num_kv_heads=HEADS)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree_util.tree_leaves(view))


def test_another_axis_for_the_heads():
    mesh = tp(8, shape=(2, 4), names=("dp", "model"))
    manager = qpaged.PartitionManager(mesh, kv_head_axis="model")
    view = make_view("int8", mesh=mesh, manager=manager, num_kv_heads=HEADS)
    assert {shape[0] for shape in shards(view.key_pages.codes).values()} == {1}
    assert {shape[0] for shape in shards(view.key_pages.scales).values()} == {1}


class Resolved:
    """A partition manager of another library: it says where, and remembers what it was asked."""

    def __init__(self, *spec):
        self.spec, self.asked = PartitionSpec(*spec), []

    def resolve(self, axes, mode="", shape=()):
        self.asked.append((list(axes), mode, tuple(shape)))
        return self.spec


@pytest.mark.short(1)
@pytest.mark.parametrize(
    ("spec", "codes", "scales"),
    [
        ((), (4, 16, 4, 32), (4, 16, 1, 1)),
        (("dp",), (2, 16, 4, 32), (2, 16, 1, 1)),
        ((("dp", "tp"),), None, None),
        ((None, ("dp", "tp")), (4, 2, 4, 32), (4, 2, 1, 1)),
        (("tp", "dp"), (1, 8, 4, 32), (1, 8, 1, 1)),
        ((None, None, "tp", "dp"), (4, 16, 1, 16), (4, 16, 1, 1)),
        (("tp", None, None, "dp"), (1, 16, 4, 16), (1, 16, 1, 1)),
    ],
    ids=str,
)
def test_a_partition_manager_of_ones_own(spec, codes, scales):
    mesh, manager = tp(8, shape=(2, 4), names=("dp", "tp")), Resolved(*spec)
    if codes is None:
        with pytest.raises(ValueError, match=r"divide a pool of shape \(4, 16, 4, 32\) evenly over the mesh"):
            make_view("int8", mesh=mesh, manager=manager, num_kv_heads=HEADS)
        return
    view = make_view("int8", mesh=mesh, manager=manager, num_kv_heads=HEADS)
    asked = (["__KV_HEAD__", "_", "_", "_"], "__prefill__", (HEADS, PAGES, 4, 32))
    assert set(map(str, manager.asked)) == {str(asked)}
    assert set(shards(view.key_pages.codes).values()) == {codes}
    assert set(shards(view.key_pages.scales).values()) == {scales}
    if spec in (("tp", "dp"), (None, None, "tp", "dp")):
        assert bits(run(view)[0]) == bits(alone("int8")[0])


@pytest.mark.parametrize("spec", [("tp", None), (None, "tp"), ("nowhere",), (UNCONSTRAINED,)], ids=str)
def test_a_partition_that_does_not_divide_is_refused(spec):
    mesh = tp(4)
    with pytest.raises(ValueError, match=r"must divide a pool of shape \(2, 18, 4, 32\) evenly .*'tp': 4"):
        make_view(None, mesh=mesh, manager=Resolved(*spec), num_pages_per_layer=18)


def test_a_whole_cache_over_devices_goes_through_json():
    cache = qpaged.PagedAttentionCache.init_cache(
        tp(4), jnp.float32, config(num_kv_heads=HEADS), None, "int8"
    )
    cache = jax.jit(
        lambda cache: cache.replace(
            views=[
                view.write_prefill_to_cache(KEY, VALUE, prefill(np.arange(8), TABLE)) for view in cache.views
            ]
        )
    )(cache)
    assert bits(qpaged.PagedAttentionCache.from_json(cache.to_json())) == bits(cache)
    assert cache.nbytes == sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(cache))


@pytest.mark.parametrize("format", SOME)
def test_donation_over_devices(format):
    view = make_view(format, mesh=tp(4), num_kv_heads=HEADS)
    write = (
        jax.jit(lambda view, step: view.write_decodes_to_cache(*MORE, step), donate_argnums=0)
        .lower(view, decode([0, 5], ROWS))
        .compile()
    )
    old = jax.tree_util.tree_leaves(view)
    places = [[s.data.unsafe_buffer_pointer() for s in leaf.addressable_shards] for leaf in old]
    after = write(view, decode([0, 5], ROWS))
    assert all(leaf.is_deleted() for leaf in old)
    new = jax.tree_util.tree_leaves(after)
    assert sorted(places) == sorted(
        [s.data.unsafe_buffer_pointer() for s in leaf.addressable_shards] for leaf in new
    )


class TestPartitionManager:
    def test_heads_go_over_the_axis(self):
        manager = qpaged.PartitionManager(tp(4))
        axes = ["__KV_HEAD__", "_", "_", "_"]
        assert manager.resolve(axes, shape=(8, 16, 4, 8)) == PartitionSpec("tp", None, None, None)
        assert manager.resolve(axes, mode="__prefill__", shape=(6, 16, 4, 8)) == PartitionSpec(*(None,) * 4)
        assert qpaged.PartitionManager(tp(2), "x").resolve(axes, shape=(8, 1, 1, 1)) == PartitionSpec(
            *(None,) * 4
        )

    def test_without_a_mesh_nothing_is_divided(self):
        assert qpaged.PartitionManager().resolve(["__KV_HEAD__", "_"], shape=(8, 8)) == PartitionSpec(
            None, None
        )
