"""PageAllocator: forks, rewinds, windows, prefixes, swaps, and what they ask of a cache."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.caches import config

import qpaged

PAGES, PAGE_SIZE, SEQUENCE_PAGES = 8, 4, 5
METADATA = config(num_pages_per_layer=PAGES, num_pages_per_sequence=SEQUENCE_PAGES, page_size=PAGE_SIZE)


@pytest.fixture
def allocator():
    return qpaged.PageAllocator(METADATA)


def pages_of(allocator, sequence):
    table = allocator.page_table([sequence])[0]
    return table[table < PAGES].tolist()


def pairs(changes):
    return [
        (s, t) for s, t in zip(changes.source.tolist(), changes.target.tolist(), strict=True) if t < PAGES
    ]


def named(pages):
    return sorted(page for page in pages.tolist() if page < PAGES)


def test_the_changes_of_a_new_sequence(allocator):
    pages = allocator.allocate("a", 6)
    changes = allocator.take_changes()
    assert changes
    assert named(changes.reset) == sorted(pages)
    assert pairs(changes) == named(changes.pack) == []
    assert {array.dtype for array in jax.tree_util.tree_leaves(changes)} == {np.dtype(np.int32)}
    assert {len(array) for array in jax.tree_util.tree_leaves(changes)} == {8}
    assert not allocator.take_changes()


def test_extend_updates_a_table_that_is_kept(allocator):
    allocator.allocate("a", 3)
    allocator.allocate("b", 4)
    names = ["a", None, "b"]
    table = jnp.asarray(allocator.page_table(names))
    updates = allocator.extend(names, [9, 0, 5])
    table = table.at[updates.row, updates.column].set(updates.page, mode="drop")
    assert (table == allocator.page_table(names)).all()
    assert len(updates.row) == 8
    nothing = allocator.extend(names, [9, 0, 5])
    assert [len(part) for part in nothing] == [0, 0, 0]


def test_extend_of_a_batch_is_all_or_nothing(allocator):
    allocator.allocate("a", 1)
    allocator.allocate("b", 1)
    with pytest.raises(
        qpaged.AllocationError, match=r"2 sequences need 8 more pages for 40 tokens, but 6 are free"
    ):
        allocator.extend(["a", "b"], [20, 20])
    assert len(pages_of(allocator, "a")) == 1
    assert allocator.num_free == 6


def test_what_extend_refuses(allocator):
    allocator.allocate("a", 1)
    with pytest.raises(
        qpaged.AllocationError, match=r"sequences must be different ones, but 'a' comes twice"
    ):
        allocator.extend(["a", "a"], [2, 2])
    with pytest.raises(qpaged.AllocationError, match=r"sequence 'b' holds no pages; allocate it"):
        allocator.extend(["b"], [2])
    with pytest.raises(ValueError, match=r"lengths must have shape \(1,\), one for each sequence"):
        allocator.extend(["a"], [2, 3])
    with pytest.raises(TypeError, match=r"lengths must be integers"):
        allocator.extend(["a"], [2.0])
    with pytest.raises(ValueError, match=r"lengths must be numbers of tokens, but got -1"):
        allocator.extend(["a"], [-1])
    with pytest.raises(TypeError, match=r"sequences must be a list"):
        allocator.extend("a", [1])


def test_the_first_of_two_that_writes_gets_a_copy(allocator):
    allocator.allocate("a", 6)
    allocator.take_changes()
    allocator.fork("a", "b")
    shared = pages_of(allocator, "a")
    assert pages_of(allocator, "b") == shared
    assert allocator.counts().shared == 2
    updates = allocator.extend(["a", "b"], [7, 7])
    a, b = pages_of(allocator, "a"), pages_of(allocator, "b")
    assert a[0] == b[0] == shared[0]
    assert b[1] == shared[1] != a[1]
    assert (updates.row[0], updates.column[0], updates.page[0]) == (0, 1, a[1])
    assert pairs(allocator.take_changes()) == [(shared[1], a[1])]
    allocator.extend(["a", "b"], [8, 8])
    assert not allocator.take_changes()


def test_a_fork_at_the_end_of_a_page_copies_nothing(allocator):
    allocator.allocate("a", 8)
    allocator.take_changes()
    allocator.fork("a", "b")
    allocator.extend(["a", "b"], [9, 9])
    changes = allocator.take_changes()
    assert pairs(changes) == []
    assert len(named(changes.reset)) == 2


def test_a_fork_of_the_first_tokens(allocator):
    allocator.allocate("a", 12)
    allocator.fork("a", "b", length=5)
    assert allocator.length("b") == 5
    assert pages_of(allocator, "b") == pages_of(allocator, "a")[:2]
    freed = allocator.free("a")
    assert len(freed) == 1
    assert len(allocator.free("b")) == 2
    assert allocator.num_free == PAGES


def test_copies_of_copies_read_what_was_there(allocator):
    allocator.allocate("a", 5)
    allocator.take_changes()
    original = pages_of(allocator, "a")[1]
    allocator.fork("a", "b")
    allocator.extend(["b"], [6])
    allocator.fork("b", "c")
    allocator.extend(["c"], [7])
    copies = [pages_of(allocator, name)[1] for name in "bc"]
    assert pairs(allocator.take_changes()) == [(original, page) for page in copies]


def test_a_copy_of_a_page_that_nothing_was_written_to_is_fresh(allocator):
    allocator.allocate("a", 5)
    allocator.fork("a", "b")
    allocator.extend(["b"], [6])
    changes = allocator.take_changes()
    assert pairs(changes) == []
    assert named(changes.reset) == sorted({*pages_of(allocator, "a"), *pages_of(allocator, "b")})


def test_a_page_that_is_freed_and_given_out_again_is_reset_and_not_packed(allocator):
    allocator.allocate("a", 4)
    allocator.take_changes()
    (page,) = allocator.free("a")
    assert allocator.allocate("b", 4) == [page]
    changes = allocator.take_changes()
    assert named(changes.reset) == [page]
    assert named(changes.pack) == []
    allocator.free("b")
    assert named(allocator.take_changes().pack) == [page]


def test_truncate_takes_back_what_drafts_had(allocator):
    allocator.allocate("a", 12)
    pages = pages_of(allocator, "a")
    assert allocator.truncate("a", 5) == pages[2:]
    assert allocator.length("a") == 5
    with pytest.raises(
        qpaged.AllocationError, match=r"at most the 5 tokens of sequence 'a', but got 6; extend"
    ):
        allocator.truncate("a", 6)
    with pytest.raises(ValueError, match=r"length must be a number of tokens, but got -1"):
        allocator.truncate("a", -1)


def test_pages_that_a_window_has_left(allocator):
    allocator.allocate("a", 14)
    pages = pages_of(allocator, "a")
    table = allocator.page_table([None, "a"])
    updates = allocator.release_prefix([None, "a"], [0, 9])
    table[updates.row[:2], updates.column[:2]] = updates.page[:2]
    assert (table == allocator.page_table([None, "a"])).all()
    assert pages_of(allocator, "a") == pages[2:]
    assert len(allocator.release_prefix(["a"], [9]).row) == 0
    for call in (lambda: allocator.truncate("a", 7), lambda: allocator.fork("a", "b", 7)):
        with pytest.raises(qpaged.AllocationError, match=r"at least the 8 tokens that sequence 'a' has rele"):
            call()
    allocator.fork("a", "b", 9)
    allocator.free("a")
    assert allocator.num_free == PAGES - 1


def test_a_prefix_is_found_up_to_the_last_full_page(allocator):
    prompt = list(range(11))
    assert allocator.match_prefix("a", prompt) == 0
    allocator.extend(["a"], [11])
    stored = allocator.share_prefix("a", prompt)
    assert list(stored.values()) == pages_of(allocator, "a")[:2]
    assert list(stored) == allocator.prefix_hashes(prompt)
    assert all(len(page_hash) >= 16 for page_hash in stored)
    assert allocator.match_prefix("b", prompt) == 8
    assert pages_of(allocator, "b") == pages_of(allocator, "a")[:2]
    assert allocator.match_prefix("c", prompt[:8]) == 4  # a token is left to go on from
    assert allocator.match_prefix("d", [*prompt[:4], 99, *prompt[5:]]) == 4
    assert allocator.match_prefix("e", prompt[4:]) == 0
    counts = allocator.counts()
    assert (counts.looked_up, counts.matched) == (11 + 11 + 8 + 11 + 7, 16)
    assert counts.hit_rate == 16 / 48


def test_prefixes_go_by_their_salt(allocator):
    prompt = np.arange(9)
    allocator.match_prefix("a", prompt, salt="adapter 1")
    allocator.extend(["a"], [9])
    allocator.share_prefix("a", prompt)
    assert allocator.match_prefix("b", prompt) == 0
    assert allocator.match_prefix("c", prompt, salt="adapter 2") == 0
    assert allocator.match_prefix("d", prompt, salt="adapter 1") == 8


def test_hashes_tell_caches_apart():
    def hashes(salt="", **changes):
        return qpaged.PageAllocator(config(**changes), salt).prefix_hashes(range(4))

    different = [
        hashes(),
        hashes("model"),
        hashes(quantizer="int8"),
        hashes(quantizer="int4"),
        hashes(num_kv_heads=1),
        hashes(dtype="float32"),
    ]
    assert len({tuple(each) for each in different}) == len(different)
    assert hashes() == hashes(num_pages_per_layer=99, batch_size=7)


def test_freed_prefixes_are_parked_and_the_oldest_is_evicted(allocator):
    prompts = {name: [number] * 8 for number, name in enumerate("ab")}
    for name, prompt in prompts.items():
        allocator.match_prefix(name, prompt)
        allocator.extend([name], [8])
        allocator.share_prefix(name, prompt)
    allocator.take_changes()
    pages = {name: pages_of(allocator, name) for name in "ab"}
    assert allocator.free("a") == allocator.free("b") == []
    counts = allocator.counts()
    assert (counts.free, counts.parked, counts.held) == (4, 4, 0)
    assert allocator.num_free == PAGES
    assert named(allocator.take_changes().pack) == sorted(pages["a"] + pages["b"])
    assert allocator.match_prefix("again", [*prompts["b"], 7]) == 8
    allocator.allocate("c", 20)  # five pages, of which four are free
    changes = allocator.take_changes()
    hashes = allocator.prefix_hashes(prompts["a"])
    assert changes.evicted == {hashes[1]: pages["a"][1]}  # the last page, which the first does not need
    assert allocator.match_prefix("found", prompts["a"]) == 4
    with pytest.raises(qpaged.AllocationError, match=r"needs 1 more pages for 4 tokens, but 0 are free"):
        allocator.allocate("d", 4)


def test_a_shared_page_that_is_written_again_is_no_longer_found(allocator):
    prompt = list(range(8))
    allocator.allocate("a", 8)
    _, second = allocator.share_prefix("a", prompt)
    allocator.truncate("a", 6)
    allocator.extend(["a"], [7])
    changes = allocator.take_changes()
    assert changes  # though there is nothing to do to the cache
    assert changes.evicted == {second: pages_of(allocator, "a")[1]}
    allocator.extend(["a"], [8])
    assert list(allocator.share_prefix("a", prompt)) == [second]
    assert allocator.take_changes().evicted == {}
    assert allocator.match_prefix("b", [*prompt, 0]) == 8


def test_two_that_computed_the_same_prefix(allocator):
    prompt = list(range(8))
    for name in "ab":
        allocator.allocate(name, 8)
    assert len(allocator.share_prefix("a", prompt)) == 2
    assert allocator.share_prefix("b", prompt) == {}
    assert len(allocator.free("b")) == 2


def test_what_prefixes_refuse(allocator):
    with pytest.raises(TypeError, match=r"tokens must be integers below 2\*\*63, but got \[0.5\]"):
        allocator.match_prefix("a", [0.5])
    with pytest.raises(ValueError, match=r"tokens must have shape \(n,\), but came with shape \(1, 2\)"):
        allocator.match_prefix("a", [[1, 2]])
    with pytest.raises(TypeError, match=r"salt must be a string, but got 3"):
        allocator.match_prefix("a", [1], salt=3)
    with pytest.raises(qpaged.AllocationError, match=r"at most 20 tokens, but got 21"):
        allocator.match_prefix("a", range(21))
    allocator.match_prefix("a", [])
    with pytest.raises(qpaged.AllocationError, match=r"sequence 'a' holds pages already; free it"):
        allocator.match_prefix("a", [1])
    with pytest.raises(qpaged.AllocationError, match=r"at most the 0 tokens of sequence 'a', but got 2"):
        allocator.share_prefix("a", [1, 2])


def test_a_swap_moves_what_a_sequence_alone_holds(allocator):
    allocator.allocate("a", 8)
    allocator.fork("a", "b")
    allocator.extend(["b"], [12])
    own = pages_of(allocator, "b")[2:]
    pages = allocator.swap_out("b")
    assert named(pages) == own
    assert len(pages) == 8
    assert allocator.counts().pinned == 1
    with pytest.raises(qpaged.AllocationError, match=r"sequence 'b' is swapped out; swap_in brings it back"):
        allocator.page_table(["b"])
    allocator.allocate("c", 20)
    with pytest.raises(qpaged.AllocationError, match=r"sequence 'b' needs 1 more pages to be swapped in"):
        allocator.swap_in("b")
    assert allocator.release(pages) == own
    with pytest.raises(qpaged.AllocationError, match=rf"but \[{own[0]}\] are not swapped out"):
        allocator.release(pages)
    back = allocator.swap_in("b")
    assert len(back) == len(pages)
    assert pages_of(allocator, "b")[2:] == named(back)
    with pytest.raises(qpaged.AllocationError, match=r"sequence 'b' is not swapped out; swap_in goes with"):
        allocator.swap_in("b")


def test_a_sequence_that_is_swapped_out_keeps_what_it_shares(allocator):
    allocator.allocate("a", 8)
    allocator.fork("a", "b")
    pages = allocator.swap_out("b")
    assert named(pages) == []
    assert allocator.free("a") == []
    assert allocator.swap_in("b").tolist() == [PAGES] * 8
    assert len(allocator.free("b")) == 2


def test_pages_that_are_swapped_in_are_put_before_anything_else(allocator):
    allocator.allocate("a", 6)
    allocator.release(allocator.swap_out("a"))
    allocator.swap_in("a")
    allocator.fork("a", "b")
    before = allocator.counts()
    with pytest.raises(qpaged.AllocationError, match=r"'a' was swapped in, and its pages are not there"):
        allocator.extend(["a", "b"], [7, 7])
    assert allocator.counts() == before
    allocator.take_changes()
    allocator.extend(["a", "b"], [7, 7])


def test_odd_arguments(allocator):
    with pytest.raises(TypeError, match=r"pages must be integers, but got \[0.7\]; give what"):
        allocator.release([0.7])
    with pytest.raises(TypeError, match=r"pages must be integers, but got \[True\]"):
        allocator.release([True])
    with pytest.raises(TypeError, match=r"tokens must be integers below 2\*\*63"):
        allocator.prefix_hashes(np.asarray([2**63, 1, 1, 1], np.uint64))
    assert allocator.prefix_hashes([2**63 - 1, -1, 1, 1]) != allocator.prefix_hashes([0, -1, 1, 1])


def test_names_may_be_objects():
    allocator = qpaged.PageAllocator(METADATA)
    name = object()
    allocator.allocate(name, 5)
    for copied in (copy.copy(allocator), copy.deepcopy(allocator), copy.deepcopy([allocator])[0]):
        assert pages_of(copied, name) == pages_of(allocator, name)
        copied.free(name)
    assert allocator.length(name) == 5


def test_what_is_parked_makes_room_for_exact_copies():
    """In one call: a copy of an exact page is exact, though all places are taken by others."""
    config_of_two = config(
        batch_size=2, num_pages_per_layer=8, num_pages_per_sequence=4, page_size=4, num_hidden_layers=1
    )
    view = qpaged.PagedAttentionCacheView.init(None, jnp.float32, config_of_two, 0, None, "int8:token+exact4")
    allocator = qpaged.PageAllocator(config_of_two)
    shape = (5, config_of_two.num_kv_heads, config_of_two.kv_head_dim_size)
    for name in "ab":
        allocator.allocate(name, 5)
        view = view.apply_changes(allocator.take_changes())
        step = qpaged.PagedAttentionMetadata.prefill(
            position=np.arange(5), page_table=allocator.page_table([name])[0]
        )
        rows = jax.random.normal(jax.random.key(0), shape)
        view = view.write_prefill_to_cache(rows, rows, step)
    exact = qpaged.pools.is_exact(view.key_pages, jnp.arange(8))
    assert exact.sum() == 4  # all that there is room for
    allocator.share_prefix("b", range(4))
    allocator.free("b")
    allocator.fork("a", "c")
    allocator.extend(["a"], [6])
    view = view.apply_changes(allocator.take_changes())
    table = allocator.page_table(["a", "c"])[:, :2]
    assert np.asarray(qpaged.pools.is_exact(view.key_pages, jnp.asarray(table))).all()


def test_a_copy_takes_over_forks_prefixes_and_swaps(allocator):
    allocator.allocate("a", 8)
    allocator.share_prefix("a", range(8))
    allocator.fork("a", "b")
    allocator.extend(["b"], [9])
    allocator.swap_out("b")
    for copied in (copy.deepcopy(allocator), pickle.loads(pickle.dumps(allocator))):
        assert copied.counts() == allocator.counts()
        assert (copied.page_table(["a"]) == allocator.page_table(["a"])).all()
        copied.swap_in("b")
        assert copied.match_prefix("c", range(9)) == 8
    assert allocator.counts().held == 3


def test_changes_go_to_a_cache_in_order():
    """Copies read the old state; what is copied and what is given out may be one page."""
    cache = qpaged.PagedAttentionCache.init_cache(None, jnp.float32, METADATA, quantizer="raw")
    view = cache.views[0]
    for page in range(3):
        step = qpaged.PagedAttentionMetadata.prefill(position=jnp.arange(4), page_table=[page])
        rows = jnp.full((4, METADATA.num_kv_heads, METADATA.kv_head_dim_size), page + 1.0)
        view = view.write_prefill_to_cache(rows, rows, step)
    changes = qpaged.PageChanges(
        source=np.asarray([0, 1]),
        target=np.asarray([1, 5]),
        pack=np.asarray([2, PAGES]),
        reset=np.asarray([0, PAGES]),
    )
    changed = jax.jit(lambda view, changes: view.apply_changes(changes))(view, changes)
    assert np.asarray(changed.value_pages.materialize()[0, :, 0, 0]).tolist() == [0, 1, 3, 0, 0, 2, 0, 0]
    with pytest.raises(TypeError, match=r"changes must be a qpaged.PageChanges, but got"):
        view.apply_changes([0])


def test_engines_that_allocate_within_jit_reset_pages_at_their_first_slot():
    """A page's first token is written before its others, so no list of new pages is needed."""
    view = qpaged.PagedAttentionCacheView.init(None, jnp.float32, METADATA, 0, None, "int8")
    shape = (1, METADATA.num_kv_heads, METADATA.kv_head_dim_size)

    @jax.jit
    def step(view, rows, position, table):
        page = table[0, position // PAGE_SIZE]
        view = view.reset_pages(jnp.where(position % PAGE_SIZE == 0, page, PAGES))
        metadata = qpaged.PagedAttentionMetadata.decode(position=position, page_table=table)
        return view.write_decodes_to_cache(rows, rows, metadata)

    def serve(view, table, value, tokens):
        for position in range(tokens):
            view = step(view, jnp.full(shape, value), jnp.asarray([position]), jnp.asarray(table))
        return view

    used = serve(view, [[3, 2]], 1000.0, 8)
    again, fresh = serve(used, [[2, 3]], 0.01, 6), serve(view, [[2, 3]], 0.01, 6)
    same = jax.tree_util.tree_map(lambda a, b: bool((a == b).all()), again, fresh)
    assert all(jax.tree_util.tree_leaves(same))


def test_pages_are_taken_from_the_device_that_has_the_most():
    allocator = qpaged.PageAllocator(METADATA.replace(num_pages_per_layer=12), devices=np.int64(3))
    assert type(allocator.devices) is int
    allocator.allocate("a", 5 * PAGE_SIZE)
    assert allocator.page_table(["a"])[0, :5].tolist() == [0, 4, 8, 1, 5]
    allocator.allocate("b", 2 * PAGE_SIZE)
    assert allocator.page_table(["b"])[0, :2].tolist() == [9, 2]
    allocator.free("a")
    again = copy.deepcopy(allocator)
    for each in (allocator, again):
        each.allocate("c", 3 * PAGE_SIZE)
    assert (allocator.page_table(["c"]) == again.page_table(["c"])).all()
    assert sorted(page // 4 for page in allocator.page_table(["c"])[0, :3]) == [0, 1, 1]


@pytest.mark.parametrize("devices", [5, 0])
def test_devices_that_do_not_share_pages(devices):
    with pytest.raises(ValueError, match="devices must"):
        qpaged.PageAllocator(METADATA.replace(num_pages_per_layer=12), devices=devices)
