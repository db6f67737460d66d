"""Dictionaries and JSON: every class comes back bit for bit, and what is not whole is refused by name."""

import copy
import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import entry_points
from support.arrays import leaves_equal
from support.caches import (
    SOME,
    bits,
    config,
    decode,
    fresh,
    make_view,
    prefill,
    tokens,
    write_prefill,
)
from support.records import TABLE, filled, first_version, with_digest

import qpaged

Quantized = qpaged.QuantizedArray


def examples():
    """An object of every class."""
    step = prefill(np.arange(8), TABLE, 5)
    rows = decode(np.array([-1, 7]), np.stack([TABLE, TABLE]))
    return {
        "metadata": config(quantizer=qpaged.CacheFormat.of("int8"), dtype="bfloat16"),
        "metadata of any format": config(),
        "prefill": step,
        "decode": rows,
        "mixed": step.replace(
            decodes_position=rows.decodes_position, decodes_page_table=rows.decodes_page_table
        ),
        "empty": qpaged.PagedAttentionMetadata.init_empty(),
        "no tokens": prefill(np.zeros(0, np.int32), np.zeros(0, np.int32)),
        "view": filled(),
        "cache": qpaged.PagedAttentionCache([filled("int8"), filled("raw").replace(layer_index=1)]),
    }


def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, qpaged.PagedAttentionCacheMetaData):
        assert a == b
        assert hash(a) == hash(b)
        return
    assert bits(a) == bits(b)
    assert jax.tree_util.tree_structure(a) == jax.tree_util.tree_structure(b)


WAYS = {
    "dictionary": lambda x: type(x).from_dict(x.to_dict()),
    "json": lambda x: type(x).from_json(x.to_json()),
    "json with options": lambda x: type(x).from_json(x.to_json(indent=2, sort_keys=True)),
    "json of the dictionary": lambda x: type(x).from_dict(json.loads(x.to_json())),
    "dictionary of the json": lambda x: type(x).from_dict(type(x).from_json(x.to_json()).to_dict()),
    "replace": lambda x: x.replace(),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "copy": copy.copy,
    "deep copy": copy.deepcopy,
    "tree_map": lambda x: jax.tree_util.tree_map(lambda leaf: leaf, x),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", examples())
def test_every_class_comes_back(name, way):
    example = examples()[name]
    same(example, WAYS[way](example))


@pytest.mark.parametrize("format", SOME)
def test_every_format_comes_back(format):
    view = filled(format)
    for way in ("dictionary", "json", "deep copy", "pickle"):
        back = WAYS[way](view)
        same(view, back)
        if format is not None:
            assert back.key_pages.quantizer == view.key_pages.quantizer
            assert back.key_pages.block == view.key_pages.block
    key, value = tokens(8, seed=1)
    later = prefill(np.arange(8, 16), TABLE)
    back = WAYS["json"](view)
    assert bits(write_prefill(back, key, value, later)) == bits(write_prefill(view, key, value, later))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("format", [None, "raw"])
def test_every_bit_pattern_comes_back(dtype, format):
    width = jnp.dtype(dtype).itemsize
    patterns = np.arange(16 * 2 * 4 * 32, dtype=f"uint{8 * width}") * (257 if width == 2 else 8388617)
    patterns = patterns.view(jnp.dtype(dtype)).reshape(2, 16, 4, 32)
    patterns[0, 0, 0, :4] = [-0.0, np.inf, -np.inf, np.nan]
    assert np.isnan(patterns.astype(np.float32)).sum() > 1  # payloads of many kinds
    pool = jnp.asarray(patterns)
    if format == "raw":
        codes = jnp.asarray(patterns.view(f"uint{8 * width}"))
        raw = qpaged.get_quantizer("raw")
        pool = Quantized(stored=codes, scales=None, quantizer=raw, dtype=jnp.dtype(dtype))
    view = qpaged.PagedAttentionCacheView(config(), 0, pool, pool)
    for way in ("dictionary", "json", "pickle"):
        back = WAYS[way](view)
        same(view, back)
        assert back.key_pages.dtype == jnp.dtype(dtype)


def test_formats_by_layer_and_part_come_back():
    format = qpaged.CacheFormat.of("int8:channel/int8:token").with_layers({1: "raw/plain", 0: None})
    metadata = config(quantizer=format, dtype="float32")
    back = WAYS["json"](metadata)
    assert back.quantizer.layer(1) == (qpaged.get_quantizer("raw"), None)
    same(metadata, back)


def test_keys_and_values_of_different_formats_come_back():
    view = make_view("int8:channel/int8:token")
    same(view, WAYS["json"](view))


def test_arrays_stay_arrays_in_a_dictionary():
    view = filled()
    assert view.to_dict()["key_pages"] is view.key_pages
    assert view.to_dict()["metadata"]["page_size"] == 4
    parts = filled("int8").to_dict()["key_pages"]
    assert parts["codes"] is filled("int8").key_pages.codes


def test_json_is_text_without_surprises():
    record = json.loads(filled("int8").to_json())
    assert record["type"] == "PagedAttentionCacheView"
    assert record["version"] == 2
    assert record["key_pages"]["codes"]["name"] == "/key_pages/codes"
    assert record["key_pages"]["quantizer"] == {"name": "int8", "granularity": "page"}
    assert filled("int8").to_json() == filled("int8").to_json()


def test_numpy_scalars_and_plain_numbers_come_back():
    step = prefill(np.arange(8), TABLE).replace(prefill_length=5)
    assert WAYS["json"](step).prefill_length == 5
    step = step.replace(prefill_length=np.int32(5), prefill_position=np.arange(8, dtype=np.int16))
    back = WAYS["json"](step)
    assert int(back.prefill_length) == 5
    assert (back.prefill_position.dtype, back.prefill_position.shape) == (np.int16, (8,))


def test_arrays_of_another_byte_order_come_back():
    step = prefill(np.arange(8), TABLE).replace(prefill_position=np.arange(8).astype(">i4"))
    np.testing.assert_array_equal(WAYS["json"](step).prefill_position, np.arange(8))


def test_arrays_that_are_not_contiguous_come_back():
    step = prefill(np.arange(8), TABLE).replace(prefill_position=np.arange(16, dtype=np.int32)[::-2])
    np.testing.assert_array_equal(WAYS["json"](step).prefill_position, np.arange(16)[::-2])


def test_a_position_past_int32_does_not_come_back_as_a_small_one():
    """It is dropped where it is written, so it must be dropped, or refused, after a round trip too."""
    step = prefill(np.arange(8), TABLE).replace(prefill_position=np.arange(8) + 2**32)
    key, value = tokens(8)
    assert bits(write_prefill(fresh(), key, value, step)) == bits(fresh())
    try:
        back = WAYS["json"](step)
    except ValueError:
        return
    assert bits(write_prefill(fresh(), key, value, back)) == bits(fresh())


CLASSES = (
    qpaged.PagedAttentionCacheMetaData,
    qpaged.PagedAttentionMetadata,
    qpaged.PagedAttentionCacheView,
    qpaged.PagedAttentionCache,
)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("data", "seen"), [({}, "type None, version None"), (None, "type None"), ([1], "type None")]
)
def test_what_is_no_record_is_refused(cls, data, seen):
    with pytest.raises(ValueError, match=f"must hold a {cls.__name__} of version 2, .* but holds {seen}"):
        cls.from_dict(data)
    with pytest.raises(ValueError, match=f"must hold a {cls.__name__} of version 2, .* but holds {seen}"):
        cls.from_json(json.dumps(data))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    "text", ["", "{", "no", b"\xff".decode("latin1"), '{"type": "PagedAttentionMetadata"']
)
def test_what_is_not_json_is_refused(cls, text):
    with pytest.raises(ValueError, match="line 1 column"):
        cls.from_json(text)


def test_another_class_is_refused():
    record = config().to_dict()
    with pytest.raises(
        ValueError, match=r"PagedAttentionCache of .* holds type 'PagedAttentionCacheMetaData'"
    ):
        qpaged.PagedAttentionCache.from_dict(record)


@pytest.mark.parametrize("version", [0, 3, "1", None, [1], True, 1.0])
def test_another_version_is_refused(version):
    record = config().to_dict() | {"version": version}
    with pytest.raises(ValueError, match=f"version 2, .* version {re.escape(repr(version))};"):
        qpaged.PagedAttentionCacheMetaData.from_dict(record)


def test_another_version_inside_is_refused():
    record = filled().to_dict()
    record["metadata"] = record["metadata"] | {"version": 1}
    with pytest.raises(ValueError, match=r"PagedAttentionCacheMetaData of version 2, .* holds .* version 1"):
        qpaged.PagedAttentionCacheView.from_dict(record)


def test_missing_and_unknown_fields_are_refused():
    record = config().to_dict()
    without = {key: value for key, value in record.items() if key != "page_size"}
    with pytest.raises(ValueError, match=r"data of a PagedAttentionCacheMetaData lacks page_size;"):
        qpaged.PagedAttentionCacheMetaData.from_dict(without)
    with pytest.raises(ValueError, match=r"MetaData lacks page_size and has unknown bits;"):
        qpaged.PagedAttentionCacheMetaData.from_dict(without | {"bits": 3})


def test_a_step_of_before_there_were_ragged_batches_is_read():
    step = qpaged.PagedAttentionMetadata.decode(position=[3], page_table=[[1]])
    record = {name: value for name, value in step.to_dict().items() if not name.startswith("ragged")}
    assert leaves_equal(qpaged.PagedAttentionMetadata.from_dict(record), step)


def test_a_ragged_batch_is_read_as_it_was():
    step = qpaged.PagedAttentionMetadata.ragged(
        position=[3, 4, 0], page_tables=[[1, 2], [0, 3]], starts=[0, 2, 3]
    )
    assert leaves_equal(qpaged.PagedAttentionMetadata.from_json(step.to_json()), step)
    record = step.to_dict() | {"ragged_starts": np.array([0, 3])}
    with pytest.raises(
        ValueError, match="ragged_starts must have one entry more than ragged_page_tables has rows"
    ):
        qpaged.PagedAttentionMetadata.from_dict(record)


def test_a_count_that_is_wrong_is_refused():
    with pytest.raises(ValueError, match="page_size must be positive, but came as 0"):
        qpaged.PagedAttentionCacheMetaData.from_dict(config().to_dict() | {"page_size": 0})


def array_of(**changes):
    record = json.loads(prefill(np.arange(8), TABLE).to_json())
    record["prefill_position"] = {
        key: value for key, value in (record["prefill_position"] | changes).items() if value is not None
    }
    return with_digest(record)


@pytest.mark.parametrize(
    "changes",
    [
        {"data": json.loads(prefill(np.arange(8), TABLE).to_json())["prefill_position"]["data"][:-5]},
        {"data": json.loads(prefill(np.arange(8), TABLE).to_json())["prefill_position"]["data"][:-8]},
        {"data": ""},
        {"data": "????"},
        {"data": 7},
        {"data": None},
        {"shape": [9]},
        {"shape": None},
        {"shape": "8"},
        {"dtype": "int31"},
        {"dtype": None},
        {"dtype": "object"},
        {"dtype": "complex64"},
        {"dtype": ">i4"},
        {"shape": [-1]},
        {"shape": [8.0]},
        {"shape": [True]},
    ],
    ids=str,
)
def test_an_array_that_is_not_whole_is_refused(changes):
    with pytest.raises(ValueError, match="data holds an array that is not whole"):
        qpaged.PagedAttentionMetadata.from_json(array_of(**changes))


@pytest.mark.parametrize("kind", ["tensor", None, 3, ["array"], {"a": 1}])
def test_a_part_of_unknown_type_is_refused(kind):
    with pytest.raises(ValueError, match="data holds a part of unknown type"):
        qpaged.PagedAttentionMetadata.from_json(array_of(type=kind if kind is not None else "None"))


def pages_with(**changes):
    record = filled("int8").to_dict()
    pages = record["key_pages"] | changes
    record["key_pages"] = {key: value for key, value in pages.items() if value != "missing"}
    return record


def test_pages_of_a_format_that_is_not_installed_are_refused():
    record = pages_with(quantizer={"name": "int7", "granularity": "page"})
    with pytest.raises(qpaged.RegistryError, match="no format is named 'int7'; there are"):
        qpaged.PagedAttentionCacheView.from_dict(record)
    metadata = config(quantizer=qpaged.CacheFormat.of("int8")).to_dict()
    metadata["quantizer"] = metadata["quantizer"] | {"key": {"name": "int7", "granularity": "page"}}
    with pytest.raises(qpaged.RegistryError, match="no format is named 'int7'; there are"):
        qpaged.PagedAttentionCacheMetaData.from_dict(metadata)


def test_pages_of_a_format_of_other_options_are_refused():
    record = pages_with(quantizer={"name": "int8", "granularity": "page", "bits": 5})
    with pytest.raises(ValueError, match=r"no format can be made from .*'bits': 5"):
        qpaged.PagedAttentionCacheView.from_dict(record)


@pytest.mark.parametrize(
    "changes",
    [
        *({part: "missing"} for part in ("codes", "scales", "quantizer", "dtype")),
        {"quantizer": {"name": "int8"}},
        {"quantizer": "int8"},
        {"quantizer": {"name": "int8", "granularity": 3}},
        {"dtype": "float31"},
        {"dtype": "int8"},
    ],
    ids=str,
)
def test_pages_that_are_not_whole_are_refused(changes):
    with pytest.raises(ValueError, match=r".+"):
        qpaged.PagedAttentionCacheView.from_dict(pages_with(**changes))


def test_codes_and_scales_that_do_not_belong_together_are_refused():
    record = pages_with(scales=filled("int8").key_pages.scales[:, :5])
    with pytest.raises(ValueError, match=r".+"):
        qpaged.PagedAttentionCacheView.from_dict(record)


def test_pools_of_another_shape_than_the_metadata_says_are_refused():
    record = filled().to_dict()
    record["metadata"] = record["metadata"] | {"num_pages_per_layer": 32}
    with pytest.raises(ValueError, match=r".+"):
        qpaged.PagedAttentionCacheView.from_dict(record)


def test_a_callable_format_cannot_be_written():
    metadata = config(quantizer=lambda zeros: zeros)
    with pytest.raises(
        TypeError, match=r"only plain and QuantizedArray pages and named formats .* got a function"
    ):
        metadata.to_dict()
    lazy = jax.jit(qpaged.implicit.use_implicit_args(lambda pages: pages * 2))(filled("int8").key_pages)
    with pytest.raises(TypeError, match="only plain and QuantizedArray pages"):
        filled("int8").replace(key_pages=lazy).to_json()
    with pytest.raises(TypeError, match="got a object"):
        filled().replace(key_pages=object()).to_json()


@dataclass(frozen=True)
class Wide(type(qpaged.get_quantizer("int8:token"))):
    """int8:token by another name, with an option."""

    bits: int = 4
    name: ClassVar[str] = "wide"


@pytest.fixture
def wide(monkeypatch):
    entry_points.install(monkeypatch, entry_points.Point("wide", "oddities", Wide))
    return qpaged.get_quantizer("wide")


def test_the_options_of_a_quantizer_come_back_or_are_refused(wide):
    """Not: come back as the defaults, unsaid."""
    other = Wide(bits=8)
    assert other != wide
    for example in (config(quantizer=qpaged.CacheFormat.of(other)), make_view(other)):
        try:
            back = WAYS["json"](example)
        except (TypeError, ValueError) as error:
            assert "bits" in str(error)  # noqa: PT017
        else:
            same(example, back)


def test_the_pages_of_an_installed_quantizer_come_back(wide):
    view = make_view(wide)
    same(view, WAYS["json"](view))


@pytest.mark.parametrize("name", examples())
def test_records_of_the_first_version_are_read(name):
    example = examples()[name]
    text = json.dumps(first_version(json.loads(example.to_json())))
    same(example, type(example).from_json(text))


def test_the_frozen_record_of_the_second_version_is_read_and_written_again():
    text = (Path(__file__).parents[1] / "frozen/version_2/int8.json").read_text(encoding="utf-8")
    cache = qpaged.PagedAttentionCache.from_json(text)
    same(cache, qpaged.PagedAttentionCache([filled("int8").replace(layer_index=i) for i in range(2)]))
    assert json.loads(cache.to_json()) == json.loads(text)
