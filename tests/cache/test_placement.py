"""Positions and page tables place tokens, whatever holds them; what has no place is dropped."""

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.caches import (
    PAGES,
    SOME,
    attend,
    bits,
    config,
    decode,
    dense,
    fresh,
    fresh_cache,
    make_view,
    prefill,
    reset,
    slots,
    tokens,
    tolerance,
    used_pages,
    write_decodes,
    write_prefill,
)

import qpaged
from qpaged.implicit import ImplicitArray, aux_field, primitive_handler

TABLE = np.array([3, 1, 5, 7])
ROWS = np.stack([TABLE, [2, 4, 6, 8]])
KEY, VALUE = tokens(8)


def filled(format=None):
    return write_prefill(fresh(format), KEY, VALUE, prefill(np.arange(8), TABLE))


INTEGERS = {
    "int8": lambda x: np.asarray(x, np.int8),
    "uint8": lambda x: np.asarray(x, np.uint8),
    "int16 of jax": lambda x: jnp.asarray(x, jnp.int16),
    "uint8 of jax": lambda x: jnp.asarray(x, jnp.uint8),
    "uint32": lambda x: np.asarray(x, np.uint32),
    "uint32 of jax": lambda x: jnp.asarray(x, jnp.uint32),
    "int64": lambda x: np.asarray(x, np.int64),
    "uint64": lambda x: np.asarray(x, np.uint64),
    "list": lambda x: np.asarray(x).tolist(),
    "big endian": lambda x: np.asarray(x, ">i4"),
}


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_of_every_kind(kind):
    of = INTEGERS[kind]
    built = prefill(of(np.arange(8)), of(TABLE), of(6))
    by_field = built.replace(
        prefill_length=of(6), prefill_position=of(np.arange(8)), prefill_page_table=of(TABLE)
    )
    expected = write_prefill(fresh(), KEY, VALUE, prefill(np.arange(8), TABLE, 6))
    assert bits(write_prefill(fresh(), KEY, VALUE, built)) == bits(expected)
    assert bits(fresh().write_prefill_to_cache(KEY, VALUE, by_field)) == bits(expected)
    built = decode(of([9, 5]), of(ROWS))
    expected = write_decodes(fresh(), KEY[:2], VALUE[:2], decode(np.array([9, 5]), ROWS))
    assert bits(write_decodes(fresh(), KEY[:2], VALUE[:2], built)) == bits(expected)
    assert used_pages(
        reset(expected, jnp.asarray(np.asarray(of([5])), jnp.int32)).key_pages, fresh().key_pages
    ) == [4]
    assert used_pages(expected.reset_pages(of([5])).key_pages, fresh().key_pages) == [4]


def test_tokens_of_every_kind():
    step = prefill(np.arange(8), TABLE)
    expected = bits(write_prefill(fresh(), KEY, VALUE, step))
    for of in (jnp.asarray, np.float64, lambda x: x.tolist()):
        assert bits(fresh().write_prefill_to_cache(of(KEY), of(VALUE), step)) == expected


HUGE = {
    "int32": np.array([2**31 - 1, -(2**31)], np.int32),
    "past int32": np.array([2**31, 2**31 + 5]),
    "past uint32": np.array([2**32 + 5, 2**32]),
    "negative past int32": np.array([-(2**32) + 5, -(2**63)]),
    "largest": np.array([2**63 - 1, 2**62 + 8]),
    "uint32": np.array([2**32 - 1, 2**31], np.uint32),
    "uint64": np.array([2**64 - 1, 2**63 + 5], np.uint64),
    "uint32 of jax": jnp.array([2**32 - 1, 2**31 + 8], jnp.uint32),
}


@pytest.mark.parametrize("format", [None, "int8"])
@pytest.mark.parametrize("huge", HUGE)
def test_huge_indices_are_dropped(huge, format):
    view, key, value = filled(format), KEY[:2], VALUE[:2]
    before, many = bits(view), np.resize(HUGE[huge], 8)
    assert bits(write_decodes(view, key, value, decode(HUGE[huge], ROWS))) == before
    assert bits(write_decodes(view, key, value, decode([0, 5], np.resize(HUGE[huge], (2, 4))))) == before
    assert bits(write_prefill(view, KEY, VALUE, prefill(many, TABLE))) == before
    assert bits(write_prefill(view, KEY, VALUE, prefill(np.arange(8), many[:4]))) == before
    if format is None:  # and outside jit
        assert bits(view.reset_pages(HUGE[huge])) == before
        raw = decode([0, 5], ROWS).replace(decodes_position=HUGE[huge])  # as they are
        assert bits(view.write_decodes_to_cache(key, value, raw)) == before
        assert not np.asarray(attend(KEY[:2], view, decode(HUGE[huge], ROWS))).any()
        assert not np.asarray(attend(KEY[:2], view, decode([0, 5], np.resize(HUGE[huge], (2, 4))))).any()


def test_the_position_of_one_page_of_the_largest_size():
    """position // page_size and the table's reach in tokens do not overflow int32 either."""
    wide = config(page_size=2**20, num_pages_per_layer=2, num_pages_per_sequence=1, max_sequences=1)
    table = np.zeros(4096, np.int32)  # reaches 2 ** 32 tokens
    pool = jax.ShapeDtypeStruct((2, 2, 2**20, 32), jnp.float32)
    view = qpaged.PagedAttentionCacheView(wide, 0, pool, pool)
    step = prefill(np.arange(8), table)
    written = jax.eval_shape(lambda view: view.write_prefill_to_cache(KEY, VALUE, step), view)
    assert written.key_pages.shape == pool.shape
    out = jax.eval_shape(lambda view: qpaged.paged_attention(KEY, view, step), view)
    assert out.shape == KEY.shape


@pytest.mark.parametrize("length", [8, 9, 2**31 - 1, 2**31, 2**40, np.uint32(2**32 - 1)])
def test_a_length_past_the_tokens_counts_them_all(length):
    step = prefill(np.arange(8), TABLE, length)
    assert bits(write_prefill(fresh(), KEY, VALUE, step)) == bits(filled())


@pytest.mark.parametrize("length", [0, -1, -(2**40)])
def test_a_length_of_nothing_counts_none(length):
    step = prefill(np.arange(8), TABLE, length)
    assert bits(write_prefill(fresh(), KEY, VALUE, step)) == bits(fresh())


@pytest.mark.parametrize("format", SOME)
def test_positions_in_any_order(format):
    order = np.array([5, 0, 3, 7, 1, 6, 2, 4])
    view = write_prefill(fresh(format), KEY[order], VALUE[order], prefill(order, TABLE))
    atol = tolerance(format)
    np.testing.assert_allclose(slots(view.key_pages, TABLE)[:8], KEY, atol=atol)
    assert bits(view) == bits(filled(format))


@pytest.mark.parametrize("format", [None, "int8"])
def test_tables_of_other_lengths_than_the_metadata_says(format):
    for table in (TABLE[:2], np.concatenate([TABLE, [9, 10, 11]])):
        view = write_prefill(fresh(format), KEY, VALUE, prefill(np.arange(8), table))
        assert bits(view) == bits(filled(format))
        if format is None:
            out = attend(KEY, view, prefill(np.arange(8), table))
            whole = attend(KEY, view, prefill(np.arange(8), TABLE))
            np.testing.assert_allclose(out, whole, rtol=1e-5, atol=1e-6)
    if format is not None:
        return
    short = write_prefill(fresh(format), KEY, VALUE, prefill(np.arange(8), TABLE[:1]))
    assert used_pages(short.key_pages, fresh(format).key_pages) == [3]


@pytest.mark.parametrize("format", SOME)
def test_no_tokens(format):
    view, none = filled(format), tokens(0)
    nothing = np.zeros(0, np.int32)
    assert bits(write_prefill(view, *none, prefill(nothing, TABLE))) == bits(view)
    assert bits(write_decodes(view, *none, decode(nothing, np.zeros((0, 4), int)))) == bits(view)
    assert bits(reset(view, nothing)) == bits(view)
    if format is not None:
        return
    assert attend(none[0], view, prefill(nothing, TABLE)).shape == (0, 2, 32)
    assert attend(none[0], view, decode(nothing, np.zeros((0, 4), int))).shape == (0, 2, 32)


@pytest.mark.parametrize("format", [None, "int8:token"])
def test_no_pages_in_the_table(format):
    view, step = filled(format), prefill(np.arange(8), np.zeros(0, int))
    assert bits(write_prefill(view, KEY, VALUE, step)) == bits(view)
    rows = decode(np.array([0, 5]), np.zeros((2, 0), int))
    assert bits(write_decodes(view, KEY[:2], VALUE[:2], rows)) == bits(view)


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_attention_over_no_pages(backend):
    attend = jax.jit(lambda q, view, step: qpaged.paged_attention(q, view, step, backend=backend))
    assert not np.asarray(attend(KEY, filled(), prefill(np.arange(8), np.zeros(0, int)))).any()
    assert not np.asarray(attend(KEY[:2], filled(), decode(np.array([0, 5]), np.zeros((2, 0), int)))).any()


@pytest.mark.parametrize("format", [None, "int8"])
def test_pages_of_one_slot_and_heads_of_one(format):
    view = make_view(format, page_size=1, num_kv_heads=1, kv_head_dim_size=1, num_pages_per_sequence=8)
    key, value = tokens(8, heads=1, head_dim=1)
    table = np.array([3, 1, 5, 7, 0, 2, 4, 6])
    view = write_prefill(view, key, value, prefill(np.arange(8), table))
    np.testing.assert_allclose(slots(view.key_pages, table), key, atol=tolerance(format))
    view = write_decodes(view, -key[:2], -value[:2], decode(np.array([2, 8]), np.stack([table, table])))
    np.testing.assert_allclose(slots(view.key_pages, table)[2], -key[0], atol=tolerance(format))
    rows = decode(np.array([0, -1]), np.stack([table, table]))
    out = attend(key[:2], view, rows)
    np.testing.assert_allclose(out[0], value[0], atol=tolerance(format) + 1e-6)
    assert not np.asarray(out[1]).any()


def mixed(length=8):
    """A prefill of 8 tokens of one sequence, and a decode of two others."""
    rows = decode(np.array([6, -1]), np.array([[10, 11, PAGES, PAGES], [12, 13, 14, 15]]))
    return prefill(np.arange(8), TABLE, length).replace(
        decodes_position=rows.decodes_position, decodes_page_table=rows.decodes_page_table
    )


@pytest.mark.parametrize("format", [None, "int8"])
def test_a_mixed_batch_writes_and_attends_to_both(format):
    step, (key, value) = mixed(), tokens(2, seed=1)
    both = write_decodes(write_prefill(fresh(format), KEY, VALUE, step), key, value, step)
    apart = write_decodes(filled(format), key, value, decode(step.decodes_position, step.decodes_page_table))
    assert bits(both) == bits(apart)
    assert used_pages(both.key_pages, fresh(format).key_pages) == [1, 3, 11]
    if format is not None:
        return
    query = tokens(10, seed=2)[0]
    out = attend(query, both, step)
    np.testing.assert_allclose(
        out[:8], attend(query[:8], both, prefill(np.arange(8), TABLE)), rtol=1e-5, atol=1e-6
    )
    alone = decode(step.decodes_position, step.decodes_page_table)
    np.testing.assert_allclose(out[8:], attend(query[8:], both, alone), rtol=1e-5, atol=1e-6)
    assert not np.asarray(out[9]).any()


@pytest.mark.parametrize("format", SOME)
def test_init_empty_writes_nothing_and_attends_to_nothing(format):
    view, empty = filled(format), qpaged.PagedAttentionMetadata.init_empty()
    assert bits(write_prefill(view, KEY, VALUE, empty)) == bits(view)
    assert bits(write_decodes(view, KEY[:2], VALUE[:2], empty)) == bits(view)
    for query in (KEY, KEY[:2]):
        out = attend(query, view, empty)
        assert out.shape == query.shape
        assert not np.asarray(out).any()


@pytest.mark.parametrize("format", SOME)
def test_reset_pages(format):
    view = filled(format)
    pages = np.array([1, 1, PAGES, PAGES + 3, -1, 2**31 - 1])
    after = reset(view, pages)
    assert used_pages(after.key_pages, fresh(format).key_pages) == [3]
    assert used_pages(after.value_pages, fresh(format).value_pages) == [3]
    kept = np.delete(np.arange(PAGES), 1)
    for pool, old in zip(jax.tree_util.tree_leaves(after), jax.tree_util.tree_leaves(view), strict=True):
        np.testing.assert_array_equal(np.asarray(pool)[:, kept], np.asarray(old)[:, kept])
    assert bits(reset(after, np.array([3, 3, 3, 3, 3, 3]))) == bits(fresh(format))
    assert bits(reset(fresh(format), pages)) == bits(fresh(format))


def test_reset_of_one_page_and_of_a_whole_cache():
    assert used_pages(filled().reset_pages(3).key_pages, fresh().key_pages) == [1]
    cache = fresh_cache("int8")
    cache = cache.replace(views=[filled("int8"), filled("int8").replace(layer_index=1)])
    after = jax.jit(lambda cache, pages: cache.reset_pages(pages))(cache, np.array([1]))
    assert [view.layer_index for view in after.views] == [0, 1]
    for view in after.views:
        assert used_pages(view.value_pages, fresh("int8").value_pages) == [3]


def avals(tree):
    return [(x.shape, x.dtype, x.weak_type) for x in jax.tree_util.tree_leaves(tree)]


@pytest.mark.parametrize("format", SOME)
def test_methods_keep_the_types_of_the_pools(format):
    view = fresh(format)

    def step(view, metadata, rows, pages):
        after = view.write_prefill_to_cache(KEY, VALUE, metadata)
        after = after.write_decodes_to_cache(jnp.full((2, 2, 32), 1.0), jnp.ones((2, 2, 32)) * 2, rows)
        return after.reset_pages(pages)

    shapes = jax.eval_shape(step, view, prefill(np.arange(8), TABLE), decode([0, 5], ROWS), np.array([3]))
    assert avals(shapes) == avals(jax.eval_shape(lambda: view))
    assert jax.tree_util.tree_structure(shapes) == jax.tree_util.tree_structure(view)
    abstract = jax.tree_util.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), view)
    assert avals(
        jax.eval_shape(step, abstract, prefill(np.arange(8), TABLE), decode([0, 5], ROWS), np.array([3]))
    ) == avals(jax.eval_shape(lambda: view))


@pytest.mark.parametrize("format", SOME)
def test_a_view_is_a_carry_of_scan(format):
    """Tokens one by one, in one program."""

    @jax.jit
    def run(view, key, value):
        def step(view, token):
            i, k, v = token
            return view.write_decodes_to_cache(k, v, decode(jnp.stack([i, -1]), ROWS)), None

        twice = [jnp.stack([x, x], axis=1) for x in (key, value)]
        return lax.scan(step, view, (jnp.arange(8, dtype=jnp.int32), *twice))[0]

    assert bits(run(fresh(format), KEY, VALUE)) == bits(filled(format))


@pytest.mark.parametrize("format", SOME)
def test_donation_updates_in_place(format):
    view = jax.tree_util.tree_map(jnp.copy, fresh(format))
    write = jax.jit(
        lambda view, key, value, step: view.write_decodes_to_cache(key, value, step), donate_argnums=0
    )
    old = jax.tree_util.tree_leaves(view)
    places = sorted(leaf.unsafe_buffer_pointer() for leaf in old)
    expected = bits(write_decodes(fresh(format), KEY[:2], VALUE[:2], decode([0, 5], ROWS)))
    after = write(view, KEY[:2], VALUE[:2], decode([0, 5], ROWS))
    assert bits(after) == expected
    assert all(leaf.is_deleted() for leaf in old)
    assert sorted(leaf.unsafe_buffer_pointer() for leaf in jax.tree_util.tree_leaves(after)) == places


@pytest.mark.parametrize("format", SOME)
def test_a_fresh_cache_shares_no_buffers(format):
    """So that all of it can be donated at once."""
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree_util.tree_leaves(fresh_cache(format))]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("format", SOME)
def test_layers_stacked_and_written_under_vmap(format):
    stacked = jax.tree_util.tree_map(lambda x: jnp.stack([x, x]), fresh(format))
    other = tokens(8, seed=1)
    key, value = np.stack([KEY, other[0]]), np.stack([VALUE, other[1]])
    step = prefill(np.arange(8), TABLE)
    write = jax.jit(jax.vmap(lambda view, k, v: view.write_prefill_to_cache(k, v, step)))
    after = write(stacked, key, value)
    for layer in range(2):
        one = jax.tree_util.tree_map(lambda x, layer=layer: x[layer], after)
        assert bits(one) == bits(write_prefill(fresh(format), key[layer], value[layer], step))


def x64():
    try:
        return jax.enable_x64(True)
    except AttributeError:
        from jax.experimental import enable_x64

        return enable_x64(True)


@pytest.mark.parametrize("format", [None, "int8"])
def test_sixty_four_bits(format):
    """With x64 on, indices of 64 bits on the device too, and the same codes."""
    expected = filled(format)
    rows = np.array([9, 2**40])
    with x64():
        view = make_view(format)
        step = prefill(jnp.arange(8), jnp.asarray(TABLE), jnp.asarray(8))
        view = jax.jit(lambda view, step: view.write_prefill_to_cache(KEY, VALUE, step))(view, step)
        assert bits(view) == bits(expected)
        after = jax.jit(
            lambda view, rows: view.write_decodes_to_cache(
                KEY[:2], VALUE[:2], decode(rows, jnp.asarray(ROWS))
            )
        )(view, jnp.asarray(rows))
        out = jax.jit(
            lambda view, rows: qpaged.paged_attention(KEY[:2], view, decode(rows, jnp.asarray(ROWS)))
        )(after, jnp.asarray(rows))
        after = jax.jit(lambda view, pages: view.reset_pages(pages))(after, jnp.asarray([2**32 + 1, 2**40]))
        assert out.dtype == jnp.float32
    assert bits(after) == bits(write_decodes(expected, KEY[:2], VALUE[:2], decode(rows, ROWS)))


@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_attention_before_the_write_with_sixty_four_bits(step):
    steps = {"prefill": prefill(np.arange(8), TABLE), "decode": decode(np.array([9, 2]), ROWS)}
    count = {"prefill": 8, "decode": 2}[step]

    def attend(view):
        new = (KEY[:count], VALUE[:count])
        part = qpaged.paged_attention(KEY[:count], view, steps[step], new=new, return_lse=True)
        return qpaged.merge_attention([part])

    want = jax.jit(attend)(filled("int8"))
    with x64():
        for got, expected in zip(jax.jit(attend)(filled("int8")), want, strict=True):
            assert got.dtype == jnp.float32
            np.testing.assert_array_equal(got, expected)


def test_a_pool_of_float64():
    with x64():
        view = make_view(None, jnp.float64)
        key = np.full((8, 2, 32), 1 + 2.0**-50)
        view = view.write_prefill_to_cache(key, key, prefill(np.arange(8), TABLE))
        assert view.key_pages.dtype == jnp.float64
        assert float(view.key_pages[0, 3, 0, 0]) == 1 + 2.0**-50
        same = qpaged.PagedAttentionCacheView.from_json(view.to_json())
        assert bits(same) == bits(view)


@pytest.mark.parametrize("format", SOME)
def test_trees_of_anything(format):
    cache = fresh_cache(format)
    structure = jax.tree_util.tree_structure(cache)
    nothing = jax.tree_util.tree_map(lambda _: None, cache)
    assert jax.tree_util.tree_leaves(nothing) == []
    assert nothing.views[1].metadata == cache.views[1].metadata
    repr(nothing)
    names = jax.tree_util.tree_map(lambda leaf: str(leaf.dtype), cache)
    assert jax.tree_util.tree_structure(names) == structure
    repr(names)
    shapes = jax.eval_shape(lambda: cache)
    assert jax.tree_util.tree_structure(shapes) == structure
    assert bits(copy.deepcopy(cache)) == bits(cache)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(cache)[0]]
    assert len(set(paths)) == len(paths)
    assert paths[0].startswith(".views[0].key_pages")


@pytest.mark.parametrize("format", SOME)
def test_a_cache_is_planned_without_being_made(format):
    planned = jax.eval_shape(
        lambda: qpaged.PagedAttentionCache.init_cache(None, jnp.float32, config(), None, format)
    )
    assert planned.nbytes == fresh_cache(format).nbytes > 0


# Pages of somebody else's implicit array, made by a callable as EasyDeL's quantizers are.


@dataclass
class Halves(ImplicitArray):
    """Values held as the bits of their bfloat16, which know how to be scattered into and gathered from."""

    codes: Any
    scale: Any = aux_field(default=1.0)  # noqa: RUF009

    def materialize(self):
        return self.scale * lax.bitcast_convert_type(self.codes, jnp.bfloat16).astype(self.dtype)

    @classmethod
    def of(cls, x):
        codes = lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
        return cls(codes, shape=x.shape, dtype=x.dtype)


@primitive_handler("scatter")
def scatter_into_halves(primitive, operand: Halves, indices: Any, updates: Any, **params):
    params["update_jaxpr"] = None
    params["update_consts"] = ()
    codes = lax.scatter(
        operand.codes,
        indices,
        lax.bitcast_convert_type(updates.astype(jnp.bfloat16), jnp.uint16),
        params["dimension_numbers"],
        mode=params["mode"],
    )
    return Halves(codes, shape=operand.shape, dtype=operand.dtype)


def rounded(x):
    return np.asarray(jnp.asarray(x).astype(jnp.bfloat16)).astype(np.float32)


@pytest.fixture
def foreign():
    return qpaged.PagedAttentionCacheView.init(None, jnp.float32, config(), 0, None, Halves.of)


def test_foreign_pages_are_made_by_a_callable(foreign):
    assert isinstance(foreign.key_pages, Halves)
    assert [leaf.dtype for leaf in jax.tree_util.tree_leaves(foreign)] == [jnp.uint16, jnp.uint16]
    metadata = qpaged.PagedAttentionCacheMetaData.create(
        None, 2, 2, 16, 4, 2, 32, 0.5, jnp.float32, memory_bytes=10**5, quantizer=Halves.of
    )
    cache = qpaged.PagedAttentionCache.init_cache(None, jnp.float32, metadata, None, Halves.of)
    page = 2 * 2 * 4 * 2 * 32 * 2
    assert metadata.num_pages_per_layer == 50_000 // page
    assert cache.nbytes == page * metadata.num_pages_per_layer
    with pytest.raises(ValueError, match="quantizer must be the one the metadata was made for"):
        qpaged.PagedAttentionCache.init_cache(None, jnp.float32, metadata)


def test_foreign_pages_are_written_attended_to_and_reset(foreign):
    step = prefill(np.arange(8), TABLE, 7)
    view = write_prefill(foreign, KEY, VALUE, step)
    assert isinstance(view.key_pages, Halves)
    np.testing.assert_array_equal(slots(view.key_pages, TABLE)[:7], rounded(KEY[:7]))
    assert not slots(view.key_pages, TABLE)[7:].any()
    view = write_decodes(view, KEY[:2], VALUE[:2], decode(np.array([7, -1]), ROWS))
    assert isinstance(view.value_pages, Halves)
    np.testing.assert_array_equal(slots(view.value_pages, TABLE)[7], rounded(VALUE[0]))
    assert not dense(view.value_pages)[:, [2, 4, 6, 8]].any()
    plain = fresh().replace(
        key_pages=jnp.asarray(dense(view.key_pages)), value_pages=jnp.asarray(dense(view.value_pages))
    )
    out = attend_quietly(KEY, view, prefill(np.arange(8), TABLE))
    np.testing.assert_allclose(out, attend(KEY, plain, prefill(np.arange(8), TABLE)), rtol=1e-5, atol=1e-6)
    view = reset(view, np.array([3, 3, PAGES, -1]))
    assert isinstance(view.key_pages, Halves)
    assert not dense(view.key_pages)[:, 3].any()
    assert dense(view.key_pages)[:, 1].any()


def attend_quietly(query, view, metadata):
    """Halves cannot gather, so that attention materializes them, and says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return attend(query, view, metadata)


@dataclass
class Doubles(ImplicitArray):
    """Values held as their doubles, which know nothing else."""

    codes: Any

    def materialize(self):
        return self.codes / 2


@pytest.mark.parametrize("method", ["write", "reset"])
def test_foreign_pages_that_cannot_be_written_are_not_made_plain(method):
    """A cache that was asked to be of one kind does not become a float cache in passing."""

    def make(zeros):
        return Doubles(2 * zeros, shape=zeros.shape, dtype=zeros.dtype)

    view = qpaged.PagedAttentionCacheView.init(None, jnp.float32, config(), 0, None, make)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if method == "write":
                after = write_decodes(view, KEY[:2], VALUE[:2], decode([0, 5], ROWS))
            else:
                after = reset(view, np.array([0]))
    except (TypeError, NotImplementedError) as error:
        assert "Doubles" in str(error)  # noqa: PT017
    else:
        assert isinstance(after.key_pages, Doubles)
