"""The ``tpu`` backend, interpreted, agrees with the reference; and it declines the calls that it must."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.arrays import normal
from support.filled_pages import (
    CHUNK,
    PADDED_CHUNK,
    PAGES,
    combined_step,
    decode_step,
    filled_view,
    permute_pages,
)

import qpaged
from qpaged.arrays import not_elementwise
from qpaged.attention import _tpu

PAGE_SIZE, SEQUENCES = 64, (0, 1, 64, 300)  # the longest has three tiles of 128 slots
TPU = qpaged.attention_backends()[0]
needs_tpu_backend = pytest.mark.skipif(not TPU.available, reason=f"the tpu backend {TPU.reason}")

# Every way in which codes, scales and offsets lie, of keys and of values; one slot to a row, and several.
CASES = {  # head_dim, options
    "raw/int8": (64, {"sliding_window": 11}),
    "int8:token+offset/int8:channel+offset": (128, {"sinks": True}),
    "int8:channel+offset/int4+rotate": (128, {"logits_soft_cap": 3.0}),
    "int4:channel+offset/int4:token": (64, {"sliding_window": 20, "sinks": True}),
    "fp8_e4m3/raw": (256, {}),
    "int6:token/int5:channel": (128, {"sinks": True}),
    "int3:page/int6": (64, {"sliding_window": 11}),
    "int5/int3:channel+offset": (256, {"logits_soft_cap": 3.0}),
    "fp8_e4m3:head/fp8_e4m3:tensor": (64, {"sliding_window": 150}),
}
SHORT = (
    "raw/int8",
    "int8:channel+offset/int4+rotate",
    "int6:token/int5:channel",
)  # which have every layout of codes; the others are long
# float32 sums of some hundred products in other orders, through an exponential
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}


def attend_interpreted(query, view, metadata, **options):
    """Return what the kernel gives in JAX's interpreter."""
    from jax.experimental.pallas import tpu as pltpu

    with pltpu.force_tpu_interpret_mode():
        return attend(query, view, metadata, backend="tpu", **options)


@functools.partial(jax.jit, static_argnames=("backend", "sliding_window", "logits_soft_cap", "return_lse"))
def attend(query, view, metadata, sinks=None, **options):
    return qpaged.paged_attention(query, view, metadata, sinks=sinks, **options)


@pytest.mark.short(1)
@needs_tpu_backend
@pytest.mark.parametrize(
    "spelling", [pytest.param(case, marks=[pytest.mark.long] * (case not in SHORT)) for case in CASES]
)
def test_the_interpreted_kernel_agrees_with_the_reference(spelling, monkeypatch):
    monkeypatch.setattr(_tpu, "KV_TILE", 128)
    monkeypatch.setattr(_tpu, "MAX_Q_ROWS", 24)  # 16 queries with 3 heads each then have two tiles
    head_dim, options = CASES[spelling]
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = normal(6, seed=7)
    view, table = filled_view(spelling, 2, head_dim, PAGE_SIZE, SEQUENCES)
    table = table.copy()
    table[3, 1] = -1  # a missing page in the middle
    metadata = combined_step(table, SEQUENCES)
    query = normal(PADDED_CHUNK + len(SEQUENCES), 6, head_dim, seed=5)
    expected = attend(query, view, metadata, backend="reference", **options)
    out = attend_interpreted(query, view, metadata, **options)
    assert not out[CHUNK : PADDED_CHUNK + 1].any()  # padding, and the inactive row
    np.testing.assert_allclose(out, expected, **TOLERANCE)
    _, expected = attend(query, view, metadata, backend="reference", return_lse=True, **options)
    _, lse = attend_interpreted(query, view, metadata, return_lse=True, **options)
    np.testing.assert_allclose(lse, expected, **TOLERANCE)

    permuted, permuted_table = permute_pages(view, table)
    metadata = combined_step(permuted_table, SEQUENCES)
    np.testing.assert_array_equal(attend_interpreted(query, permuted, metadata, **options), out)


@needs_tpu_backend
def test_nan_between_visible_slots_reaches_no_output(monkeypatch):
    """Positions far apart with a sliding window leave slots between them that no query sees."""
    monkeypatch.setattr(_tpu, "KV_TILE", 128)
    view, table = filled_view(None, 2, 64, PAGE_SIZE, SEQUENCES)
    position, window = np.array([5, 6, 130, 290]), 4
    slots = np.arange(table.shape[1] * PAGE_SIZE)
    visible = ((slots <= position[:, None]) & (slots > position[:, None] - window)).any(axis=0)
    masked = np.full((PAGES, PAGE_SIZE), True)
    masked[table[3]] = ~visible.reshape(-1, PAGE_SIZE)
    view = jax.tree_util.tree_map(lambda pool: jnp.where(masked[:, :, None], np.nan, pool), view)
    metadata = qpaged.PagedAttentionMetadata.prefill(position=position, page_table=table[3])
    query = normal(len(position), 6, 64, seed=5)
    expected = attend(query, view, metadata, backend="reference", sliding_window=window)
    out = attend_interpreted(query, view, metadata, sliding_window=window)
    np.testing.assert_allclose(out, expected, **TOLERANCE)


CONFIG = qpaged.PagedAttentionCacheMetaData(2, 1, 8, 4, 64, PAGE_SIZE, 2, 128, 0.5)


def reasons_declined(spelling, dtype=jnp.bfloat16, q_heads=4, **changes):
    """Return why each backend declines a decode over pages of a format, or None, by name."""
    config = dataclasses.replace(CONFIG, **changes)
    view = jax.eval_shape(
        lambda: qpaged.PagedAttentionCacheView.fresh(None, dtype, config, 0, None, spelling)
    )
    query = jax.ShapeDtypeStruct((2, q_heads, config.kv_head_dim_size), jnp.bfloat16)
    metadata = qpaged.PagedAttentionMetadata.decode(
        position=np.zeros(2, int), page_table=np.zeros((2, 4), int)
    )
    return {backend.name: backend.reason for backend in qpaged.attention_backends(query, view, metadata)}


@dataclasses.dataclass(frozen=True)
class NotElementwise(type(qpaged.get_quantizer("int8:token"))):
    """int8:token with a decode that is not elementwise."""

    def decode(self, codes, dtype):
        return jnp.cumsum(codes.astype(dtype), axis=-1)


class NotTiled(NotElementwise):
    """A format that declares that its functions are no tile functions."""

    elementwise = False


@needs_tpu_backend
def test_control_flow_is_not_elementwise():
    def branches(x):
        return jax.lax.cond(True, jnp.negative, jnp.abs, x)

    assert "uses cond, which is not elementwise" in not_elementwise(branches, jnp.float32)


@needs_tpu_backend
def test_formats_of_one_level_of_scales_are_taken():
    spellings = (
        None,
        "raw",
        "int8",
        "fp8_e5m2:token",
        "int4",
        "mxfp4",
        "int2",
        "int4:channel+offset+rotate/int8",
        "int6:channel/int3",
    )
    for spelling in spellings:
        assert reasons_declined(spelling)["tpu"] is None, spelling


@needs_tpu_backend
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"spelling": "int8", "kv_head_dim_size": 96}, "takes a head_dim of 64, 128, 256, but it is 96"),
        ({"spelling": "int8", "page_size": 8}, "takes a page_size of 16, 32, 64, 128, 256, but it is 8"),
        (
            {"spelling": "int8", "num_kv_heads": 4096, "q_heads": 4096},
            "no room for the pages of 4096 KV heads",
        ),
        (
            {"spelling": "int5:token", "page_size": 16},
            "do not fill rows of lanes on pages of 16 slots; take larger",
        ),
        ({"spelling": None, "dtype": jnp.float16}, "keys: pages of float16 are not taken"),
        ({"spelling": "int8/nvfp4"}, "values: nvfp4 has scales of two levels"),
        ({"spelling": "int4+offset"}, "keys: int4+offset has offsets of groups"),
        (
            {"spelling": "raw", "dtype": jnp.float16},
            "keys: decode of raw uses float16, which kernels do not have",
        ),
        ({"spelling": NotElementwise()}, "keys: decode of int8:token uses cumsum, which is not elementwise"),
        ({"spelling": NotTiled()}, "keys: int8:token is declared not to be elementwise"),
    ],
)
def test_calls_are_declined_with_the_reason(arguments, reason):
    declined = reasons_declined(**arguments)
    assert reason in declined["tpu"]
    assert declined["xla"] is declined["reference"] is None


def test_every_backend_is_listed_in_the_order_of_preference():
    backends = qpaged.attention_backends()
    names = [backend.name for backend in backends]
    # Kernels come first, and the reference last: it reads every page of the table.
    assert names[:2] == ["tpu", "gpu"] and names[-1] == "reference"
    assert {b.name for b in backends if b.available} >= {"xla", "reference"}
    with pytest.raises(TypeError, match="takes query, view and metadata together"):
        qpaged.attention_backends(np.zeros((2, 4, 128), np.float32))


def num_kernels(function, *arguments, platform="tpu"):
    """Return the number of TPU kernels in a program for the platform."""
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
    return lowered.as_text().count("@tpu_custom_call")


@needs_tpu_backend
def test_the_platform_of_the_program_decides():
    view, table = filled_view("int8", 2, 128, PAGE_SIZE, SEQUENCES)
    query = normal(len(SEQUENCES), 4, 128)
    arguments = query, view, decode_step(table, SEQUENCES)[0]
    assert num_kernels(qpaged.paged_attention, *arguments) == 1
    assert num_kernels(qpaged.paged_attention, *arguments, platform="cpu") == 0


@needs_tpu_backend
def test_derivatives_are_those_of_the_xla_backend():
    view, table = filled_view("int8", 2, 128, PAGE_SIZE, SEQUENCES)
    query, metadata = normal(len(SEQUENCES), 4, 128), decode_step(table, SEQUENCES)[0]

    def primal_and_tangent(backend):
        return jax.jvp(lambda q: attend(q, view, metadata, backend=backend), (query,), (query,))

    for out, expected in zip(primal_and_tangent(None), primal_and_tangent("xla"), strict=True):
        np.testing.assert_array_equal(out, expected)


@needs_tpu_backend
def test_only_shard_map_has_the_kernel_on_several_devices():
    """Within shard_map each device attends to its own heads; a partitioned program has no kernel."""
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    pool_heads, query_heads = PartitionSpec("heads"), PartitionSpec(None, "heads")
    view, table = filled_view("int8", 2, 128, PAGE_SIZE, SEQUENCES)
    query, metadata = normal(len(SEQUENCES), 4, 128), decode_step(table, SEQUENCES)[0]
    sharded_view = jax.device_put(view, NamedSharding(mesh, pool_heads))
    assert num_kernels(qpaged.paged_attention, query, sharded_view, metadata) == 0
    with jax.set_mesh(mesh):
        assert "call it within jax.shard_map" in qpaged.attention_backends(query, view, metadata)[0].reason

        @functools.partial(jax.shard_map, in_specs=(query_heads, pool_heads), out_specs=query_heads)
        def attend(query, pools):
            config = dataclasses.replace(view.metadata, num_kv_heads=1)
            local_view = view.replace(metadata=config, key_pages=pools[0], value_pages=pools[1])
            return qpaged.paged_attention(query, local_view, metadata)

        assert num_kernels(attend, query, (view.key_pages, view.value_pages)) == 1
