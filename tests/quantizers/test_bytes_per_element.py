"""Bits an element, as the formats' docstrings state them: measured to the byte."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.formats import BUILT_IN

import qpaged
import quantizers

HEADS, PAGES, SLOTS, HEAD_DIM = 2, 6, 16, 128
ELEMENTS = HEADS * PAGES * SLOTS * HEAD_DIM
PAGE, TOKEN, CHANNEL = SLOTS * HEAD_DIM, HEAD_DIM, SLOTS
POWER, BFLOAT16, FLOAT32, WINDOW, PAIR = 8, 16, 32, 16, 32  # bits of what is stored for a block

# Bits of a code, and of what blocks of so many elements store beside them.
STORED = {
    "fp8_e4m3": (8, {PAGE: POWER}),
    "fp8_e4m3:token": (8, {TOKEN: POWER}),
    "fp8_e4m3:channel": (8, {CHANNEL: POWER}),
    "fp8_e5m2": (8, {PAGE: POWER}),
    "fp8_e5m2:token": (8, {TOKEN: POWER}),
    "fp8_e5m2:channel": (8, {CHANNEL: POWER}),
    "int2": (2, {32: BFLOAT16}),
    "int2+offset": (2, {32: PAIR}),
    "int2:group64": (2, {64: BFLOAT16}),
    "int2:page": (2, {PAGE: POWER}),
    "int2:channel+offset": (2, {CHANNEL: WINDOW}),
    "int2:token": (2, {TOKEN: BFLOAT16}),
    "int2:group64+offset": (2, {64: PAIR}),
    "int4": (4, {32: BFLOAT16}),
    "int4+offset": (4, {32: PAIR}),
    "int4:group64": (4, {64: BFLOAT16}),
    "int4:group64+offset": (4, {64: PAIR}),
    "int4:group128": (4, {128: BFLOAT16}),
    "int4:group128+offset": (4, {128: PAIR}),
    "int4:token": (4, {TOKEN: BFLOAT16}),
    "int4:token+offset": (4, {TOKEN: PAIR}),
    "int4:page": (4, {PAGE: POWER}),
    "int4:page+offset": (4, {PAGE: WINDOW}),
    "int4:channel": (4, {CHANNEL: POWER}),
    "int4:channel+offset": (4, {CHANNEL: WINDOW}),
    "int3": (3, {32: BFLOAT16}),
    "int3:channel+offset": (3, {CHANNEL: WINDOW}),
    "int5:token": (5, {TOKEN: BFLOAT16}),
    "int5:page": (5, {PAGE: POWER}),
    "int6:group64+offset": (6, {64: PAIR}),
    "int6:channel": (6, {CHANNEL: POWER}),
    "int8": (8, {PAGE: POWER}),
    "int8+offset": (8, {PAGE: WINDOW}),
    "int8:token": (8, {TOKEN: FLOAT32}),
    "int8:token+offset": (8, {TOKEN: PAIR}),
    "int8:channel": (8, {CHANNEL: POWER}),
    "int8:channel+offset": (8, {CHANNEL: WINDOW}),
    "lloyd2": (2, {TOKEN: BFLOAT16}),
    "lloyd3": (3, {TOKEN: BFLOAT16}),
    "lloyd4": (4, {TOKEN: BFLOAT16}),
    "trellis2": (2, {TOKEN: BFLOAT16}),
    "trellis3": (3, {TOKEN: BFLOAT16}),
    "mxfp4": (4, {32: 8}),
    "mxfp8": (8, {32: 8}),
    "nvfp4": (4, {16: 8, TOKEN: 8}),
    "raw": (32, {}),
}


DOCUMENTED = [spelling for spelling in BUILT_IN if spelling.replace("+rotate", "") in STORED]
"""Formats whose bits are counted here by hand; the kit's sixth law counts those of every format."""


def bits(spelling):
    """Bits an element; a rotation adds none."""
    code, blocks = STORED[spelling.replace("+rotate", "")]
    return code + sum((Fraction(stored, size) for size, stored in blocks.items()), Fraction(0))


def made(spelling, shape, dtype=jnp.float32):
    """The array's parts, none of them allocated."""
    return jax.eval_shape(
        lambda x: qpaged.get_quantizer(spelling).quantize(x), jax.ShapeDtypeStruct(shape, dtype)
    )


@pytest.mark.parametrize("spelling", DOCUMENTED)
def test_an_array_takes_the_documented_bits(spelling):
    array = made(spelling, (HEADS, PAGES, SLOTS, HEAD_DIM))
    parts = [part.size * part.dtype.itemsize for part in jax.tree_util.tree_leaves(array)]
    assert sum(parts) * 8 == ELEMENTS * bits(spelling)


@pytest.mark.parametrize("spelling", DOCUMENTED)
def test_a_whole_cache_takes_the_documented_bits(spelling):
    layers = 2
    page_bits = bits(spelling) * 2 * layers * HEADS * SLOTS * HEAD_DIM
    room = int(page_bits * PAGES / 8)

    def planned(memory_bytes):
        sizes = (1, layers, 64, SLOTS, HEADS, HEAD_DIM, 0.5, jnp.float32)
        options = {"quantizer": spelling, "memory_bytes": memory_bytes}
        return qpaged.PagedAttentionCacheMetaData.create(None, *sizes, **options)

    config = planned(2 * room)
    assert config.num_pages_per_layer == PAGES
    assert planned(2 * room - 2).num_pages_per_layer == PAGES - 1
    cache = qpaged.PagedAttentionCache.init_cache(None, jnp.float32, config, None, spelling)
    assert cache.nbytes == room == page_bits * PAGES / 8
    assert sum(np.asarray(leaf).nbytes for leaf in jax.tree_util.tree_leaves(cache)) == room
    pools = [pool for view in cache.views for pool in (view.key_pages, view.value_pages)]
    assert sum(pool.nbytes for pool in pools) == room


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_logical_dtype_matters_to_raw_alone(dtype):
    shape = (HEADS, PAGES, SLOTS, HEAD_DIM)
    for spelling in DOCUMENTED:
        parts = [
            part.size * part.dtype.itemsize
            for part in jax.tree_util.tree_leaves(made(spelling, shape, dtype))
        ]
        assert sum(parts) * 8 == ELEMENTS * (16 if spelling == "raw" else bits(spelling)), spelling


# What docstrings say: class, words, spelling, slots, head_dim, and the number of bits among the words.
Fp8 = quantizers.Fp8E4M3.__base__
STATED = [
    (quantizers.Lloyd2, "2.125 bits an element", "lloyd2", 16, 128, "2.125"),
    (quantizers.Lloyd3, "3.125 bits an element at head_dim 128", "lloyd3", 16, 128, "3.125"),
    (quantizers.Lloyd4, "4.125 bits an element at head_dim 128", "lloyd4", 16, 128, "4.125"),
    (quantizers.Trellis2, "2.125 bits an element", "trellis2", 16, 128, "2.125"),
    (quantizers.Trellis3, "3.125 bits an element at head_dim 128", "trellis3", 16, 128, "3.125"),
    (quantizers.Trellis2Channel, "4 at 16 tokens a page", "trellis2:channel", 16, 128, "4"),
    (quantizers.Trellis2Channel, "2.5 at 64", "trellis2:channel", 64, 128, "2.5"),
    (quantizers.Trellis3Channel, "5 at 16 tokens a page", "trellis3:channel", 16, 128, "5"),
    (quantizers.Trellis3Channel, "3.5 at 64", "trellis3:channel", 64, 128, "3.5"),
    (quantizers.Int2, "2.5 at ``group32``", "int2", 16, 128, "2.5"),
    (quantizers.Int2, "2.25 at ``group64``", "int2:group64", 16, 128, "2.25"),
    (quantizers.Int2, "with the offset, 3 and 2.5", "int2+offset", 16, 128, "3"),
    (quantizers.Int2, "with the offset, 3 and 2.5", "int2:group64+offset", 16, 128, "2.5"),
    (quantizers.Int4, "4.5 at ``group32``", "int4", 16, 128, "4.5"),
    (quantizers.Int4, "4.25 at ``group64``", "int4:group64", 16, 128, "4.25"),
    (quantizers.Int4, "4.125 at ``group128``", "int4:group128", 16, 128, "4.125"),
    (quantizers.Int4, "and at ``token`` with head_dim 128", "int4:token", 16, 128, "4.125"),
    (quantizers.Int4Floor, "4.004 at ``page`` (16 slots of 128)", "int4:page", 16, 128, "4.004"),
    (quantizers.Int4Floor, "4.5 at ``channel``", "int4:channel", 16, 128, "4.5"),
    (quantizers.Int8Floor, "8.004 at ``page`` (16 slots of 128)", "int8", 16, 128, "8.004"),
    (quantizers.Int8Floor, "8.5 at ``channel``", "int8:channel", 16, 128, "8.5"),
    (quantizers.Int8Token, "8.25 at head_dim 128", "int8:token", 16, 128, "8.25"),
    (quantizers.Mxfp8, "8.25 bits an element", "mxfp8", 16, 128, "8.25"),
    (quantizers.Mxfp4, "4.25 bits an element", "mxfp4", 16, 128, "4.25"),
    (quantizers.Nvfp4, "4.5625 at head_dim 128", "nvfp4", 16, 128, "4.5625"),
    (
        quantizers.Offset,
        "``int8:token+offset`` has 8.25 at head_dim 128",
        "int8:token+offset",
        16,
        128,
        "8.25",
    ),
    (quantizers.Offset, "``int4+offset`` 5 and", "int4+offset", 16, 128, "5"),
    (quantizers.Offset, "``int2+offset`` 3 at their groups of 32", "int2+offset", 16, 128, "3"),
    (quantizers.OffsetFloor, "9 bits at 16 tokens a page", "int8:channel+offset", 16, 128, "9"),
    (quantizers.OffsetFloor, "8.5 at 32", "int8:channel+offset", 32, 128, "8.5"),
    (quantizers.OffsetFloor, "``int4:channel+offset`` 5 and 4.5", "int4:channel+offset", 16, 128, "5"),
    (quantizers.OffsetFloor, "``int4:channel+offset`` 5 and 4.5", "int4:channel+offset", 32, 128, "4.5"),
    (Fp8, "8 bits an element and 8 per block", "fp8_e4m3:token", 16, 128, "8.0625"),
]


@pytest.mark.parametrize(("cls", "words", "spelling", "slots", "head_dim", "number"), STATED)
def test_docstrings_state_the_bits_that_arrays_take(cls, words, spelling, slots, head_dim, number):
    assert words in " ".join(cls.__doc__.split())
    parts = jax.tree_util.tree_leaves(made(spelling, (1, 1, slots, head_dim)))
    measured = Fraction(sum(part.size * part.dtype.itemsize for part in parts) * 8, slots * head_dim)
    places = len(number.partition(".")[2])
    assert round(measured, places) == Fraction(number)


def test_int8_by_token_takes_the_stated_3_percent_more():
    assert round(100 * (bits("int8:token") / bits("int8") - 1)) == 3
