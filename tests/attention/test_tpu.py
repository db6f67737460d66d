"""The ``tpu`` backend, interpreted, against the reference; and the calls that it declines."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.arrays import normal
from support.filled_pages import PAGES, decode, filled, prefill

import qpaged
from qpaged.attention import _tpu

PAGE_SIZE, SEQUENCES = 64, (0, 1, 64, 300)  # so that the longest has three blocks of 128 slots
TPU = qpaged.attention_backends()[0]
takes = pytest.mark.skipif(not TPU.available, reason=f"the tpu backend {TPU.reason}")

# Every way in which codes, scales and offsets lie, in keys and in values, folded and not.
CASES = {
    "raw/int8": (64, {"sliding_window": 11}),
    "int8:token+offset/int8:channel+offset": (128, {"sinks": True}),
    "int8:channel+offset/int4+rotate": (128, {"logits_soft_cap": 3.0}),
    "int4:channel+offset/int4:token": (64, {"sliding_window": 20, "sinks": True}),
    "fp8_e4m3/raw": (256, {}),
}
# float32 sums of some hundred products in other orders, through an exponential
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}


def both_modes(table):
    """A prefill of the longest sequence's last tokens, and a decode of every sequence."""
    rows = decode(table, SEQUENCES)[0]
    return prefill(table, SEQUENCES)[0].replace(
        decodes_position=rows.decodes_position, decodes_page_table=rows.decodes_page_table
    )


def interpreted(query, view, metadata, **options):
    from jax.experimental.pallas import tpu as pltpu

    with pltpu.force_tpu_interpret_mode():
        return attend(query, view, metadata, backend="tpu", **options)


@functools.partial(jax.jit, static_argnames=("backend", "sliding_window", "logits_soft_cap"))
def attend(query, view, metadata, sinks=None, **options):
    return qpaged.paged_attention(query, view, metadata, sinks=sinks, **options)


@takes
@pytest.mark.parametrize("format", CASES)
def test_interpreted(format, monkeypatch):
    monkeypatch.setattr(_tpu, "KV_TILE", 128)
    monkeypatch.setattr(_tpu, "MAX_Q_ROWS", 24)  # of 16 queries with 3 heads each: two tiles
    head_dim, options = CASES[format]
    options = options | ({"sinks": normal(6, seed=7)} if "sinks" in options else {})
    view, table = filled(format, 2, head_dim, PAGE_SIZE, SEQUENCES)
    table = table.copy()
    table[3, 1] = -1  # a hole
    metadata = both_modes(table)
    query = normal(16 + len(SEQUENCES), 6, head_dim, seed=5)
    want = attend(query, view, metadata, backend="reference", **options)
    got = interpreted(query, view, metadata, **options)
    assert not got[13:17].any()  # padding, and the inactive row
    np.testing.assert_allclose(got, want, **TOLERANCE)

    order = np.random.default_rng(3).permutation(PAGES)
    place = np.append(np.argsort(order), PAGES)
    moved = jax.tree_util.tree_map(lambda leaf: leaf[:, order], view)
    np.testing.assert_array_equal(interpreted(query, moved, both_modes(place[table]), **options), got)


@takes
def test_slots_between_those_that_are_seen(monkeypatch):
    """Scattered positions with a window: NaN in what lies between them reaches no output."""
    monkeypatch.setattr(_tpu, "KV_TILE", 128)
    view, table = filled(None, 2, 64, PAGE_SIZE, SEQUENCES)
    position, window = np.array([5, 6, 130, 290]), 4
    slots = np.arange(table.shape[1] * PAGE_SIZE)
    seen = ((slots <= position[:, None]) & (slots > position[:, None] - window)).any(axis=0)
    unseen = np.full((PAGES, PAGE_SIZE), True)
    unseen[table[3]] = ~seen.reshape(-1, PAGE_SIZE)
    view = jax.tree_util.tree_map(lambda pool: jnp.where(unseen[:, :, None], np.nan, pool), view)
    metadata = qpaged.PagedAttentionMetadata.prefill(position=position, page_table=table[3])
    query = normal(len(position), 6, 64, seed=5)
    want = attend(query, view, metadata, backend="reference", sliding_window=window)
    np.testing.assert_allclose(interpreted(query, view, metadata, sliding_window=window), want, **TOLERANCE)


CONFIG = qpaged.PagedAttentionCacheMetaData(2, 1, 8, 4, 64, PAGE_SIZE, 2, 128, 0.5)


def declined(format, dtype=jnp.bfloat16, q_heads=4, **changes):
    """What the backend says to a decode over pages of a format."""
    config = dataclasses.replace(CONFIG, **changes)
    view = jax.eval_shape(lambda: qpaged.PagedAttentionCacheView.fresh(None, dtype, config, 0, None, format))
    query = jax.ShapeDtypeStruct((2, q_heads, config.kv_head_dim_size), jnp.bfloat16)
    metadata = qpaged.PagedAttentionMetadata.decode(
        position=np.zeros(2, int), page_table=np.zeros((2, 4), int)
    )
    return {backend.name: backend.reason for backend in qpaged.attention_backends(query, view, metadata)}


@dataclasses.dataclass(frozen=True)
class Looked(type(qpaged.get_quantizer("int8:token"))):
    """int8:token, with a decode that is no tile function."""

    def decode(self, codes, dtype):
        return jnp.cumsum(codes.astype(dtype), axis=-1)


class Kept(Looked):
    """A format whose author says so."""

    elementwise = False


@takes
def test_takes():
    formats = (
        None,
        "raw",
        "int8",
        "fp8_e5m2:token",
        "int4",
        "mxfp4",
        "int2",
        "int4:channel+offset+rotate/int8",
    )
    for format in formats:
        assert declined(format)["tpu"] is None, format


@takes
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"format": "int8", "kv_head_dim_size": 96}, "takes a head_dim of 64, 128, 256, but it is 96"),
        ({"format": "int8", "page_size": 8}, "takes a page_size of 16, 32, 64, 128, 256, but it is 8"),
        ({"format": "int8", "num_kv_heads": 4096, "q_heads": 4096}, "no room for the pages of 4096 KV heads"),
        ({"format": None, "dtype": jnp.float16}, "keys: pages of float16 are not taken"),
        ({"format": "int8/nvfp4"}, "values: nvfp4 has scales of two levels"),
        ({"format": "int4+offset"}, "keys: int4+offset has offsets of groups"),
        (
            {"format": "raw", "dtype": jnp.float16},
            "keys: decode of raw uses float16, which kernels do not have",
        ),
        ({"format": Looked()}, "keys: decode of int8:token uses cumsum, which is not elementwise"),
        ({"format": Kept()}, "keys: int8:token is declared not to be made of tile functions"),
    ],
)
def test_declines(arguments, reason):
    said = declined(**arguments)
    assert reason in said["tpu"]
    assert said["xla"] is said["reference"] is None


def test_lists_every_backend():
    backends = qpaged.attention_backends()
    assert [backend.name for backend in backends] == ["tpu", "gpu", "xla", "reference"]
    assert {b.name for b in backends if b.available} >= {"xla", "reference"}
    with pytest.raises(TypeError, match="takes query, view and metadata together"):
        qpaged.attention_backends(np.zeros((2, 4, 128), np.float32))


def kernels(function, *arguments, platform="tpu"):
    """How many of them a program for the platform has."""
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
    return lowered.as_text().count("@tpu_custom_call")


@takes
def test_the_platform_of_the_program_decides():
    view, table = filled("int8", 2, 128, PAGE_SIZE, SEQUENCES)
    query = normal(len(SEQUENCES), 4, 128)
    arguments = query, view, decode(table, SEQUENCES)[0]
    assert kernels(qpaged.paged_attention, *arguments) == 1
    assert kernels(qpaged.paged_attention, *arguments, platform="cpu") == 0


@takes
def test_derivatives_are_those_of_the_xla_backend():
    view, table = filled("int8", 2, 128, PAGE_SIZE, SEQUENCES)
    query, metadata = normal(len(SEQUENCES), 4, 128), decode(table, SEQUENCES)[0]

    def moved(backend):
        return jax.jvp(lambda q: attend(q, view, metadata, backend=backend), (query,), (query,))

    for got, want in zip(moved(None), moved("xla"), strict=True):
        np.testing.assert_array_equal(got, want)


@takes
def test_several_devices():
    """Within shard_map each device has its own heads; what the compiler partitions has no kernel."""
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    heads, of_query = PartitionSpec("heads"), PartitionSpec(None, "heads")
    view, table = filled("int8", 2, 128, PAGE_SIZE, SEQUENCES)
    query, metadata = normal(len(SEQUENCES), 4, 128), decode(table, SEQUENCES)[0]
    placed = jax.device_put(view, NamedSharding(mesh, heads))
    assert kernels(qpaged.paged_attention, query, placed, metadata) == 0
    with jax.set_mesh(mesh):
        assert "call it within jax.shard_map" in qpaged.attention_backends(query, view, metadata)[0].reason

        @functools.partial(jax.shard_map, in_specs=(of_query, heads), out_specs=of_query)
        def attend(query, pools):
            config = dataclasses.replace(view.metadata, num_kv_heads=1)
            mine = view.replace(metadata=config, key_pages=pools[0], value_pages=pools[1])
            return qpaged.paged_attention(query, mine, metadata)

        assert kernels(attend, query, (view.key_pages, view.value_pages)) == 1
