"""Caches over several devices in files: each device's part by itself, loaded onto other devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import normal
from support.caches import make_mesh
from support.long import first_short

import qpaged
from qpaged.cache import HeadSizes
from qpaged.storage import _shard_files

if not hasattr(jax, "shard_map"):
    pytest.skip("this JAX has no jax.shard_map", allow_module_level=True)
pytest.importorskip("safetensors")

KV_HEADS, HEAD_DIM, PAGES, PAGE_SIZE, TOKENS = 4, 32, 8, 8, 21
FORMATS = ["int8", None, "int4:token+rotate", "nvfp4", "int8:channel", "fp8_e4m3:head", "fp8_e4m3:tensor"]
EXACT = ["int4:token+rotate+exact9", "int4:channel+exact4+sink4"]
# From these devices to those.
MOVES = [
    ({"tp": 4}, {}),
    ({}, {"tp": 4}),
    ({"tp": 2}, {"tp": 8}),
    ({"tp": 8}, {"tp": 2}),
    ({"dp": 2, "tp": 2}, {"dp": 2, "tp": 4}),
    ({"dp": 2, "tp": 4}, {"dp": 2}),
    ({"fsdp": 2, "tp": 2}, {"tp": 4, "fsdp": 2}),
]
MOVES_OVER_CONTEXT = [
    ({"cp": 4}, {}),
    ({"cp": 4}, {"cp": 2, "tp": 2}),
    ({"dp": 2, "tp": 2}, {"dp": 2, "cp": 4}),
]
CASES = [(format, move) for format in FORMATS + EXACT for move in MOVES]
CASES += [(format, move) for format in FORMATS for move in MOVES_OVER_CONTEXT]


def mesh_of(axes, axis_type="Auto"):
    return make_mesh(tuple(axes.values()), tuple(axes), axis_type) if axes else None


def config(**changes):
    sizes = {
        "batch_size": 2, "num_hidden_layers": 2, "num_pages_per_layer": PAGES, "num_pages_per_sequence": 4,
        "max_sequences": 32, "page_size": PAGE_SIZE, "num_kv_heads": KV_HEADS, "kv_head_dim_size": HEAD_DIM,
        "hbm_utilization": 0.5,
    }  # fmt: skip
    return qpaged.PagedAttentionCacheMetaData(**sizes | changes)


def fresh(axes, format, flat=False, **changes):
    return qpaged.PagedAttentionCache.init_cache(
        mesh_of(axes), jnp.float32, config(**changes), quantizer=format, flat=flat
    )


@jax.jit
def write(view, step, key, value):
    return view.write_to_cache(key, value, step)


def filled(axes, format, **options):
    """Return a cache with a sequence in each group, and the groups' allocators."""
    cache, allocators = fresh(axes, format, **options), []
    for group in range(axes.get("dp", 1)):
        allocators.append(qpaged.PageAllocator(cache.metadata))
        allocators[-1].allocate("before", 8 * (group + 1))
        table = allocators[-1].allocate("a", TOKENS)
        allocators[-1].free("before")
        allocators[-1].take_changes()
        named = {"group": group} if "dp" in axes else {}
        step = qpaged.PagedAttentionMetadata.prefill(position=np.arange(TOKENS), page_table=table, **named)
        for layer in range(2):
            view = cache.layer(layer)
            sizes = view.metadata.num_kv_heads, view.metadata.kv_head_dim_size
            rows = (normal(TOKENS, *sizes, seed=100 * group + 10 * layer + side) for side in range(2))
            cache = cache.with_layer(write(view, step, *rows))
    return cache, allocators


def in_order(array, cache):
    """Return an array of a flat cache, whose devices each have all layers, as one device has it."""
    placement = cache.views[0].placement
    parts = placement.num_groups * placement.context_size if placement else 1
    return array.reshape(len(array), parts, 2, -1).swapaxes(1, 2)


def check_same(cache, saved, flat=False):
    """Raise AssertionError unless all arrays are the same, but for copies of heads."""
    for got, want in zip(*map(jax.tree_util.tree_leaves, (cache, saved)), strict=True):
        got, want = np.asarray(got), np.asarray(want)
        if got.ndim > 1:
            heads = max(len(got), len(want))
            got, want = (np.repeat(array, heads // len(array), axis=0) for array in (got, want))
        if flat:
            got, want = in_order(got, cache), in_order(want, saved)
        assert got.tobytes() == want.tobytes()


# A case of each move, of one format after another, and the others.
FIRST = [(format, move) for move, format in zip(MOVES, ["int8", *EXACT, *FORMATS[1:]], strict=False)]
FIRST += [(format, move) for move, format in zip(MOVES_OVER_CONTEXT, FORMATS[2:], strict=False)]


@pytest.mark.short(3)
@pytest.mark.parametrize(
    "case", first_short(len(FIRST), FIRST + [case for case in CASES if case not in FIRST])
)
def test_what_devices_hold_is_loaded_onto_others(case, tmp_path, monkeypatch):
    monkeypatch.setattr(_shard_files, "BATCH_BYTES", 4000)  # so that there are several files of a device
    format, (source, target) = case
    cache, allocators = filled(source, format)
    qpaged.save(tmp_path, cache, allocators)
    loaded, again = qpaged.load(tmp_path, mesh_of(target))
    check_same(loaded, cache)
    assert [each.page_table(["a"]).tolist() for each in again] == [
        each.page_table(["a"]).tolist() for each in allocators
    ]
    placement = loaded.views[0].placement
    assert (placement is None) == (not target)
    for leaf, like in zip(*map(jax.tree_util.tree_leaves, (loaded, fresh(target, format))), strict=True):
        assert leaf.sharding == like.sharding


def test_each_device_writes_what_no_other_does(tmp_path):
    cache, allocators = filled({"dp": 2, "tp": 4, "fsdp": 1}, "int8")
    qpaged.save(tmp_path, cache, allocators)
    codes = sum(view.key_pages.codes.nbytes + view.value_pages.codes.nbytes for view in cache.views)
    in_use = sum(int((each.page_table(["a"]) < PAGES).sum()) for each in allocators)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == 8
    # Scales and the files' headers come to the codes; a second copy of these would not fit.
    assert (
        codes * in_use / (2 * PAGES)
        < sum(file.stat().st_size for file in files)
        < 1.5 * codes * in_use / (2 * PAGES)
    )


@pytest.mark.short(1)
@pytest.mark.parametrize("move", [({"tp": 8}, {"tp": 2}), ({"tp": 2}, {}), ({"dp": 2, "cp": 2}, {"dp": 2})])
def test_flat_caches_and_layers_of_other_heads(move, tmp_path):
    source, target = move
    for number, options in enumerate(
        ({"flat": True}, {"layer_sizes": {1: HeadSizes(2, 64)}}, {"layer_sizes": {1: HeadSizes(3, 32)}})
    ):
        cache, allocators = filled(source, "int8:token", **options)
        qpaged.save(tmp_path / str(number), cache, allocators)
        loaded = qpaged.load(tmp_path / str(number), mesh_of(target)).cache
        check_same(loaded, cache, flat="flat" in options)


def test_pages_that_no_allocator_knows(tmp_path):
    cache, _ = filled({"dp": 2, "tp": 4}, "int8")
    qpaged.save(tmp_path, cache)
    loaded, allocators = qpaged.load(tmp_path, mesh_of({"dp": 2, "tp": 2}))
    check_same(loaded, cache)
    assert allocators is None


def test_explicit_meshes(tmp_path):
    cache, allocators = filled({"dp": 2, "tp": 4}, "int4:token+rotate+exact9")
    qpaged.save(tmp_path, cache, allocators)
    mesh = mesh_of({"dp": 2, "tp": 2}, "Explicit")
    with jax.set_mesh(mesh):
        loaded = qpaged.load(tmp_path, mesh).cache
        qpaged.save(tmp_path, loaded, allocators)
    check_same(qpaged.load(tmp_path, mesh_of({"dp": 2, "tp": 4})).cache, cache)


def test_groups_are_those_that_were_saved(tmp_path):
    cache, allocators = filled({"dp": 2}, "int8")
    with pytest.raises(
        ValueError, match="allocator must be one for each of the 2 groups of devices, but 1 came"
    ):
        qpaged.save(tmp_path, cache, allocators[0])
    with pytest.raises(TypeError, match=r"allocator must be a qpaged.PageAllocator, but got 'a'"):
        qpaged.save(tmp_path, cache, [allocators[0], "a"])
    qpaged.save(tmp_path, cache, allocators)
    for target in ({}, {"dp": 4}, {"tp": 2}):
        with pytest.raises(ValueError, match="mesh must divide sequences into the 2 groups that were saved"):
            qpaged.load(tmp_path, mesh_of(target))


def elsewhere(kind):
    """Return a function that puts an array where init_cache over four devices would not."""
    if kind == "host":
        return jax.device_get
    devices = np.array(jax.devices()[3::-1])
    spec = {"reversed": ("tp",), "everywhere": (), "pages": (None, "tp")}[kind]
    mesh = jax.sharding.Mesh(devices, ("tp",))
    return lambda leaf: jax.device_put(
        leaf, jax.NamedSharding(mesh, jax.P(*spec[: leaf.ndim]) if leaf.ndim > 1 else jax.P())
    )


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", ["reversed", "everywhere", "pages", "host"])
def test_arrays_that_their_caller_put_elsewhere_are_saved_as_they_are(kind, flat, tmp_path):
    cache, allocators = filled({"tp": 4}, "int8:token", flat=flat)
    moved = jax.tree_util.tree_map(elsewhere(kind), cache)
    qpaged.save(tmp_path, moved, allocators)
    for target in ({}, {"tp": 4}):
        check_same(qpaged.load(tmp_path, mesh_of(target)).cache, cache)


def test_groups_that_their_caller_put_elsewhere_are_not_saved(tmp_path):
    cache, allocators = filled({"dp": 2, "tp": 2}, "int8")
    cache = jax.tree_util.tree_map(jax.device_get, cache)
    with pytest.raises(ValueError, match="cache must lie as init_cache lays it over its mesh"):
        qpaged.save(tmp_path, cache, allocators)


def test_layers_over_different_devices(tmp_path):
    views = [fresh(axes, "int8").views[layer] for layer, axes in enumerate(({"tp": 2}, {"tp": 4}))]
    with pytest.raises(ValueError, match="cache must have all its layers over the same devices"):
        qpaged.save(tmp_path, qpaged.PagedAttentionCache(views))
