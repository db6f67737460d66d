"""Records whose parts do not fit each other, and records that were changed, are refused."""

import base64
import json

import jax.numpy as jnp
import numpy as np
import pytest
from support.caches import config
from support.records import filled, with_digest

import qpaged


def cache_of(format, metadata_format=None):
    """Return a filled cache of two layers."""
    metadata = config(quantizer=qpaged.CacheFormat.of(metadata_format or format), dtype="float32")
    layers = [filled(format).replace(metadata=metadata, layer_index=layer) for layer in range(2)]
    return qpaged.PagedAttentionCache(layers)


def swapped(record, first, second):
    """Exchange what two paths lead to."""

    def at(path):
        *way, last = path.split("/")
        for key in way:
            parent = parents[-1][int(key) if key.isdigit() else key]
            parents.append(parent)
        return parents[-1], last

    parents = [record]
    one, one_key = at(first)
    parents = [record]
    two, two_key = at(second)
    one[one_key], two[two_key] = two[two_key], one[one_key]


def changed(path, value):
    """Return a function that puts a value where a path leads."""

    def change(record):
        *way, last = path.split("/")
        for key in way:
            record = record[int(key) if key.isdigit() else key]
        record[last] = value

    return change


VIEW = "views/0"
CHANGES = {
    "keys and values": lambda r: swapped(r, f"{VIEW}/key_pages", f"{VIEW}/value_pages"),
    "keys of two layers": lambda r: swapped(r, f"{VIEW}/key_pages", "views/1/key_pages"),
    "scales of keys and of values": lambda r: swapped(
        r, f"{VIEW}/key_pages/scales", f"{VIEW}/value_pages/scales"
    ),
    "another format in the metadata": changed(f"{VIEW}/metadata/quantizer", None),
    "the name of a format": changed(f"{VIEW}/metadata/quantizer", "int8"),
    "the name of a file": changed(f"{VIEW}/metadata/quantizer", "x.json"),
    "another dtype in the metadata": changed(f"{VIEW}/metadata/dtype", "bfloat16"),
    "another dtype of pages": changed(f"{VIEW}/key_pages/dtype", "float16"),
    "a dtype that JAX has not": changed(f"{VIEW}/key_pages/dtype", "float64"),
    "another page in one layer": changed(f"{VIEW}/metadata/page_size", 8),
    "other sequences in one layer": changed(f"{VIEW}/metadata/max_sequences", 7),
    "a true count": changed(f"{VIEW}/metadata/page_size", True),
    "a fractional count": changed(f"{VIEW}/metadata/page_size", 4.0),
    "a nested list": changed(f"{VIEW}/metadata/num_kv_heads", [1]),
    "no layers": changed("views", []),
    "null layers": changed("views", None),
    "a number of layers": changed("views", 2),
    "empty layers": changed("views", [None, None]),
    "a layer beyond": changed(f"{VIEW}/layer_index", 99),
    "a layer's name": changed(f"{VIEW}/layer_index", "0"),
    "a fractional layer": changed(f"{VIEW}/layer_index", 0.0),
    "a false layer": changed(f"{VIEW}/layer_index", False),
    "no metadata": changed(f"{VIEW}/metadata", None),
    "no pages": changed(f"{VIEW}/key_pages", None),
    "pages of text": changed(f"{VIEW}/key_pages", "x"),
    "pages of another granularity": changed(
        f"{VIEW}/key_pages/quantizer", {"name": "int8", "granularity": "channel"}
    ),
    "a format by its spelling": changed(f"{VIEW}/metadata/quantizer/key", "int8"),
    "a layer of the format that is infinite": changed(
        f"{VIEW}/metadata/quantizer/layers", [[float("inf"), [None, None]]]
    ),
    "a layer of the format that is huge": changed(
        f"{VIEW}/metadata/quantizer/layers", [[10**30, [None, None]]]
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_parts_that_do_not_fit_each_other_are_refused(change):
    record = json.loads(cache_of("int8").to_json())
    qpaged.PagedAttentionCache.from_json(with_digest(record))  # as it was, it is read
    CHANGES[change](record)
    with pytest.raises(ValueError, match=r".+"):
        qpaged.PagedAttentionCache.from_json(with_digest(record))


def test_pages_labelled_as_another_format_of_the_same_bytes_are_refused():
    record = json.loads(cache_of("fp8_e4m3").to_json())
    record["views"][0]["key_pages"]["quantizer"]["name"] = "fp8_e5m2"
    with pytest.raises(ValueError, match=r"key_pages must be fp8_e4m3 pages .* but holds fp8_e5m2 pages"):
        qpaged.PagedAttentionCache.from_json(with_digest(record))


@pytest.mark.parametrize(
    ("format", "part"),
    [("int8", "scales"), ("int4", "scales"), ("int8:token+rotate", "scales"), ("fp8_e4m3", "codes"),
     ("nvfp4", "scales"), ("int4:channel+offset", "scales")],
)  # fmt: skip
def test_pages_that_read_as_nan_are_refused(format, part):
    record = json.loads(cache_of(format).to_json())
    stored = record["views"][0]["key_pages"][part]
    stored["data"] = base64.b64encode(b"\xff" * len(base64.b64decode(stored["data"]))).decode()
    with pytest.raises(
        ValueError, match="codes and scales must read as numbers, but some of these read as NaN"
    ):
        qpaged.PagedAttentionCache.from_json(with_digest(record))


@pytest.mark.parametrize("dtype", ["int32", "bool", "bfloat16", "uint8"])
def test_plain_pages_of_another_dtype_are_refused(dtype):
    record = json.loads(cache_of(None, "plain").to_json())
    pages = record["views"][0]["key_pages"]
    size = np.prod(pages["shape"]) * jnp.dtype(dtype).itemsize
    pages |= {"dtype": dtype, "data": base64.b64encode(bytes(int(size))).decode()}
    with pytest.raises(ValueError, match="key_pages must be plain pages of float32"):
        qpaged.PagedAttentionCache.from_json(with_digest(record))


def test_a_flipped_bit_is_refused():
    text = cache_of("int8").to_json().encode()
    rng = np.random.default_rng(0)
    for place, bit in zip(rng.integers(0, len(text), 300), rng.integers(0, 8, 300), strict=True):
        damaged = bytearray(text)
        damaged[place] ^= 1 << bit
        with pytest.raises(ValueError, match=r".+"):
            qpaged.PagedAttentionCache.from_json(bytes(damaged))


def test_a_record_without_its_digest_is_refused():
    record = json.loads(filled("int8").to_json())
    del record["digest"]
    with pytest.raises(ValueError, match="damaged since it was written: its digest is missing"):
        qpaged.PagedAttentionCacheView.from_json(json.dumps(record))


def test_a_digest_is_checked_in_a_dictionary_too():
    record = json.loads(filled("int8").to_json())
    record["layer_index"] = 1
    with pytest.raises(ValueError, match="changed or damaged since it was written"):
        qpaged.PagedAttentionCacheView.from_dict(record)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"type":' * 200_000, None, 3])
def test_what_json_cannot_read_at_all_is_refused(text):
    with pytest.raises(
        ValueError, match="json_str must be the text that to_json writes of a PagedAttentionCache, but got "
    ):
        qpaged.PagedAttentionCache.from_json(text)


def test_a_format_nested_without_end_is_refused():
    record = json.loads(cache_of("int8").to_json())
    nested = {"name": "int8", "granularity": "page"}
    for _ in range(400):
        nested = {"name": "+rotate", "granularity": "", "inner": nested}
    record["views"][0]["key_pages"]["quantizer"] = nested
    with pytest.raises(ValueError, match=r".+"):
        qpaged.PagedAttentionCache.from_json(with_digest(record))
