"""The figures of the TPU benchmark: bytes copied, and temporaries where libtpu is installed."""

import importlib.util

import pytest

import qpaged

TPU = qpaged.attention_backends()[0]
MEGABYTE = 10**6

pytestmark = pytest.mark.skipif(not TPU.available, reason=f"the tpu backend {TPU.reason}")
compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the compiler of TPUs"
)


def test_each_live_page_is_copied_once():
    """The share exceeds 1, since scales are copied by blocks of 512 slots, some of them partly empty."""
    import tpu_compile

    assert 1 <= tpu_compile.copied_share("int8:channel/int8:token") <= 1.05


@compiler
@pytest.mark.parametrize("format", ["int8", "int4:token", "int6:token"])
def test_temporaries_stay_small_and_writes_are_in_place(format):
    import tpu_compile

    for measured in tpu_compile.measure(tpu_compile.chip_sharding("v5e"), format).values():
        assert measured["temp"] < MEGABYTE and measured["temp_large"] < MEGABYTE
        assert measured.get("alias", 1) >= 1
