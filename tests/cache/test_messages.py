"""Slips in calls, and what is said of each: the argument, the rule, what came, what to do."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from support.caches import config, decode, fresh, make_view, prefill, tokens

import qpaged

INT8 = qpaged.get_quantizer("int8")
CONFIG = config()
TABLE = np.array([3, 1, 5, 7])
ROWS, _ = tokens(2)
PREFILL = prefill(np.arange(2), TABLE)

init_cache = qpaged.PagedAttentionCache.init_cache
init_view = qpaged.PagedAttentionCacheView.init
from_json = qpaged.PagedAttentionCacheMetaData.from_json


def create(mesh=None, max_sequences=16, dtype=jnp.float32, memory_bytes=10**5, **options):
    return qpaged.PagedAttentionCacheMetaData.create(
        mesh, 2, 2, max_sequences, 4, 2, 32, 0.5, dtype, memory_bytes=memory_bytes, **options
    )


def write(key, value, metadata):
    return fresh().write_prefill_to_cache(key, value, metadata)


FOR_A_FORMAT = "quantizer must be None, a spelling such as 'int8:token', the path of a .json file, "
A_DTYPE = "dtype must be a real floating-point dtype, but got "
ITS_ADVICE = (
    "give that of keys and values, such as 'bfloat16'; for pages of codes give quantizer='int8', say."
)
A_CONFIG = "metadata must be a qpaged.PagedAttentionCacheMetaData, but got "
NO_MANAGER = (
    "partition_manager must be None or have a method resolve, but got 5; give a qpaged.PartitionManager"
)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: create(mesh=3), TypeError, "mesh must be a jax.sharding.Mesh or None, but got 3;"),
        (lambda: create(mesh="cpu"), TypeError, "mesh must be a jax.sharding.Mesh or None, but got 'cpu';"),
        (lambda: create(dtype="bf16"), TypeError, f"{A_DTYPE}'bf16'; {ITS_ADVICE}"),
        (lambda: create(dtype="int3"), TypeError, f"{A_DTYPE}'int3'; {ITS_ADVICE}"),
        (lambda: create(dtype=jnp.int8), TypeError, f"{A_DTYPE}int8; {ITS_ADVICE}"),
        (lambda: create(dtype=np.int64), TypeError, f"{A_DTYPE}int64; {ITS_ADVICE}"),
        (lambda: config(dtype="bf16"), TypeError, f"{A_DTYPE}'bf16'; {ITS_ADVICE}"),
        (lambda: make_view(dtype="bf16"), TypeError, f"{A_DTYPE}'bf16'; {ITS_ADVICE}"),
        (
            lambda: create(memory_bytes="1GB"),
            TypeError,
            "memory_bytes must be a number of bytes, but got '1GB';",
        ),
        (
            lambda: create(memory_bytes=np.nan),
            ValueError,
            "memory_bytes must be a number of bytes, but got nan;",
        ),
        (
            lambda: create(memory_bytes=np.inf),
            ValueError,
            "memory_bytes must be a number of bytes, but got inf;",
        ),
        (
            lambda: create(max_sequences=True),
            TypeError,
            "max_sequences must be an integer, but came as True;",
        ),
        (
            lambda: create(max_sequences=2**40),
            ValueError,
            "max_sequences, in whole pages, must be at most 2,147,483,646 so that int32 can index it, but "
            "came as 1,099,511,627,776; give the tokens of the longest sequence.",
        ),
        (lambda: create(partition_manager=5), TypeError, NO_MANAGER),
        (lambda: init_cache(None, jnp.float32, CONFIG, 5), TypeError, NO_MANAGER),
        (
            lambda: init_cache(3, jnp.float32, CONFIG),
            TypeError,
            "mesh must be a jax.sharding.Mesh or None, but",
        ),
        (
            lambda: init_cache(None, jnp.float32, None),
            TypeError,
            f"{A_CONFIG}None; arguments go in the order",
        ),
        (
            lambda: init_cache(None, jnp.float32, {}),
            TypeError,
            f"{A_CONFIG}{{}}; arguments go in the order mesh",
        ),
        (
            lambda: init_cache(CONFIG, None, jnp.float32),
            TypeError,
            f"{A_CONFIG}the class float32; arguments go",
        ),
        (
            lambda: init_view(None, jnp.float32, None, 0),
            TypeError,
            "order mesh, dtype, metadata, layer_index.",
        ),
        (
            lambda: qpaged.PageAllocator(None),
            TypeError,
            f"{A_CONFIG}None; give the one that the cache is made for",
        ),
        (
            lambda: qpaged.PagedAttentionCache([]),
            ValueError,
            "views must be a list with a view for each layer, but",
        ),
    ],
)
def test_a_cache_that_cannot_be_made(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        (
            5,
            f"{FOR_A_FORMAT}a qpaged.Quantizer or a qpaged.CacheFormat, but got 5; qpaged.available_",
        ),
        (
            jnp.int8,
            "but got the class int8; for pages of codes give the spelling of a format, such as 'int8'.",
        ),
        (
            np.int8,
            "but got the class int8; for pages of codes give the spelling of a format, such as 'int8'.",
        ),
        (np.dtype("int8"), "but got dtype('int8'); for pages of codes give the spelling of a format"),
        (float, "but got the class float; for pages of codes"),
        (qpaged.Quantizer, "but got the class Quantizer; qpaged.available_formats() lists the spellings."),
        (type(INT8), "but got the class Int8Floor; give an instance, Int8Floor()."),
        (lambda: 1, "quantizer must be a function of one argument, a pool's zeros, but <function <lambda>"),
        (lambda zeros: 3, "made 3; return an array of four axes."),
        (lambda zeros: zeros.sum(), "return an array of four axes."),
    ],
)
def test_what_is_no_format(quantizer, message):
    for call in (
        lambda: create(quantizer=quantizer),
        lambda: init_cache(None, jnp.float32, CONFIG, None, quantizer),
    ):
        with pytest.raises(TypeError) as raised:
            call()
        assert message in str(raised.value)


def test_a_file_that_is_not_there():
    message = r"quantizer names a file that cannot be read: No such file .* CacheFormat.save .*'no\.json'"
    for call in (lambda: create(quantizer="no.json"), lambda: qpaged.CacheFormat.of("no.json")):
        with pytest.raises(FileNotFoundError, match=message):
            call()


NO_LAYERS = "layers must be a tuple of (layer, (key quantizer, value quantizer)), but got "
NOT_ASCENDING = "layers must be counted from 0, each once and ascending, but got layers "


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ({0: "int4"}, TypeError, f"{NO_LAYERS}{{0: 'int4'}}; with_layers takes a mapping"),
        (3, TypeError, f"{NO_LAYERS}3;"),
        ([], TypeError, f"{NO_LAYERS}[];"),
        (((0, [INT8, INT8]),), TypeError, NO_LAYERS),
        (((0, (INT8, "int4")),), TypeError, NO_LAYERS),
        (((0, INT8),), TypeError, NO_LAYERS),
        (((-1, (INT8, INT8)),), ValueError, f"{NOT_ASCENDING}[-1]"),
        (
            ((1, (INT8, INT8)), (1, (INT8, None))),
            ValueError,
            f"{NOT_ASCENDING}[1, 1]; with_layers sorts them.",
        ),
        (((2, (INT8, INT8)), (1, (INT8, None))), ValueError, f"{NOT_ASCENDING}[2, 1]"),
    ],
)
def test_layers_that_are_none(layers, error, message):
    with pytest.raises(error) as raised:
        qpaged.CacheFormat(INT8, INT8, layers)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        ({"a": "int4"}, "the number of a layer must be an integer, but came as 'a'"),
        (
            ["int4"],
            "formats must be a mapping from layers to formats, but got ['int4']; give {0: 'raw'}, say.",
        ),
    ],
)
def test_formats_by_layer_that_are_none(formats, message):
    with pytest.raises(TypeError) as raised:
        qpaged.CacheFormat.of("int8").with_layers(formats)
    assert message in str(raised.value)


def test_a_layer_of_numpy_becomes_a_python_integer():
    made = qpaged.CacheFormat.of("int8").with_layers({np.int64(1): "raw"})
    assert qpaged.CacheFormat.from_config(json.loads(json.dumps(made.config))) == made


UNHASHABLE = "sequence must be hashable, but got [1]; name it by a number, a string or a tuple."


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda pages: pages.allocate([1], 3), TypeError, UNHASHABLE),
        (lambda pages: pages.free([1]), TypeError, UNHASHABLE),
        (lambda pages: pages.page_table([[1]]), TypeError, UNHASHABLE),
        (lambda pages: pages.page_table(3), TypeError, "sequences must be a list, but got 3; give [3]."),
        (lambda pages: pages.page_table("prompt"), TypeError, "but got 'prompt'; give ['prompt']."),
        (lambda pages: pages.allocate("p", -1), ValueError, "length must be a number of tokens, but got -1;"),
        (lambda pages: pages.allocate("p", "3"), TypeError, "length must be an integer, but came as '3';"),
        (lambda pages: pages.allocate(None, 3), ValueError, "sequence must not be None, which stands for"),
        (
            lambda pages: pages.free("zz"),
            qpaged.AllocationError,
            "or is freed already; free each sequence once.",
        ),
    ],
)
def test_what_an_allocator_refuses(call, error, message):
    pages = qpaged.PageAllocator(CONFIG)
    with pytest.raises(error) as raised:
        call(pages)
    assert message in str(raised.value)
    assert pages.num_free == CONFIG.num_pages_per_layer


A_STEP = "metadata must be a qpaged.PagedAttentionMetadata, but got "


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: write(ROWS, ROWS, None),
            TypeError,
            f"{A_STEP}None; PagedAttentionMetadata.prefill, .decode and .ragged make it",
        ),
        (lambda: write(ROWS, ROWS, CONFIG), TypeError, f"{A_STEP}a PagedAttentionCacheMetaData;"),
        (lambda: fresh().write_decodes_to_cache(ROWS, ROWS, None), TypeError, f"{A_STEP}None;"),
        (lambda: write(None, ROWS, PREFILL), TypeError, "key must be an array of floats, but got None;"),
        (lambda: write(ROWS, "v", PREFILL), TypeError, "value must be an array of floats, but got 'v';"),
        (
            lambda: prefill(None, TABLE),
            TypeError,
            "position must be integers, but got None; give an array of",
        ),
        (
            lambda: prefill(["a"], TABLE),
            TypeError,
            "position must be integers, but got ['a']; give an array of",
        ),
        (lambda: prefill([2**64, 1], TABLE), TypeError, "integers, but got [18446744073709551616, 1]; give"),
        (
            lambda: decode([0, 1], [[1], [1, 2]]),
            ValueError,
            "page_table must be integers in rows of one length, but got [[1], [1, 2]]; fill a page table up "
            "with num_pages_per_layer, which is no page.",
        ),
    ],
)
def test_a_step_that_cannot_be_written(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


def changed_text():
    return json.dumps({**json.loads(CONFIG.to_json()), "page_size": 5})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{",
            "json_str must be the text that to_json writes of a PagedAttentionCacheMetaData, but got '{': ",
        ),
        (
            changed_text(),
            "data was changed or damaged since it was written: its digest does not match; write it",
        ),
    ],
    ids=["half a text", "a changed text"],
)
def test_text_that_is_no_record(text, message):
    with pytest.raises(ValueError, match=r"must be the text|was changed") as raised:
        from_json(text)
    assert message in str(raised.value)
