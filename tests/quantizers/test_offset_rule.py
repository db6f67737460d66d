"""int8 and int4 with an offset in blocks that tokens share: the rule in exact integers, and any order.

With s a power of two, n = floor(x / s), and z the multiple of g at or below the least n, a block has the
smallest s for which the window of codes from z reaches the greatest n, and for which the offset byte reaches
the block's values: the multiples of g below the least and below the greatest are -128 g to 127 g.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arrays import leaves_equal
from support.long import first_short
from support.stored_codes import two_to_a_byte

import qpaged

SPELLINGS = ("int8+offset", "int8:channel+offset", "int4:page+offset", "int4:channel+offset")
every_spelling = pytest.mark.parametrize("spelling", SPELLINGS)
VIEW = qpaged.PagedAttentionCacheView
PAGES, SLOTS, CHANNELS = 8, 8, 16
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = 2.0**-126
SUBNORMAL = 149  # float32 are integers in units of 2^-149
BIAS = 126  # the byte b is the scale 2^(b - 126)

quantize = jax.jit(lambda spelling, x: qpaged.get_quantizer(spelling).quantize(x), static_argnums=0)
values = jax.jit(lambda array: array.dequantize())


def integers(x):
    """float32 as Python integers, in units of 2^-149; subnormals as zero."""
    x = np.where(np.abs(x) < SMALLEST, 0, x).astype(np.float64)
    return [int(v) for v in np.ldexp(np.ravel(x), SUBNORMAL).tolist()]


def rule(block, bits):
    """(scale byte, offset byte, codes) of the integers of one block."""
    granule = 2**bits // 4
    low, high = min(block), max(block)
    size = max(
        high - low, abs(low) >> 5, abs(high) >> 5
    )  # no window of scales 2^(bits + 2) times smaller reaches
    for byte in range(max(1, size.bit_length() - bits - 2 + BIAS - SUBNORMAL), 255):
        shift = byte - BIAS + SUBNORMAL  # floor(x / s), as x is 2^-149 times an integer
        begin, end = (low >> shift) // granule, (high >> shift) // granule
        if begin >= -128 and end <= 127 and (high >> shift) - begin * granule <= 2**bits - 2:
            return byte, begin & 0xFF, [(x >> shift) - begin * granule + 1 for x in block]
    raise AssertionError("no scale reaches")


def oracle(spelling, x):
    """Codes and stored scales of pages (n, slots, channels)."""
    quantizer = qpaged.get_quantizer(spelling)
    by_channel = quantizer.granularity == "channel"
    codes, scales = (
        np.zeros(x.shape, np.uint8),
        np.zeros((len(x), 1, x.shape[2] if by_channel else 1), np.uint16),
    )
    for page in range(len(x)):
        for channel in range(scales.shape[2]):
            place = (page, slice(None), channel if by_channel else slice(None))
            byte, begin, block_codes = rule(integers(x[place]), quantizer.bits)
            codes[place] = np.reshape(block_codes, codes[place].shape)
            scales[page, 0, channel] = byte << 8 | begin
    return codes, scales


def exact_values(spelling, codes, scales):
    """(n + 1/2) s of codes and stored scales, clipped to what float32 holds."""
    granule = 2 ** qpaged.get_quantizer(spelling).bits // 4
    s = np.ldexp(1.0, (scales >> 8).astype(int) - BIAS)
    begin = (scales & 0xFF).astype(np.uint8).view(np.int8).astype(np.int64) * granule
    middle = np.clip((begin + 2 * granule) * s, -LARGEST, LARGEST)  # of the window, as float32 holds it
    return np.clip((codes.astype(np.int64) - 2 * granule - 0.5) * s + middle, -LARGEST, LARGEST)


KINDS = {
    "gaussian": lambda rng, shape: (
        rng.normal(size=shape) * 2.0 ** rng.integers(-100, 100, (shape[0], 1, shape[2]))
    ),
    "wild": lambda rng, shape: rng.normal(size=shape) * 10.0 ** rng.uniform(-44, 37, shape),
    "far from zero": lambda rng, shape: (
        (1 + rng.normal(size=shape) * 10.0 ** rng.uniform(-6, 0, (shape[0], 1, 1)))
        * np.sign(rng.normal(size=(shape[0], 1, shape[2])))
        * 10.0 ** rng.uniform(-30, 30, (shape[0], 1, shape[2]))
    ),
    "across zero": lambda rng, shape: (
        rng.uniform(-1, rng.uniform(0.001, 1), shape) * 10.0 ** rng.uniform(-36, 37, (shape[0], 1, shape[2]))
    ),
    "constant": lambda rng, shape: np.broadcast_to(
        rng.choice(
            [1, -1, 0.5, 127, -128, 8191, 8192, -8192, 448, 1e-38, -1e-38, 1e-3, 3e7], (shape[0], 1, 1)
        ),
        shape,
    ),
    "powers": lambda rng, shape: np.sign(rng.normal(size=shape)) * 2.0 ** rng.integers(-126, 127, shape),
    "one value": lambda rng, shape: (
        np.where(np.arange(shape[1])[:, None] == 3, rng.normal(size=shape), 0)
        * 10.0 ** rng.uniform(-30, 30, (shape[0], 1, shape[2]))
    ),
    "tiny": lambda rng, shape: rng.normal(size=shape) * 10.0 ** rng.uniform(-46, -36, shape),
    "zeros": lambda rng, shape: np.zeros(shape),
    "integers": lambda rng, shape: (
        rng.integers(-300, 300, shape) + rng.integers(-9000, 9000, (shape[0], 1, shape[2]))
    ),
    "from zero up": lambda rng, shape: np.abs(rng.normal(size=shape)) * (rng.random(shape) < 0.7),
    "edges of the reach": lambda rng, shape: (
        rng.integers(-3, 4, shape)
        + rng.choice([-8192, -8128, 8128, 8192, -512, -508, 508, 512], (shape[0], 1, shape[2]))
    ),
    "edges of the window": lambda rng, shape: (
        rng.integers(-1, 2, shape)
        + rng.choice([0, 64, 191, 192, 254, 255, 256, 3, 4, 11, 12, 14, 15, 16], shape)
    ),
    "large": lambda rng, shape: np.clip(rng.normal(size=shape), -0.49, 0.49) * LARGEST,
    "huge": lambda rng, shape: np.clip(rng.normal(size=shape), -1, 1) * 3.4e38,
    "huge constant": lambda rng, shape: np.broadcast_to(
        rng.choice([3.4e38, -3.4e38, 3.38e38, -3.38e38, LARGEST, -LARGEST, 1.7e38], (shape[0], 1, 1)), shape
    ),
}
every_kind = pytest.mark.parametrize("kind", first_short(2, KINDS))


@functools.cache
def pages(kind):
    rng = np.random.default_rng(sorted(KINDS).index(kind))
    with np.errstate(over="ignore"):
        x = np.asarray(KINDS[kind](rng, (PAGES, SLOTS, CHANNELS)), np.float64)
    return np.clip(x, -LARGEST, LARGEST).astype(np.float32)


@functools.cache
def oracle_of(spelling, kind):
    return oracle(spelling, pages(kind))


@every_kind
@every_spelling
def test_codes_and_scales_are_those_of_the_rule(spelling, kind):
    x = pages(kind)
    codes, scales = oracle_of(spelling, kind)
    array = quantize(spelling, x)
    assert array.scales.dtype == np.uint16
    wrong = np.argwhere(np.asarray(array.scales) != scales)
    assert not len(wrong), [
        (at.tolist(), hex(array.scales[tuple(at)]), hex(scales[tuple(at)]), x[at[0]].min(), x[at[0]].max())
        for at in wrong[:3]
    ]
    np.testing.assert_array_equal(np.asarray(array.unpacked()), codes)


@every_kind
@every_spelling
def test_values_are_the_middles_of_their_cells(spelling, kind):
    x = pages(kind)
    want = exact_values(spelling, *oracle_of(spelling, kind))
    got = np.asarray(values(quantize(spelling, x))).astype(np.float64)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=SMALLEST)
    scale = np.asarray(quantize(spelling, x).multipliers()).astype(np.float64)
    # The middle of a window at the end of float32 is brought back to what is finite.
    codes = 4 * (2 ** qpaged.get_quantizer(spelling).bits // 4)
    allowed = np.where(np.abs(x) > LARGEST - codes * scale, 0.5 + codes / 2, 0.5)
    assert (np.abs(got - x) <= allowed * scale + SMALLEST).all()


@functools.cache
def one_at_a_time(spelling):
    """A jitted function of pages (n, slots, channels) and orders (steps, n): written token by token."""
    config = qpaged.PagedAttentionCacheMetaData(PAGES, 1, PAGES, 1, SLOTS, SLOTS, 1, CHANNELS, 0.5)
    view = VIEW.init(None, jnp.float32, config, 0, None, f"{spelling}/plain")
    table = jnp.arange(PAGES, dtype=jnp.int32)[:, None]

    def write(x, orders):
        def step(view, slots):
            rows = jnp.take_along_axis(x, jnp.maximum(slots, 0)[:, None, None], axis=1)
            metadata = qpaged.PagedAttentionMetadata.decode(position=slots, page_table=table)
            return view.write_decodes_to_cache(rows, rows, metadata), None

        return jax.lax.scan(step, view, orders)[0]

    return jax.jit(write)


@functools.cache
def at_once(spelling):
    config = qpaged.PagedAttentionCacheMetaData(1, 1, PAGES, PAGES, PAGES * SLOTS, SLOTS, 1, CHANNELS, 0.5)
    view = VIEW.init(None, jnp.float32, config, 0, None, f"{spelling}/plain")

    def write(x, position):
        metadata = qpaged.PagedAttentionMetadata.prefill(
            position=position, page_table=jnp.arange(PAGES, dtype=jnp.int32)
        )
        rows = x.reshape(-1, 1, CHANNELS)
        return view.write_prefill_to_cache(rows, rows, metadata)

    return jax.jit(write)


EVERYWHERE = np.arange(PAGES * SLOTS, dtype=np.int32)


def orders(seed):
    """(steps, pages): a permutation of the slots for each page."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(SLOTS) for _ in range(PAGES)], axis=1).astype(np.int32)


def assert_same(x, one, other, what):
    a, b = one.key_pages, other.key_pages
    if leaves_equal(a, b):
        return
    at = np.argwhere(np.asarray(a.scales) != np.asarray(b.scales))
    at = at if len(at) else np.argwhere(np.asarray(a.codes) != np.asarray(b.codes))
    page, block = int(at[0][1]), int(at[0][3]) if a.scales.shape[3] > 1 else 0
    stored = [hex(np.asarray(part.scales)[0, page, 0, block]) for part in (a, b)]
    rows = x[page, :, block] if a.scales.shape[3] > 1 else x[page]
    raise AssertionError(f"{what}: {len(at)} differ, as {stored} for {rows.tolist()}")


@pytest.mark.short(2)
@every_kind
@every_spelling
def test_any_order_leaves_the_same(spelling, kind):
    x = pages(kind)
    whole = at_once(spelling)(x, EVERYWHERE)
    ascending = np.broadcast_to(np.arange(SLOTS, dtype=np.int32)[:, None], (SLOTS, PAGES))
    ways = {"in order": ascending, "backwards": ascending[::-1], "shuffled": orders(0)}
    for what, order in ways.items():
        assert_same(x, one_at_a_time(spelling)(x, order), whole, what)


@every_kind
@every_spelling
def test_what_the_cache_writes_is_what_quantize_makes(spelling, kind):
    x = pages(kind)
    whole = at_once(spelling)(x, EVERYWHERE).key_pages
    assert leaves_equal(quantize(spelling, x[None]), whole)


@every_spelling
def test_a_part_of_a_page_leaves_zero_codes_elsewhere(spelling):
    """Code 0 is a slot to which nothing was written; the others are as if the block were of them alone."""
    x = pages("gaussian")
    position = np.where(EVERYWHERE % SLOTS < 5, EVERYWHERE, -1).astype(np.int32)
    part = at_once(spelling)(x, position).key_pages
    codes, scales = oracle(spelling, x[:, :5])
    np.testing.assert_array_equal(np.asarray(part.scales)[0], scales)
    got = np.asarray(part.unpacked())[0]
    np.testing.assert_array_equal(got[:, :5], codes)
    assert (codes > 0).all() and not got[:, 5:].any()
    steps = np.broadcast_to(np.array([3, 0, 4, 2, 1, -1, -1, -1], np.int32)[:, None], (SLOTS, PAGES))
    assert leaves_equal(part, one_at_a_time(spelling)(x, steps).key_pages)


def floats():
    """Finite float32 of any bits, and a few that matter."""
    some = [
        0.0,
        1.0,
        -1.0,
        8191.0,
        8192.0,
        -8192.0,
        8128.0,
        254.0,
        255.0,
        256.0,
        511.0,
        512.0,
        1e-38,
        3.4e38,
        -3.4e38,
    ]
    return st.one_of(
        st.sampled_from(some),
        st.integers(-9000, 9000).map(float),
        st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True),
    )


@st.composite
def drawn_pages(draw):
    """Each channel of a page draws from a few values, which its slots repeat; all pages of one kind."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    few = np.array(draw(st.lists(floats(), min_size=2, max_size=8)), np.float32)
    return rng.choice(few, (PAGES, SLOTS, CHANNELS))


@pytest.mark.parametrize("spelling", ["int8:channel+offset", "int4:channel+offset"])
@settings(max_examples=5, deadline=None, derandomize=True)
@given(x=drawn_pages(), seed=st.integers(0, 1000))
def test_whatever_is_drawn_keeps_the_rule_in_any_order(spelling, x, seed):
    codes, scales = oracle(spelling, x)
    whole = at_once(spelling)(x, EVERYWHERE)
    got = whole.key_pages
    np.testing.assert_array_equal(np.asarray(got.scales)[0], scales)
    np.testing.assert_array_equal(
        np.asarray(got.codes)[0], codes if got.codes_per_byte == 1 else two_to_a_byte(codes)
    )
    assert_same(x, one_at_a_time(spelling)(x, orders(seed)), whole, "shuffled")


@pytest.mark.parametrize("spelling", ["int8+offset", "int8+offset+rotate", "int4:page+offset"])
@pytest.mark.parametrize("channels", [16, 64, 128])
def test_blocks_whose_least_value_is_zero(spelling, channels):
    """Whether a compiler gives the zero of a minimum a sign or not, the window begins at 0."""
    x = np.ones((1, 4, 16, channels), np.float32)
    if "rotate" not in spelling:  # where the first channel holds everything, and the others zero
        x[..., ::2] = 0
    array = quantize(spelling, x)
    assert not (np.asarray(array.scales) & 0xFF).any()
    assert np.asarray(array.unpacked()).min() == 1


@every_spelling
def test_a_smaller_value_changes_no_scale_when_it_comes_second(spelling):
    """What fits beside a smaller value must fit alone, or the order would tell."""
    reach = 128 * 2 ** qpaged.get_quantizer(spelling).bits // 4
    x = np.zeros((PAGES, SLOTS, CHANNELS), np.float32) + np.float32(reach)
    x[:, 1:] = reach - 1
    whole = at_once(spelling)(x, EVERYWHERE)
    steps = np.broadcast_to(np.arange(SLOTS, dtype=np.int32)[:, None], (SLOTS, PAGES))
    assert_same(x, one_at_a_time(spelling)(x, steps), whole, "greatest first")
