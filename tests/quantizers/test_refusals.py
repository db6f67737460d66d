"""Options that no format has: each is refused with what came, and what is possible."""

import re

import jax.numpy as jnp
import pytest

import qpaged
from qpaged.arrays import quantize

META = qpaged.PagedAttentionCacheMetaData

SPELLINGS = {
    "int4:group33": [
        "granularity must be one of group32, group64, group128, token, page, channel",
        "'group33'",
    ],
    "int8:foo": ["granularity must be one of page, token, channel", "int8", "'foo'"],
    "int8:group32": ["granularity must be one of page, token, channel", "int8", "'group32'"],
    "int2:group128": ["granularity must be one of group32, group64", "int2", "'group128'"],
    "mxfp4:group16": ["takes only the granularity group32", "mxfp4", "'group16'"],
    "mxfp8:page": ["takes only the granularity group32", "mxfp8", "'page'"],
    "nvfp4:group32": ["takes only the granularity group16", "nvfp4", "'group32'"],
    "raw:page": ["takes only the granularity element", "raw", "'page'"],
    "int7": [
        "no format is named 'int7'",
        "int2, int3, int4, int5, int6, int8",
        "trellis3, and plain. Did you mean int8?",
    ],
    "plain:token": ["'plain:token' is no format: plain has no granularity or wrapper; write plain alone."],
    "int8+turn": ["no wrapper is named '+turn'", "there are +offset, +rotate."],
    "int8+offset+offset": ["+offset may be given once", "int8+offset has it"],
    "int8:token+offset+offset": ["+offset may be given once", "int8:token+offset has it"],
    "int8+rotate+rotate": ["+rotate may be given once", "int8+rotate has it"],
    "int8+offset+rotate+offset": ["+offset may be given once", "int8+offset"],
    "int8+rotate+offset+rotate": ["+rotate may be given once"],
    "int4+rotate+offset+rotate+offset": ["may be given once"],
    "raw+rotate": ["+rotate goes with formats that have scales", "raw has none"],
    "raw+offset": ["+offset goes with", "int8, int4 and int2", "raw is not one of these"],
    "fp8_e4m3+offset": ["+offset goes with", "int8, int4 and int2", "fp8_e4m3 is not one of these"],
    "fp8_e5m2:token+offset": ["+offset goes with", "fp8_e5m2:token is not one of these"],
    "lloyd4+offset": ["+offset goes with", "lloyd4 is not one of these"],
    "trellis2+offset": ["+offset goes with", "trellis2 is not one of these"],
    "fp8_e4m3+rotate+offset": ["+offset goes with", "fp8_e4m3"],
    "mxfp4+offset": ["+offset goes with", "int8, int4 and int2", "mxfp4 is not one of these"],
    "mxfp8+offset": ["+offset goes with", "mxfp8 is not one of these"],
    "nvfp4+offset": ["+offset goes with", "int8, int4 and int2", "nvfp4 is not one of these"],
    "+rotate": ["is no format; write NAME, NAME:GRANULARITY or NAME+WRAPPER, as int8,"],
    "int8+": ["is no format; write NAME, NAME:GRANULARITY or NAME+WRAPPER, as int8,"],
    "int4:": ["is no format; write NAME, NAME:GRANULARITY or NAME+WRAPPER, as int8,"],
    "int4:+offset": ["is no format; write NAME, NAME:GRANULARITY or NAME+WRAPPER, as int8,"],
    "int8++rotate": ["is no format; write NAME, NAME:GRANULARITY or NAME+WRAPPER, as int8,"],
    "int8+rotate:token": ["is no format; write NAME, NAME:GRANULARITY or NAME+WRAPPER, as int8,"],
    "int8 + rotate": ["is no format; write NAME, NAME:GRANULARITY or NAME+WRAPPER, as int8,"],
    "Int8": ["no format is named 'Int8'", "Did you mean int8?"],
}


def assert_says(error, spelling, parts):
    for part in (repr(spelling), *parts):
        assert part in str(error.value), f"{str(error.value)!r} does not say {part!r}"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_is_refused_with_what_is_possible(spelling):
    with pytest.raises(qpaged.RegistryError) as error:
        qpaged.get_quantizer(spelling)
    assert_says(error, spelling, SPELLINGS[spelling])


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("pair", ["{}", "int8/{}", "{}/raw"])
def test_and_so_it_is_where_a_cache_is_made(spelling, pair):
    with pytest.raises(qpaged.RegistryError) as error:
        META.create(None, 1, 1, 64, 16, 2, 64, 0.5, quantizer=pair.format(spelling), memory_bytes=10**7)
    assert_says(error, spelling, SPELLINGS[spelling])


def configuration(head_dim):
    return META(1, 1, 4, 4, 64, 16, 2, head_dim, 0.5)


def as_planned(spelling, head_dim):
    return META.create(None, 1, 1, 64, 16, 2, head_dim, 0.5, quantizer=spelling, memory_bytes=10**7)


def as_allocated(spelling, head_dim):
    return qpaged.PagedAttentionCache.init_cache(None, jnp.float32, configuration(head_dim), None, spelling)


def as_a_layer(spelling, head_dim):
    format = qpaged.CacheFormat.of("int8").with_layers({0: f"int8/{spelling}"})
    return qpaged.PagedAttentionCacheView.init(None, jnp.float32, configuration(head_dim), 0, None, format)


def as_an_array(spelling, head_dim):
    return qpaged.get_quantizer(spelling).quantize(jnp.zeros((2, 4, head_dim)))


WAYS = [as_planned, as_allocated, as_a_layer, as_an_array]

GROUPS = {
    ("int4:group128", 64): [
        "head_dim must be a multiple of 128 for int4:group128",
        "but is 64",
        "group32, group64",
    ],
    ("int4", 48): ["head_dim must be a multiple of 32 for int4", "but is 48", "token, page, channel"],
    ("int4:group64+offset+rotate", 96): [
        "multiple of 64 for int4:group64",
        "but is 96",
        "group32",
    ],
    ("int2", 80): ["head_dim must be a multiple of 32 for int2", "but is 80"],
    ("mxfp4", 80): ["head_dim must be a multiple of 32 for mxfp4", "but is 80"],
    ("mxfp8+rotate", 100): ["head_dim must be a multiple of 32 for mxfp8", "but is 100"],
    ("nvfp4", 40): ["head_dim must be a multiple of 16 for nvfp4", "but is 40"],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("spelling", "head_dim"), GROUPS)
def test_groups_that_do_not_divide_head_dim_are_refused(way, spelling, head_dim):
    with pytest.raises(ValueError, match="head_dim") as error:
        way(spelling, head_dim)
    for part in GROUPS[spelling, head_dim]:
        assert part in str(error.value)


@pytest.mark.parametrize(("spelling", "head_dim"), [("mxfp4", 80), ("nvfp4", 40)])
def test_where_no_granularity_fits_another_format_is_named(spelling, head_dim):
    """That none fits is no help."""
    with pytest.raises(ValueError, match="head_dim") as error:
        as_planned(spelling, head_dim)
    assert re.search(r"int8|format", str(error.value).split(";", 1)[1]), str(error.value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "spelling", ["int4:token", "int4:page", "int4:channel", "int4:page+offset", "int4:token+rotate"]
)
def test_an_odd_head_dim_is_refused_where_codes_are_packed(way, spelling):
    with pytest.raises(ValueError, match=re.escape(spelling)) as error:
        way(spelling, 33)
    for part in ("multiple of 2 channels", "33", "take a format of 8 bits"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "spelling", ["int8", "int8:token", "int8+offset+rotate", "int8:channel+rotate", "fp8_e4m3"]
)
def test_an_odd_head_dim_is_taken_by_formats_of_8_bits(spelling):
    assert as_planned(spelling, 33).num_pages_per_layer > 0


def test_blocks_of_other_axes_are_checked_too():
    quantizer = qpaged.get_quantizer("int4:token")
    with pytest.raises(ValueError, match="multiple of 2 channels, for codes of int4:token to fill"):
        quantize(jnp.zeros((3, 8)), quantizer, (1, 8), channel_axis=0)


@pytest.mark.parametrize("name", ["Int8Floor", "Int8Token", "Int4", "Int4Floor"])
def test_a_class_refuses_the_granularities_of_its_sibling(name):
    import quantizers

    wrong = {"Int8Floor": "token", "Int8Token": "page", "Int4": "page", "Int4Floor": "group32"}[name]
    with pytest.raises(ValueError, match=f"granularity must .* for {name}"):
        getattr(quantizers, name)(wrong)


def test_wrappers_made_by_hand_are_checked_too():
    import quantizers

    with pytest.raises(
        ValueError, match="inner must be a format of floors for OffsetFloor, but is int8:token"
    ):
        quantizers.OffsetFloor(inner=quantizers.Int8Token())
    with pytest.raises(TypeError, match=r"inner must be a qpaged\.Quantizer, but came as 'int8'"):
        quantizers.Rotate(inner="int8")
    with pytest.raises((TypeError, ValueError), match=r"inner must be a qpaged\.Quantizer"):
        quantizers.Rotate()


@pytest.mark.parametrize(
    ("head_dim", "fit"),
    [(33, "another format, as int8:token"), (34, "int4 with a granularity that fits: token,")],
)
def test_of_an_odd_head_dim_only_granularities_that_fill_bytes_are_named(head_dim, fit):
    shape = (1, 2, 16, head_dim)
    with pytest.raises(ValueError, match=f"but is {head_dim}; take {fit}"):
        qpaged.get_quantizer("int4").empty(shape, jnp.float32)
