"""What create plans is what init_cache allocates, to the byte, on every device."""

import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from support.caches import CACHES, SOME, make_mesh, narrow_floats_allowed

import qpaged
import qpaged.cache._budget as budget

LAYERS, HEADS, PAGE_SIZE, HEAD_DIM = 2, 4, 4, 32
FLOAT32_PAGE = 2 * LAYERS * PAGE_SIZE * HEADS * HEAD_DIM * 4


def create(mesh=None, quantizer=None, memory_bytes=None, manager=None, **changes):
    arguments = {
        "batch_size": 2,
        "num_hidden_layers": LAYERS,
        "max_sequences": 16,
        "page_size": PAGE_SIZE,
        "num_kv_heads": HEADS,
        "kv_head_dim_size": HEAD_DIM,
        "hbm_utilization": 0.5,
        "dtype": jnp.float32,
    }
    return qpaged.PagedAttentionCacheMetaData.create(
        mesh,
        **(arguments | changes),
        quantizer=quantizer,
        memory_bytes=memory_bytes,
        partition_manager=manager,
    )


def allocated(metadata, mesh=None, quantizer=None, manager=None, dtype=jnp.float32):
    """Bytes on each device that holds any."""
    with narrow_floats_allowed():
        cache = qpaged.PagedAttentionCache.init_cache(mesh, dtype, metadata, manager, quantizer)
    held = {}
    for leaf in jax.tree_util.tree_leaves(cache):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return held


def beside_pages(metadata, mesh=None, quantizer=None, manager=None, dtype=jnp.float32):
    """Bytes on the first device that no page takes: those of static scales."""
    with narrow_floats_allowed():
        cache = qpaged.PagedAttentionCache.init_cache(mesh, dtype, metadata, manager, quantizer)
    leaves = jax.tree_util.tree_leaves(cache)
    shared = [leaf for leaf in leaves if leaf.shape[1] == 1 != metadata.num_pages_per_layer]
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in shared)


def fills(mesh, quantizer, memory_bytes, manager=None, dtype=jnp.float32, unit=1):
    """The cache fits into half the memory of each device, and ``unit`` pages more would not."""
    metadata = create(mesh, quantizer, memory_bytes, manager, dtype=dtype)
    held = allocated(metadata, mesh, quantizer, manager, dtype)
    assert set(held) == set(jax.devices()[:1] if mesh is None else mesh.devices.flat)
    (each,) = set(held.values())
    assert each <= memory_bytes // 2
    pages = metadata.num_pages_per_layer
    of_pages = each - beside_pages(metadata, mesh, quantizer, manager, dtype)
    assert of_pages % pages == 0 or unit > 1
    assert each + unit * of_pages // pages > memory_bytes // 2
    return metadata, each


class Split:
    """A partition manager with one answer."""

    def __init__(self, *spec):
        self.spec = PartitionSpec(*spec)

    def resolve(self, axes, mode="", shape=()):
        assert list(axes) == ["__KV_HEAD__", "_", "_", "_"]
        assert mode == "__prefill__"
        assert len(shape) == 4
        return self.spec


@pytest.mark.parametrize("quantizer", CACHES)
def test_without_a_mesh(quantizer):
    fills(None, quantizer, 100_003)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("quantizer", SOME)
def test_other_dtypes(quantizer, dtype):
    fills(None, quantizer, 50_001, dtype=dtype)


@pytest.mark.parametrize("quantizer", CACHES)
def test_the_page_that_just_fits(quantizer):
    metadata = create(None, quantizer, 100_003)
    beside = beside_pages(metadata, None, quantizer)
    page = sum(allocated(metadata, None, quantizer).values()) - beside
    page //= metadata.num_pages_per_layer
    assert create(None, quantizer, 2 * (page * 7 + beside)).num_pages_per_layer == 7
    assert create(None, quantizer, 2 * (page * 7 + beside) - 2).num_pages_per_layer == 6
    assert create(None, quantizer, 2 * (page + beside)).num_pages_per_layer == 1
    others = f", and static scales {beside}" if beside else ""
    room = page + beside - 1
    with pytest.raises(
        ValueError, match=f"takes {page:,} bytes on a device{others}, but the cache may take {room:,};"
    ):
        create(None, quantizer, 2 * (page + beside) - 2)


def needs_axis_types(axis_type):
    if not hasattr(jax.sharding, "AxisType"):
        if axis_type == "Explicit":
            pytest.skip("this JAX has no axis types")
        return
    return


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("quantizer", ["raw", "int8", "int8:token", None])
def test_heads_over_tp(quantizer, devices, axis_type):
    needs_axis_types(axis_type)
    mesh = make_mesh((devices,), ("tp",), axis_type)
    metadata, each = fills(mesh, quantizer, 50_001)
    alone = create(None, quantizer, devices * 50_001)
    assert abs(alone.num_pages_per_layer - metadata.num_pages_per_layer) <= 1
    assert each * devices == sum(allocated(metadata, None, quantizer).values())


@pytest.mark.parametrize("quantizer", CACHES)
def test_every_format_over_tp(quantizer):
    fills(make_mesh((2,), ("tp",)), quantizer, 20_001)


@pytest.mark.parametrize("quantizer", SOME)
def test_replicas_hold_everything(quantizer):
    mesh = make_mesh((4,), ("dp",))
    metadata, each = fills(mesh, quantizer, 50_001)
    assert metadata.num_pages_per_layer == create(None, quantizer, 50_001).num_pages_per_layer
    assert each == sum(allocated(metadata, None, quantizer).values())


@pytest.mark.parametrize("quantizer", SOME)
def test_replicas_of_shards(quantizer):
    metadata, _ = fills(make_mesh((2, 2), ("dp", "tp")), quantizer, 50_001)
    alone = create(make_mesh((2,), ("tp",)), quantizer, 50_001)
    assert metadata.num_pages_per_layer == alone.num_pages_per_layer


@pytest.mark.parametrize("quantizer", SOME)
def test_heads_that_do_not_divide_are_replicated(quantizer):
    mesh = make_mesh((3,), ("tp",))  # 4 heads
    metadata, each = fills(mesh, quantizer, 50_001)
    assert each == sum(allocated(metadata, None, quantizer).values())


@pytest.mark.parametrize("quantizer", SOME)
def test_head_dim_over_devices(quantizer):
    fills(make_mesh((4,), ("x",)), quantizer, 50_001, Split(None, None, None, "x"))


@pytest.mark.parametrize("quantizer", SOME)
@pytest.mark.parametrize("memory_bytes", [52_345, 61_234])
def test_pages_over_devices(quantizer, memory_bytes):
    """The pages planned are a number that the devices can share."""
    mesh, manager = make_mesh((4,), ("x",)), Split(None, "x")
    metadata, _ = fills(mesh, quantizer, memory_bytes, manager, unit=4)
    assert metadata.num_pages_per_layer % 4 == 0


class SplitWhatDivides:
    """Pages over the mesh where they divide, and else nothing."""

    def resolve(self, axes, mode="", shape=()):
        return PartitionSpec(None, "x" if shape[1] % 4 == 0 else None)


@pytest.mark.parametrize("memory_bytes", [52_345, 61_234])
def test_a_manager_that_answers_by_shape(memory_bytes):
    mesh, manager = make_mesh((4,), ("x",)), SplitWhatDivides()
    metadata = create(mesh, "int8", memory_bytes, manager)
    assert max(allocated(metadata, mesh, "int8", manager).values()) <= memory_bytes // 2


def test_keys_values_and_layers_of_different_formats():
    format = qpaged.CacheFormat.of("int8:channel/int8:token").with_layers({1: "raw/plain"})
    fills(None, format, 50_001)
    fills(make_mesh((2,), ("tp",)), format, 50_001)


def test_a_callable_is_asked_for_its_bytes():
    def halved(zeros):
        return zeros[..., ::2].astype(jnp.int8)

    metadata, each = fills(None, halved, 50_001)
    assert each == metadata.num_pages_per_layer * FLOAT32_PAGE // 8


def test_the_budget_is_filled_whatever_is_needed():
    metadata = create(memory_bytes=100 * FLOAT32_PAGE, max_sequences=1, batch_size=1)
    assert metadata.num_pages_per_layer == 50
    assert metadata.num_pages_per_sequence == 1


def test_more_pages_than_int32_can_index():
    metadata = create(None, None, 2**60, page_size=1, num_kv_heads=1, kv_head_dim_size=1, num_hidden_layers=1)
    assert metadata.num_pages_per_layer == 2**31 - 2


def test_counts_that_overflow_int32_bytes_do_not():
    metadata = create(None, "int8", 2**45, num_kv_heads=128, kv_head_dim_size=1024, page_size=4096)
    page = 2 * LAYERS * 128 * (4096 * 1024 + 1)
    assert metadata.num_pages_per_layer == 2**44 // page


@pytest.mark.parametrize("memory_bytes", [0, -5, 1, 2 * FLOAT32_PAGE - 2])
def test_not_one_page_fits(memory_bytes):
    room = max(memory_bytes // 2, 0) if memory_bytes != 1 else 0
    message = (
        f"one page of 2 layers takes {FLOAT32_PAGE:,} bytes on a device, but the cache may take {room:,}; "
        "raise memory_bytes or hbm_utilization, choose a smaller page_size or format"
    )
    with pytest.raises(ValueError, match=message):
        create(memory_bytes=memory_bytes)


# Devices that report their memory are stood in for, and a mesh is only asked for its devices.


class Device:
    device_kind = "stand-in"
    platform = "stand-in"

    def __init__(self, stats, process_index=0):
        self.stats, self.process_index = stats, process_index

    def memory_stats(self):
        if self.process_index != jax.process_index():
            raise ValueError("MemoryStats is only supported for addressable devices.")
        return self.stats


def room(*devices, utilization=0.5, memory_bytes=None):
    mesh = types.SimpleNamespace(devices=np.array(devices, object), local_devices=[
        device for device in devices if device.process_index == jax.process_index()
    ])  # fmt: skip
    return budget.available_bytes(mesh, devices[0], utilization, memory_bytes)


def reporting(limit, used=0, **more):
    return {"bytes_limit": limit, "bytes_in_use": used} | more


def test_what_the_device_reports(monkeypatch):
    device = Device(reporting(20 * FLOAT32_PAGE, 3 * FLOAT32_PAGE))
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    assert create().num_pages_per_layer == 7  # half of 20, less the 3 in use
    device.stats = reporting(99 * FLOAT32_PAGE, 3 * FLOAT32_PAGE, bytes_reservable_limit=20 * FLOAT32_PAGE)
    assert create().num_pages_per_layer == 7


def test_memory_bytes_go_before_what_the_device_reports(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: [Device(reporting(10**12))])
    assert create(memory_bytes=20 * FLOAT32_PAGE).num_pages_per_layer == 10


def test_what_is_in_use_may_leave_no_room(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: [Device(reporting(10**6, 10**6))])
    with pytest.raises(ValueError, match="but the cache may take 0; raise memory_bytes"):
        create()


def test_the_fullest_device_decides():
    assert room(Device(reporting(1000, 100)), Device(reporting(1000, 300)), Device(reporting(1000))) == 200


def test_a_mesh_of_several_processes_needs_memory_bytes():
    """Each process would make a cache of another size."""
    devices = [Device(None, process_index=1), Device(reporting(1000, 100))]
    with pytest.raises(ValueError, match="memory_bytes must be given for a mesh of several processes"):
        room(*devices)
    assert room(*devices, memory_bytes=1000) == 500


@pytest.mark.parametrize("stats", [None, {}])
def test_the_hosts_memory_is_shared_and_said_so(monkeypatch, stats):
    monkeypatch.setattr(budget, "_free_host_bytes", lambda: 8_000_000)
    with pytest.warns(
        qpaged.HostMemoryWarning,
        match=r"takes 50% of 2,000,000 bytes, each device's share .* Pass memory_bytes=",
    ):
        assert room(*[Device(stats)] * 4) == 1_000_000


def test_a_device_that_reports_beside_one_that_does_not(monkeypatch):
    monkeypatch.setattr(budget, "_free_host_bytes", lambda: 8_000_000)
    with pytest.warns(qpaged.HostMemoryWarning, match="4,000,000 bytes"):
        assert room(Device(reporting(10**9)), Device(None)) == 2_000_000


def test_devices_that_do_not_say_their_limit(monkeypatch):
    monkeypatch.setattr(budget, "_free_host_bytes", lambda: 8_000_000)
    with pytest.warns(qpaged.HostMemoryWarning, match="8,000,000 bytes"):
        assert room(Device({"bytes_in_use": 5})) == 4_000_000


def test_the_warning_points_at_the_caller(monkeypatch):
    monkeypatch.setattr(budget, "_free_host_bytes", lambda: 8_000_000)
    with pytest.warns(qpaged.HostMemoryWarning) as caught:
        qpaged.PagedAttentionCacheMetaData.create(None, 2, 2, 16, 4, 2, 8, 0.5)
    assert caught[0].filename == __file__


def test_nothing_is_said_where_memory_is_given():
    create(memory_bytes=10**6)  # warnings are errors here


def test_a_host_that_does_not_report_either(monkeypatch):
    monkeypatch.setattr(os, "sysconf_names", {})
    with pytest.raises(ValueError, match="memory_bytes must be given here"):
        create()


def test_the_hosts_free_memory():
    free = budget._free_host_bytes()
    assert 0 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_the_default_device_is_the_one_asked(monkeypatch):
    asked = []
    found = budget.available_bytes

    def available_bytes(mesh, device, *rest):
        asked.append(device)
        return found(mesh, device, *rest)

    monkeypatch.setattr("qpaged.cache._config.available_bytes", available_bytes)
    with jax.default_device(jax.devices()[3]):
        metadata = create(memory_bytes=10**5)
        assert set(allocated(metadata)) == {jax.devices()[3]}
    assert asked == [jax.devices()[3]]


def test_a_mesh_of_one_device_is_that_device():
    mesh = Mesh(np.array(jax.devices()[2:3]), ("tp",))
    assert set(allocated(create(mesh, memory_bytes=10**5), mesh)) == {jax.devices()[2]}


@pytest.mark.parametrize("layers", [10_001, 10**12])
def test_more_layers_than_any_model_has_are_refused_at_once(layers):
    text = f"num_hidden_layers must be at most 10,000, but came as {layers:,}"
    with pytest.raises(ValueError, match=text):
        qpaged.PagedAttentionCacheMetaData.create(None, 2, layers, 64, 16, 2, 32, 0.9)
