"""Pages that leave their cache, and come back at other places, to it or to another one, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import normal
from support.long import first_short

import qpaged
from qpaged.formats import format_of_codes
from qpaged.testing._pools import head_dim as smallest_head_dim

KV_HEADS, PAGE_SIZE, PAGES = 2, 16, 12
LENGTH = 3 * PAGE_SIZE + 5
SOURCE, TARGET = np.array([7, 2, 9, 4]), np.array([0, 11, 3, 2])
EXACT = "int4:channel+offset+exact20/int8:token+exact1+sink16", "fp8_e4m3:tensor+exact1", "nvfp4+exact40"
take = jax.jit(qpaged.PagedAttentionCache.take_pages, static_argnames="sequences")
put = jax.jit(qpaged.PagedAttentionCache.put_pages, donate_argnums=0)


def fresh_cache(spelling, pages=PAGES, layers=2, batch=2):
    formats = [format_of_codes(one) for one in qpaged.CacheFormat.of(spelling).layer(0) if one is not None]
    head_dim = max(32, *map(smallest_head_dim, formats), 0)
    config = qpaged.PagedAttentionCacheMetaData(
        batch, layers, pages, 4, 4 * PAGE_SIZE, PAGE_SIZE, KV_HEADS, head_dim, 0.5
    )
    return qpaged.PagedAttentionCache.init_cache(None, jnp.float32, config, quantizer=spelling)


def written(cache, table=SOURCE, length=LENGTH, seed=0):
    """Return a cache with a sequence on the pages of the table."""
    step = qpaged.PagedAttentionMetadata.prefill(position=np.arange(length), page_table=table)
    head_dim = cache.views[0].metadata.kv_head_dim_size
    views = []
    for layer, view in enumerate(cache.views):
        key, value = (normal(length, KV_HEADS, head_dim, seed=seed + 2 * layer + side) for side in range(2))
        views.append(jax.jit(view.__class__.write_prefill_to_cache)(view, key, value, step))
    return cache.replace(views=views)


def attended(cache, table, length=LENGTH):
    step = qpaged.PagedAttentionMetadata.decode(position=[length - 1], page_table=table[None])
    query = normal(1, 4, cache.views[0].metadata.kv_head_dim_size, seed=9)
    return [
        np.asarray(qpaged.paged_attention(query, view, step, backend="reference")) for view in cache.views
    ]


def content(cache, pages):
    """Return codes, scales and exact rows of some pages, and which of these are exact."""
    taken = take(cache, pages)
    leaves = []
    for view in taken.views:
        for pool in (view.key_pages, view.value_pages):
            exact = qpaged.pools.is_exact(pool, jnp.arange(len(pages)))
            packed = jax.tree_util.tree_leaves(qpaged.pools.packed(pool))
            if exact is None:
                leaves += packed
                continue
            leaves.append(exact)
            slots = qpaged.pools.gather_slots(pool, jnp.arange(len(pages)))
            leaves.append(slots)
    return [np.asarray(leaf) for leaf in leaves]


def same(a, b):
    return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


@pytest.mark.short(3)
@pytest.mark.parametrize(
    "spelling",
    [
        "plain",
        "raw",
        "int8",
        "int4:channel+offset",
        "nvfp4",
        *EXACT,
        *first_short(0, qpaged.available_formats()),
    ],
)
def test_pages_come_back_as_they_were(spelling):
    """By way of the host, to other places of another cache, in which others lie."""
    cache = written(fresh_cache(spelling))
    taken = jax.device_get(take(cache, SOURCE))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree_util.tree_leaves(taken))
    other = written(fresh_cache(spelling, PAGES), np.array([1, 5, 6, 8]), seed=50)
    others = attended(other, np.array([1, 5, 6, 8]))
    other = put(other, TARGET, taken)
    assert same(content(other, TARGET), content(cache, SOURCE))
    assert same(attended(other, TARGET), attended(cache, SOURCE))
    assert same(attended(other, np.array([1, 5, 6, 8])), others)  # untouched


@pytest.mark.short(1)
@pytest.mark.parametrize("spelling", ["int8", EXACT[0]])
def test_a_taken_cache_is_a_cache(spelling):
    """Its pages are numbered from 0, it has the bytes of its pages, and it goes into records."""
    cache = written(fresh_cache(spelling))
    taken = take(cache, SOURCE)
    fresh = fresh_cache(spelling, len(SOURCE), batch=1)
    assert taken.nbytes == fresh.nbytes and jax.tree_util.tree_structure(
        taken
    ) == jax.tree_util.tree_structure(fresh)
    assert same(attended(taken, np.arange(4)), attended(cache, SOURCE))
    back = qpaged.PagedAttentionCache.from_json(taken.to_json())
    assert same(attended(put(fresh_cache(spelling), TARGET, back), TARGET), attended(cache, SOURCE))


@pytest.mark.short(1)
@pytest.mark.parametrize("spelling", ["int8:token", EXACT[0]])
def test_indices_that_are_no_page_fill_up(spelling):
    cache = written(fresh_cache(spelling))
    taken = take(cache, np.append(SOURCE, [PAGES, PAGES]))
    before = written(fresh_cache(spelling), np.array([1, 5, 6, 8]), seed=50)
    after = put(jax.tree_util.tree_map(jnp.copy, before), np.append(TARGET, [PAGES, PAGES]), taken)
    assert same(attended(after, TARGET), attended(cache, SOURCE))
    free = np.setdiff1d(np.arange(PAGES), TARGET)
    assert same(content(after, free), content(before, free))
    untouched = put(jax.tree_util.tree_map(jnp.copy, before), np.full(6, -1), taken)
    assert same(content(untouched, np.arange(PAGES)), content(before, np.arange(PAGES)))


def test_of_several_with_one_number_the_last_counts():
    cache = written(fresh_cache("int8"))
    after = put(fresh_cache("int8"), np.array([3, 3, 3, 5]), take(cache, SOURCE))
    assert same(content(after, np.array([3, 5])), content(cache, SOURCE[2:]))


@pytest.mark.long
def test_exact_pages_without_room_are_packed():
    """In what is taken, of more sequences than it was said to be, and in the cache that they are put into.

    Open pages stay exact, then the newest full ones; the others are quantized as ``pack_pages`` does it.
    """
    spelling = "int8:token+exact20"
    second = np.array([1, 5, 6, 8])
    cache = written(written(fresh_cache(spelling)), second, seed=50)
    everything = np.concatenate([SOURCE, second])
    whole, part = take(cache, everything, sequences=2), take(cache, everything)
    small = put(fresh_cache(spelling, batch=1), np.arange(8), whole)
    for some, stay in ((whole, (1, 2, 3, 5, 6, 7)), (part, (3, 6, 7)), (small, (3, 6, 7))):
        is_exact = qpaged.pools.is_exact(some.views[0].key_pages, jnp.arange(8))
        np.testing.assert_array_equal(np.flatnonzero(is_exact), stay)
        packed = np.delete(everything, stay)
        expected = cache.pack_pages(packed, np.full(len(packed), PAGE_SIZE))
        assert same(attended(some, np.arange(4)), attended(expected, SOURCE))
        assert same(attended(some, np.arange(4, 8)), attended(expected, second))


@pytest.mark.long
@pytest.mark.parametrize("spelling", ["int8:token+exact1", "int8:token+exact20"])
def test_a_page_may_be_taken_and_copied_several_times(spelling):
    cache = written(fresh_cache(spelling, batch=1))
    many, row = np.full(6, SOURCE[3]), np.repeat(SOURCE[3:], 4)
    nearly = {"rtol": 0.05, "atol": 0.05}  # those without room are quantized
    for some, pages in (
        (take(cache, many), np.arange(6)),
        (cache.copy_pages(many, np.arange(6)), np.arange(6)),
    ):
        for page in pages:
            want = attended(cache, row, length=5)
            np.testing.assert_allclose(attended(some, np.full(4, page), length=5), want, **nearly)


def test_a_copy_that_is_dropped_takes_no_room():
    """As one onto a page that a later pair takes, or from a page that there is not."""
    cache = written(fresh_cache("int8:token+exact20", batch=2))
    open_page = SOURCE[3]
    copied = cache.copy_pages([open_page, open_page, 99, open_page], [0, 0, 1, PAGES])
    is_exact = qpaged.pools.is_exact(copied.views[0].key_pages, jnp.array([0, open_page]))
    assert is_exact.all()
    assert same(content(copied, np.array([0])), content(cache, np.array([open_page])))
    itself = cache.copy_pages(SOURCE, SOURCE)
    assert same(content(itself, SOURCE), content(cache, SOURCE))


@pytest.mark.parametrize("spelling", ["plain", "int8"])
def test_what_was_taken_outside_of_a_program_is_put_within(spelling):
    cache = written(fresh_cache(spelling))
    taken = take(cache, SOURCE)
    after = jax.jit(lambda cache: cache.put_pages(TARGET, taken))(fresh_cache(spelling))
    assert same(content(after, TARGET), content(cache, SOURCE))


def test_the_bytes_that_move_are_those_of_the_pages():
    """Whatever the size of the pool: no temporary of it, and donated pools are written in place."""
    temporaries = []
    for pages in (512, 8192):
        cache = jax.eval_shape(lambda pages=pages: fresh_cache("int8:token", pages, layers=1))
        taken = jax.eval_shape(lambda cache: cache.take_pages(SOURCE), cache)
        programs = take.lower(cache, SOURCE), put.lower(cache, TARGET, taken)
        temporaries.append([program.compile().memory_analysis().temp_size_in_bytes for program in programs])
    assert temporaries[0] == temporaries[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda cache: cache.put_pages([0, 1], take(cache, SOURCE)),
            "pages must be as many as were taken, 4, but",
        ),
        (
            lambda cache: cache.put_pages(TARGET, take(fresh_cache("int8:token"), SOURCE)),
            "taken must be pages of the",
        ),
        (
            lambda cache: cache.put_pages(TARGET, take(fresh_cache("int8", layers=1), SOURCE)),
            "must have the 2 layers",
        ),
        (lambda cache: cache.take_pages(SOURCE, sequences=0), "sequences must be at least 1, but came as 0"),
        (lambda cache: cache.take_pages([0.5]), "pages must be integers"),
        (lambda cache: cache.take_pages([]), "pages must name at least one page, but are none"),
        (
            lambda cache: cache.put_pages([0], cache.views[0]),
            "taken must be a qpaged.PagedAttentionCache, but",
        ),
        (
            lambda cache: cache.views[0].put_pages([0], cache),
            "taken must be a qpaged.PagedAttentionCacheView, but",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        change(fresh_cache("int8"))
