"""Saved pages read as they did when they were saved, and the same rows still leave the same bytes."""

import base64
import json

import jax
import numpy as np
import pytest
from support import frozen_pages
from support.arrays import leaves_equal
from support.formats import BUILT_IN, FORMATS, LAWFUL
from support.frozen_pages import (
    FOLDER,
    VALUES,
    freeze,
    head_dim_of,
    path_of,
    record_of,
    rows_of,
    view_of,
    written_slots,
)
from support.long import first_short
from support.records import first_version

import qpaged

FILES = sorted(FOLDER.glob("*.json"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def read(path):
    """Return the record of a file, and its view."""
    record = json.loads(path.read_text(encoding="utf-8"))
    return record, qpaged.PagedAttentionCacheView.from_json(json.dumps(record["view"]))


@pytest.mark.parametrize("spelling", BUILT_IN)
def test_every_format_has_a_file(spelling):
    path = path_of(spelling)
    assert path in FILES, f"there is no {path.name}; python docs/new_format.py NAME writes it"
    assert read(path)[0]["format"] == spelling


@every_file
def test_saved_pages_read_as_they_did(path):
    record, view = read(path)
    assert str(view.key_pages.quantizer) == record["format"]
    values = written_slots(VALUES(view.key_pages))
    saved = np.frombuffer(base64.b64decode(record["values"]), "<f4").astype(np.float32)
    expected = saved.reshape(values.shape)
    if view.key_pages.quantizer.transform is not None:  # sums, which each compiler may round in another order
        np.testing.assert_allclose(values, expected, rtol=0, atol=2.0**-20 * np.abs(expected).max())
    else:
        np.testing.assert_array_equal(values.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("path", [path_of(spelling) for spelling in LAWFUL if spelling in BUILT_IN])
def test_the_same_rows_leave_the_same_bytes(path):
    record, view = read(path)
    today = view_of(record["format"], written_slots(view.value_pages))
    assert leaves_equal(today, view)
    assert jax.tree_util.tree_structure(today) == jax.tree_util.tree_structure(view)
    assert first_version(json.loads(today.to_json())) == first_version(record["view"])


@every_file
def test_the_rows_are_those_of_the_formula(path):
    record, view = read(path)
    np.testing.assert_array_equal(written_slots(view.value_pages), rows_of(head_dim_of(record["format"])))


@pytest.mark.parametrize("spelling", first_short(3, filter(BUILT_IN.__contains__, FORMATS)))
def test_saved_pages_can_be_written_to(spelling):
    _, view = read(path_of(spelling))
    fresh = view_of(spelling, rows_of(head_dim_of(spelling)))
    step = qpaged.PagedAttentionMetadata.decode(position=np.array([6]), page_table=np.array([[1, 0]]))
    row = np.full((1, 1, head_dim_of(spelling)), 2.5, np.float32)
    write = jax.jit(lambda view: view.write_decodes_to_cache(row, row, step))
    assert leaves_equal(write(view), write(fresh))


def test_a_file_that_exists_is_never_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_pages, "FOLDER", tmp_path)
    (tmp_path / "int8.json").write_text("kept")
    freeze(["int8", "raw"])
    assert (tmp_path / "int8.json").read_text() == "kept"
    assert json.loads((tmp_path / "raw.json").read_text()) == record_of("raw")


def test_the_files_are_small():
    assert max(path.stat().st_size for path in FILES) < 12_000
    assert sum(path.stat().st_size for path in FILES) < 5_000 * len(FILES)
