"""Formats of pages that are quantized once: the block's own extremes, to the nearest code."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from support.caches import make_view

import qpaged
from qpaged.formats import ExactFormat

NAMES = ("int2", "int3", "int4", "int5", "int6", "int8")
SHARED = [f"{name}:{shared}" for name in NAMES for shared in ("page", "channel")]
ROWS = np.random.default_rng(0).normal(size=(2, 16, 64)).astype(np.float32) + 0.5


def error_of(quantizer):
    return float(np.abs(np.asarray(quantizer.quantize(ROWS).dequantize()) - ROWS).mean())


@pytest.mark.short(12)
@pytest.mark.parametrize("wrappers", ["", "+offset", "+rotate", "+offset+rotate"])
@pytest.mark.parametrize("spelling", SHARED)
def test_whole_blocks_are_held_better_than_those_that_grow(spelling, wrappers):
    growing = qpaged.get_quantizer(spelling + wrappers)
    whole = growing.of_whole_blocks
    assert whole != growing and whole.of_whole_blocks == whole and str(whole) == str(growing)
    assert error_of(whole) < error_of(growing)


@pytest.mark.parametrize("spelling", ["int4", "int8:token+rotate", "raw", "nvfp4", "fp8_e4m3"])
def test_other_formats_stay_what_they_are(spelling):
    quantizer = qpaged.get_quantizer(spelling)
    assert quantizer.of_whole_blocks == quantizer


def test_an_offset_takes_the_minimum_and_the_maximum():
    whole = qpaged.get_quantizer("int4:channel+offset").of_whole_blocks
    decoded = np.asarray(whole.quantize(ROWS + 7).dequantize())
    step = np.ptp(ROWS, axis=1, keepdims=True) / 15
    assert (np.abs(decoded - ROWS - 7) <= 0.51 * step + 7 * 2.0**-8).all()


@pytest.mark.parametrize("spelling", SHARED)
def test_spellings_and_configurations_come_back(spelling):
    format = qpaged.CacheFormat.of(f"{spelling}+offset+exact9/{spelling}+exact1")
    assert qpaged.CacheFormat.of(str(format)) == format == qpaged.CacheFormat.from_config(format.config)
    assert ExactFormat(qpaged.get_quantizer(spelling)).inner == qpaged.get_quantizer(spelling).of_whole_blocks


def test_a_format_that_cannot_grow_is_refused_without_exact_pages():
    whole = qpaged.get_quantizer("int4:channel").of_whole_blocks
    text = r"scales of int4:channel are shared by several and do not grow; .* int4:channel\+exact1"
    with pytest.raises(ValueError, match=text):
        make_view(whole)
    assert make_view(ExactFormat(whole)).key_pages.codes.quantizer == whole


@pytest.mark.parametrize(("name", "granularity"), [("int4", "group32"), ("int8", "token"), ("int2", "token")])
def test_there_is_none_where_no_tokens_share_a_scale(name, granularity):
    whole = type(qpaged.get_quantizer(f"{name}:page").of_whole_blocks)
    with pytest.raises(ValueError, match="granularity must "):
        whole(granularity)
    assert dataclasses.replace(whole("channel"), granularity="page") == whole("page")


class OnGrowth(qpaged.Wrapper):
    """A wrapper of formats that grow alone."""

    name = "on_growth"

    def check(self):
        if self.inner.growth is None:
            raise ValueError("+on_growth goes with formats that grow")


def test_a_wrapper_that_refuses_whole_blocks_stays_what_it_is():
    wrapper = OnGrowth(inner=qpaged.get_quantizer("int8"))
    assert ExactFormat(wrapper).inner == wrapper == wrapper.of_whole_blocks


def test_a_scale_carries_its_sign():
    whole = qpaged.get_quantizer("int8").of_whole_blocks
    rows = jnp.array([[[1.0, -128.0]], [[-1.0, 128.0]]])
    np.testing.assert_array_equal(whole.quantize(rows).dequantize(), rows)
