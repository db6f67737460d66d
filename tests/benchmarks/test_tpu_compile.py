"""What is compiled for a TPU stays within its bounds, where the TPU's compiler is installed."""

import pytest

pytest.importorskip("libtpu", reason="needs libtpu, the compiler of TPUs")
MEGABYTE = 10**6


@pytest.fixture(scope="module", params=["int8", "int4:token"])
def measured(request):
    import tpu_compile

    return tpu_compile.measure(tpu_compile.chip_of("v5e"), request.param)


def test_attention_reads_each_live_page_once_and_makes_no_copies(measured):
    attention = measured["attention"]
    assert attention["temp"] < MEGABYTE and attention["temp_large"] < MEGABYTE
    assert 1 <= attention["copied"] <= 1.05


def test_the_write_is_in_place(measured):
    write = measured["write"]
    assert write["temp"] < MEGABYTE and write["temp_large"] < MEGABYTE
    assert write["alias"] >= 1
