"""The ``cpu`` kernel: what it declines, how it is found, and how its work is divided.

That its numbers are right is tested with those of every backend, in test_backends.py and test_shapes.py.
"""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.arrays import normal
from support.backends import is_here
from support.filled_pages import LENGTHS, decode_step, filled_view, prefill_step

import qpaged
from qpaged.attention import _cpu_library

needs_kernel = pytest.mark.skipif(
    not is_here("cpu"), reason="the kernel is not compiled, or not for this JAX"
)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def reason_declined(spelling, dtype=jnp.bfloat16, head_dim=64):
    """Return why the kernel declines a decode over pages of a format, or None."""
    config = qpaged.PagedAttentionCacheMetaData(2, 1, 8, 4, 64, 16, 2, head_dim, 0.5)
    view = jax.eval_shape(
        lambda: qpaged.PagedAttentionCacheView.fresh(None, dtype, config, 0, None, spelling)
    )
    query = jax.ShapeDtypeStruct((2, 4, head_dim), jnp.bfloat16)
    metadata = qpaged.PagedAttentionMetadata.decode(
        position=np.zeros(2, int), page_table=np.zeros((2, 4), int)
    )
    backends = qpaged.attention_backends(query, view, metadata)
    return next(backend.reason for backend in backends if backend.name == "cpu")


@dataclasses.dataclass(frozen=True)
class Summing(type(qpaged.get_quantizer("int8:token"))):
    """int8:token whose decode looks at other codes than its own."""

    def decode(self, codes, dtype):
        return jnp.cumsum(codes.astype(dtype), axis=-1)


class NotTiled(Summing):
    """A format that declares as much."""

    elementwise = False


@dataclasses.dataclass(frozen=True)
class DoubleScales(type(qpaged.get_quantizer("int8:token"))):
    """int8:token whose scales are words that nothing is known of."""

    scale_dtype = jnp.uint32

    def multiplier(self, scales):
        return scales.astype(jnp.float32)


@needs_kernel
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"spelling": "int8", "head_dim": 40}, "takes a head_dim that is a multiple of 16, but it is 40"),
        ({"spelling": None, "dtype": jnp.float16}, "keys: pages of float16 are not taken"),
        ({"spelling": "raw", "dtype": jnp.float16}, "keys: raw of float16 is not taken"),
        ({"spelling": NotTiled()}, "keys: int8:token is declared not to be elementwise"),
        ({"spelling": Summing()}, "keys: decode of int8:token is not elementwise"),
        ({"spelling": DoubleScales()}, "keys: int8:token has scales of a kind that is not read"),
    ],
)
def test_calls_are_declined_with_the_reason(arguments, reason):
    assert reason in reason_declined(**arguments)


@needs_kernel
def test_prompts_are_left_to_others():
    view, table = filled_view("int8", 2, 32)
    backends = qpaged.attention_backends(normal(16, 4, 32), view, prefill_step(table)[0])
    reason = next(backend.reason for backend in backends if backend.name == "cpu")
    assert reason == "takes decode rows alone, and leaves prompts to xla"


@pytest.mark.short(20)
@needs_kernel
@pytest.mark.parametrize("spelling", qpaged.available_formats())
def test_every_format_is_taken(spelling):
    assert reason_declined(spelling, head_dim=128) is None


def num_kernels(function, *arguments):
    """Return the number of kernels in a program for CPUs."""
    return jax.jit(function).lower(*arguments).as_text().count(f"@{_cpu_library.TARGET}")


@needs_kernel
def test_a_decode_takes_the_kernel_by_itself():
    view, table = filled_view("int8", 2, 32)
    arguments = normal(len(LENGTHS), 4, 32), view, decode_step(table)[0]
    assert num_kernels(qpaged.paged_attention, *arguments) == 1
    tpu = jax.jit(qpaged.paged_attention).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    assert _cpu_library.TARGET not in tpu


@needs_kernel
def test_only_shard_map_has_the_kernel_on_several_devices():
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    pool_heads, query_heads = PartitionSpec("heads"), PartitionSpec(None, "heads")
    view, table = filled_view("int8", 2, 32)
    query, metadata = normal(len(LENGTHS), 4, 32), decode_step(table)[0]
    sharded_view = jax.device_put(view, NamedSharding(mesh, pool_heads))
    assert num_kernels(qpaged.paged_attention, query, sharded_view, metadata) == 0

    def attend(query, pools):
        config = dataclasses.replace(view.metadata, num_kv_heads=1)
        local_view = view.replace(metadata=config, key_pages=pools[0], value_pages=pools[1])
        return qpaged.paged_attention(query, local_view, metadata)

    attend = jax.shard_map(attend, mesh=mesh, in_specs=(query_heads, pool_heads), out_specs=query_heads)
    pools = view.key_pages, view.value_pages
    assert num_kernels(attend, query, pools) == 1
    expected = qpaged.paged_attention(query, view, metadata, backend="reference")
    np.testing.assert_allclose(jax.jit(attend)(query, pools), expected, **TOLERANCE)


LONG = (0, 1500, 3, 700)  # slots: rows of some pieces, of one, and of none


def long_call():
    """Return the query, view and metadata of a decode whose rows are divided among threads."""
    pages = [-(-length // 16) for length in LONG]
    config = qpaged.PagedAttentionCacheMetaData(
        len(LONG), 1, sum(pages), max(pages), 16 * max(pages), 16, 1, 32, 0.5
    )
    view = qpaged.PagedAttentionCacheView.init(None, jnp.float32, config, 0, None, "int8:token")
    fill = qpaged.get_quantizer("int8:token").quantize
    keys, values = (fill(normal(*view.key_pages.shape, seed=seed)) for seed in (1, 2))
    view = view.replace(key_pages=view.key_pages.like(keys.codes, keys.parts))
    view = view.replace(value_pages=view.value_pages.like(values.codes, values.parts))
    table = np.full((len(LONG), max(pages)), sum(pages), np.int32)
    order = iter(np.random.default_rng(0).permutation(sum(pages)))
    for row, count in enumerate(pages):
        table[row, :count] = [next(order) for _ in range(count)]
    step = qpaged.PagedAttentionMetadata.decode(position=np.array(LONG) - 1, page_table=table)
    return normal(len(LONG), 3, 32, seed=5), view, step


@needs_kernel
@pytest.mark.parametrize("window", [None, 1100])
def test_rows_that_are_divided_agree_with_the_reference(window):
    query, view, step = long_call()
    out, lse = qpaged.paged_attention(
        query, view, step, backend="cpu", sliding_window=window, return_lse=True
    )
    expected, expected_lse = qpaged.paged_attention(
        query, view, step, backend="reference", sliding_window=window, return_lse=True
    )
    np.testing.assert_allclose(out, expected, **TOLERANCE)
    np.testing.assert_allclose(lse, expected_lse, **TOLERANCE)


@needs_kernel
def test_programs_that_run_at_once_do_not_wait_for_each_other():
    """More calls than XLA has threads, each on a device of its own, and each asking for help."""
    query, view, step = long_call()
    attend = jax.jit(lambda query, view: qpaged.paged_attention(query, view, step, backend="cpu"))
    expected = np.asarray(attend(query, view))
    calls = [jax.device_put((query, view), device) for device in jax.devices()]
    outs = [[None] * 20 for _ in calls]

    def run(number):
        for turn in range(20):
            outs[number][turn] = np.asarray(attend(*calls[number]))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
        assert not thread.is_alive()
    np.testing.assert_array_equal(np.array(outs), np.broadcast_to(expected, np.shape(outs)))


@needs_kernel
def test_nan_that_a_query_sees_is_seen():
    query, view, step = long_call()
    parts = view.key_pages.parts
    scales = parts.scales.at[:, step.decodes_page_table[1, 40]].set(jnp.nan)
    poisoned = view.key_pages.like(view.key_pages.codes, parts._replace(scales=scales))
    out = qpaged.paged_attention(query, view.replace(key_pages=poisoned), step, backend="cpu")
    assert np.isnan(out[1]).all() and np.isfinite(out[3]).all()


@pytest.fixture
def _forgotten():
    _cpu_library.load.cache_clear()
    yield
    _cpu_library.load.cache_clear()


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.skipif(not hasattr(jax, "ffi"), reason="no library is looked for")
def test_a_library_that_is_missing_or_foreign_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(_cpu_library, "PATH", tmp_path / "attention.so")
    assert "is not compiled in this installation; install a C compiler" in _cpu_library.load().refusal
    _cpu_library.load.cache_clear()
    _cpu_library.PATH.write_bytes(b"not a library")
    assert "cannot be loaded: " in _cpu_library.load().refusal


@needs_kernel
@pytest.mark.usefixtures("_forgotten")
def test_a_library_that_does_not_fit_is_named(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(_cpu_library, "CallLayout", _cpu_library.ctypes.c_int8)
        assert "was compiled from another version of this package" in _cpu_library.load().refusal
    _cpu_library.load.cache_clear()

    def refuse(*_, **__):
        raise ValueError("handler's API version (0.1) is incompatible with the framework's (9.9)")

    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    assert "is refused by this jaxlib: handler's API version" in _cpu_library.load().refusal
