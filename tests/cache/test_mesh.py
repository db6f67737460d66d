"""Calls that divide themselves over devices: heads over one mesh axis, sequences over another.

Eight devices are compared with one device for each group of sequences: the same bits in its pages, and the
same attention to float32 rounding. Compiled programs are read: nothing goes between devices.
"""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.arrays import normal
from support.caches import make_mesh
from support.long import first_short

import qpaged

if not hasattr(jax, "shard_map"):
    pytest.skip("this JAX has no jax.shard_map", allow_module_level=True)

KV_HEADS, Q_HEADS, HEAD_DIM, PAGES, PAGE_SIZE, SEQUENCES = 4, 8, 32, 12, 8, 2
FORMATS = ["int8", "int4:token+rotate+exact9", None, "int8:token", "int4", "nvfp4", "int8+rotate"]
MESHES = [(1, 8), (2, 4), (4, 2), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]
COLLECTIVES = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
NO_PAGE = PAGES


def mesh_of(groups, shards, axis_type):
    return make_mesh((groups, shards), ("dp", "tp"), axis_type)


def entered(mesh, axis_type):
    return jax.set_mesh(mesh) if axis_type == "Explicit" else contextlib.nullcontext()


def config(**changes):
    sizes = {
        "batch_size": SEQUENCES, "num_hidden_layers": 2, "num_pages_per_layer": PAGES,
        "num_pages_per_sequence": 4, "max_sequences": 32, "page_size": PAGE_SIZE, "num_kv_heads": KV_HEADS,
        "kv_head_dim_size": HEAD_DIM, "hbm_utilization": 0.5,
    }  # fmt: skip
    return qpaged.PagedAttentionCacheMetaData(**sizes | changes)


@functools.cache
def tables(group):
    """Return the page tables of a group's sequences, [sequences, 4]."""
    order = np.random.default_rng(group).permutation(PAGES)
    return np.array([[*order[:3], NO_PAGE], [*order[3:5], NO_PAGE, NO_PAGE]], np.int32)


def rows_of(tokens, seed):
    """Return a query, keys and values."""
    return (
        normal(tokens, Q_HEADS, HEAD_DIM, seed=seed),
        normal(tokens, KV_HEADS, HEAD_DIM, seed=seed + 1),
        normal(tokens, KV_HEADS, HEAD_DIM, seed=seed + 2),
    )


def ragged_of(groups):
    """Return a batch with a chunk and a decode in each group, one group after the other."""
    position = np.concatenate([[11, 12, 13, 14, 15 - group, -1] for group in groups])
    page_tables = np.concatenate([tables(group) for group in groups])
    starts = np.array([[0, 4, 5]] * len(groups))
    return qpaged.PagedAttentionMetadata.ragged(
        position=position, page_tables=page_tables, starts=starts if len(groups) > 1 else starts[0]
    )


def decode_of(groups):
    return qpaged.PagedAttentionMetadata.decode(
        position=np.concatenate([[15, -1] for _ in groups]),
        page_table=np.concatenate([tables(group) for group in groups]),
    )


def prefill_of(group, named):
    options = {"group": group} if named else {}
    return qpaged.PagedAttentionMetadata.prefill(
        position=np.arange(13), page_table=tables(group)[0], length=11, **options
    )


@functools.partial(jax.jit, static_argnames=("window",))
def write_and_attend(view, step, query, key, value, window=None):
    view = view.write_to_cache(key, value, step)
    return view, qpaged.paged_attention(query, view, step, sliding_window=window, return_lse=True)


@jax.jit
def attend_new(view, step, query, key, value, sinks):
    return qpaged.paged_attention(query, view, step, new=(key, value), sinks=sinks)


@jax.jit
def move_pages(view, source, target, cleared):
    return view.copy_pages(source, target).reset_pages(cleared)


def run(view, groups, named):
    """Return a view after steps of every kind, copies and resets, and what was attended to."""
    outs = []
    for group in groups:
        view, (out, lse) = write_and_attend(view, prefill_of(group, named), *rows_of(13, 100 * group))
        outs.append(("prefill", group, out, lse))
    for name, step, count in (("ragged", ragged_of(groups), 6), ("decode", decode_of(groups), SEQUENCES)):
        per_group = [rows_of(count, 100 * group + 10) for group in groups]
        query, key, value = (jnp.concatenate(parts) for parts in zip(*per_group, strict=True))
        sinks = normal(Q_HEADS, seed=3)
        new = np.asarray(attend_new(view, step, query, key, value, sinks))
        view, attended = write_and_attend(view, step, query, key, value, window=7)
        out, lse = map(np.asarray, attended)
        for place, group in enumerate(groups):
            own = slice(place * count, (place + 1) * count)
            outs.append((name, group, out[own], lse[own]))
            outs.append((f"{name}, new", group, new[own], np.zeros(count)))
    source = np.concatenate([tables(group)[0, :2] for group in groups])
    target = np.concatenate([[tables(group)[1, 1], NO_PAGE] for group in groups])
    view = move_pages(view, source, target, np.concatenate([[tables(group)[0, 0]] for group in groups]))
    return view, outs


@functools.cache
def alone(spelling, group):
    view = qpaged.PagedAttentionCacheView.init(None, jnp.float32, config(), 0, None, spelling)
    return run(view, [group], named=False)


def leaves_of_group(view, group, groups):
    """Return the arrays of a mesh's view that are of a group, each head once, NumPy."""
    found = []
    for leaf in jax.tree_util.tree_leaves((view.key_pages, view.value_pages)):
        array = np.asarray(leaf)
        axis = 0 if array.ndim == 1 else 1
        array = np.split(array, groups, axis=axis)[group]
        copies = array.shape[0] // KV_HEADS if array.ndim > 1 else 1
        found.append(array[::copies] if copies > 1 else array)
    return found


@pytest.mark.short(1)
@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
@pytest.mark.parametrize("shape", first_short(3, MESHES))
@pytest.mark.parametrize("spelling", first_short(2, FORMATS))
def test_pages_and_attention_are_those_of_one_device(spelling, shape, axis_type):
    groups, mesh = shape[0], mesh_of(*shape, axis_type)
    with entered(mesh, axis_type):
        view = qpaged.PagedAttentionCacheView.init(mesh, jnp.float32, config(), 0, None, spelling)
        view, outs = run(view, range(groups), named=True)
    for group in range(groups):
        want, _ = alone(spelling, group)
        expected = [
            np.asarray(leaf) for leaf in jax.tree_util.tree_leaves((want.key_pages, want.value_pages))
        ]
        for got, leaf in zip(leaves_of_group(view, group, groups), expected, strict=True):
            assert got.tobytes() == leaf.tobytes()
    wanted = {
        (name, group): (out, lse)
        for group in range(groups)
        for name, _, out, lse in alone(spelling, group)[1]
    }
    for name, group, out, lse in outs:
        np.testing.assert_allclose(out, wanted[name, group][0], **TOLERANCE, err_msg=f"{name} {group}")
        np.testing.assert_allclose(lse, wanted[name, group][1], **TOLERANCE, err_msg=f"{name} {group}")


def compiled_text(function, view, *arguments):
    return jax.jit(function, donate_argnums=0).lower(view, *arguments).compile().as_text()


@pytest.mark.short(1)
@pytest.mark.parametrize("axis_type", first_short(1, ["Auto", "Explicit"]))
@pytest.mark.parametrize("shape", first_short(2, [(2, 4), (1, 8), (4, 2)]))
@pytest.mark.parametrize("spelling", first_short(2, FORMATS))
def test_nothing_goes_between_devices(spelling, shape, axis_type):
    (groups, shards), mesh = shape, mesh_of(*shape, axis_type)
    with entered(mesh, axis_type):
        view = qpaged.PagedAttentionCacheView.init(mesh, jnp.float32, config(), 0, None, spelling)
        heads = PartitionSpec("dp", "tp")
        for step, count in ((decode_of(range(groups)), SEQUENCES), (ragged_of(range(groups)), 6)):
            rows = rows_of(count * groups, 1)
            if shards <= KV_HEADS:
                rows = [jax.device_put(row, NamedSharding(mesh, heads)) for row in rows]

            def write_and_attend(view, step, query, key, value):
                view = view.write_to_cache(key, value, step)
                return view, qpaged.paged_attention(query, view, step)

            assert not COLLECTIVES.findall(compiled_text(write_and_attend, view, step, *rows))
        pages = np.zeros(2 * groups, np.int32)

        def change(view, pages, others):
            view = view.copy_pages(pages, others).pack_pages(pages, pages)
            return view.put_pages(others, view.take_pages(pages)).reset_pages(pages)

        assert not COLLECTIVES.findall(compiled_text(change, view, pages, pages + 1))


def test_a_prefill_sums_its_output_over_groups_and_nothing_else():
    mesh = mesh_of(2, 4, "Auto")
    view = qpaged.PagedAttentionCacheView.init(mesh, jnp.float32, config(), 0, None, "int8")
    text = compiled_text(
        lambda view, step, query: qpaged.paged_attention(query, view, step),
        view, prefill_of(1, True), rows_of(13, 1)[0],
    )  # fmt: skip
    sums = [line for line in text.splitlines() if re.search(r"= \S+ all-reduce", line)]
    assert sums and all(f"f32[13,{Q_HEADS // 4},{HEAD_DIM}]" in line for line in sums)
    assert not COLLECTIVES.findall(text.replace("all-reduce", ""))


@pytest.mark.parametrize(("groups", "shards"), [(2, 4), (1, 8), (4, 1)])
@pytest.mark.parametrize("spelling", first_short(2, ["int8", "int4:token+rotate+exact9", None]))
def test_each_device_holds_what_is_planned(spelling, groups, shards):
    mesh = mesh_of(groups, shards, "Auto")
    metadata = qpaged.PagedAttentionCacheMetaData.create(
        mesh=mesh, batch_size=SEQUENCES, num_hidden_layers=2, max_sequences=32, page_size=PAGE_SIZE,
        num_kv_heads=KV_HEADS, kv_head_dim_size=HEAD_DIM, hbm_utilization=0.999, dtype=jnp.float32,
        quantizer=spelling, memory_bytes=200_000,
    )  # fmt: skip
    held = dict.fromkeys(mesh.devices.flat, 0)
    more = dict(held)
    for counts, pages in ((held, metadata.num_pages_per_layer), (more, metadata.num_pages_per_layer + 1)):
        cache = qpaged.PagedAttentionCache.init_cache(
            mesh, jnp.float32, metadata.replace(num_pages_per_layer=pages), quantizer=spelling
        )
        for leaf in jax.tree_util.tree_leaves(cache):
            for shard in leaf.addressable_shards:
                counts[shard.device] += shard.data.nbytes
    assert len(set(held.values())) == 1
    assert max(held.values()) <= int(200_000 * 0.999) < min(more.values())


@pytest.mark.short(1)
@pytest.mark.parametrize("manual", [("tp",), ("dp",), ("dp", "tp")])
def test_within_the_callers_own_shard_map_only_other_axes_are_divided(manual):
    mesh = mesh_of(2, 4, "Auto")
    view = qpaged.PagedAttentionCacheView.init(mesh, jnp.float32, config(), 0, None, "int8:token")
    step, (query, key, value) = decode_of(range(2)), rows_of(2 * SEQUENCES, 1)
    want_view, (want, _) = write_and_attend(view, step, query, key, value)

    def spec(*axes):
        return PartitionSpec(*(axis if axis in manual else None for axis in axes))

    def body(view, step, query, key, value):
        view = view.write_to_cache(key, value, step)
        return view, qpaged.paged_attention(query, view, step)

    of_pools = jax.tree_util.tree_map(lambda leaf: spec("tp", "dp"), view)
    of_step = jax.tree_util.tree_map(lambda leaf: spec("dp") if jnp.ndim(leaf) else spec(), step)
    of_rows = spec("dp", "tp")
    call = jax.jit(
        jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(of_pools, of_step, of_rows, of_rows, of_rows),
            out_specs=(of_pools, of_rows),
            axis_names=set(manual),
        )
    )
    got_view, out = call(view, step, query, key, value)
    np.testing.assert_allclose(out, want, **TOLERANCE)
    for got, leaf in zip(*map(jax.tree_util.tree_leaves, (got_view, want_view)), strict=True):
        assert np.asarray(got).tobytes() == np.asarray(leaf).tobytes()


def test_a_flat_cache_divides_itself_too():
    mesh = mesh_of(2, 4, "Auto")
    step, (query, key, value) = decode_of(range(2)), rows_of(2 * SEQUENCES, 1)

    def scan(cache):
        def block(cache, layer):
            view = cache.layer(layer).write_to_cache(key, value, step)
            return cache.with_layer(view), qpaged.paged_attention(query, view, step)

        return jax.lax.scan(block, cache, jnp.arange(2))

    make = functools.partial(
        qpaged.PagedAttentionCache.init_cache, dtype=jnp.float32, metadata=config(), quantizer="int8"
    )
    flat, outs = jax.jit(scan)(make(mesh, flat=True))
    apart = make(mesh)
    want = []
    for layer in range(2):
        view, (out, _) = write_and_attend(apart.layer(layer), step, query, key, value)
        apart = apart.with_layer(view)
        want.append(out)
    np.testing.assert_allclose(outs, jnp.stack(want), **TOLERANCE)
    assert flat.nbytes == apart.nbytes


def test_batches_that_do_not_divide_are_refused():
    mesh = mesh_of(2, 4, "Auto")
    view = qpaged.PagedAttentionCacheView.init(mesh, jnp.float32, config(), 0, None, "int8")
    odd = qpaged.PagedAttentionMetadata.decode(position=[15, -1, 3], page_table=np.stack([tables(0)[0]] * 3))
    with pytest.raises(ValueError, match=r"decodes_position must have as many rows for each of the 2 groups"):
        view.write_to_cache(*rows_of(3, 1)[1:], odd)
    with pytest.raises(ValueError, match=r"ragged_starts must have a line for each of the 2 groups .* has 1"):
        view.write_to_cache(*rows_of(6, 1)[1:], ragged_of([0]))
    with pytest.raises(ValueError, match=r"ragged_starts must have a line for each of the 1 groups .* has 2"):
        alone("int8", 0)[0].write_to_cache(*rows_of(12, 1)[1:], ragged_of([0, 1]))
    with pytest.raises(ValueError, match=r"pages must be as many for each of the 2 groups .* but are 3"):
        view.reset_pages([1, 2, 3])
    with pytest.raises(ValueError, match="starts must have one entry more"):
        qpaged.PagedAttentionMetadata.ragged(
            position=np.zeros(4, int), page_tables=np.zeros((3, 2), int), starts=[[0, 1], [0, 1]]
        )


@pytest.mark.short(1)
@pytest.mark.parametrize("spelling", first_short(2, ["int8:token", "int4:token+rotate+exact9", None]))
def test_pages_go_from_a_mesh_to_the_host_and_to_others(spelling):
    shapes = [(1, 4), None, (1, 8)]
    meshes = [mesh_of(*shape, "Auto") if shape else None for shape in shapes]
    views = [
        qpaged.PagedAttentionCacheView.init(mesh, jnp.float32, config(), 0, None, spelling) for mesh in meshes
    ]
    first, _ = run(views[0], [0], named=False)
    pages = tables(0)[0]
    taken = jax.device_get(first.take_pages(pages))
    query = rows_of(13, 5)[0]
    want = qpaged.paged_attention(query, first, prefill_of(0, False))
    for view in views[1:]:
        there = np.array([8, 0, 3, NO_PAGE])
        put = view.put_pages(there, taken)
        taken = jax.device_get(put.take_pages(there))  # from there to the next
        step = prefill_of(0, False).replace(prefill_page_table=there)
        np.testing.assert_allclose(qpaged.paged_attention(query, put, step), want, **TOLERANCE)


def test_changes_of_groups_are_those_of_each():
    mesh = mesh_of(2, 4, "Auto")
    cache = qpaged.PagedAttentionCache.init_cache(mesh, jnp.float32, config(), quantizer="int8")
    books = [qpaged.PageAllocator(config()) for _ in range(2)]
    books[0].allocate("a", 30)
    books[1].allocate("b", 3)
    books[1].fork("b", "c")
    for book in books:
        book.take_changes()
    books[1].extend(["c"], [4])
    changes = qpaged.PageChanges.of_groups([book.take_changes() for book in books], NO_PAGE)
    assert len(changes.source) == 2 * 8 and (changes.source[:8] == NO_PAGE).all()
    assert changes.target[8] == books[1].page_table(["c"])[0, 0]
    source = int(changes.source[8])
    step = qpaged.PagedAttentionMetadata.prefill(position=np.arange(3), page_table=[source], group=1)
    view, _ = write_and_attend(cache.layer(0), step, *rows_of(3, 1))
    cache = cache.with_layer(view).apply_changes(changes)
    there = step.replace(prefill_page_table=np.array([changes.target[8]]))
    query = rows_of(3, 1)[0]
    np.testing.assert_allclose(
        qpaged.paged_attention(query, cache.layer(0), there),
        qpaged.paged_attention(query, view, step),
        **TOLERANCE,
    )
    empty = qpaged.PageChanges.of_groups([book.take_changes() for book in books], NO_PAGE)
    assert not empty and cache.apply_changes(empty) is not None


def test_a_view_may_be_closed_over_and_have_no_rows():
    mesh = mesh_of(2, 4, "Auto")
    view = qpaged.PagedAttentionCacheView.init(mesh, jnp.float32, config(), 0, None, "int8")
    step, (query, key, value) = decode_of(range(2)), rows_of(2 * SEQUENCES, 1)
    view, (want, _) = write_and_attend(view, step, query, key, value)
    out = jax.jit(lambda query: qpaged.paged_attention(query, view, step))(query)
    np.testing.assert_allclose(out, want, **TOLERANCE)
    none = qpaged.PagedAttentionMetadata.decode(position=np.zeros(0, int), page_table=np.zeros((0, 4), int))
    assert qpaged.paged_attention(query[:0], view, none).shape == (0, Q_HEADS, HEAD_DIM)


def test_a_prefill_of_no_group_is_of_nobody():
    views = [
        qpaged.PagedAttentionCacheView.init(mesh, jnp.float32, config(), 0, None, "int8")
        for mesh in (mesh_of(2, 4, "Auto"), None)
    ]
    for view in views:
        step = prefill_of(0, False).replace(prefill_group=np.int32(7))
        after, (out, lse) = write_and_attend(view, step, *rows_of(13, 1))
        assert not out.any() and np.isneginf(lse).all()
        for got, want in zip(*map(jax.tree_util.tree_leaves, (after, view)), strict=True):
            assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


@pytest.mark.short(1)
@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_a_prefill_and_a_decode_in_one_step(axis_type):
    mesh = mesh_of(2, 2, axis_type)
    decodes = decode_of(range(2))
    both = prefill_of(0, True).replace(
        decodes_position=decodes.decodes_position, decodes_page_table=decodes.decodes_page_table
    )
    rows = rows_of(13 + 2 * SEQUENCES, 1)
    with entered(mesh, axis_type):
        view = qpaged.PagedAttentionCacheView.init(mesh, jnp.float32, config(), 0, None, "int8")
        _, (out, _) = write_and_attend(view, both, *rows)
    out = np.asarray(out)
    alone = qpaged.PagedAttentionCacheView.init(None, jnp.float32, config(), 0, None, "int8")
    _, (want, _) = write_and_attend(
        alone, both.replace(decodes_position=np.array([15, -1]), decodes_page_table=tables(0)),
        *(row[:15] for row in rows),
    )  # fmt: skip
    np.testing.assert_allclose(out[:15], want, **TOLERANCE)


def test_changes_of_one_group_say_nothing_of_another():
    """A page that one group packs has the number of one that the other copies."""
    mesh = mesh_of(2, 1, "Auto")
    spelling = "int4:token+exact4"
    pages = {"source": [[6], [5]], "target": [[9], [7]], "pack": [[5], [NO_PAGE]], "reset": [[NO_PAGE]] * 2}

    def changes(group):
        return qpaged.PageChanges(**{name: np.array(each[group], np.int32) for name, each in pages.items()})

    def written(view, step, count):
        view, _ = write_and_attend(view, step, *rows_of(count, 1))
        return qpaged.PagedAttentionCache([view])

    def decode(groups):
        table = np.array([[6, NO_PAGE], [5, NO_PAGE]], np.int32)
        return qpaged.PagedAttentionMetadata.decode(
            position=np.tile([3, 2], groups), page_table=np.tile(table, (groups, 1))
        )

    config_of = config(num_hidden_layers=1)
    alone = written(
        qpaged.PagedAttentionCacheView.init(None, jnp.float32, config_of, 0, None, spelling), decode(1), 2
    ).apply_changes(changes(0))
    both = qpaged.PageChanges.of_groups([changes(0), changes(1)], NO_PAGE)
    view = qpaged.PagedAttentionCacheView.init(mesh, jnp.float32, config_of, 0, None, spelling)
    view, _ = write_and_attend(view, decode(2), *(jnp.tile(row, (2, 1, 1)) for row in rows_of(2, 1)))
    divided = qpaged.PagedAttentionCache([view]).apply_changes(both)
    want = [np.asarray(leaf) for leaf in jax.tree_util.tree_leaves(alone)]
    for got, leaf in zip(leaves_of_group(divided.views[0], 0, 2), want, strict=True):
        assert got.tobytes() == leaf.tobytes()


def test_a_store_takes_pages_of_one_group(tmp_path):
    pytest.importorskip("safetensors")
    cache = qpaged.PagedAttentionCache.init_cache(
        mesh_of(2, 4, "Auto"), jnp.float32, config(), quantizer="int8"
    )
    store = qpaged.PrefixStore(tmp_path)
    for call in (lambda: store.put(cache, {b"x" * 32: 1}), lambda: store.get(cache, [b"x" * 32], [1])):
        with pytest.raises(ValueError, match="cache must have all its pages in one group"):
            call()
