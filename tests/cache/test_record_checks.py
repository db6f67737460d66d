"""What no class writes is refused when it is read, whatever the digest says, and raises nothing else."""

import functools
import json
from dataclasses import dataclass, field
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
from support import entry_points
from support.caches import decode, fresh_cache, make_view, prefill
from support.records import first_version, with_digest

import qpaged

TABLES = np.array([[0, 1], [2, 3]])
STEPS = {"decode": decode(np.array([1, 6]), TABLES), "prefill": prefill(np.arange(4), TABLES[0], 3)}


@pytest.mark.parametrize(
    ("mode", "changes", "message"),
    [
        ("decode", {"decodes_position": "x"}, "decodes_position must be integers, but got"),
        ("decode", {"decodes_position": None}, "decodes_position must be integers, but got"),
        (
            "decode",
            {"decodes_position": [1, 6]},
            "decodes_position must be an array of integers, but a list came",
        ),
        (
            "decode",
            {"decodes_position": np.ones(2)},
            "decodes_position must be integers, but came as float64",
        ),
        ("decode", {"decodes_position": np.array([True, False])}, "must be integers, but came as bool"),
        (
            "decode",
            {"decodes_position": np.array([1])},
            "one row for each sequence, but came with 1 and 2 rows",
        ),
        (
            "decode",
            {"decodes_position": np.ones((2, 1), np.int32)},
            r"must have shape \(batch,\), but .* \(2, 1\)",
        ),
        (
            "decode",
            {"decodes_page_table": np.array([0, 1])},
            r"must have shape \(batch, pages_per_sequence\)",
        ),
        ("decode", {"prefill_length": 10**30}, "prefill_length must be integers, but got 1"),
        ("prefill", {"prefill_page_table": TABLES}, r"prefill_page_table must have shape \(pages,\)"),
        ("prefill", {"prefill_length": 2.5}, "prefill_length must be integers, but came as float64"),
        ("prefill", {"prefill_length": True}, "prefill_length must be integers, but came as bool"),
        ("prefill", {"decodes_position": "x"}, "decodes_position must be integers, but got"),
    ],
)
def test_a_step_of_other_things_than_integers_that_fit_is_refused(mode, changes, message):
    step = STEPS[mode]
    with pytest.raises(ValueError, match=message):
        qpaged.PagedAttentionMetadata.from_dict(step.to_dict() | changes)
    if all(isinstance(value, str | None | int | float | list) for value in changes.values()):
        record = json.loads(step.to_json()) | changes
        with pytest.raises(ValueError, match=message):
            qpaged.PagedAttentionMetadata.from_json(with_digest(record))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("way", "kind"),
    [
        (["key_pages"], "QuantizedArray"),
        (["value_pages", "codes"], "array"),
        (["metadata", "quantizer"], "CacheFormat"),
        (["metadata"], "PagedAttentionCacheMetaData"),
    ],
)
def test_an_unknown_field_is_refused_wherever_it_is(version, way, kind):
    record = json.loads(make_view("int8", quantizer=qpaged.CacheFormat.of("int8"), dtype="float32").to_json())
    if version == 1:
        record = first_version(record)
    part = functools.reduce(lambda part, name: part[name], way, record)
    part["extra"] = 3
    text = with_digest(record) if version == 2 else json.dumps(record)
    with pytest.raises(ValueError, match=rf"data of a {kind} has unknown extra"):
        qpaged.PagedAttentionCacheView.from_json(text)


NESTED = functools.reduce(lambda inner, _: [inner], range(100_000), 0)


@pytest.mark.parametrize(
    "changes",
    [{}, {"views": NESTED}, {"views": [], 3: 4}, {"views": {1: 2, "a": 3}}, {"views": {None}}],
    ids=["arrays", "nested", "a key", "keys", "a set"],
)
def test_a_digest_of_what_has_none_is_refused(changes):
    record = fresh_cache("int8").to_dict() | {"digest": "x"} | changes
    with pytest.raises(
        ValueError, match=r"data of a PagedAttentionCache cannot be read|data must have the digest"
    ):
        qpaged.PagedAttentionCache.from_dict(record)


@dataclass(frozen=True)
class Tabled(type(qpaged.get_quantizer("int8:token"))):
    """int8:token by another name, with a table by number, which JSON has not."""

    table: dict = field(default_factory=lambda: {2: "a", 10: "b"}, hash=False)
    name: ClassVar[str] = "tabled"


def test_a_config_that_json_would_change_is_not_written(monkeypatch):
    entry_points.install(monkeypatch, entry_points.Point("tabled", "oddities", Tabled))
    view = make_view(Tabled())
    with pytest.raises(
        TypeError, match="keys of a record must be strings, but 2 came in /key_pages/quantizer/table"
    ):
        view.to_json()


@pytest.mark.parametrize(
    "layer", [True, False, 0.5, 1.0, "0", None, np.bool_(True), np.float32(1), 2, -1, 10**30]
)
def test_what_is_no_layer_is_refused(layer):
    with pytest.raises(ValueError, match=r"layer_index must be one of the 2 layers, .* but came as "):
        make_view("int8", layer=layer)


@pytest.mark.parametrize("layer", [1, np.int64(1), np.uint8(1), jnp.int32(1)])
def test_the_number_of_a_layer_is_an_int(layer):
    view = make_view("int8", layer=layer)
    assert type(view.layer_index) is int and view.layer_index == 1
