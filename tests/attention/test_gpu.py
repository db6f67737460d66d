"""The ``gpu`` backend, interpreted, agrees with the reference; and it declines the calls that it must."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import normal
from support.filled_pages import CHUNK, PADDED_CHUNK, combined_step, filled_view

import qpaged
from qpaged import _compat
from qpaged.attention import _gpu, _layout

GPU = next(backend for backend in qpaged.attention_backends() if backend.name == "gpu")


def interpreter():
    """Return JAX's interpreter of Mosaic GPU kernels, public since 0.11; None if there is none."""
    if not GPU.available:
        return None
    from jax.experimental.pallas import mosaic_gpu

    return getattr(mosaic_gpu, "force_gpu_interpret_mode", None)


needs_interpreter = pytest.mark.skipif(
    interpreter() is None, reason="this JAX interprets no Mosaic GPU kernels"
)

SEQUENCES = (0, 100)
CASES = {  # head_dim, page_size, options
    "plain": (64, 64, {"sliding_window": 70}),
    "int8:token+offset/fp8_e4m3": (64, 32, {"sinks": True}),
    "int4:token/int8": (64, 32, {"logits_soft_cap": 3.0, "sinks": True}),
    "int6:token/int6:page+offset": (128, 32, {"sliding_window": 70}),
    "int5:page/int3:token": (256, 32, {}),
    "fp8_e4m3:tensor/fp8_e4m3:head": (64, 32, {}),
}
# The kernel rounds weights to bfloat16 before it multiplies values with them, and the output is rounded, too.
ROUNDING = 2.0**-8


@functools.partial(jax.jit, static_argnames=("backend", "sliding_window", "logits_soft_cap"))
def attend(query, view, metadata, sinks=None, **options):
    return qpaged.paged_attention(query, view, metadata, sinks=sinks, **options)


@needs_interpreter
@pytest.mark.parametrize("name", CASES)
def test_the_interpreted_kernel_agrees_with_the_reference(name, monkeypatch):
    monkeypatch.setattr(_gpu, "PROGRAMS", 4)  # a prefill of 2 KV heads then has two splits
    head_dim, page_size, options = CASES[name]
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = normal(6, seed=7)
    spelling = None if name == "plain" else name
    view, table = filled_view(spelling, 2, head_dim, page_size, SEQUENCES)
    if spelling is None:
        view = jax.tree_util.tree_map(lambda pool: pool.astype(jnp.bfloat16), view)
    table = table.copy()
    table[1, 1] = -1  # a missing page in the middle
    metadata = combined_step(table, SEQUENCES)
    query = normal(PADDED_CHUNK + len(SEQUENCES), 6, head_dim, seed=5).astype(jnp.bfloat16)
    expected = attend(query, view, metadata, backend="reference", **options)
    with interpreter()():
        out = attend(query, view, metadata, backend="gpu", **options)
    assert not out[CHUNK : PADDED_CHUNK + 1].any()  # padding, and the inactive row
    largest = 5.0  # of some thousand normal numbers
    np.testing.assert_allclose(np.float32(out), np.float32(expected), rtol=ROUNDING, atol=ROUNDING * largest)


def reason_declined(
    spelling,
    query_dtype=jnp.bfloat16,
    q_heads=4,
    head_dim=128,
    page_size=16,
    dtype=jnp.bfloat16,
):
    """Return why the backend declines a decode over pages of a format, or None."""
    config = qpaged.PagedAttentionCacheMetaData(2, 1, 8, 4, 4 * page_size, page_size, 2, head_dim, 0.5)
    view = jax.eval_shape(
        lambda: qpaged.PagedAttentionCacheView.fresh(None, dtype, config, 0, None, spelling)
    )
    query = jax.ShapeDtypeStruct((2, q_heads, head_dim), query_dtype)
    metadata = qpaged.PagedAttentionMetadata.decode(
        position=np.zeros(2, int), page_table=np.zeros((2, 4), int)
    )
    return qpaged.attention_backends(query, view, metadata)[1].reason


@pytest.mark.parametrize(
    ("programs", "kv_tiles", "splits"),
    [(8, 2048, 30), (64, 64, 4), (512, 128, 2), (2048, 16, 1), (8, 2, 2), (1, 1, 1)],
)
def test_splits_fill_a_chip(programs, kv_tiles, splits):
    assert _gpu._num_splits(programs, kv_tiles) == splits


@pytest.fixture
def supported(monkeypatch):
    """Make it look as if JAX is new enough, absl-py is installed, and no mesh is partitioned."""
    monkeypatch.setattr(jax, "__version__", _compat.dotted(_compat.MOSAIC_GPU_JAX))
    monkeypatch.setattr(_gpu.importlib.util, "find_spec", lambda name: name == "absl")
    monkeypatch.setattr(_layout, "compiler_partitions_mesh", lambda: False)
    return monkeypatch


def test_a_supported_environment_is_not_refused(supported):
    assert _gpu.refusal() is None


def test_an_older_jax_is_refused(supported):
    supported.setattr(jax, "__version__", "0.10.2")
    assert _gpu.refusal() == "needs JAX 0.11 or newer, but this is 0.10.2"


def test_a_missing_absl_is_refused(supported):
    supported.setattr(_gpu.importlib.util, "find_spec", lambda name: None)
    assert _gpu.refusal() == "needs absl-py, which JAX's Mosaic GPU imports; pip install absl-py"


def test_a_partitioned_mesh_is_refused(supported):
    supported.setattr(_layout, "compiler_partitions_mesh", lambda: True)
    assert "call it within jax.shard_map" in _gpu.refusal()


@pytest.mark.skipif(not GPU.available, reason=f"the gpu backend {GPU.reason}")
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"spelling": "int8", "head_dim": 96}, "takes a head_dim of 64, 128, 256, but it is 96"),
        ({"spelling": "int8", "page_size": 8}, "takes a page_size of 16, 32, 64, 128, 256, but it is 8"),
        ({"spelling": "int8", "q_heads": 130}, "takes at most 64 query heads of a KV head, but there are 65"),
        (
            {"spelling": "int8", "query_dtype": jnp.float32},
            "keys: computes in bfloat16, but they ask for float32",
        ),
        ({"spelling": "int8/nvfp4"}, "values: nvfp4 has scales of two levels"),
        ({"spelling": "int8:channel"}, "keys: int8:channel has several scales along the channels"),
        (
            {"spelling": "int5:token"},
            "keys: int5:token has codes in two planes, and the high one has 16 bytes",
        ),
        ({"spelling": "int8", "dtype": jnp.bfloat16}, None),
        ({"spelling": "int6:token"}, None),
    ],
)
def test_calls_are_declined_with_the_reason(arguments, reason):
    declined = reason_declined(**arguments)
    if reason is None:
        assert declined is None
    else:
        assert reason in declined


def test_the_backend_is_taken_only_by_name():
    assert qpaged.attention._backends.BACKENDS["gpu"].by_name_only
