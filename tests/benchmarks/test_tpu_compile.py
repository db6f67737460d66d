"""What the benchmark of the TPU kernels claims: copies, and temporaries where the compiler is installed."""

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
    """Scales come by blocks of 512 slots, and a sequence's last block is partly empty: hence not 1."""
    import tpu_compile

    assert 1 <= tpu_compile.copied("int8:channel/int8:token") <= 1.05


@compiler
@pytest.mark.parametrize("format", ["int8", "int4:token"])
def test_temporaries(format):
    import tpu_compile

    for measured in tpu_compile.measure(tpu_compile.chip_of("v5e"), format).values():
        assert measured["temp"] < MEGABYTE and measured["temp_large"] < MEGABYTE
        assert measured.get("alias", 1) >= 1
