"""Trellis codes: states against a count of bits by hand, and the best path against every path there is."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import qpaged
import quantizers
from qpaged import sweep
from qpaged.arrays import PLANES, extract_states, windows
from qpaged.arrays._packing import codes_per_byte, pack
from qpaged.arrays._trellis import unpacked_states
from qpaged.attention import _cpu
from qpaged.interop._numbers import as_numbers

WIDTHS = [(2, 7), (2, 8), (2, 10), (3, 8), (3, 10), (3, 11), (4, 10), (4, 12), (5, 11), (5, 13), (6, 14)]
CHANNELS = 64


def states_by_hand(codes, bits, state_bits):
    """Return the state of each code of a row: bit by bit, the newest code's highest bit first."""
    states = []
    for last in range(len(codes)):
        ring = [int(codes[last - age]) for age in range(len(codes))]
        state, shift, below = 0, 0, 0
        for plane, window in zip(PLANES[bits], windows(bits, state_bits), strict=True):
            of_plane = [(code >> shift) & (2**plane - 1) for code in ring]
            text = "".join(f"{code:0{plane}b}" for code in of_plane)[:window]
            state |= int(text, 2) << below
            shift, below = shift + plane, below + window
        states.append(state)
    return np.array(states)


def drawn_codes(bits, rows=3, channels=CHANNELS):
    return np.random.default_rng(bits).integers(0, 2**bits, (rows, channels)).astype(np.uint8)


@pytest.mark.parametrize(("bits", "state_bits"), WIDTHS)
def test_windows_have_the_newest_bits_of_each_plane(bits, state_bits):
    assert sum(windows(bits, state_bits)) == state_bits
    codes = np.zeros(CHANNELS, np.uint8)
    codes[5] = 2**bits - 1
    touched = np.flatnonzero(states_by_hand(codes, bits, state_bits))
    assert (touched == 5 + np.arange(-(-state_bits // bits))).all()  # so many codes read it, and no more


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("bits", "state_bits"), WIDTHS)
def test_states_of_unpacked_codes_are_those_counted_by_hand(bits, state_bits, axis):
    codes = drawn_codes(bits)
    want = np.stack([states_by_hand(row, bits, state_bits) for row in codes])
    got = unpacked_states(jnp.moveaxis(codes, 1, axis), bits, state_bits, axis)
    np.testing.assert_array_equal(jnp.moveaxis(got, axis, 1), want)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize(("bits", "state_bits"), WIDTHS)
def test_states_of_packed_codes_are_those_counted_by_hand(bits, state_bits, slots):
    codes = drawn_codes(bits, rows=slots)
    want = np.concatenate([states_by_hand(row, bits, state_bits) for row in codes])
    packed = pack(codes, bits, -1).reshape(1, -1).astype(jnp.int32)
    in_byte = codes_per_byte(bits)
    for index in range(in_byte):
        got = extract_states(packed, bits, state_bits, index, slots)
        np.testing.assert_array_equal(got[0], want[index::in_byte])


@pytest.mark.parametrize(("bits", "state_bits", "channels"), [(2, 4, 6), (2, 5, 6), (3, 4, 4), (3, 5, 4)])
def test_no_ring_with_the_same_seam_is_nearer(bits, state_bits, channels):
    generator = np.random.default_rng(0)
    values = generator.integers(-30, 31, 2**state_bits)
    units = generator.normal(0, 12, (40, channels)).round(2).astype(np.float32)
    codes = np.asarray(qpaged.trellis_codes(jnp.asarray(units), bits, state_bits, values))
    rings = np.array(list(itertools.product(range(2**bits), repeat=channels)), np.uint8)
    read = values[np.asarray(unpacked_states(jnp.asarray(rings), bits, state_bits, 1))]
    # What is remembered across the seam: all that the state of the next code has of the last ones.
    after = np.concatenate([rings, np.zeros((len(rings), 1), np.uint8)], axis=1)
    memories = np.asarray(unpacked_states(jnp.asarray(after), bits, state_bits, 1))[:, -1]
    place = 2 ** (bits * np.arange(channels)[::-1])
    in_quarters = (4 * units).round() / 4
    lost, least = 0.0, 0.0
    for row, chosen in zip(in_quarters, codes, strict=True):
        costs = np.square(row - read).sum(axis=1)
        index = int((chosen * place).sum())
        assert (rings[index] == chosen).all()
        same_seam = memories == memories[index]
        assert costs[index] == costs[same_seam].min()
        lost, least = lost + costs[index], least + costs.min()
    assert lost < 1.25 * least  # rings as short as these are mostly seam


def test_codes_are_the_same_in_every_program():
    quantizer = qpaged.get_quantizer("trellis2")
    units = np.random.default_rng(1).normal(0, 9, (150, 2, 64)).astype(np.float32)  # done in several turns
    together = np.asarray(quantizer.encode(jnp.asarray(units)))
    mapped = jax.jit(jax.vmap(jax.vmap(quantizer.encode), in_axes=1, out_axes=1))(units)
    np.testing.assert_array_equal(mapped, together)
    for row in (0, 127, 128, 149):
        np.testing.assert_array_equal(quantizer.encode(jnp.asarray(units[row, 1])), together[row, 1])
    assert together.dtype == np.uint8 and together.max() == 3


@pytest.mark.long
def test_rows_of_whatever_length_close_to_a_ring():
    quantizer = qpaged.get_quantizer("trellis3")
    for channels in (1, 2, 3, 8, 40, 72, 576):
        units = np.random.default_rng(2).normal(0, 9, (5, channels)).astype(np.float32)
        codes = quantizer.encode(jnp.asarray(units))
        read = quantizer.decode(unpacked_states(codes, 3, 10, 1), jnp.float32)
        lost = float(np.square(read - units).mean() / np.square(units).mean())
        assert lost < 0.04 or channels < 40  # of which the seam is much


def test_what_is_beyond_all_values_is_read_as_near_them():
    quantizer = qpaged.get_quantizer("trellis2")
    units = np.random.default_rng(3).normal(0, 9, (4, 64)).astype(np.float32)
    for outlier in (1e4, 1e30, -1e30):
        units[:, 9] = outlier
        read = quantizer.decode(unpacked_states(quantizer.encode(jnp.asarray(units)), 2, 10, 1), jnp.float32)
        assert (np.sign(outlier) * read[:, 9] > 20).all()
        others = np.delete(np.asarray(read) - units, 9, axis=1)
        assert np.square(others).mean() < 0.15 * 81  # and twice as much as usual is lost of the others


def test_many_channels_of_large_values_are_followed():
    values = np.random.default_rng(4).integers(-128, 128, 256)
    values[0] = 127
    codes = qpaged.trellis_codes(jnp.full((1, 1024), 1e3), 6, 8, values)
    assert (values[np.asarray(unpacked_states(codes, 6, 8, 1))] == 127).mean() > 0.99


@pytest.mark.short(1)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [PartitionSpec("tp"), PartitionSpec(None, "tp")])
def test_rows_over_devices_have_the_codes_that_they_have_on_one(kind, spec):
    quantizer = qpaged.get_quantizer("trellis2")
    x = np.random.default_rng(5).normal(size=(8, 16, 32)).astype(np.float32)
    want = quantizer.quantize(jnp.asarray(x)).codes
    mesh = Mesh(np.array(jax.devices()[:8]), ("tp",), axis_types=(kind,))
    divided = jax.device_put(x, NamedSharding(mesh, spec))
    np.testing.assert_array_equal(jax.jit(lambda x: quantizer.quantize(x).codes)(divided), want)
    by_hand = jax.shard_map(
        lambda x: quantizer.quantize(x).codes, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=True
    )
    np.testing.assert_array_equal(jax.jit(by_hand)(divided), want)


def test_rounding_has_no_derivative():
    quantizer = qpaged.get_quantizer("trellis2")
    slope = jax.grad(lambda x: quantizer.quantize(x).dequantize().sum())(jnp.ones((2, 32)))
    assert not slope.any()


@pytest.mark.parametrize(
    ("bits", "state_bits", "values", "message"),
    [
        (
            2,
            11,
            np.zeros(2**11, int),
            "state_bits must be more .* by at most 8, but came as 11 with codes of 2",
        ),
        (3, 3, np.zeros(8, int), "state_bits must be more than the bits of a code"),
        (
            2,
            8,
            np.zeros(300, int),
            r"values must be 256 integers .* came as int64 of shape \(300,\)",
        ),
        (2, 8, np.linspace(-1, 1, 256), "values must be 256 integers .* came as float64"),
        (2, 8, np.full(256, 129), "values must be 256 integers of at most 128 in magnitude"),
    ],
)
def test_values_that_are_not_those_of_states_are_refused(bits, state_bits, values, message):
    with pytest.raises(ValueError, match=message):
        qpaged.trellis_codes(jnp.zeros((1, 8)), bits, state_bits, values)


def test_values_of_pools_are_given_as_other_numbers_only_if_these_hold_them():
    pool = qpaged.get_quantizer("trellis3").quantize(jnp.ones((1, 2, 8, 64)))
    assert as_numbers(pool, [jnp.float8_e4m3fn]) is None  # odd numbers above 16
    numbers = as_numbers(pool, [jnp.float8_e4m3fn, jnp.int8])
    np.testing.assert_array_equal(numbers.array.astype(jnp.float32), pool.values(jnp.float32))


def test_shared_scales_of_a_trellis_do_not_grow():
    trellis = quantizers.Trellis2
    grows = type("Grows", (trellis,), {"growth": qpaged.get_quantizer("int8").growth, "block_fit": None})
    with pytest.raises(TypeError, match=r"Grows.growth must be None for a trellis, whose codes"):
        grows()


@pytest.mark.parametrize(("cls", "granularity"), [("Trellis2", "channel"), ("Trellis3Channel", "token")])
def test_classes_are_of_one_granularity(cls, granularity):
    with pytest.raises(ValueError, match=rf"granularity must be \w+ for {cls}, but came as '{granularity}'"):
        getattr(quantizers, cls)(granularity)


def test_states_that_the_kernel_has_no_table_for_are_read_by_another_backend():
    deep = type("Deep", (quantizers.Trellis2,), {"bits": 6, "state_bits": 13, "stretch": 1.0})()
    config = qpaged.PagedAttentionCacheMetaData(1, 1, 4, 4, 64, 16, 1, 64, 0.5)
    view = qpaged.PagedAttentionCache.init_cache(None, jnp.float32, config, None, deep).views[0]
    reason = _cpu._pool_refusal(view.key_pages)
    assert reason.endswith("has states of more than 12 bits, or values that are no steps of 8 bits")


def test_a_sweep_says_which_formats_go_with_exact_pages_alone():
    fit, reasons = sweep.fitting(["trellis2:channel", "trellis2:channel+exact128"], 64)
    assert fit == ["trellis2:channel+exact128"]
    assert reasons == {
        "trellis2:channel": "trellis2:channel goes with exact pages alone, as trellis2:channel+exact128."
    }
