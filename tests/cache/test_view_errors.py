"""What the cache refuses, and that its messages say what came."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from support.caches import config, decode, fresh, fresh_cache, make_mesh, make_view, prefill, tokens

import qpaged

TABLE = np.array([3, 1, 5, 7])
ROWS = np.stack([TABLE, [2, 4, 6, 8]])
COUNTS = (
    "batch_size",
    "num_hidden_layers",
    "num_pages_per_layer",
    "num_pages_per_sequence",
    "max_sequences",
    "page_size",
    "num_kv_heads",
    "kv_head_dim_size",
)
CREATE = {
    "batch_size": 2,
    "num_hidden_layers": 2,
    "max_sequences": 16,
    "page_size": 4,
    "num_kv_heads": 2,
    "kv_head_dim_size": 32,
    "hbm_utilization": 0.5,
}


def create(**changes):
    keywords = {"dtype": jnp.float32, "memory_bytes": 10**5} | CREATE | changes
    return qpaged.PagedAttentionCacheMetaData.create(None, **keywords)


@pytest.mark.parametrize("value", [0, -1, np.int64(-7)])
@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_positive(name, value):
    message = f"{name} must be positive, but came as {value}; give at least 1"
    with pytest.raises(ValueError, match=message):
        config(**{name: value})
    if name in CREATE:
        with pytest.raises(ValueError, match=message):
            create(**{name: value})


@pytest.mark.parametrize("value", [4.0, "4", None, np.float32(4), [4]])
@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_integers(name, value):
    with pytest.raises(TypeError) as error:
        config(**{name: value})
    assert f"{name} must be an integer, but came as {value!r}; give a whole number." in str(error.value)
    if name in CREATE:
        with pytest.raises(TypeError, match=f"{name} must be an integer"):
            create(**{name: value})


def test_counts_of_numpy_become_python_integers():
    metadata = config(page_size=np.int64(4), num_kv_heads=np.uint8(2), hbm_utilization=np.float32(0.5))
    assert metadata == config(hbm_utilization=0.5)
    assert type(metadata.page_size) is type(metadata.num_kv_heads) is int
    assert type(metadata.hbm_utilization) is float
    assert create(max_sequences=np.uint8(255), page_size=np.uint8(16)).num_pages_per_sequence == 16


@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0, -0.5, 1.5, 90, float("nan"), float("inf"), np.float64(2)])
def test_a_utilization_lies_between_0_and_1(value):
    message = f"hbm_utilization must lie between 0 and 1, both excluded, but came as {value};"
    with pytest.raises(ValueError, match=message):
        config(hbm_utilization=value)
    with pytest.raises(ValueError, match=message):
        create(hbm_utilization=value)


@pytest.mark.parametrize("value", ["0.9", None, [0.5]])
def test_a_utilization_is_a_number(value):
    with pytest.raises((TypeError, ValueError), match="hbm_utilization"):
        config(hbm_utilization=value)


def test_what_int32_cannot_index():
    assert config(num_pages_per_layer=2**31 - 2).num_pages_per_layer == 2**31 - 2
    with pytest.raises(
        ValueError, match=r"num_pages_per_layer must be at most 2,147,483,646 .* came as 2,147,483,647"
    ):
        config(num_pages_per_layer=2**31 - 1)
    with pytest.raises(
        ValueError, match=r"num_pages_per_sequence \* page_size must be .* came as 4,294,967,296"
    ):
        config(num_pages_per_sequence=2**16, page_size=2**16)
    with pytest.raises(
        ValueError, match=r"max_sequences, in whole pages, must be at most .* came as 2,147,483,648"
    ):
        create(max_sequences=2**31 - 3)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.complex64, bool, "int32"])
def test_a_cache_is_of_floats(dtype):
    message = (
        f"dtype must be a real floating-point dtype, but got {jnp.dtype(dtype).name}; .*quantizer='int8'"
    )
    with pytest.raises(TypeError, match=message):
        create(dtype=dtype)
    with pytest.raises(TypeError, match=message):
        make_view(dtype=dtype)


def test_no_dtype_is_not_float64():
    with pytest.raises(TypeError, match="dtype"):
        create(dtype=None)
    with pytest.raises(TypeError, match="dtype"):
        make_view(dtype=None)


@pytest.mark.parametrize("quantizer", [None, "raw", "int8"])
def test_a_dtype_that_jax_does_not_have_now(quantizer):
    """Without x64 a float64 pool would hold float32, and its metadata would say float64."""
    with pytest.raises((TypeError, ValueError), match="float64"):
        create(dtype=np.float64, quantizer=quantizer)


@pytest.mark.parametrize("name", ["int7", "int8:block", "int8+turn", "int8/int8/int8"])
def test_a_format_that_is_not_there(name):
    with pytest.raises(qpaged.RegistryError):
        create(quantizer=name)
    with pytest.raises(qpaged.RegistryError):
        make_view(name)


def test_a_format_that_is_none():
    with pytest.raises(TypeError, match=r"quantizer must be None, a spelling .*, but got 8; "):
        create(quantizer=8)


@pytest.mark.parametrize(
    ("made", "asked", "seen"),
    [
        ("int8", None, "int8, but came as plain"),
        (None, "int8", "plain, but came as int8"),
        ("int8", "int8:token", "int8, but came as int8:token"),
        ("int8/raw", "int8", "int8/raw, but came as int8"),
    ],
)
def test_metadata_made_for_another_format(made, asked, seen):
    metadata = create(quantizer=made)
    message = f"quantizer must be the one the metadata was made for, {seen}; give both the same"
    with pytest.raises(ValueError, match=message):
        qpaged.PagedAttentionCacheView.init(None, jnp.float32, metadata, 0, None, asked)
    with pytest.raises(ValueError, match=message):
        qpaged.PagedAttentionCache.init_cache(None, jnp.float32, metadata, None, asked)


def test_metadata_made_for_another_dtype():
    message = "dtype must be the one the metadata was made for, bfloat16, but came as float32"
    with pytest.raises(ValueError, match=message):
        qpaged.PagedAttentionCache.init_cache(None, jnp.float32, create(dtype=jnp.bfloat16))


def test_the_same_format_in_other_words():
    metadata = create(quantizer="int8/int8")
    for quantizer in ("int8", "int8:page", qpaged.get_quantizer("int8"), qpaged.CacheFormat.of("int8")):
        view = qpaged.PagedAttentionCacheView.init(None, "float32", metadata, 0, None, quantizer)
        assert str(view.key_pages.quantizer) == "int8"


@pytest.mark.parametrize("quantizer", ["int8", qpaged.get_quantizer("int8"), None])
def test_metadata_whose_format_is_spelled(quantizer):
    metadata = config(quantizer=quantizer, dtype=jnp.float32)
    view = qpaged.PagedAttentionCacheView.init(None, jnp.float32, metadata, 0, None, quantizer)
    assert qpaged.PagedAttentionCacheView.from_json(view.to_json()).metadata == metadata
    if quantizer is not None:
        assert metadata == config(quantizer=qpaged.CacheFormat.of("int8"), dtype="float32")


@pytest.mark.parametrize("layer", [2, -1, 7])
def test_a_layer_that_is_not_there(layer):
    with pytest.raises(ValueError, match=f"layer_index .*{layer}"):
        make_view("int8", layer=layer)


class Resolved:
    def __init__(self, *spec):
        self.spec = PartitionSpec(*spec)

    def resolve(self, axes, mode="", shape=()):
        return self.spec


@pytest.mark.parametrize(
    "spec",
    [("tp",), (None, "tp"), (("tp", "dp"),), ("nowhere",), (None, None, None, None, "dp")],
    ids=str,
)
def test_a_partition_that_does_not_divide(spec):
    mesh = make_mesh((4, 2), ("tp", "dp"))
    with pytest.raises(ValueError, match="partition_manager") as error:
        make_view("int8", mesh=mesh, manager=Resolved(*spec), num_pages_per_layer=18)
    message = str(error.value)
    assert "partition_manager must divide a pool of shape (2, 18, 4, 32) evenly over the mesh" in message
    assert "{'tp': 4, 'dp': 2}, but resolved it to PartitionSpec(" in message.replace(
        " to P(", " to PartitionSpec("
    )


SHAPES = {
    "another number of tokens": (7, 2, 32),
    "another number of heads": (8, 1, 32),
    "another size of head": (8, 2, 4),
    "heads before tokens": (2, 8, 32),
    "a batch axis": (1, 8, 2, 32),
    "heads and sizes flat": (8, 16),
    "a scalar": (),
}


@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_tokens_of_another_shape(name, shape):
    step, right, wrong = prefill(np.arange(8), TABLE), np.zeros((8, 2, 32)), np.zeros(shape)
    with pytest.raises(ValueError, match=name) as error:
        fresh().write_prefill_to_cache(**{"key": right, "value": right, "metadata": step} | {name: wrong})
    assert str(error.value) == (
        f"{name} must have shape (len(prefill_position), kv_heads, head_dim) = (8, 2, 32), "
        f"but came with shape {shape}."
    )
    rows = decode(np.arange(8), np.tile(TABLE, (8, 1)))
    with pytest.raises(ValueError, match=name) as error:
        fresh("int8").write_decodes_to_cache(
            **{"key": right, "value": right, "metadata": rows} | {name: wrong}
        )
    assert f"{name} must have shape (len(decodes_position), kv_heads, head_dim)" in str(error.value)


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.complex64, bool])
@pytest.mark.parametrize("format", [None, "int8", "raw"])
def test_tokens_that_are_not_floats(format, dtype):
    key, value = tokens(8)
    message = f"must have a real floating-point dtype, but came as {np.dtype(dtype).name}"
    with pytest.raises(TypeError, match="key " + message):
        fresh(format).write_prefill_to_cache(key.astype(dtype), value, prefill(np.arange(8), TABLE))
    with pytest.raises(TypeError, match="value " + message):
        fresh(format).write_decodes_to_cache(key[:2], value[:2].astype(dtype), decode(np.arange(2), ROWS))


def test_nothing_of_a_write_that_is_refused_was_done():
    key, _ = tokens(8)
    with pytest.raises(ValueError, match="value must have shape"):
        fresh().write_prefill_to_cache(key, key[:4], prefill(np.arange(8), TABLE))
    assert not np.asarray(fresh().key_pages).any()


def test_the_other_mode():
    key, value = tokens(2)
    with pytest.raises(ValueError, match=r"metadata must be that of a prefill .* but got that of a decode"):
        fresh().write_prefill_to_cache(key, value, decode(np.arange(2), ROWS))
    with pytest.raises(ValueError, match=r"metadata must be that of a decode .* but got that of a prefill"):
        fresh().write_decodes_to_cache(key, value, prefill(np.arange(2), TABLE))


FLOATS = np.arange(2.0, dtype=np.float32)


@pytest.mark.parametrize(
    ("build", "name", "dtype"),
    [
        (lambda: prefill(FLOATS, TABLE), "position", "float32"),
        (lambda: prefill(np.arange(2), FLOATS), "page_table", "float32"),
        (lambda: prefill(np.arange(2), TABLE, 2.0), "length", "float64"),
        (lambda: prefill(np.arange(2), TABLE, True), "length", "bool"),
        (lambda: prefill(np.array([True, False]), TABLE), "position", "bool"),
        (lambda: decode(FLOATS, ROWS), "position", "float32"),
        (lambda: decode(np.arange(2), ROWS.astype(np.float16)), "page_table", "float16"),
        (lambda: decode(jnp.arange(2.0), ROWS), "position", "float32"),
        (lambda: fresh().reset_pages(FLOATS), "pages", "float32"),
        (lambda: fresh_cache().reset_pages([True]), "pages", "bool"),
    ],
)
def test_indices_that_are_not_integers(build, name, dtype):
    with pytest.raises(TypeError, match=f"{name} must be integers, but came as {dtype}; convert with"):
        build()


def field_by_field(**changes):
    step = prefill(np.arange(2), TABLE).replace(decodes_position=np.arange(2), decodes_page_table=ROWS)
    return step.replace(**changes)


@pytest.mark.parametrize("name", ["prefill_position", "prefill_page_table", "prefill_length"])
def test_fields_that_are_not_integers_are_refused_at_the_write(name):
    key, value = tokens(2)
    step = field_by_field()
    step = step.replace(**{name: np.asarray(getattr(step, name), np.float32)})
    with pytest.raises(TypeError, match=f"{name} must be integers, but came as float32"):
        fresh().write_prefill_to_cache(key, value, step)


@pytest.mark.parametrize("name", ["decodes_position", "decodes_page_table"])
def test_fields_of_a_decode_that_are_not_integers_are_refused_at_the_write(name):
    key, value = tokens(2)
    step = field_by_field()
    step = step.replace(**{name: np.asarray(getattr(step, name), np.float32)})
    with pytest.raises(TypeError, match=f"{name} must be integers, but came as float32"):
        fresh().write_decodes_to_cache(key, value, step)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: prefill(np.zeros((2, 2), int), TABLE),
            r"position must have shape \(padded_len,\), .* \(2, 2\)",
        ),
        (lambda: prefill(3, TABLE), r"position must have shape \(padded_len,\), but came with shape \(\)"),
        (lambda: prefill(np.arange(2), ROWS), r"page_table must have shape \(pages,\), .* \(2, 4\)"),
        (lambda: prefill(np.arange(2), TABLE, [2]), r"length must have shape \(\), .* \(1,\)"),
        (lambda: decode(ROWS, ROWS), r"position must have shape \(batch,\), .* \(2, 4\)"),
        (
            lambda: decode(np.arange(2), TABLE),
            r"page_table must have shape \(batch, pages_per_sequence\), .* \(4,\)",
        ),
        (lambda: decode(np.arange(3), ROWS), r"one row for each sequence, but came with 3 and 2 rows"),
        (lambda: decode(np.arange(1), ROWS), r"one row for each sequence, but came with 1 and 2 rows"),
    ],
)
def test_indices_of_another_shape(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "changes",
    [
        {"prefill_page_table": ROWS},
        {"prefill_page_table": ROWS[:1]},
        {"prefill_page_table": np.int32(3)},
        {"prefill_length": np.array([1, 2])},
        {"prefill_position": np.arange(2)[None]},
    ],
    ids=lambda changes: f"{next(iter(changes))} of shape {np.shape(next(iter(changes.values())))}",
)
def test_fields_of_another_shape_are_refused_at_the_write(changes):
    key, value = tokens(2)
    with pytest.raises(ValueError, match=next(iter(changes))):
        fresh().write_prefill_to_cache(key, value, field_by_field(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"decodes_page_table": TABLE},
        {"decodes_page_table": ROWS[:1]},
        {"decodes_page_table": np.concatenate([ROWS, ROWS])},
        {"decodes_page_table": np.int32(3)},
        {"decodes_page_table": ROWS[None]},
        {"decodes_position": np.arange(2)[None]},
    ],
    ids=lambda changes: f"{next(iter(changes))} of shape {np.shape(next(iter(changes.values())))}",
)
@pytest.mark.parametrize("call", ["write", "attend"])
def test_fields_of_a_decode_of_another_shape_are_refused(changes, call):
    key, value = tokens(2)
    step = field_by_field(**changes)
    step = step.replace(prefill_position=np.int32(0), prefill_page_table=np.int32(0))
    calls = {
        "write": lambda: fresh().write_decodes_to_cache(key, value, step),
        "attend": lambda: qpaged.paged_attention(key, fresh(), step),
    }
    with pytest.raises(ValueError, match=f"{next(iter(changes))}|query must have shape"):
        calls[call]()


@pytest.mark.parametrize("format", [None, "int8"])
def test_pages_to_reset_of_another_shape(format):
    with pytest.raises(ValueError, match=r"pages .*\(2, 4\)"):
        fresh(format).reset_pages(ROWS)


def test_a_plain_narrow_float_pool_on_cpu_is_warned_about():
    if jax.default_backend() != "cpu":
        pytest.skip("XLA copies such pools on CPU only")
    metadata = config(num_hidden_layers=3)
    with pytest.warns(
        qpaged.NarrowFloatPoolWarning, match="copies a whole bfloat16 pool .* quantizer='raw'"
    ) as caught:
        qpaged.PagedAttentionCache.init_cache(None, jnp.bfloat16, metadata)
    assert caught[0].filename == __file__
    assert len(caught) == 1  # once for a cache
    with pytest.warns(qpaged.NarrowFloatPoolWarning, match="float16") as caught:
        qpaged.PagedAttentionCacheView.init(None, jnp.float16, metadata, 0)
    assert caught[0].filename == __file__
    qpaged.PagedAttentionCache.init_cache(None, jnp.bfloat16, metadata, None, "raw")  # and not about these
    qpaged.PagedAttentionCache.init_cache(None, jnp.float32, metadata)
    jax.eval_shape(lambda: qpaged.PagedAttentionCacheView.init(None, jnp.bfloat16, metadata, 0))
