"""Flat caches: all layers in one pool, one after the other, against caches with a pool for each layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import normal
from support.caches import bits
from support.long import first_short

import qpaged
from qpaged import pools

LAYERS, PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM = 3, 12, 8, 2, 32
TABLE = np.array([[7, 3, 9, 1], [5, 11, 0, PAGES]], np.int32)
FORMATS = [
    "int8",
    "int4:token+rotate+exact9",
    None,
    "int8:channel/int4:token",
    "nvfp4",
    "int3:channel",
    "raw",
]


def config(**changes):
    sizes = {
        "batch_size": 2, "num_hidden_layers": LAYERS, "num_pages_per_layer": PAGES,
        "num_pages_per_sequence": 4, "max_sequences": 32, "page_size": PAGE_SIZE, "num_kv_heads": KV_HEADS,
        "kv_head_dim_size": HEAD_DIM, "hbm_utilization": 0.5,
    }  # fmt: skip
    return qpaged.PagedAttentionCacheMetaData(**sizes | changes)


def cache_of(spelling, flat, metadata=None):
    metadata = config() if metadata is None else metadata
    return qpaged.PagedAttentionCache.init_cache(None, jnp.float32, metadata, quantizer=spelling, flat=flat)


def prompt(count=19):
    return qpaged.PagedAttentionMetadata.prefill(position=np.arange(count), page_table=TABLE[0])


def decode(position):
    return qpaged.PagedAttentionMetadata.decode(position=position, page_table=TABLE)


STEPS = [prompt(), decode([19, -1]), decode([20, 3]), decode([-1, 40])]  # past the table, too
CHANGES = [
    lambda cache: cache.copy_pages([7, 3, PAGES, 5], [2, 4, 6, -1]),
    lambda cache: cache.reset_pages([9, PAGES, -1, 2]),
    lambda cache: cache.pack_pages([1, PAGES, 3], [4, 4, 8]),
    lambda cache: cache.put_pages([6, PAGES, 8], cache.take_pages([3, 1, PAGES], 2)),
]


def rows(count, layer, step):
    return [normal(count, KV_HEADS, HEAD_DIM, seed=100 * step + 10 * layer + side) for side in (1, 2)]


@functools.partial(jax.jit, static_argnums=2)
def layer_step(view, index, number):
    """Return a view after a step's rows, and the attention of its queries."""
    step = STEPS[number]
    count = sum(len(tokens.position) for tokens in step.steps())
    of_layers = [rows(count, layer, number) for layer in range(LAYERS)]
    key, value = (jnp.stack(each)[index] for each in zip(*of_layers, strict=True))
    query = normal(count, 4, HEAD_DIM, seed=number)
    view = view.write_to_cache(key, value, step)
    return view, qpaged.paged_attention(query, view, step)


def run_layers(cache):
    outs = []
    for number in range(len(STEPS)):
        of_step = []
        for layer in range(LAYERS):
            view, out = layer_step(cache.layer(layer), layer, number)
            cache = cache.with_layer(view)
            of_step.append(out)
        outs.append(jnp.stack(of_step))
    return cache, outs


def scan_layers(cache):
    outs = []
    for number in range(len(STEPS)):

        def block(cache, layer, number=number):
            view, out = layer_step(cache.layer(layer), layer, number)
            return cache.with_layer(view), out

        cache, of_step = jax.lax.scan(block, cache, jnp.arange(LAYERS))
        outs.append(of_step)
    return cache, outs


def all_slots(cache):
    """Return what every layer holds, [layers, side, kv_heads, slots, head_dim]."""
    pages = jnp.arange(PAGES, dtype=jnp.int32)
    held = []
    for layer in range(LAYERS):
        view = cache.layer(layer)
        for pool in (view.key_pages, view.value_pages):
            slots = pools.gather_slots(pool, pages)
            held.append(np.asarray(qpaged.arrays.to_float32(slots)))
    return np.stack(held)


@pytest.mark.short(1)
@pytest.mark.parametrize("run", [scan_layers, run_layers])
@pytest.mark.parametrize("spelling", first_short(2, FORMATS))
def test_it_holds_and_gives_what_pools_of_layers_do(spelling, run):
    apart, outs_apart = run_layers(cache_of(spelling, flat=False))
    flat, outs = run(cache_of(spelling, flat=True))
    np.testing.assert_array_equal(all_slots(flat), all_slots(apart))
    for out, want in zip(outs, outs_apart, strict=True):
        np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
    for change in CHANGES:
        apart, flat = change(apart), change(flat)
        np.testing.assert_array_equal(all_slots(flat), all_slots(apart))


def test_a_layer_that_is_not_there_has_no_pages():
    cache = cache_of("int8", flat=True)

    @jax.jit
    def write(cache, layer):
        view, out = layer_step(cache.layer(layer), 0, 0)
        return cache.with_layer(view), out

    for layer in (-1, LAYERS):
        written, out = write(cache, layer)
        assert bits(written) == bits(cache)
        assert not out.any()


@pytest.mark.parametrize("spelling", ["int8", "int4+exact9", None])
def test_bytes_are_those_of_pools_of_layers(spelling):
    assert cache_of(spelling, flat=True).nbytes == cache_of(spelling, flat=False).nbytes


def scan_memory(spelling, pages):
    """Return the temporary bytes, and the aliased, of a decode step in a scan over layers."""
    cache = cache_of(spelling, True, config(num_pages_per_layer=pages))

    def step(cache):
        def block(cache, layer):
            view, out = layer_step(cache.layer(layer), layer, 2)
            return cache.with_layer(view), out

        return jax.lax.scan(block, cache, jnp.arange(LAYERS))

    memory = jax.jit(step, donate_argnums=0).lower(cache).compile().memory_analysis()
    return memory.temp_size_in_bytes, memory.alias_size_in_bytes / cache.nbytes


@pytest.mark.parametrize("spelling", first_short(1, ["int8:token", "int4+exact9", "raw"]))
def test_a_scan_carries_it_without_a_copy(spelling):
    small, large = scan_memory(spelling, 64), scan_memory(spelling, 1024)
    assert large[0] <= small[0]
    assert large[1] > 0.98


@pytest.mark.long
def test_an_allocators_changes_go_to_every_layer():
    apart, flat = cache_of("int4+exact9", False), cache_of("int4+exact9", True)
    allocator = qpaged.PageAllocator(config())
    allocator.allocate("a", 19)
    allocator.fork("a", "b")
    allocator.extend(["b"], [20])
    changes = allocator.take_changes()
    apart, _ = run_layers(apart)
    flat, _ = run_layers(flat)
    np.testing.assert_array_equal(
        all_slots(flat.apply_changes(changes)), all_slots(apart.apply_changes(changes))
    )


def test_it_is_saved_and_loaded_as_it_is(tmp_path):
    pytest.importorskip("safetensors")
    flat, _ = run_layers(cache_of("int4:token+exact9", True))
    qpaged.save(tmp_path / "cache", flat)
    loaded = qpaged.load(tmp_path / "cache").cache
    assert loaded.is_flat
    np.testing.assert_array_equal(all_slots(loaded), all_slots(flat))
    with pytest.raises(ValueError, match=r"cache must have a pool for each layer, .* flat=False"):
        qpaged.PrefixStore(tmp_path / "store").put(flat, {})


def test_what_cannot_lie_in_one_pool_is_refused():
    with pytest.raises(ValueError, match="flat must be False for layers of several formats or head sizes"):
        cache_of(qpaged.CacheFormat.of("int8").with_layers({1: "int4"}), True)
    with pytest.raises(ValueError, match="flat must be False for layers of several formats or head sizes"):
        cache_of("int8", True, config(layer_sizes={1: qpaged.HeadSizes(1, 64)}))
    with pytest.raises(ValueError, match="flat must be False for formats with static scales"):
        cache_of("fp8_e4m3:tensor", True)
    with pytest.raises(
        ValueError, match="flat must be False for 3 layers of 1,000,000,000 pages, which int32"
    ):
        cache_of("int8", True, config(num_pages_per_layer=10**9))


def test_the_view_of_all_layers_is_neither_written_nor_read():
    cache = cache_of("int8", flat=True)
    [view] = cache.views
    assert repr(view).startswith("PagedAttentionCacheView(all layers, ")
    assert repr(cache).startswith("PagedAttentionCache(3 layers, 37,008 bytes\n    all layers in one pool: ")
    key, value = rows(19, 0, 0)
    for use in (
        lambda: view.write_to_cache(key, value, prompt()),
        lambda: qpaged.paged_attention(normal(19, 4, HEAD_DIM), view, prompt()),
    ):
        with pytest.raises(ValueError, match=r"view must be of one layer .* give cache.layer\(i\)"):
            use()
    with pytest.raises(ValueError, match="a record is of one layer, but this view is of a flat cache"):
        cache.to_dict()


def test_layers_are_named_by_their_numbers():
    flat, apart = cache_of("int8", True), cache_of("int8", False)
    for cache in (flat, apart):
        with pytest.raises(ValueError, match=r"layer_index must be one of the 3 layers, .* came as 3"):
            cache.layer(3)
    with pytest.raises(ValueError, match=r"index must be known .* flat=True"):
        jax.jit(lambda layer: apart.layer(layer))(1)
    with pytest.raises(ValueError, match=r"view must be of a layer of this flat cache, but is a .*layer 1"):
        flat.with_layer(apart.layer(1))
    with pytest.raises(TypeError, match=r"view must be a qpaged.PagedAttentionCacheView, but got None; give"):
        flat.with_layer(None)
    assert flat.with_layer_leaves() is flat


def test_pages_go_from_layer_to_layer_and_not_to_other_numbers_of_layers():
    flat, _ = run_layers(cache_of("int8:token", True))
    taken = flat.layer(1).take_pages(TABLE[0])
    put = flat.with_layer(flat.layer(0).put_pages([2, 4, 6, 8], taken))
    held = all_slots(put)
    np.testing.assert_array_equal(
        held[0].reshape(KV_HEADS, PAGES, -1)[:, [2, 4, 6, 8]],
        held[2].reshape(KV_HEADS, PAGES, -1)[:, TABLE[0]],
    )
    other = cache_of("int8:token", True, config(num_hidden_layers=2))
    with pytest.raises(ValueError, match="taken must be pages of the same kind"):
        flat.put_pages([1], other.take_pages([1]))
    with pytest.raises(ValueError, match="view must be of a layer of this flat cache"):
        flat.with_layer(other.layer(1))
