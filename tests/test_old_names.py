"""Names of the version before go on working for one version, with a warning that says the new one."""

import importlib
import re
import sys

import pytest

import qpaged
from qpaged import adopt, arrays
from qpaged._deprecated import renamed_argument


@renamed_argument("format", "quantizer")
def spelled(quantizer):
    return str(quantizer)


def test_an_old_keyword_is_taken_as_the_new_one():
    with pytest.warns(DeprecationWarning, match=r"format= of spelled is now quantizer=; the old name goes"):
        assert spelled(format="int8") == "int8"
    assert spelled("int8") == spelled(quantizer="int8") == "int8"


def test_an_old_keyword_beside_the_new_one_is_refused():
    message = "spelled takes quantizer, once called format, but both came; leave format out"
    with pytest.raises(TypeError, match=message):
        spelled(format="int8", quantizer="int8")


def test_a_cache_format_may_be_given_by_its_old_keyword():
    with pytest.warns(DeprecationWarning, match=r"format= of CacheFormat.of is now quantizer="):
        assert qpaged.CacheFormat.of(format="int8") == qpaged.CacheFormat.of("int8")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("take_pages", "gather_pages"),
        ("keep_slots", "mask_slots"),
        ("clipped", "clip_to_int32"),
        ("fill_rows", "fill_lane_rows"),
        ("refused", "not_elementwise"),
    ],
)
def test_reads_have_their_old_names(old, new):
    message = re.escape(f"qpaged.arrays.{old} is now qpaged.arrays.{new}")
    with pytest.warns(DeprecationWarning, match=message):
        assert getattr(arrays, old) is getattr(arrays, new)


def test_a_materialization_has_its_old_name_in_adopt():
    with pytest.warns(DeprecationWarning, match=r"adopt.Materialized is now qpaged.implicit.Materialization"):
        assert adopt.Materialized is qpaged.implicit.Materialization


def test_arrays_have_no_other_names():
    with pytest.raises(AttributeError, match=r"module 'qpaged.arrays' has no attribute 'swap_pages'"):
        _ = arrays.swap_pages


def test_the_module_of_formats_has_its_old_name_as_an_attribute(monkeypatch):
    monkeypatch.delitem(vars(qpaged), "quantizer", raising=False)  # as an earlier import leaves it
    with pytest.warns(DeprecationWarning, match=r"qpaged.quantizer is now qpaged.formats"):
        assert qpaged.quantizer is qpaged.formats


def test_the_package_has_its_submodules_and_no_other_names():
    assert qpaged.adopt is adopt
    with pytest.raises(AttributeError, match=r"module 'qpaged' has no attribute 'pages'"):
        _ = qpaged.pages


def test_formats_may_be_imported_by_their_old_module():
    sys.modules.pop("qpaged.quantizer", None)
    with pytest.warns(DeprecationWarning, match=r"qpaged.quantizer is now qpaged.formats"):
        old = importlib.import_module("qpaged.quantizer")
    assert old.Quantizer is qpaged.Quantizer and old.get_quantizer is qpaged.get_quantizer
