"""The public API that the cache keeps from EasyDeL 0.1.4: names, order, and what is documented."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import pytest
from support.caches import config, decode, fresh, fresh_cache, prefill, tokens

import qpaged

FIELDS = {
    "PagedAttentionCacheMetaData": (
        "batch_size",
        "num_hidden_layers",
        "num_pages_per_layer",
        "num_pages_per_sequence",
        "max_sequences",
        "page_size",
        "num_kv_heads",
        "kv_head_dim_size",
        "hbm_utilization",
    ),
    "PagedAttentionMetadata": (
        "prefill_length",
        "prefill_position",
        "prefill_page_table",
        "decodes_position",
        "decodes_page_table",
    ),
    "PagedAttentionCacheView": ("metadata", "layer_index", "key_pages", "value_pages"),
    "PagedAttentionCache": ("views",),
}

SERIAL = {
    "to_dict": (),
    "from_dict": ("data",),
    "to_json": ("**kwargs",),
    "from_json": ("json_str",),
    "replace": ("**kwargs",),
}

METHODS = {
    "PagedAttentionCacheMetaData": SERIAL
    | {
        "create": (
            "mesh",
            "batch_size",
            "num_hidden_layers",
            "max_sequences",
            "page_size",
            "num_kv_heads",
            "kv_head_dim_size",
            "hbm_utilization",
            "dtype",
        )
    },
    "PagedAttentionMetadata": SERIAL | {"init_empty": (), "is_prefill_mode": (), "is_decode_mode": ()},
    "PagedAttentionCacheView": SERIAL
    | {
        "init": ("mesh", "dtype", "metadata", "layer_index", "partition_manager", "quantizer"),
        "concatenate_to_cache": ("*args", "**kwargs"),
        "write_prefill_to_cache": ("key", "value", "metadata"),
        "write_decodes_to_cache": ("key", "value", "metadata"),
    },
    "PagedAttentionCache": SERIAL
    | {
        "init_cache": ("mesh", "dtype", "metadata", "partition_manager", "quantizer"),
        "init_empty": ("*args", "**kwargs"),
    },
}

CLASSMETHODS = {"create", "init", "init_cache", "from_dict", "from_json"}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_and_their_order(name):
    cls = getattr(qpaged, name)
    names = tuple(field.name for field in dataclasses.fields(cls))
    assert names[: len(FIELDS[name])] == FIELDS[name]
    parameters = list(inspect.signature(cls).parameters.values())
    assert tuple(p.name for p in parameters[: len(FIELDS[name])]) == FIELDS[name]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters[: len(FIELDS[name])])
    assert all(p.default is not p.empty for p in parameters[len(FIELDS[name]) :])  # what is new is optional


@pytest.mark.parametrize(
    ("name", "method"), [(name, method) for name, methods in METHODS.items() for method in methods]
)
def test_methods_and_their_parameters(name, method):
    cls = getattr(qpaged, name)
    static = method in CLASSMETHODS or (name, method) == ("PagedAttentionMetadata", "init_empty")
    assert isinstance(inspect.getattr_static(cls, method), classmethod) == static
    parameters = list(inspect.signature(getattr(cls, method)).parameters.values())
    parameters = parameters if static else parameters[1:]  # without self
    for wanted in METHODS[name][method]:
        parameter = parameters.pop(0)
        if wanted.startswith("**"):
            assert parameter.kind is parameter.VAR_KEYWORD
        elif wanted.startswith("*"):
            assert parameter.kind is parameter.VAR_POSITIONAL
        else:
            assert (parameter.name, parameter.kind) == (wanted, parameter.POSITIONAL_OR_KEYWORD)
    assert all(parameter.default is not parameter.empty for parameter in parameters)


@pytest.mark.parametrize(
    ("name", "method", "parameter", "default"),
    [
        ("PagedAttentionCacheMetaData", "create", "dtype", jnp.bfloat16),
        ("PagedAttentionCacheView", "init", "quantizer", None),
        ("PagedAttentionCache", "init_cache", "quantizer", None),
    ],
)
def test_defaults(name, method, parameter, default):
    assert inspect.signature(getattr(getattr(qpaged, name), method)).parameters[parameter].default is default


def test_the_configuration_is_what_was_given():
    counts = dict(zip(FIELDS["PagedAttentionCacheMetaData"], (2, 3, 16, 4, 15, 4, 2, 32, 0.5), strict=True))
    metadata = qpaged.PagedAttentionCacheMetaData(*counts.values())
    assert {name: getattr(metadata, name) for name in counts} == counts


def test_create_calculates_the_pages():
    metadata = qpaged.PagedAttentionCacheMetaData.create(
        None, 2, 3, 33, 16, 2, 8, 0.5, jnp.float32, memory_bytes=2 * 3 * 2 * 16 * 2 * 8 * 4 * 10
    )
    assert metadata.num_pages_per_sequence == 3  # ceil(33 / 16)
    assert metadata.num_pages_per_layer == 10
    assert (metadata.batch_size, metadata.num_hidden_layers, metadata.max_sequences) == (2, 3, 33)
    assert (metadata.page_size, metadata.num_kv_heads, metadata.kv_head_dim_size) == (16, 2, 8)
    assert metadata.hbm_utilization == 0.5


def test_a_cache_has_a_view_for_each_layer():
    cache = fresh_cache()
    assert isinstance(cache.views, list)
    assert [view.layer_index for view in cache.views] == [0, 1]
    for view in cache.views:
        assert view.metadata == config()
        assert view.key_pages.shape == view.value_pages.shape == (2, 16, 4, 32)
        assert view.key_pages.dtype == view.value_pages.dtype == jnp.float32


def test_concatenate_to_cache_is_not_implemented():
    with pytest.raises(NotImplementedError, match="concatenate_to_cache does not apply to pages"):
        fresh().concatenate_to_cache(1, anything=2)


def test_init_empty_of_a_cache_returns_none():
    assert fresh_cache().init_empty(1, anything=2) is None


def test_init_empty_of_metadata_holds_scalars_and_is_in_both_modes():
    empty = qpaged.PagedAttentionMetadata.init_empty()
    assert empty.is_prefill_mode() is True
    assert empty.is_decode_mode() is True
    for field in dataclasses.fields(empty):
        value = getattr(empty, field.name)
        assert (value.shape, value.dtype) == ((), jnp.int32)


def test_modes_follow_from_the_empty_shapes():
    table = jnp.arange(4, dtype=jnp.int32)
    of_prefill, of_decode = prefill(jnp.arange(8), table), decode(jnp.arange(2), jnp.stack([table, table]))
    assert (of_prefill.is_prefill_mode(), of_prefill.is_decode_mode()) == (True, False)
    assert (of_decode.is_prefill_mode(), of_decode.is_decode_mode()) == (False, True)
    both = of_prefill.replace(
        decodes_position=of_decode.decodes_position, decodes_page_table=of_decode.decodes_page_table
    )
    assert (both.is_prefill_mode(), both.is_decode_mode()) == (False, False)
    assert of_prefill.prefill_length.shape == of_decode.prefill_length.shape == ()
    assert int(of_decode.prefill_length) == 0
    assert of_prefill.decodes_position.shape == of_prefill.decodes_page_table.shape == ()
    assert of_decode.prefill_position.shape == of_decode.prefill_page_table.shape == ()


def test_modes_are_known_while_tracing():
    def modes(metadata):
        assert metadata.is_prefill_mode()
        assert not metadata.is_decode_mode()
        return metadata.prefill_length

    assert jax.eval_shape(modes, prefill(jnp.arange(8), jnp.arange(4))).shape == ()


def test_metadata_built_field_by_field_as_before():
    table = jnp.arange(4, dtype=jnp.int32)
    none = jnp.int32(1_000_000)  # what the fields of the other mode held
    metadata = qpaged.PagedAttentionMetadata(jnp.int32(8), jnp.arange(8, dtype=jnp.int32), table, none, none)
    key, value = tokens(8)
    view = fresh().write_prefill_to_cache(key, value, metadata)
    assert isinstance(view, qpaged.PagedAttentionCacheView)
    assert (view.key_pages[:, :2] == key.reshape(2, 4, 2, 32).transpose(2, 0, 1, 3)).all()


def test_replace():
    view = fresh()
    assert view.replace(layer_index=1).layer_index == 1
    assert view.layer_index == 0
    assert config().replace(page_size=8).page_size == 8
    assert fresh_cache().replace(views=[view]).views == [view]
    assert (
        int(qpaged.PagedAttentionMetadata.init_empty().replace(prefill_length=jnp.int32(3)).prefill_length)
        == 3
    )
    with pytest.raises(TypeError, match="pages"):
        config().replace(pages=8)
