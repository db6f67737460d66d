"""Every backend at the shapes that attention is measured at, scaled down, and at those that hypothesis draws.

Unused pages are poisoned, and the pages of a permuted pool give the same bits.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from shapes import SHAPES, Shape
from support.arrays import normal
from support.attention_oracle import attention
from support.filled_pages import PAGES, PER_SEQUENCE, poisoned, tables

import qpaged
from qpaged.attention import _tpu, _xla
from qpaged.testing._pools import head_dim as smallest_head_dim

SCALE = 64  # what lengths are divided by, and with them the slots that backends read at once
AT_MOST = 8  # sequences; there is one for every 16 where there are more
SPARE = 2  # pages that nothing uses
ANYWHERE = [backend.name for backend in qpaged.attention_backends() if backend.platform is None]
TPU = qpaged.attention_backends()[0]
# float32 sums of some hundred products in other orders, through an exponential
EXACT = {"rtol": 1e-5, "atol": 2e-5}
# The output is rounded to bfloat16; before that xla rounds scaled queries, weights and scaled weights: each
# 2^-9 of values up to 4.
ROUNDED = {"reference": {"rtol": 2**-8, "atol": 2e-5}, "xla": {"rtol": 2**-7, "atol": 4 * 3 * 2**-9}}


def small(shape):
    """The shape with shorter sequences, and fewer if they are many; the raggedness, heads and pages stay."""
    lengths = [length // SCALE for length in shape.lengths]
    every = 1 if len(lengths) <= AT_MOST else 16
    return dataclasses.replace(shape, lengths=tuple(lengths[::every]), chunk=max(1, shape.chunk // SCALE))


def named():
    """Return each shape with formats of keys and of values, and a dtype, until every format had its turn."""
    formats = itertools.cycle(qpaged.available_formats())
    dtypes = itertools.cycle((jnp.float32, jnp.bfloat16))
    count = max(len(SHAPES), -(-len(qpaged.available_formats()) // 2))
    names = itertools.islice(itertools.cycle(SHAPES), count)
    return [(name, next(formats), next(formats), next(dtypes)) for name in names]


@pytest.fixture(scope="module", autouse=True)
def _blocks():
    """As many of them in a sequence as at full length."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_xla, "BLOCK", _xla.BLOCK // SCALE)
        patch.setattr(_xla, "TILE", 4)
        patch.setattr(_tpu, "BLOCK", 128)
        yield


@functools.partial(jax.jit, static_argnums=(0, 1))
def quantize(format, dtype, values):
    values = values.astype(dtype)
    return values if format is None else qpaged.get_quantizer(format).quantize(values)


@functools.partial(
    jax.jit, static_argnames=("backends", "softmax_scale", "sliding_window", "logits_soft_cap")
)
def attend(query, view, metadata, sinks=None, backends=ANYWHERE, **options):
    """The backends' results, and the pools' values."""
    outs = {
        backend: qpaged.paged_attention(query, view, metadata, sinks=sinks, backend=backend, **options)
        for backend in backends
    }
    pools = view.key_pages, view.value_pages
    return outs, [
        pool.dequantize() if isinstance(pool, qpaged.QuantizedArray) else pool.astype(jnp.float32)
        for pool in pools
    ]


def filled(shape, formats, dtype, pages, table):
    """A view with Gaussian tokens on the pages of the ``table``, and poison elsewhere."""
    config = qpaged.PagedAttentionCacheMetaData(
        len(table), 1, pages, table.shape[1], table.shape[1] * shape.page_size, shape.page_size,
        shape.kv_heads, shape.head_dim, 0.5,
    )  # fmt: skip
    pools = []
    for seed, format in enumerate(formats):
        view = jax.eval_shape(
            lambda format=format: qpaged.PagedAttentionCacheView.fresh(None, dtype, config, 0, None, format)
        )
        pool = quantize(format, dtype, normal(*view.key_pages.shape, seed=seed))
        if format is not None:
            pool = view.key_pages.like(pool.codes, pool.scales, pool.offsets, pool.outer)
        pools.append(poisoned(pool, table, shape.page_size, shape.lengths))
    return view.replace(key_pages=pools[0], value_pages=pools[1])


def check(shape, formats, dtype, table, pages, chunk=None, backends=tuple(ANYWHERE), sinks=None, **options):
    """The backends against the oracle, and against themselves on a permuted pool.

    A ``chunk`` is the positions of a prefill of the first sequence; a decode step without.
    """
    view = filled(shape, formats, dtype, pages, table)

    def metadata(table):
        if chunk is None:
            return qpaged.PagedAttentionMetadata.decode(position=position, page_table=table)
        return qpaged.PagedAttentionMetadata.prefill(position=position, page_table=table[0])

    position = np.array(shape.lengths, np.int32) - 1 if chunk is None else chunk
    query = normal(len(position), shape.q_heads, shape.head_dim, seed=5).astype(dtype)
    run = functools.partial(attend, query, sinks=sinks, backends=backends, **options)
    outs, (keys, values) = jax.device_get(run(view, metadata(table)))
    unused = np.setdiff1d(np.arange(pages), table)
    assert unused.size and np.isnan(keys[:, unused]).all() and np.isnan(values[:, unused]).all()

    rows = table if chunk is None else np.broadcast_to(table[0], (len(chunk), table.shape[1]))
    want = attention(
        np.asarray(query, np.float32), np.asarray(keys), np.asarray(values), position, rows,
        options.get("softmax_scale", shape.head_dim**-0.5), options.get("sliding_window"),
        options.get("logits_soft_cap"), sinks,
    )  # fmt: skip
    for name in backends:
        assert outs[name].dtype == dtype
        tolerance = EXACT if dtype == jnp.float32 else ROUNDED[name]
        np.testing.assert_allclose(np.asarray(outs[name], np.float32), want, **tolerance)

    order = np.random.default_rng(3).permutation(pages)
    place = np.append(np.argsort(order), pages)
    moved = jax.tree_util.tree_map(lambda leaf: np.asarray(leaf)[:, order], view)
    again, _ = run(moved, metadata(place[table]))
    for name in backends:
        np.testing.assert_array_equal(again[name], outs[name])


@pytest.mark.parametrize(("name", "keys", "values", "dtype"), named())
def test_named_shapes(name, keys, values, dtype):
    shape = small(SHAPES[name])
    table, used = shape.tables()
    pages = used + SPARE
    chunk = None if shape.chunk == 1 else np.arange(shape.lengths[0], dtype=np.int32)[-shape.chunk :]
    check(shape, (keys, values), dtype, np.where(table == used, pages, table), pages, chunk)


@pytest.mark.skipif(not TPU.available, reason=f"the tpu backend {TPU.reason}")
def test_a_ragged_shape_of_the_tpu_kernel():
    from jax.experimental.pallas import tpu as pltpu

    shape = small(SHAPES["8x4k ragged"])
    table, used = shape.tables()
    pages = used + SPARE
    with pltpu.force_tpu_interpret_mode():
        table = np.where(table == used, pages, table)
        check(shape, ("int8", "fp8_e4m3"), jnp.float32, table, pages, backends=("reference", "tpu"))


def test_every_format_has_its_turn():
    assert {format for _, *pair, _ in named() for format in pair} == set(qpaged.available_formats())


HEADS_OF = {format: smallest_head_dim(qpaged.get_quantizer(format)) for format in qpaged.available_formats()}
HEADS_OF |= {None: 1}


@st.composite
def drawn(draw):
    """A shape, a format that takes it, and the options."""
    head_dim, page_size = draw(st.sampled_from([16, 32, 64, 128])), draw(st.sampled_from([1, 2, 16, 32]))
    format = draw(st.sampled_from([name for name, least in HEADS_OF.items() if head_dim % least == 0]))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4, 8]))
    shape = Shape("drawn", (1,), kv_heads * group, kv_heads, head_dim, page_size)
    options = {
        "sliding_window": draw(st.sampled_from([None, 1, page_size, 2 * page_size + 1])),
        "logits_soft_cap": draw(st.sampled_from([None, 3.0])),
        "sinks": normal(kv_heads * group, seed=7) if draw(st.booleans()) else None,
    }
    return shape, (format, format), draw(st.sampled_from([jnp.float32, jnp.bfloat16])), options


@st.composite
def lengths(draw, page_size, count):
    """Of so many sequences: inactive, a token, about a page's end, about the table's, anything."""
    edges = {n * page_size + off for n in (0, 1, 2, PER_SEQUENCE) for off in (-1, 0, 1)} | {0, 1}
    most = PER_SEQUENCE * page_size
    length = st.sampled_from(sorted(n for n in edges if 0 <= n <= most)) | st.integers(0, most)
    return tuple(draw(st.tuples(*[length] * count)))


# Not shrunk: each smaller shape would be compiled anew.
@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
@given(drawn(), st.integers(1, 4), st.booleans(), st.data())
def test_drawn_shapes(drawn, count, prefill, data):
    shape, formats, dtype, options = drawn
    for _ in range(4):  # of one program
        shape = dataclasses.replace(shape, lengths=data.draw(lengths(shape.page_size, count)))
        table = tables(np.random.default_rng(0), shape.page_size, shape.lengths)
        chunk = None
        if prefill:
            start = data.draw(st.integers(0, max(0, shape.lengths[0] - 1)))
            chunk = start + np.arange(9)
            chunk = np.where(chunk < shape.lengths[0], chunk, -1).astype(np.int32)
        check(shape, formats, dtype, table, PAGES, chunk, **options)
