"""Pages handed to JAX's own kernels have the same values, and give the same attention."""

import dataclasses
import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import normal

import qpaged
from qpaged import interop
from qpaged._compat import version_tuple
from qpaged.implicit import ImplicitArray

HEADS, PAGES, PAGE_SIZE, HEAD_DIM = 2, 6, 8, 16
CONFIG = qpaged.PagedAttentionCacheMetaData(4, 1, PAGES, 3, 24, PAGE_SIZE, HEADS, HEAD_DIM, 0.5)
# An inactive row, a sequence that ends within a page, one on all its pages, and one past its table.
POSITIONS = np.array([-1, 4, 20, 24])
TABLE = np.array([[PAGES] * 3, [3, PAGES, -1], [5, 0, 2], [1, 4, 99]])
DECODE = qpaged.PagedAttentionMetadata.decode(position=POSITIONS, page_table=TABLE)
PREFILL = qpaged.PagedAttentionMetadata.prefill(position=np.arange(11, 19), page_table=TABLE[2], length=5)
RAGGED = qpaged.PagedAttentionMetadata.ragged(
    position=[2, 3, 4, 17, 18, 19, 20, 0],
    page_tables=np.stack([TABLE[1], TABLE[2], TABLE[0]]),
    starts=[0, 3, 7, 7],
)
EMPTY = qpaged.PagedAttentionMetadata.init_empty()

needs_interpreter = pytest.mark.skipif(
    version_tuple(jax.__version__) < (0, 10), reason="the kernels of older JAX cannot be interpreted"
)
# float32 sums of some tens of products in other orders, through an exponential; the TPU kernel's reading of
# scales that are rounded moves a score by 2^-22 of itself, 5e-6 for one of 20.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
promoting = functools.partial(jax.numpy_dtype_promotion, "standard")  # as the kernels are written


@functools.cache
def view_of(key_spelling, value_spelling, dtype=jnp.float32):
    """Return a view of these formats whose every slot holds a token."""
    shape = HEADS, PAGES, PAGE_SIZE, HEAD_DIM
    keys = quantize(key_spelling, normal(*shape, seed=1, scale=1.5).astype(dtype))
    values = quantize(value_spelling, normal(*shape, seed=2, scale=1.5).astype(dtype))
    return qpaged.PagedAttentionCacheView(CONFIG, 0, keys, values)


@functools.partial(jax.jit, static_argnums=0)
def quantize(spelling, values):
    return values if spelling is None else qpaged.get_quantizer(spelling).quantize(values)


dequantize = jax.jit(qpaged.QuantizedArray.dequantize)


def reference(view, metadata=DECODE):
    """Return a query, and its attention on the reference backend with a softmax_scale of 1."""
    query = normal(len(POSITIONS) if metadata is DECODE else 8, 2 * HEADS, HEAD_DIM, seed=5)
    attend = functools.partial(qpaged.paged_attention, backend="reference", softmax_scale=1.0)
    return query, jax.jit(attend)(query, view, metadata)


@pytest.mark.parametrize(
    ("spelling", "dtype", "same_bytes"),
    [
        ("int8:token", jnp.int8, True),
        ("fp8_e4m3", jnp.float8_e4m3fn, True),
        ("fp8_e5m2:token", jnp.float8_e5m2, True),
        ("int4:page", jnp.int8, False),
        ("fp8_e4m3:tensor", jnp.float8_e4m3fn, True),
        ("fp8_e5m2:head", jnp.float8_e5m2, True),
    ],
)
def test_scaled_pages_times_their_scales_are_the_values(spelling, dtype, same_bytes):
    view = view_of(spelling, "int8:token")
    pages, values = jax.jit(lambda view: (interop.scaled_pages(view), view.key_pages.dequantize()))(view)
    assert pages.k_pages.dtype == dtype and pages.k_scales_pages.shape == (HEADS, PAGES, PAGE_SIZE)
    read = np.asarray(pages.k_pages.astype(jnp.float32)) * np.asarray(pages.k_scales_pages)[..., None]
    np.testing.assert_array_equal(read, values)
    if same_bytes:
        assert np.asarray(pages.k_pages).tobytes() == np.asarray(view.key_pages.codes).tobytes()


@pytest.mark.parametrize(
    ("spelling", "loss"),
    [("int8:token", 4 * 2.0**-24), ("int4:token", 0), ("int4:page", 0), ("int6:token", 0), ("int3:page", 0)],
)
def test_quantized_tensors_read_as_the_values(spelling, loss):
    view = view_of(spelling, spelling)
    for tensor, pool in zip(
        jax.jit(interop.quantized_tensors)(view), (view.key_pages, view.value_pages), strict=True
    ):
        assert tensor.weight.dtype == jnp.int8 and tensor.scales.dtype == jnp.float32
        assert tensor.scales.shape == (HEADS, PAGES, PAGE_SIZE, 1)
        read = np.asarray(tensor.weight, np.float32) * np.asarray(tensor.scales) / np.float32(127.5)
        np.testing.assert_allclose(read, dequantize(pool), rtol=loss, atol=0)


def test_plain_pages_are_passed_on():
    view = view_of(None, "raw", jnp.bfloat16)
    keys, values = interop.quantized_tensors(view)
    pages = interop.scaled_pages(view)
    assert keys is view.key_pages is pages.k_pages
    np.testing.assert_array_equal(values, view.value_pages.materialize())
    np.testing.assert_array_equal(pages.v_pages, values)
    assert pages.k_scales_pages is None and pages.v_scales_pages is None


@pytest.mark.parametrize("spelling", ["int8", "fp8_e4m3"])
def test_interleaved_pages_lose_nothing_in_bfloat16(spelling):
    view = view_of(spelling, spelling, jnp.bfloat16)
    pages = jax.jit(interop.interleaved_pages)(view)
    assert pages.shape == (PAGES, PAGE_SIZE, 2 * HEADS, HEAD_DIM) and pages.dtype == jnp.bfloat16
    for first, pool in enumerate((view.key_pages, view.value_pages)):
        heads = pages[:, :, first::2].transpose(2, 0, 1, 3).astype(jnp.float32)
        np.testing.assert_array_equal(heads, dequantize(pool))


def test_decode_sequences_are_lengths_and_page_tables():
    lengths, pages = jax.jit(interop.decode_sequences)(view_of(None, None), DECODE)
    assert lengths.dtype == pages.dtype == jnp.int32
    np.testing.assert_array_equal(lengths, [0, 5, 21, 0])
    np.testing.assert_array_equal(pages, [[0, 0, 0], [3, 0, 0], [5, 0, 2], [1, 4, 0]])


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (DECODE, ([1, 5, 21, 1], [[0, 0, 0], [3, 0, 0], [5, 0, 2], [1, 4, 0]], [0, 1, 2, 3, 4], [4])),
        (PREFILL, ([16], [[5, 0, 2]], [0, 5], [1])),
        (RAGGED, ([5, 21, 1], [[3, 0, 0], [5, 0, 2], [0, 0, 0]], [0, 3, 7, 7], [2])),
    ],
)
def test_ragged_sequences_are_lengths_page_tables_and_queries(metadata, expected):
    sequences = jax.jit(interop.ragged_sequences)(view_of(None, None), metadata)
    assert {array.dtype for array in sequences} == {jnp.dtype(jnp.int32)}
    for array, values in zip(sequences, expected, strict=True):
        np.testing.assert_array_equal(array, values)


@needs_interpreter
def test_the_tpu_kernel_of_jax_agrees_with_the_reference():
    from jax.experimental.pallas import tpu as pltpu
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    view = view_of("int8:token", "int4:page")
    query, expected = reference(view)
    with promoting(), pltpu.force_tpu_interpret_mode():
        pages, sequences = interop.quantized_tensors(view), interop.decode_sequences(view, DECODE)
        out = paged_attention(query, *pages, *sequences, pages_per_compute_block=1)
    np.testing.assert_allclose(out, expected, **TOLERANCE)


@needs_interpreter
@pytest.mark.filterwarnings("ignore:jax.experimental.pallas.ops.gpu.paged_attention is deprecated")
def test_the_gpu_kernel_of_jax_agrees_with_the_reference():
    module = pytest.importorskip("jax.experimental.pallas.ops.gpu.paged_attention")
    view = view_of("fp8_e4m3", "int8:token")
    query, expected = reference(view)
    lengths, tables = interop.decode_sequences(view, DECODE)
    pages = interop.scaled_pages(view)
    with promoting():
        out = module.paged_attention(
            query, block_tables=tables, lengths=lengths, **pages._asdict(),
            pages_per_compute_block=1, k_splits=1, interpret=True,
        )  # fmt: skip
    np.testing.assert_allclose(out, expected, **TOLERANCE)


@needs_interpreter
@pytest.mark.parametrize(
    ("metadata", "rows"), [(DECODE, slice(1, 3)), (PREFILL, slice(0, 5)), (RAGGED, slice(0, 7))]
)
def test_the_ragged_reference_of_jax_agrees_with_the_reference(metadata, rows):
    """The interpreter cannot run the ragged kernel, which reads reshaped buffers: its reference stands in."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

    view = view_of("int8", "int8:token")
    query, expected = reference(view, metadata)
    sequences = [np.asarray(array) for array in interop.ragged_sequences(view, metadata)]

    @jax.jit
    def attend(query, view):
        return ref_ragged_paged_attention(query, interop.interleaved_pages(view), *sequences)

    with promoting():
        out = attend(query, view)
    np.testing.assert_allclose(out[rows], expected[rows], **TOLERANCE)


@needs_interpreter
@pytest.mark.parametrize(("metadata", "rows"), [(DECODE, slice(1, 3)), (PREFILL, slice(0, 5))])
def test_the_ragged_reference_of_jax_agrees_under_static_scales(metadata, rows):
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

    view = view_of("fp8_e4m3:tensor", "fp8_e4m3:tensor")
    query, expected = reference(view, metadata)
    sequences = [np.asarray(array) for array in interop.ragged_sequences(view, metadata)]
    pages, k_scale, v_scale = interop.scaled_interleaved_pages(view)
    assert pages.dtype == jnp.float8_e4m3fn and k_scale != v_scale
    with promoting():
        out = ref_ragged_paged_attention(query, pages, *sequences, k_scale=k_scale, v_scale=v_scale)
    np.testing.assert_allclose(out[rows], expected[rows], **TOLERANCE)


@pytest.mark.parametrize(("name", "dtype"), [("fp8_e4m3", jnp.float8_e4m3fn), ("fp8_e5m2", jnp.float8_e5m2)])
def test_scaled_interleaved_pages_times_their_scales_are_the_values(name, dtype):
    view = view_of(f"{name}:tensor", f"{name}:tensor")
    pages, *scales = interop.scaled_interleaved_pages(view)
    assert pages.shape == (PAGES, PAGE_SIZE, 2 * HEADS, HEAD_DIM) and pages.dtype == dtype
    for first, pool in enumerate((view.key_pages, view.value_pages)):
        heads = pages[:, :, first::2].transpose(2, 0, 1, 3).astype(jnp.float32)
        np.testing.assert_array_equal(heads * np.float32(scales[first]), dequantize(pool))


@needs_interpreter
def test_the_ragged_kernel_of_jax_takes_the_arrays_and_static_scales():
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    config = dataclasses.replace(CONFIG, kv_head_dim_size=128)
    view = qpaged.PagedAttentionCacheView.init(None, jnp.bfloat16, config, 0, None, "fp8_e4m3:tensor")
    pages, k_scale, v_scale = interop.scaled_interleaved_pages(view.with_scales(key=0.5, value=0.25))
    assert (k_scale, v_scale) == (0.5, 0.25)
    sequences = interop.ragged_sequences(view, DECODE)

    def attend(query):
        return ragged_paged_attention(
            query, pages, *sequences, k_scale=k_scale, v_scale=v_scale,
            num_kv_pages_per_block=1, num_queries_per_block=4,
        )  # fmt: skip

    query = jax.ShapeDtypeStruct((len(POSITIONS), 2 * HEADS, 128), jnp.bfloat16)
    with promoting():
        assert jax.eval_shape(attend, query).shape == query.shape


@needs_interpreter
def test_the_ragged_kernel_of_jax_takes_the_arrays():
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    def attend(query):
        config = dataclasses.replace(CONFIG, kv_head_dim_size=128)
        view = qpaged.PagedAttentionCacheView.fresh(None, query.dtype, config, 0, None, "int8")
        pages, sequences = interop.interleaved_pages(view), interop.ragged_sequences(view, DECODE)
        return ragged_paged_attention(
            query, pages, *sequences, num_kv_pages_per_block=1, num_queries_per_block=4
        )

    query = jax.ShapeDtypeStruct((len(POSITIONS), 2 * HEADS, 128), jnp.bfloat16)
    with promoting():
        assert jax.eval_shape(attend, query).shape == query.shape


REFUSED = {  # by scaled_pages, with the message
    "int8/int8:token": "view must hold pages whose values are int8 or float8_e4m3fn or float8_e5m2 numbers "
    "times one scale for each slot, but its keys are int8, which reads its codes as numbers of magnitude 0.5 "
    "to 127.5; take interleaved_pages, which decodes them, or qpaged.paged_attention, which takes every "
    "format.",
    "int8:token/int8:channel": "its values are int8:channel, which has 16 scales along the channels; take",
    "int8:token/int8:token+offset": "values are int8:token+offset, which adds an offset to each block; take",
    "int8:token+rotate/raw": "its keys are int8:token+rotate, which holds transformed channels; take",
}
REFUSED_FOR_TPU = {  # by quantized_tensors
    "fp8_e4m3/raw": "values are int8 numbers times one scale for each slot, but its keys are fp8_e4m3, which",
    "raw/int8:token": "view must hold keys and values that are both plain or both quantized, since the "
    "kernel takes scales for both or for neither, but its keys are plain and its values quantized; give both "
    "the same kind of format, or take qpaged.paged_attention.",
}


REFUSED_WITH_ONE_SCALE = {  # by scaled_interleaved_pages
    "fp8_e4m3/fp8_e4m3:tensor": "view must hold pages whose values are 8-bit floats times one static scale, "
    "as fp8_e4m3:tensor, but its keys are fp8_e4m3, which has no static scales; take interleaved_pages, "
    "which decodes them, or qpaged.paged_attention, which takes every format.",
    "fp8_e4m3:tensor/fp8_e4m3:head": "its values are fp8_e4m3:head, which has 2 scales, one for each KV head",
    "fp8_e4m3:tensor+rotate/raw": "its keys are fp8_e4m3:tensor+rotate, which holds transformed channels;",
    "fp8_e4m3:tensor/raw": "its values are raw, which has no static scales;",
    "fp8_e4m3:tensor/fp8_e5m2:tensor": "view must hold keys and values of one dtype, since the kernel takes "
    "both in one array, but its keys are float8_e4m3fn and its values float8_e5m2; take interleaved_pages, "
    "which decodes them.",
}


def test_static_scales_that_are_traced_are_refused():
    message = (
        "view must hold scales that are known, since the kernel takes them as Python numbers, but those of "
        "its keys are traced; call scaled_interleaved_pages outside of jit."
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        jax.jit(interop.scaled_interleaved_pages)(view_of("fp8_e4m3:tensor", "fp8_e4m3:tensor"))


@pytest.mark.parametrize(
    ("adapter", "spellings", "message"),
    [(interop.scaled_pages, *refused) for refused in REFUSED.items()]
    + [(interop.quantized_tensors, *refused) for refused in REFUSED_FOR_TPU.items()]
    + [(interop.scaled_interleaved_pages, *refused) for refused in REFUSED_WITH_ONE_SCALE.items()],
)
def test_formats_that_a_kernel_cannot_read_exactly_are_refused(adapter, spellings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        adapter(view_of(*spellings.split("/")))


BOTH = PREFILL.replace(decodes_position=POSITIONS, decodes_page_table=TABLE)


@pytest.mark.parametrize(
    ("adapter", "metadata", "message"),
    [
        (
            interop.decode_sequences,
            PREFILL,
            "metadata must be of a decode alone, since the kernels take one query for each sequence, but is "
            "of a prefill; build it with PagedAttentionMetadata.decode.",
        ),
        (interop.decode_sequences, BOTH, "but is of a prefill and a decode; build it with"),
        (
            interop.ragged_sequences,
            EMPTY,
            "metadata must be of a ragged batch, a prefill or a decode, but is of neither; make both one "
            "with PagedAttentionMetadata.ragged, or call the kernel once for each.",
        ),
        (interop.ragged_sequences, BOTH, "but is of a prefill and a decode; make both one with"),
        (interop.decode_sequences, RAGGED, "but is of a ragged batch; build it with"),
    ],
)
def test_steps_that_a_kernel_does_not_take_are_refused(adapter, metadata, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        adapter(view_of(None, None), metadata)


def test_implicit_arrays_of_another_class_are_decoded_or_refused():
    pool = Zeros(shape=CONFIG.pool_shape, dtype=jnp.float32)
    view = qpaged.PagedAttentionCacheView(CONFIG, 0, pool, pool)
    with pytest.raises(
        TypeError, match=re.escape("its keys are of type Zeros; take interleaved_pages, which")
    ):
        interop.scaled_pages(view)
    assert not interop.interleaved_pages(view).any()


class Zeros(ImplicitArray):
    """An implicit array that is no QuantizedArray."""

    def materialize(self):
        return jnp.zeros(self.shape, self.dtype)


def test_importing_interop_imports_no_kernels():
    code = "import sys, qpaged.interop; sys.exit('jax.experimental.pallas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="this JAX has no meshes of Explicit axes")
def test_sharded_pages_stay_where_they_are():
    mesh = jax.make_mesh((HEADS,), ("heads",), axis_types=(jax.sharding.AxisType.Explicit,))
    # The stored rows of these pools hold two slots each.
    config = qpaged.PagedAttentionCacheMetaData(4, 1, PAGES, 3, 48, 16, HEADS, 64, 0.5)
    by_head = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("heads"))
    with jax.set_mesh(mesh):
        view = qpaged.PagedAttentionCacheView.fresh(None, jnp.bfloat16, config, 0, None, "int8:token")
        assert view.key_pages.slots_per_row == 2
        view = jax.tree_util.tree_map(lambda leaf: jax.device_put(leaf, by_head), view)
        for pages in (interop.quantized_tensors(view), interop.scaled_pages(view)):
            for leaf in jax.tree_util.tree_leaves(pages):
                assert leaf.sharding.spec[0] == "heads"
        assert interop.interleaved_pages(view).sharding.spec[2] == "heads"
