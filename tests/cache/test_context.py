"""One sequence over many devices, which share its pages: against one device, and at a million tokens."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import normal
from support.caches import make_mesh
from support.long import first_short

import qpaged

if not hasattr(jax, "shard_map"):
    pytest.skip("this JAX has no jax.shard_map", allow_module_level=True)

KV_HEADS, Q_HEADS, HEAD_DIM, PAGES, PAGE_SIZE = 2, 4, 32, 16, 8
TABLE = np.array([[9, 2, 15, 0, 7, 12], [3, 11, 6, PAGES, PAGES, PAGES]], np.int32)
FORMATS = ["int8", None, "int8:token", "int4:token+rotate", "nvfp4", "int8:channel"]
OPTIONS = {
    "plain": {},
    "window": {"sliding_window": 11},
    "cap and sinks": {"logits_soft_cap": 3.0, "sinks": normal(Q_HEADS, seed=7)},
    "prefix, window": {"visible_until": np.full(43, 20, np.int32), "sliding_window": 15},
    "prefix": {"visible_until": np.full(43, 20, np.int32)},
}
SHAPES = [{"cp": 8}, {"cp": 4, "tp": 2}, {"cp": 2, "tp": 4}]
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}  # float32 sums in other orders


def entered(mesh, axis_type):
    return jax.set_mesh(mesh) if axis_type == "Explicit" else contextlib.nullcontext()


def config(**changes):
    sizes = {
        "batch_size": 2, "num_hidden_layers": 2, "num_pages_per_layer": PAGES, "num_pages_per_sequence": 6,
        "max_sequences": 48, "page_size": PAGE_SIZE, "num_kv_heads": KV_HEADS, "kv_head_dim_size": HEAD_DIM,
        "hbm_utilization": 0.5,
    }  # fmt: skip
    return qpaged.PagedAttentionCacheMetaData(**sizes | changes)


STEPS = {
    "prefill": qpaged.PagedAttentionMetadata.prefill(position=np.arange(43), page_table=TABLE[0], length=41),
    "ragged": qpaged.PagedAttentionMetadata.ragged(
        position=np.concatenate([np.arange(17), np.arange(30, 43), [-1] * 13]),
        page_tables=TABLE[::-1], starts=[0, 17, 30],
    ),
}  # fmt: skip


@functools.partial(jax.jit, static_argnames=("sliding_window", "logits_soft_cap"))
def write_and_attend(view, step, query, key, value, **options):
    view = view.write_to_cache(key, value, step)
    return view, qpaged.paged_attention(query, view, step, return_lse=True, **options)


@jax.jit
def decode(view, query, key, value):
    step = qpaged.PagedAttentionMetadata.decode(position=[41, 17], page_table=TABLE)
    view = view.write_to_cache(key, value, step)
    out = qpaged.paged_attention(query, view, step, sliding_window=9)
    return view.reset_pages([2, PAGES, 11]), qpaged.paged_attention(query, view, step), out


CASES = [(kind, name, "Auto") for kind in STEPS for name in OPTIONS]
CASES += [(kind, "window", "Explicit") for kind in STEPS]


def rows(tokens, seed):
    return (
        normal(tokens, Q_HEADS, HEAD_DIM, seed=seed),
        normal(tokens, KV_HEADS, HEAD_DIM, seed=seed + 1),
        normal(tokens, KV_HEADS, HEAD_DIM, seed=seed + 2),
    )


def run(view, kind, name):
    view, attended = write_and_attend(view, STEPS[kind], *rows(43, 1), **OPTIONS[name])
    view, *decoded = decode(view, *rows(2, 9))
    return view, [*attended, *decoded]


@functools.cache
def alone(spelling, kind, name):
    view = qpaged.PagedAttentionCacheView.init(None, jnp.float32, config(), 0, None, spelling)
    return run(view, kind, name)


@pytest.mark.short(4)
@pytest.mark.parametrize(
    "shape", first_short(1, [{"cp": 8}, {"cp": 4, "tp": 2}, {"cp": 2, "tp": 4}]), ids=str
)
@pytest.mark.parametrize("spelling", first_short(2, FORMATS))
@pytest.mark.parametrize(("kind", "name", "axis_type"), CASES)
def test_it_holds_and_gives_what_one_device_does(kind, name, spelling, shape, axis_type):
    mesh = make_mesh(tuple(shape.values()), tuple(shape), axis_type)
    with entered(mesh, axis_type):
        view = qpaged.PagedAttentionCacheView.init(mesh, jnp.float32, config(), 0, None, spelling)
        shards = {leaf.addressable_shards[0].data.shape[1] for leaf in jax.tree_util.tree_leaves(view)}
        assert shards == {PAGES // shape["cp"]}
        view, outs = run(view, kind, name)
    want_view, want = alone(spelling, kind, name)
    for out, wanted in zip(outs, want, strict=True):
        np.testing.assert_allclose(out, wanted, **TOLERANCE)
    for leaf, wanted in zip(*map(jax.tree_util.tree_leaves, (view, want_view)), strict=True):
        copies = leaf.shape[0] // wanted.shape[0]
        assert np.asarray(leaf)[::copies].tobytes() == np.asarray(wanted).tobytes()


def test_only_what_is_attended_to_is_merged():
    mesh = make_mesh((8,), ("cp",), "Auto")
    view = qpaged.PagedAttentionCacheView.init(mesh, jnp.float32, config(), 0, None, "int8")
    text = write_and_attend.lower(view, STEPS["prefill"], *rows(43, 1)).compile().as_text()
    collectives = [line for line in text.splitlines() if " all-" in line and "(" in line.split(" all-")[1]]
    largest = 43 * Q_HEADS * HEAD_DIM
    assert collectives
    assert not [kind for kind in ("all-gather", "all-to-all", "collective-permute") if f" {kind}(" in text]
    for line in collectives:
        sizes = [part.split("]")[0] for part in line.split(" all-")[0].split("[")[1:]]
        counts = [int(np.prod([int(size) for size in part.split(",") if size])) for part in sizes if part]
        assert max(counts, default=1) <= largest


def test_groups_and_a_flat_cache_too():
    mesh = make_mesh((2, 4), ("dp", "cp"), "Auto")
    cache = qpaged.PagedAttentionCache.init_cache(mesh, jnp.float32, config(), quantizer="int8", flat=True)
    step = qpaged.PagedAttentionMetadata.prefill(
        position=np.arange(43), page_table=TABLE[0], length=41, group=1
    )
    view, (out, _) = write_and_attend(cache.layer(1), step, *rows(43, 1))
    _, want = alone("int8", "prefill", "plain")
    np.testing.assert_allclose(out, want[0], **TOLERANCE)
    assert cache.with_layer(view).is_flat


@pytest.mark.long
def test_a_million_tokens_over_eight_devices():
    """A decode step against float64, over pages that are spread over all devices."""
    tokens, page_size, chunk, head_dim = 2**20, 64, 2**16, 16
    pages = tokens // page_size
    mesh = make_mesh((8,), ("cp",), "Auto")
    metadata = config(
        num_pages_per_layer=pages, num_pages_per_sequence=pages, max_sequences=tokens, page_size=page_size,
        num_kv_heads=1, kv_head_dim_size=head_dim,
    )  # fmt: skip
    view = qpaged.PagedAttentionCacheView.init(mesh, jnp.float32, metadata, 0, None, "int8:token")
    table = np.random.default_rng(0).permutation(pages).astype(np.int32)
    rng = np.random.default_rng(1)
    key, value = rng.normal(size=(2, tokens, 1, head_dim)).astype(np.float32)

    @functools.partial(jax.jit, donate_argnums=0)
    def write(view, key, value, position):
        step = qpaged.PagedAttentionMetadata.prefill(position=position, page_table=table)
        return view.write_to_cache(key, value, step)

    for start in range(0, tokens, chunk):
        here = slice(start, start + chunk)
        view = write(view, key[here], value[here], np.arange(start, start + chunk, dtype=np.int32))
    query = 4 * rng.normal(size=(1, 2, head_dim)).astype(np.float32)
    step = qpaged.PagedAttentionMetadata.decode(position=[tokens - 1], page_table=table[None])
    out, lse = qpaged.paged_attention(query, view, step, return_lse=True)
    held = []
    for pool in (view.key_pages, view.value_pages):
        slots = np.asarray(pool.dequantize())[0][table].reshape(tokens, head_dim)
        held.append(slots.astype(np.float64))
    scores = query[0].astype(np.float64) @ held[0].T / head_dim**0.5
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    want = weights @ held[1] / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(out[0], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lse[0], np.log(weights.sum(axis=1)) + scores.max(axis=1), rtol=1e-5)


def test_what_would_go_between_devices_is_refused():
    mesh = make_mesh((4,), ("cp",), "Auto")

    def init(metadata, spelling):
        return qpaged.PagedAttentionCacheView.init(mesh, jnp.float32, metadata, 0, None, spelling)

    view = init(config(), "int8")
    query, key, value = rows(43, 1)
    for call, message in (
        (
            lambda: qpaged.paged_attention(query, view, STEPS["prefill"], new=(key, value)),
            "new must be None where devices share the pages of a sequence; write first",
        ),
        (
            lambda: qpaged.paged_attention(
                query, view, STEPS["prefill"], alibi_slopes=np.ones(4, np.float32)
            ),
            "alibi_slopes must be None where devices share the pages",
        ),
        (
            lambda: init(config(num_pages_per_layer=18), "int8"),
            "num_pages_per_layer must be a multiple of the 4 devices that share the pages .* came as 18",
        ),
        (
            lambda: init(config(), "int4+exact8"),
            r"quantizer must be one without exact pages where devices share .* int4\+exact8",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_memory_is_counted_for_pages_that_are_shared():
    def create(mesh):
        return qpaged.PagedAttentionCacheMetaData.create(
            mesh, 2, 2, 48, PAGE_SIZE, KV_HEADS, HEAD_DIM, 0.9, jnp.float32,
            quantizer="int8", memory_bytes=100_000,
        )  # fmt: skip

    assert (
        create(make_mesh((4,), ("cp",), "Auto")).num_pages_per_layer == 4 * create(None).num_pages_per_layer
    )


@pytest.mark.short(1)
@pytest.mark.parametrize("spelling", first_short(2, ["int8", None, "int8:token"]))
def test_an_allocators_changes_go_from_device_to_device(spelling):
    """A page is copied to one that another device has, and one to itself."""
    made = []
    for mesh in (None, make_mesh((4,), ("cp",), "Auto")):
        view = qpaged.PagedAttentionCacheView.init(mesh, jnp.float32, config(), 0, None, spelling)
        view, _ = write_and_attend(view, STEPS["prefill"], *rows(43, 1))
        copy = jax.jit(lambda view: view.copy_pages([9, 2, 15, PAGES, -1, 7], [3, 13, 12, 5, 6, 99]))
        view = copy(view)
        allocator = qpaged.PageAllocator(config())
        allocator.allocate("a", 20)
        made.append(qpaged.PagedAttentionCache([view]).apply_changes(allocator.take_changes()))
    for got, want in zip(*map(jax.tree_util.tree_leaves, made), strict=True):
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


@pytest.mark.short(1)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("spelling", first_short(2, ["int8:token", None, "nvfp4", "int4:token+rotate"]))
def test_pages_go_from_shared_ones_to_the_host_and_back(spelling, flat):
    def fresh(axes):
        mesh = make_mesh(tuple(axes.values()), tuple(axes), "Auto") if axes else None
        return qpaged.PagedAttentionCache.init_cache(
            mesh, jnp.float32, config(), quantizer=spelling, flat=flat
        )

    taken, wanted = [], np.array([7, 12, 9, PAGES, 2, 15], np.int32)
    for axes in ({}, {"cp": 4}, {"cp": 2, "tp": 4}):
        cache = fresh(axes)
        view, _ = write_and_attend(cache.layer(1), STEPS["prefill"], *rows(43, 1))
        taken.append(jax.device_get(jax.jit(lambda cache: cache.take_pages(wanted))(cache.with_layer(view))))
    held = [0, 1, 2, 4, 5]
    for cache in taken[1:]:
        put = [
            jax.jit(lambda cache, pages: cache.put_pages([1, 14, 3, PAGES, 8, 6], pages))(fresh({}), pages)
            for pages in (taken[0], cache)
        ]
        for got, want in zip(*map(jax.tree_util.tree_leaves, put), strict=True):
            assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
    there = np.array([11, 0, 4, PAGES, 13, 5], np.int32)
    for axes in ({"cp": 8}, {"cp": 4, "tp": 2}):
        cache = fresh(axes).put_pages(there, taken[0])
        again = jax.device_get(cache.take_pages(there))
        for got, want in zip(*map(jax.tree_util.tree_leaves, (again, taken[0])), strict=True):
            if want.ndim > 1:
                got, want = (
                    array.reshape(len(array), -1, len(there), *array.shape[2:])[:, :, held]
                    for array in (got, want)
                )
            assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_what_is_no_page_leaves_static_scales_as_they_are():
    view = qpaged.PagedAttentionCacheView.init(
        make_mesh((4,), ("cp",), "Auto"), jnp.float32, config(), 0, None, "fp8_e4m3:tensor"
    )
    taken = [view.take_pages([page]).key_pages.scales for page in (3, PAGES)]
    assert [scales.tolist() for scales in taken] == [view.key_pages.scales.tolist()] * 2


@pytest.mark.parametrize("axes", [{"cp": 4}, {"tp": 2}])
def test_pages_of_one_layer_of_a_flat_cache_are_taken(axes):
    def taken(mesh):
        cache = qpaged.PagedAttentionCache.init_cache(
            mesh, jnp.float32, config(), quantizer="int8:token", flat=True
        )
        view, _ = write_and_attend(cache.layer(1), STEPS["prefill"], *rows(43, 1))
        return jax.device_get(view.take_pages([7, 12, 9]))

    made = taken(make_mesh(tuple(axes.values()), tuple(axes), "Auto")), taken(None)
    for got, want in zip(*map(jax.tree_util.tree_leaves, made), strict=True):
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_rows_of_no_sequence_see_nothing_and_no_sink():
    mesh = make_mesh((4,), ("cp",), "Auto")
    outs = []
    for place in (mesh, None):
        view = qpaged.PagedAttentionCacheView.init(place, jnp.float32, config(), 0, None, "int8")
        step = STEPS["ragged"].replace(ragged_position=np.arange(43, dtype=np.int32))  # padding, too
        _, attended = write_and_attend(
            view, step, *rows(43, 1), sinks=np.array([0, np.nan, 1, 2], np.float32)
        )
        outs.append(attended)
    for got, want in zip(*outs, strict=True):
        np.testing.assert_allclose(got, want, **TOLERANCE)
    assert np.isneginf(outs[0][1][30:]).all()


def test_empty_tables_and_derivatives():
    mesh = make_mesh((4,), ("cp",), "Auto")
    view = qpaged.PagedAttentionCacheView.init(mesh, jnp.float32, config(), 0, None, None)
    view, _ = write_and_attend(view, STEPS["prefill"], *rows(43, 1))
    query = rows(2, 3)[0]
    nothing = qpaged.PagedAttentionMetadata.decode(position=[0, 1], page_table=np.zeros((2, 0), np.int32))
    assert not qpaged.paged_attention(query, view, nothing).any()
    step = qpaged.PagedAttentionMetadata.decode(position=[40, 3], page_table=TABLE)
    alone, _ = write_and_attend(
        qpaged.PagedAttentionCacheView.init(None, jnp.float32, config(), 0), STEPS["prefill"], *rows(43, 1)
    )

    def loss(query, view):
        return qpaged.paged_attention(query, view, step, backend="reference").sum()

    gradients = [jax.jit(jax.grad(loss))(query, each) for each in (view, alone)]
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-5)


def test_pages_of_each_layer_divide():
    mesh = make_mesh((2,), ("cp",), "Auto")
    with pytest.raises(ValueError, match="num_pages_per_layer must be a multiple of the 2 devices"):
        qpaged.PagedAttentionCache.init_cache(
            mesh, jnp.float32, config(num_pages_per_layer=9), quantizer="int8", flat=True
        )


def test_backends_say_what_runs():
    mesh = make_mesh((4,), ("cp",), "Auto")
    view = qpaged.PagedAttentionCacheView.init(mesh, jnp.float32, config(), 0, None, "int8")
    step = qpaged.PagedAttentionMetadata.decode(position=[40, 3], page_table=TABLE)
    query = rows(2, 3)[0]
    plain = {each.name: each.reason for each in qpaged.attention_backends(query, view, step)}
    within = {
        each.name: each.reason for each in qpaged.attention_backends(query, view, step, sliding_window=9)
    }
    assert plain["cpu"] is None or not qpaged.attention_backends()[2].available
    assert within["cpu"] is not None and within["xla"] is None
