"""Every backend agrees with the oracle at the shapes of the benchmarks, scaled down, and at drawn ones.

Unused pages hold NaN, and a permuted pool gives the same bits.
"""

import dataclasses
import functools
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from shapes import SHAPES, Shape
from support.arrays import normal
from support.attention_oracle import attention
from support.backends import backends_here
from support.filled_pages import PAGES, PER_SEQUENCE, permute_pages, poisoned, shuffled_tables

import qpaged
from qpaged.attention import _tpu, _xla_tiles
from qpaged.testing._pools import head_dim as smallest_head_dim

SCALE = 64  # lengths are divided by it, and so are the slots that backends read at once
MAX_SEQUENCES = 8  # of a shape with more, every 16th sequence is taken
UNUSED = 2  # pages
TPU = qpaged.attention_backends()[0]
# float32 sums of some hundred products in other orders, through an exponential
EXACT = {"rtol": 1e-5, "atol": 2e-5}
# The output is rounded to bfloat16. Before that reference and cpu compute in float32, and others round
# scaled queries, weights and scaled weights: each 2^-9 of values up to 4.
ROUNDED_ONCE = {"rtol": 2**-8, "atol": 2e-5}
ROUNDED_OFTEN = {"rtol": 2**-7, "atol": 4 * 3 * 2**-9}


def scaled_down(shape):
    """Return the shape with shorter sequences, and fewer of many; its raggedness, heads and pages stay."""
    lengths = [length // SCALE for length in shape.lengths]
    every = 1 if len(lengths) <= MAX_SEQUENCES else 16
    return dataclasses.replace(shape, lengths=tuple(lengths[::every]), chunk=max(1, shape.chunk // SCALE))


def named_cases():
    """Return each shape with formats of keys and of values, and a dtype, until every format had its turn."""
    waiting = list(qpaged.available_formats())
    dtypes = itertools.cycle((jnp.float32, jnp.bfloat16))
    count = max(len(SHAPES), -(-len(waiting) // 2))

    def next_fitting(head_dim):
        fits = (one for one in waiting if head_dim % smallest_head_dim(qpaged.get_quantizer(one)) == 0)
        spelling = next(fits)
        waiting.remove(spelling)
        waiting.append(spelling)
        return spelling

    cases = []
    for name in itertools.islice(itertools.cycle(SHAPES), count):
        head_dim = SHAPES[name].head_dim
        cases.append((name, next_fitting(head_dim), next_fitting(head_dim), next(dtypes)))
    return cases


@pytest.fixture(scope="module", autouse=True)
def _smaller_tiles():
    """Give a scaled-down sequence as many tiles as it has at full length."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_xla_tiles, "KV_TILE", _xla_tiles.KV_TILE // SCALE)
        patch.setattr(_xla_tiles, "Q_TILE", 4)
        patch.setattr(_tpu, "KV_TILE", 128)
        yield


@functools.partial(jax.jit, static_argnums=(0, 1))
def quantize(spelling, dtype, values):
    values = values.astype(dtype)
    return values if spelling is None else qpaged.get_quantizer(spelling).quantize(values)


@functools.partial(
    jax.jit, static_argnames=("backends", "softmax_scale", "sliding_window", "logits_soft_cap")
)
def attend(query, view, metadata, backends, sinks=None, **options):
    """Return the attention of each backend by name, and the dequantized keys and values."""
    outs = {
        backend: qpaged.paged_attention(query, view, metadata, sinks=sinks, backend=backend, **options)
        for backend in backends
    }
    pools = view.key_pages, view.value_pages
    return outs, [
        pool.dequantize() if isinstance(pool, qpaged.QuantizedArray) else pool.astype(jnp.float32)
        for pool in pools
    ]


def filled_view_of(shape, spellings, dtype, num_pages, table):
    """Return a view with normal numbers on the pages of the ``table``, and NaN elsewhere."""
    config = qpaged.PagedAttentionCacheMetaData(
        len(table), 1, num_pages, table.shape[1], table.shape[1] * shape.page_size, shape.page_size,
        shape.kv_heads, shape.head_dim, 0.5,
    )  # fmt: skip
    pools = []
    for seed, spelling in enumerate(spellings):
        fresh = functools.partial(
            qpaged.PagedAttentionCacheView.fresh, None, dtype, config, 0, None, spelling
        )
        view = jax.eval_shape(fresh)
        pool = quantize(spelling, dtype, normal(*view.key_pages.shape, seed=seed))
        if spelling is not None:
            pool = view.key_pages.like(pool.codes, pool.parts)
        pools.append(poisoned(pool, table, shape.page_size, shape.lengths))
    return view.replace(key_pages=pools[0], value_pages=pools[1])


def check_backends(
    shape, spellings, dtype, table, num_pages, chunk=None, backends=None, sinks=None, **options
):
    """Check that the backends agree with the oracle, and give the same bits over a permuted pool.

    ``chunk`` holds the positions of a prefill of the first sequence; the step is a decode if it is None.
    Without ``backends``, they are those that take the call and run here.
    """
    view = filled_view_of(shape, spellings, dtype, num_pages, table)

    def metadata(table):
        if chunk is None:
            return qpaged.PagedAttentionMetadata.decode(position=position, page_table=table)
        return qpaged.PagedAttentionMetadata.prefill(position=position, page_table=table[0])

    position = np.array(shape.lengths, np.int32) - 1 if chunk is None else chunk
    query = normal(len(position), shape.q_heads, shape.head_dim, seed=5).astype(dtype)
    if backends is None:
        backends = tuple(backends_here(query, view, metadata(table)))
    run = functools.partial(attend, query, sinks=sinks, backends=backends, **options)
    outs, (keys, values) = jax.device_get(run(view, metadata(table)))
    unused = np.setdiff1d(np.arange(num_pages), table)
    assert unused.size and np.isnan(keys[:, unused]).all() and np.isnan(values[:, unused]).all()

    token_tables = table if chunk is None else np.broadcast_to(table[0], (len(chunk), table.shape[1]))
    expected = attention(
        np.asarray(query, np.float32), np.asarray(keys), np.asarray(values), position, token_tables,
        options.get("softmax_scale", shape.head_dim**-0.5), options.get("sliding_window"),
        options.get("logits_soft_cap"), sinks,
    )  # fmt: skip
    for name in backends:
        assert outs[name].dtype == dtype
        tolerance = EXACT
        if dtype == jnp.bfloat16:
            tolerance = ROUNDED_ONCE if name in ("reference", "cpu") else ROUNDED_OFTEN
        np.testing.assert_allclose(np.asarray(outs[name], np.float32), expected, **tolerance)

    permuted, permuted_table = permute_pages(jax.device_get(view), table, num_pages)
    permuted_outs, _ = run(permuted, metadata(permuted_table))
    for name in backends:
        np.testing.assert_array_equal(permuted_outs[name], outs[name])


@pytest.mark.short(6)
@pytest.mark.parametrize(("name", "keys", "values", "dtype"), named_cases())
def test_backends_agree_at_the_shapes_of_the_benchmarks(name, keys, values, dtype):
    shape = scaled_down(SHAPES[name])
    table, used = shape.tables()
    num_pages = used + UNUSED
    chunk = None if shape.chunk == 1 else np.arange(shape.lengths[0], dtype=np.int32)[-shape.chunk :]
    table = np.where(table == used, num_pages, table)
    check_backends(shape, (keys, values), dtype, table, num_pages, chunk)


@pytest.mark.skipif(not TPU.available, reason=f"the tpu backend {TPU.reason}")
def test_the_tpu_kernel_agrees_at_a_ragged_shape():
    from jax.experimental.pallas import tpu as pltpu

    shape = scaled_down(SHAPES["8x4k ragged"])
    table, used = shape.tables()
    num_pages = used + UNUSED
    table = np.where(table == used, num_pages, table)
    with pltpu.force_tpu_interpret_mode():
        check_backends(
            shape, ("int8", "fp8_e4m3"), jnp.float32, table, num_pages, backends=("reference", "tpu")
        )


def test_every_format_has_its_turn():
    tested = {spelling for _, keys, values, _ in named_cases() for spelling in (keys, values)}
    assert tested == set(qpaged.available_formats())


SMALLEST_HEAD_DIM = {
    spelling: smallest_head_dim(qpaged.get_quantizer(spelling)) for spelling in qpaged.available_formats()
}
SMALLEST_HEAD_DIM[None] = 1


@st.composite
def drawn_cases(draw):
    """Draw a shape, a format that takes it, a dtype, and the options."""
    head_dim, page_size = draw(st.sampled_from([16, 32, 64, 128])), draw(st.sampled_from([1, 2, 16, 32]))
    spellings = [name for name, smallest in SMALLEST_HEAD_DIM.items() if head_dim % smallest == 0]
    spelling = draw(st.sampled_from(spellings))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4, 8]))
    shape = Shape("drawn", (1,), kv_heads * group, kv_heads, head_dim, page_size)
    options = {
        "sliding_window": draw(st.sampled_from([None, 1, page_size, 2 * page_size + 1])),
        "logits_soft_cap": draw(st.sampled_from([None, 3.0])),
        "sinks": normal(kv_heads * group, seed=7) if draw(st.booleans()) else None,
    }
    return shape, (spelling, spelling), draw(st.sampled_from([jnp.float32, jnp.bfloat16])), options


@st.composite
def drawn_lengths(draw, page_size, count):
    """Draw lengths of ``count`` sequences: 0, 1, near the end of a page or of the table, or any."""
    edges = {n * page_size + off for n in (0, 1, 2, PER_SEQUENCE) for off in (-1, 0, 1)} | {0, 1}
    longest = PER_SEQUENCE * page_size
    length = st.sampled_from(sorted(n for n in edges if 0 <= n <= longest)) | st.integers(0, longest)
    return tuple(draw(st.tuples(*[length] * count)))


# Failures are not shrunk, because each smaller shape would be compiled anew.
@settings(
    max_examples=int(os.environ.get("DRAWN_SHAPES", 6)),
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
)
@given(drawn_cases(), st.integers(1, 4), st.booleans(), st.data())
def test_backends_agree_at_drawn_shapes(case, count, prefill, data):
    shape, spellings, dtype, options = case
    for _ in range(4):  # which all run one compiled program
        shape = dataclasses.replace(shape, lengths=data.draw(drawn_lengths(shape.page_size, count)))
        table = shuffled_tables(np.random.default_rng(0), shape.page_size, shape.lengths)
        chunk = None
        if prefill:
            start = data.draw(st.integers(0, max(0, shape.lengths[0] - 1)))
            chunk = start + np.arange(9)
            chunk = np.where(chunk < shape.lengths[0], chunk, -1).astype(np.int32)
        check_backends(shape, spellings, dtype, table, PAGES, chunk, **options)
