"""Pages of prompts on a disk: found by their tokens, or not found; never an error, never a wrong token."""

import os
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.long import first_short
from support.saved_caches import PAGE_SIZE, PAGES, filled, fresh

import qpaged
from qpaged.storage import _prefix_store

FORMATS = ["int8", None, "int4:token+rotate+exact20+sink4", "fp8_e4m3:head", "nvfp4", "int6:channel"]
PROMPT = list(range(40))


def attended(cache, allocator, name, length=2 * PAGE_SIZE):
    table = allocator.page_table([name])
    step = qpaged.PagedAttentionMetadata.decode(position=jnp.asarray([length - 1]), page_table=table)
    query = jnp.linspace(-1, 1, 4 * 64).reshape(1, 4, 64)
    return [np.asarray(qpaged.paged_attention(query, view, step)) for view in cache.views]


def files_of(store):
    return sorted(file for file in store.path.rglob("*") if file.is_file())


@pytest.fixture
def stored(tmp_path):
    """Return a store with two pages of a prompt, their hashes, and the cache."""
    cache, allocator = filled("int8")
    store = qpaged.PrefixStore(tmp_path / "prefixes")
    hashes = allocator.prefix_hashes(PROMPT)
    pages = dict(zip(hashes, allocator.page_table(["a"])[0].tolist(), strict=False))
    store.put(cache, pages)
    return store, hashes, cache, allocator


@pytest.mark.short(1)
@pytest.mark.parametrize("format", first_short(3, FORMATS))
def test_a_later_process_goes_on_from_the_stored_prefix(format, tmp_path):
    cache, allocator = filled(format)
    store = qpaged.PrefixStore(tmp_path)
    hashes = allocator.prefix_hashes(PROMPT)
    table = allocator.page_table(["a"])[0]
    store.put(cache, dict(zip(hashes, table.tolist(), strict=False)))
    packed = cache.pack_pages(table, np.full(len(table), PAGE_SIZE))

    other, again = fresh(format), qpaged.PageAllocator(cache.views[0].metadata, salt="model")
    again.allocate("before", 20)  # so that the pages have other numbers
    assert again.match_prefix("a", PROMPT) == 0
    hashes = again.prefix_hashes(PROMPT[:-1])
    assert qpaged.PrefixStore(tmp_path).count(hashes) == 2
    again.extend(["a"], [2 * PAGE_SIZE])
    other = other.apply_changes(again.take_changes())
    other, count = store.get(other, hashes, again.page_table(["a"])[0, :2])
    assert count == 2
    expected, got = attended(packed, allocator, "a"), attended(other, again, "a")
    assert all((one == two).all() for one, two in zip(expected, got, strict=True))
    assert list(again.share_prefix("a", PROMPT[: 2 * PAGE_SIZE])) == hashes
    assert again.match_prefix("b", PROMPT) == 2 * PAGE_SIZE


@pytest.mark.long
def test_exact_pages_stay_exact_in_the_cache_that_they_are_stored_from(tmp_path):
    cache, allocator = filled("int8+exact40")
    before = attended(cache, allocator, "a", 40)
    store = qpaged.PrefixStore(tmp_path)
    store.put(cache, allocator.share_prefix("a", PROMPT) or {b"any": 0})
    after = attended(cache, allocator, "a", 40)
    assert all((one == two).all() for one, two in zip(before, after, strict=True))


def test_a_page_that_is_there_is_not_written_again(stored):
    store, hashes, cache, allocator = stored
    before = [file.stat().st_mtime_ns for file in files_of(store)]
    store.put(cache, dict(zip(hashes, allocator.page_table(["a"])[0].tolist(), strict=False)))
    assert [file.stat().st_mtime_ns for file in files_of(store)] == before


def test_what_is_not_there_is_not_found(stored):
    store, hashes, _, _ = stored
    assert hashes[0] in store
    assert b"other" not in store
    assert store.count([hashes[0], b"other", hashes[1]]) == 1
    cache, count = store.get(fresh("int8"), [b"other", hashes[0]], [0, 1])
    assert count == 0
    cache, count = store.get(cache, [hashes[0], b"other", hashes[1]], [0, 1, 2])
    assert count == 1
    assert not np.asarray(cache.views[0].key_pages.codes[:, 1:]).any()
    with pytest.raises(ValueError, match=r"pages must have shape \(2,\), one for each hash"):
        store.get(cache, hashes, [0])


def test_pages_of_another_cache_are_not_found(stored):
    store, hashes, _, _ = stored
    for other in (fresh("int4"), fresh("int8", layers=1), fresh("int8", kv_head_dim_size=32)):
        store.put(stored[2], dict(zip(hashes, range(2), strict=True)))
        _, count = store.get(other, hashes, [0, 1])
        assert count == 0


def test_pages_of_other_formats_and_scales_are_not_found_though_hashes_are_the_same(tmp_path):
    """Metadata need not tell the format, and tells no scales."""
    store, h = qpaged.PrefixStore(tmp_path), b"0"
    scaled = fresh("fp8_e4m3:tensor")
    scaled = scaled.replace(views=[view.with_scales(4.0, 4.0) for view in scaled.views])
    caches = [fresh("int8:token"), fresh("int8:token+rotate"), fresh("fp8_e4m3:tensor"), scaled]
    for cache in caches:
        store.put(cache, {h: 0})
        for other in caches:
            copied = jax.tree_util.tree_map(jnp.copy, other)  # for it is donated
            assert store.get(copied, [h], [1])[1] == int(other is cache)
        assert store.count([h]) == 1  # what is sound stays
        store._file(h).unlink()


def test_pages_that_are_none(stored):
    store, hashes, cache, _ = stored
    for page in (PAGES, -1):
        with pytest.raises(ValueError, match=rf"must be those of the cache, from 0 to 8, but {page} came"):
            store.put(cache, {b"new": 0, b"other": page})
    with pytest.raises(TypeError, match=r"pages must be an integer, but came as 0.5"):
        store.put(cache, {b"new": 0.5})
    assert store.count([b"new"]) == 0
    for wrong in (PAGES, -1):
        assert store.get(fresh("int8"), hashes, [3, wrong])[1] == 1
        assert store.get(fresh("int8"), hashes, [wrong, 3])[1] == 0
    with pytest.raises(TypeError, match=r"pages must be integers, but got \[3.5, 4.5\]"):
        store.get(cache, hashes, [3.5, 4.5])


def test_many_pages_go_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(_prefix_store, "PAGES_AT_ONCE", 2)
    cache, _ = filled("int8")
    store = qpaged.PrefixStore(tmp_path)
    hashes = [bytes([index]) for index in range(5)]
    store.put(cache, {page_hash: index for index, page_hash in enumerate(hashes)})
    got, count = store.get(fresh("int8"), hashes, range(5))
    assert count == 5
    for view, other in zip(got.views, cache.views, strict=True):
        assert (view.key_pages.codes[:, :5] == other.key_pages.codes[:, :5]).all()


def test_files_that_others_remove_or_write_wrongly(stored):
    store, hashes, cache, _ = stored
    (store.path / "ab").mkdir(exist_ok=True)
    (store.path / "ab" / "gone.safetensors").symlink_to(store.path / "nowhere")
    assert hashes[0] in qpaged.PrefixStore(store.path)
    header = b'{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}'
    store._file(hashes[0]).write_bytes(len(header).to_bytes(8, "little") + header + b"1")
    assert store.get(cache, hashes, [3, 4])[1] == 0


@pytest.mark.parametrize("share", [pytest.param(1, marks=pytest.mark.long), 1 / 100])
def test_no_bit_makes_a_wrong_token(tmp_path, share):
    sizes = {"layers": 1, "num_kv_heads": 1, "kv_head_dim_size": 16}
    cache, allocator = filled("int8", **sizes)
    store = qpaged.PrefixStore(tmp_path)
    hashes = allocator.prefix_hashes(PROMPT)
    store.put(cache, dict(zip(hashes, allocator.page_table(["a"])[0].tolist(), strict=False)))
    file = store._file(hashes[0])
    data = file.read_bytes()
    bits = range(8 * len(data))
    for bit in random.Random(1).sample(bits, int(share * len(bits))):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bytes(changed))
        cache, count = store.get(cache, hashes, [3, 4])
        assert count == 0, f"bit {bit}"
        assert not file.exists()  # so that it is written again
    for length in (0, 1, 8, 100, len(data) - 1):
        file.write_bytes(data[:length])
        assert store.get(cache, hashes, [3, 4])[1] == 0
    file.write_bytes(store._file(hashes[1]).read_bytes())
    assert store.get(cache, hashes, [3, 4])[1] == 0
    file.write_bytes(data)
    assert store.get(cache, hashes, [3, 4])[1] == 2


def test_files_that_were_used_last_are_kept(tmp_path):
    cache, _ = filled("int8")
    store = qpaged.PrefixStore(tmp_path, max_bytes=100_000)
    store.put(cache, {b"0": 0})
    (file,) = files_of(store)
    most = 100_000 // file.stat().st_size
    names = [bytes([index]) for index in range(most - 1)]
    store.put(cache, dict.fromkeys(names, 0))
    for index, name in enumerate([b"0", *names]):
        os.utime(store._file(name), ns=(index, index))
    store.get(fresh("int8"), [b"0"], [0])
    store.put(cache, {b"more": 0})
    assert b"0" in store and b"more" in store and names[-1] in store
    assert names[0] not in store
    assert sum(file.stat().st_size for file in files_of(store)) <= 100_000


def test_what_a_store_refuses(tmp_path):
    with pytest.raises(ValueError, match="max_bytes must be positive, but came as 0"):
        qpaged.PrefixStore(tmp_path, max_bytes=0)
    store = qpaged.PrefixStore(tmp_path)
    with pytest.raises(TypeError, match=r"cache must be a qpaged.PagedAttentionCache, but got"):
        store.put(fresh("int8").views[0], {b"0": 0})
