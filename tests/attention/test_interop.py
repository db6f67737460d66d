"""Pages handed to JAX's own kernels: the same values, and the same attention."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formats import normal

import qpaged
from qpaged import interop
from qpaged._compat import version_tuple

HEADS, PAGES, PAGE_SIZE, HEAD_DIM = 2, 6, 8, 16
CONFIG = qpaged.PagedAttentionCacheMetaData(4, 1, PAGES, 3, 24, PAGE_SIZE, HEADS, HEAD_DIM, 0.5)
# An inactive row, a sequence that ends within a page, one on all its pages, and one past its table.
POSITIONS = np.array([-1, 4, 20, 24])
TABLE = np.array([[PAGES] * 3, [3, PAGES, -1], [5, 0, 2], [1, 4, 99]])
DECODE = qpaged.PagedAttentionMetadata.decode(position=POSITIONS, page_table=TABLE)
PREFILL = qpaged.PagedAttentionMetadata.prefill(position=np.arange(11, 19), page_table=TABLE[2], length=5)
EMPTY = qpaged.PagedAttentionMetadata.init_empty()

kernels = pytest.mark.skipif(
    version_tuple(jax.__version__) < (0, 10), reason="older kernels of JAX are not interpreted as its own are"
)
# float32 sums of some tens of products in other orders, through an exponential; the TPU kernel's reading of
# scales that are rounded moves a score by 2^-22 of itself, 5e-6 for one of 20.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
promoting = functools.partial(jax.numpy_dtype_promotion, "standard")  # as the kernels are written


@functools.cache
def view_of(keys, values, dtype=jnp.float32):
    """A view whose every slot holds something."""

    def pool(format, seed):
        x = normal(HEADS, PAGES, PAGE_SIZE, HEAD_DIM, seed=seed, scale=1.5).astype(dtype)
        return x if format is None else qpaged.get_quantizer(format).quantize(x)

    return qpaged.PagedAttentionCacheView(CONFIG, 0, pool(keys, 1), pool(values, 2))


@functools.cache
def reference(keys, values, dtype=jnp.float32, metadata="decode"):
    """A query, and what the reference gives for it with a softmax_scale of 1."""
    metadata = {"decode": DECODE, "prefill": PREFILL}[metadata]
    rows = len(POSITIONS) if metadata is DECODE else 8
    query = normal(rows, 2 * HEADS, HEAD_DIM, seed=5)
    attend = functools.partial(qpaged.paged_attention, backend="reference", softmax_scale=1.0)
    return query, attend(query, view_of(keys, values, dtype), metadata)


@pytest.mark.parametrize(
    ("format", "dtype", "kept"),
    [
        ("int8:token", jnp.int8, True),
        ("fp8_e4m3", jnp.float8_e4m3fn, True),
        ("fp8_e5m2:token", jnp.float8_e5m2, True),
        ("int4:token", jnp.int8, False),
        ("int4:page", jnp.int8, False),
        ("mxfp4:group16", jnp.int8, False),
    ],
)
def test_scaled_pages_are_the_values(format, dtype, kept):
    view = view_of(format, "int8:token")
    pages = interop.scaled_pages(view)
    assert pages.k_pages.dtype == dtype and pages.k_scales_pages.shape == (HEADS, PAGES, PAGE_SIZE)
    read = np.asarray(pages.k_pages.astype(jnp.float32)) * np.asarray(pages.k_scales_pages)[..., None]
    np.testing.assert_array_equal(read, view.key_pages.dequantize())
    assert not kept or np.asarray(pages.k_pages).tobytes() == np.asarray(view.key_pages.codes).tobytes()


@pytest.mark.parametrize(
    ("format", "loss"), [("int8:token", 4 * 2.0**-24), ("int4:token", 0), ("int4:page", 0)]
)
def test_quantized_tensors_are_the_values(format, loss):
    view = view_of(format, format)
    pools = view.key_pages, view.value_pages
    for tensor, pool in zip(interop.quantized_tensors(view), pools, strict=True):
        assert tensor.weight.dtype == jnp.int8 and tensor.scales.dtype == jnp.float32
        assert tensor.scales.shape == (HEADS, PAGES, PAGE_SIZE, 1)
        read = np.asarray(tensor.weight, np.float32) * np.asarray(tensor.scales) / np.float32(127.5)
        np.testing.assert_allclose(read, pool.dequantize(), rtol=loss, atol=0)


def test_plain_pages_are_handed_over():
    view = view_of(None, "raw", jnp.bfloat16)
    keys, values = interop.quantized_tensors(view)
    pages = interop.scaled_pages(view)
    assert keys is view.key_pages is pages.k_pages
    np.testing.assert_array_equal(values, view.value_pages.materialize())
    np.testing.assert_array_equal(pages.v_pages, values)
    assert pages.k_scales_pages is None and pages.v_scales_pages is None


@pytest.mark.parametrize("format", ["int8", "fp8_e4m3"])
def test_interleaved_pages_lose_nothing_in_bfloat16(format):
    view = view_of(format, format, jnp.bfloat16)
    pages = interop.interleaved_pages(view)
    assert pages.shape == (PAGES, PAGE_SIZE, 2 * HEADS, HEAD_DIM) and pages.dtype == jnp.bfloat16
    for first, pool in enumerate((view.key_pages, view.value_pages)):
        heads = pages[:, :, first::2].transpose(2, 0, 1, 3).astype(jnp.float32)
        np.testing.assert_array_equal(heads, pool.dequantize())


def test_decode_sequences():
    lengths, pages = jax.jit(interop.decode_sequences)(view_of(None, None), DECODE)
    assert lengths.dtype == pages.dtype == jnp.int32
    np.testing.assert_array_equal(lengths, [0, 5, 21, 0])
    np.testing.assert_array_equal(pages, [[0, 0, 0], [3, 0, 0], [5, 0, 2], [1, 4, 0]])


def test_ragged_sequences():
    made = jax.jit(interop.ragged_sequences)
    found = made(view_of(None, None), DECODE), made(view_of(None, None), PREFILL)
    want = (
        ([1, 5, 21, 1], [[0, 0, 0], [3, 0, 0], [5, 0, 2], [1, 4, 0]], [0, 1, 2, 3, 4], [4]),
        ([16], [[5, 0, 2]], [0, 5], [1]),
    )
    for sequences, expected in zip(found, want, strict=True):
        assert {array.dtype for array in sequences} == {jnp.dtype(jnp.int32)}
        for array, values in zip(sequences, expected, strict=True):
            np.testing.assert_array_equal(array, values)


@kernels
@pytest.mark.parametrize(
    ("keys", "values", "dtype"), [("int8:token", "int4:page", jnp.float32), (None, "raw", jnp.bfloat16)]
)
def test_tpu_kernel(keys, values, dtype):
    from jax.experimental.pallas import tpu as pltpu
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    view = view_of(keys, values, dtype)
    query, want = reference(keys, values, dtype)
    with promoting(), pltpu.force_tpu_interpret_mode():
        pages, sequences = interop.quantized_tensors(view), interop.decode_sequences(view, DECODE)
        got = paged_attention(query, *pages, *sequences, pages_per_compute_block=1)
    np.testing.assert_allclose(got, want, **TOLERANCE)


@kernels
@pytest.mark.parametrize(("keys", "values"), [("int8:token", "fp8_e4m3"), (None, "int4:page")])
def test_gpu_kernel(keys, values):
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    view = view_of(keys, values)
    query, want = reference(keys, values)
    lengths, tables = interop.decode_sequences(view, DECODE)
    pages = interop.scaled_pages(view)
    with promoting():
        attend = functools.partial(paged_attention, pages_per_compute_block=1, k_splits=1, interpret=True)
        got = attend(query, block_tables=tables, lengths=lengths, **pages._asdict())
    np.testing.assert_allclose(got, want, **TOLERANCE)


@kernels
@pytest.mark.parametrize("metadata", ["decode", "prefill"])
def test_ragged_kernel(metadata):
    """Its package's own reference in its place: what interprets kernels cannot read the reshaped buffers that
    the kernel does."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

    view = view_of("int8", "int8:channel+offset+rotate")
    query, want = reference("int8", "int8:channel+offset+rotate", metadata=metadata)
    step = {"decode": DECODE, "prefill": PREFILL}[metadata]
    sequences = interop.ragged_sequences(view, step)
    with promoting():
        got = ref_ragged_paged_attention(query, interop.interleaved_pages(view), *sequences)
    rows = slice(1, 3) if metadata == "decode" else slice(0, 5)
    np.testing.assert_allclose(got[rows], want[rows], **TOLERANCE)


@kernels
def test_ragged_kernel_takes_the_arrays():
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    view = view_of("int8", "int8", jnp.bfloat16)
    query = normal(len(POSITIONS), 2 * HEADS, HEAD_DIM).astype(jnp.bfloat16)
    sequences = interop.ragged_sequences(view, DECODE)
    kernel = functools.partial(ragged_paged_attention, num_kv_pages_per_block=1, num_queries_per_block=4)
    with promoting():
        out = jax.eval_shape(kernel, query, interop.interleaved_pages(view), *sequences)
    assert out.shape == query.shape


@pytest.mark.parametrize(
    ("format", "adapter", "message"),
    [
        (
            "int8/int8:token",
            interop.scaled_pages,
            "view must hold pages whose values are int8 or float8_e4m3fn or float8_e5m2 numbers times one "
            "scale for each slot, but its keys are int8, which reads its codes as numbers of magnitude 0.5 to "
            "127.5; take interleaved_pages, which decodes them, or qpaged.paged_attention",
        ),
        ("int8:token/int8:channel", interop.quantized_tensors, "its values are int8:channel, which has 16 sc"),
        ("int8:token/int8:token+offset", interop.scaled_pages, "values are int8:token+offset, which adds an "),
        ("int8:token+rotate/raw", interop.scaled_pages, "int8:token.rotate, which holds transformed channels"),
        ("fp8_e4m3/raw", interop.quantized_tensors, "reads its codes as numbers of magnitude 0.001953.* to 448"),
        (
            "raw/int8:token",
            interop.quantized_tensors,
            "view must hold keys and values that are both plain or both quantized, since the kernel takes "
            "scales for both or for neither, but its keys are plain and its values quantized; give both",
        ),
    ],
)
def test_formats_that_a_kernel_cannot_read_exactly(format, adapter, message):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        adapter(view_of(*format.split("/")))


@pytest.mark.parametrize(
    ("adapter", "metadata", "message"),
    [
        (interop.decode_sequences, PREFILL, "metadata must be of a decode alone, .* but is of a prefill; build"),
        (interop.decode_sequences, EMPTY, "but is of neither; build it with PagedAttentionMetadata.decode"),
        (interop.ragged_sequences, EMPTY, "metadata must be of a prefill or of a decode, but is of neither; ca"),
        (
            interop.ragged_sequences,
            PREFILL.replace(decodes_position=POSITIONS, decodes_page_table=TABLE),
            "but is of a prefill and a decode; call the kernel once for each",
        ),
    ],
)
def test_steps_that_a_kernel_does_not_take(adapter, metadata, message):
    with pytest.raises(ValueError, match=message):
        adapter(view_of(None, None), metadata)


def test_foreign_pages():
    from qpaged.implicit import ImplicitArray

    class Foreign(ImplicitArray):
        def materialize(self):
            return jnp.zeros(CONFIG.pool_shape)

    pool = Foreign(shape=CONFIG.pool_shape, dtype=jnp.float32)
    view = qpaged.PagedAttentionCacheView(CONFIG, 0, pool, pool)
    with pytest.raises(TypeError, match="qpaged.QuantizedArray, but its keys are of type Foreign; take interl"):
        interop.scaled_pages(view)
    assert not interop.interleaved_pages(view).any()


def test_importing_it_imports_no_kernels():
    code = "import sys, qpaged.interop; sys.exit('jax.experimental.pallas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
