"""Formats by name: what is found, what is refused and why, and how formats are spelled and saved."""

import copy
import functools
import json
import pickle
import re
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from support import entry_points
from support.entry_points import Point
from support.formats import EVERY_FORMAT

import qpaged
from qpaged._arguments import shown
from qpaged.sweep import installed_formats

ROOT = Path(__file__).parents[2]
ENTRY_POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
NAMES = tuple(sorted(name for name in ENTRY_POINTS["qpaged.quantizers"] if not name.startswith("+")))
# Spellings in files and in users' programs, which must stay what they are.
OF_INTEGERS = ("", ":group64", ":group128", ":token", ":page", ":channel")
RELEASED = {
    "fp8_e4m3": ("", ":token", ":channel", ":tensor", ":head"),
    "fp8_e5m2": ("", ":token", ":channel", ":tensor", ":head"),
    "int2": ("", ":group64", ":token", ":page", ":channel"),
    "int3": OF_INTEGERS,
    "int4": OF_INTEGERS,
    "int5": OF_INTEGERS,
    "int6": OF_INTEGERS,
    "int8": ("", ":token", ":channel"),
    "mxfp4": ("",),
    "mxfp8": ("",),
    "nvfp4": ("",),
    "raw": ("",),
}


@pytest.fixture
def install(monkeypatch):
    """Adds entry points to those that are installed."""
    return functools.partial(entry_points.install, monkeypatch)


@dataclass(frozen=True)
class Odd(type(qpaged.get_quantizer("int8"))):
    granularity: str = "channel"
    name: ClassVar[str] = "odd"
    granularities: ClassVar = ("channel", "page")


def test_every_entry_point_is_found():
    assert qpaged.available_quantizers() == NAMES
    assert qpaged.available_wrappers() == ("+offset", "+rotate")


def test_formats_are_listed_at_each_granularity_the_default_first():
    names = [spelling.partition(":")[0] for spelling in qpaged.available_formats(packed=True)]
    assert tuple(dict.fromkeys(names)) == NAMES and names == sorted(names)
    for name in NAMES:
        spellings = [
            spelling for spelling in qpaged.available_formats(packed=True) if spelling.split(":")[0] == name
        ]
        first, *others = qpaged.get_quantizer(name).granularities
        assert spellings == [name, *(f"{name}:{granularity}" for granularity in others)]
        assert qpaged.get_quantizer(name).granularity == first


@pytest.mark.parametrize("name", RELEASED)
def test_released_spellings_stay(name):
    spellings = [spelling for spelling in qpaged.available_formats() if spelling.split(":")[0] == name]
    assert spellings == [name + granularity for granularity in RELEASED[name]]


WRAPPERS = ("+offset", "+rotate", "+offset+rotate")


def accepts(spelling, wrappers):
    """Return True if the format can be wrapped so."""
    try:
        qpaged.get_quantizer(spelling + wrappers)
    except qpaged.RegistryError:
        return False
    return True


def test_every_format_in_every_wrapper_that_goes_with_it():
    bare = [spelling for spelling in EVERY_FORMAT if "+" not in spelling]
    assert tuple(bare) == qpaged.available_formats()
    for spelling in bare:
        has = {other[len(spelling) :] for other in EVERY_FORMAT if other.partition("+")[0] == spelling}
        assert has == {""} | {wrappers for wrappers in WRAPPERS if accepts(spelling, wrappers)}
        if spelling.partition(":")[0] in RELEASED:
            turns = {"+rotate"} if spelling != "raw" else set()
            shifts = {"+offset", "+offset+rotate"} if spelling.startswith("int") else set()
            assert has == {""} | turns | shifts


@pytest.mark.parametrize("spelling", EVERY_FORMAT)
def test_spellings_come_back(spelling):
    quantizer = qpaged.get_quantizer(spelling)
    assert str(quantizer) == spelling
    assert isinstance(quantizer, qpaged.Quantizer)
    assert qpaged.get_quantizer(quantizer) is quantizer
    again = qpaged.get_quantizer(spelling)
    assert again == quantizer
    assert hash(again) == hash(quantizer)
    assert json.loads(json.dumps(quantizer.config)) == quantizer.config
    assert qpaged.formats.quantizer_from_config(quantizer.config) == quantizer
    for copied in (copy.copy(quantizer), copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert copied == quantizer
    name, _, wrappers = spelling.partition("+")
    plus = "+" if wrappers else ""
    spelled_out = f"{name.partition(':')[0]}:{quantizer.granularity}{plus}{wrappers}"
    assert qpaged.get_quantizer(spelled_out) == quantizer


def test_formats_are_told_apart():
    assert len({qpaged.get_quantizer(spelling) for spelling in EVERY_FORMAT}) == len(EVERY_FORMAT)


@pytest.mark.parametrize("spelling", ["int7", "INT8", "None", "int7:token+rotate"])
def test_an_unknown_name_lists_what_is_installed(spelling):
    with pytest.raises(qpaged.RegistryError, match=f"there are {', '.join(NAMES)}, and plain."):
        qpaged.get_quantizer(spelling)


@pytest.mark.parametrize(
    "spelling",
    ["", "int8 ", " int8", ":token", "int8:", "int8:token:x", "+rotate", "int8+", "a,b"],
)
def test_what_is_not_of_the_grammar(spelling):
    message = re.escape(f"{spelling!r} is no format; write NAME, NAME:GRANULARITY or NAME+WRAPPER, as int8,")
    with pytest.raises(qpaged.RegistryError, match=message):
        qpaged.get_quantizer(spelling)


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("plain", "'plain' is no quantizer; give None, or CacheFormat.of('plain')."),
        ("int8/int4", "'int8/int4' is no quantizer; CacheFormat.of takes files and KEYS/VALUES."),
        ("format.json", "'format.json' is no quantizer; CacheFormat.of takes files and KEYS/VALUES."),
    ],
)
def test_what_only_a_cache_format_is(spelling, message):
    with pytest.raises(qpaged.RegistryError, match=re.escape(message)):
        qpaged.get_quantizer(spelling)


def test_nothing_installed(monkeypatch):
    entry_points.only(monkeypatch)
    assert qpaged.available_formats() == ()
    with pytest.raises(
        qpaged.RegistryError, match="no format is named 'int8'; none is installed: a package has"
    ):
        qpaged.get_quantizer("int8")


@pytest.mark.parametrize(
    ("spelling", "offered"),
    [
        ("int8:block", "page, token, channel"),
        ("int8:Token", "page, token, channel"),
        ("fp8_e4m3:element", "page, token, channel, tensor, head"),
    ],
)
def test_a_granularity_that_is_not_offered_lists_those_that_are(spelling, offered):
    name, _, granularity = spelling.partition(":")
    message = f"'{spelling}': granularity must be one of {offered} for {name}, but came as '{granularity}'"
    with pytest.raises(qpaged.RegistryError, match=message):
        qpaged.get_quantizer(spelling)


def test_a_wrapper_that_is_not_installed():
    message = r"'int8\+turn': no wrapper is named '\+turn'; there are \+offset, \+rotate"
    with pytest.raises(qpaged.RegistryError, match=message):
        qpaged.get_quantizer("int8+turn")


@pytest.mark.parametrize(
    "spelling", ["int8+rotate+rotate", "int8+offset+rotate+offset", "int4+rotate+offset+rotate"]
)
def test_a_wrapper_twice(spelling):
    with pytest.raises(
        qpaged.RegistryError, match=r"\+(rotate|offset) may be given once, but int[48]\S* has it"
    ):
        qpaged.get_quantizer(spelling)


def test_wrappers_print_the_order_they_stand_in():
    assert str(qpaged.get_quantizer("int8:channel+rotate+offset")) == "int8:channel+offset+rotate"


@pytest.mark.parametrize("thing", [8, None, b"int8", object(), qpaged.Quantizer, ["int8"], np.int8])
def test_what_is_no_spelling(thing):
    with pytest.raises(TypeError, match=f"or a qpaged.Quantizer, but got {re.escape(shown(thing))}; "):
        qpaged.get_quantizer(thing)


def test_a_package_is_found_without_being_listed(install):
    install(Point("odd", "oddities", Odd))
    assert qpaged.available_quantizers() == tuple(sorted((*NAMES, "odd")))
    assert qpaged.get_quantizer("odd") == Odd("channel")
    assert qpaged.get_quantizer("odd:page") == Odd("page")
    assert {"odd", "odd:page"} <= set(qpaged.available_formats())
    assert str(qpaged.CacheFormat.of("odd/odd:page")) == "odd/odd:page"


def test_a_package_is_seen_when_it_is_installed_and_gone_when_it_is_removed(monkeypatch, tmp_path):
    """Within one process, as in a notebook."""
    site_packages = tmp_path / "site-packages"
    package = site_packages / "oddities-1.dist-info"
    package.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(site_packages))
    assert "odd" not in qpaged.available_quantizers()
    package.rmdir()
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: oddities\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[qpaged.quantizers]\nodd = quantizers:Int8Floor\n")
    assert "odd" in qpaged.available_quantizers()
    shutil.rmtree(package)
    assert "odd" not in qpaged.available_quantizers()


def floats():
    """Make a format whose codes are floats, which is a slip."""
    return type("Floats", (Odd,), {"encode": lambda self, units: units})()


def fails(error):
    """Return a factory that raises."""

    def make(**options):
        raise error

    return make


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda **_: floats(), "'slip': Floats.encode must return integers, but returns float32"),
        (fails(KeyError("x")), "the format 'slip' of package slips cannot be made: KeyError: 'x'. Tell the"),
        (fails(SystemExit(3)), "the format 'slip' of package slips cannot be made: SystemExit: 3"),
        (
            SystemExit("no"),
            "the format 'slip' of package slips cannot be loaded from 'package:Format': SystemExit: no",
        ),
    ],
)
def test_a_format_that_cannot_be_had_is_warned_of_and_left_out(install, make, reason):
    before = qpaged.available_formats()
    install(Point("slip", "slips", make))
    with pytest.warns(UserWarning, match=re.escape(reason)):
        assert qpaged.available_formats() == before


def test_a_name_that_two_packages_claim(install):
    install(Point("odd", "oddities", Odd), Point("odd", "curios", Odd), Point("even", "curios", Odd))
    with pytest.raises(
        qpaged.RegistryError, match="the name 'odd' is claimed by 2 packages, curios and oddities; uninstall"
    ):
        qpaged.get_quantizer("odd")
    assert qpaged.get_quantizer("int8").name == "int8"  # the others are not in doubt


def test_a_built_in_name_that_a_package_claims(install):
    install(Point("int8", "impostor", Odd))
    with pytest.raises(qpaged.RegistryError, match="'int8' is claimed by 2 packages, impostor and qpaged"):
        qpaged.get_quantizer("int8")


def test_an_installation_that_is_seen_twice_counts_once(install):
    install(
        Point("odd", "oddities", Odd),
        Point("odd", "oddities", Odd),
        Point("lone", None, Odd),
        Point("lone", None, Odd),
    )
    assert qpaged.get_quantizer("odd") == Odd()
    assert qpaged.get_quantizer("lone") == Odd()


@pytest.mark.parametrize(
    "error", [ImportError("no oddlib"), ModuleNotFoundError("no oddlib"), AttributeError("no oddlib")]
)
def test_a_package_that_cannot_be_imported(install, error):
    install(Point("odd", "oddities", error, "oddlib:Odd"))
    assert "odd" in qpaged.available_quantizers()
    with pytest.raises(
        qpaged.RegistryError,
        match=r"'odd' of package oddities cannot be loaded from 'oddlib:Odd': \w+: no oddlib",
    ):
        qpaged.get_quantizer("odd")
    assert qpaged.get_quantizer("int8").name == "int8"


@pytest.mark.parametrize("error", [SyntaxError("bad line"), RuntimeError("bad line"), NameError("bad line")])
def test_a_package_that_breaks_while_it_is_imported(install, error):
    install(Point("odd", "oddities", error, "oddlib:Odd"))
    with pytest.raises(qpaged.RegistryError, match=r"'odd' of package oddities cannot be loaded .*bad line"):
        qpaged.get_quantizer("odd")


def test_an_entry_point_that_makes_no_quantizer(install):
    install(Point("odd", "oddities", dict))
    with pytest.raises(
        qpaged.RegistryError, match=r"the entry point 'odd' must make a qpaged.Quantizer, but made a dict"
    ):
        qpaged.get_quantizer("odd")


def test_registry_errors_are_value_errors():
    assert issubclass(qpaged.RegistryError, ValueError)


CacheFormat = qpaged.CacheFormat
INT8, TOKEN, CHANNEL, RAW = (qpaged.get_quantizer(s) for s in ("int8", "int8:token", "int8:channel", "raw"))


@pytest.mark.parametrize(
    ("format", "key", "value", "spelling"),
    [
        (None, None, None, "plain"),
        ("plain", None, None, "plain"),
        ("plain/plain", None, None, "plain"),
        ("int8", INT8, INT8, "int8"),
        ("int8:page", INT8, INT8, "int8"),
        (TOKEN, TOKEN, TOKEN, "int8:token"),
        ("int8:channel/int8:token", CHANNEL, TOKEN, "int8:channel/int8:token"),
        ("int8/int8", INT8, INT8, "int8"),
        ("plain/raw", None, RAW, "plain/raw"),
        ("raw/plain", RAW, None, "raw/plain"),
        (CacheFormat(INT8, None), INT8, None, "int8/plain"),
        (CacheFormat(), None, None, "plain"),
    ],
)
def test_what_a_cache_format_is_made_of(format, key, value, spelling):
    made = CacheFormat.of(format)
    assert made == CacheFormat(key, value)
    assert hash(made) == hash(CacheFormat(key, value))
    assert made.layer(0) == made.layer(99) == (key, value)
    assert str(made) == spelling
    assert CacheFormat.of(str(made)) == made
    assert CacheFormat.from_config(json.loads(json.dumps(made.config))) == made


def test_formats_by_layer():
    made = CacheFormat.of("int8").with_layers({3: "raw/plain", 0: None, 1: TOKEN, 2: CacheFormat(INT8, RAW)})
    assert [made.layer(i) for i in range(5)] == [
        (None, None),
        (TOKEN, TOKEN),
        (INT8, RAW),
        (RAW, None),
        (INT8, INT8),
    ]
    assert str(made) == "int8 (0: plain/plain; 1: int8:token/int8:token; 2: int8/raw; 3: raw/plain)"
    assert CacheFormat.from_config(json.loads(json.dumps(made.config))) == made
    assert made.with_layers({0: "int8"}).layer(0) == (INT8, INT8)
    assert made.with_layers({0: "int8"}).layer(1) == (TOKEN, TOKEN)
    assert made == CacheFormat.of("int8").with_layers({0: "plain", 1: TOKEN}).with_layers(
        {2: "int8/raw", 3: "raw/plain"}
    )
    assert made.layer(0) == (None, None)  # it was not changed


@pytest.mark.parametrize("spelling", ["int8/int8/int8", "raw//raw"])
def test_too_many_parts(spelling):
    with pytest.raises(qpaged.RegistryError, match=f"'{spelling}' is no format; write KEYS/VALUES with one"):
        CacheFormat.of(spelling)


@pytest.mark.parametrize("spelling", ["int8/", "/int8", "", "/", "plain:token", "int7/int8", "int8/int7"])
def test_parts_that_name_nothing(spelling):
    with pytest.raises(
        qpaged.RegistryError, match=r"no format is named|is no format|both sides of its slash"
    ):
        CacheFormat.of(spelling)


@pytest.mark.parametrize("thing", [3, b"int8", ("int8", "int8")])
def test_what_is_no_cache_format(thing):
    with pytest.raises(TypeError, match=f"quantizer must be None, .* but got {re.escape(repr(thing))}; "):
        CacheFormat.of(thing)


def test_layers_that_cannot_be():
    with pytest.raises(ValueError, match="counted from 0, but got -1"):
        CacheFormat.of("int8").with_layers({-1: "raw"})
    by_layer = CacheFormat.of("int8").with_layers({0: "raw"})
    with pytest.raises(
        ValueError, match=r"layer 2 must have one format, but .* by layer: int8 \(0: raw/raw\)"
    ):
        CacheFormat().with_layers({2: by_layer})


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"key": "int8", "value": "int8"},
        {"key": "int8", "layers": []},
        {"key": "int8", "value": "int8", "layers": 3},
        {"key": "int8", "value": "int8", "layers": [3]},
        {"key": "int8", "value": "int8", "layers": [["x", ["raw", "raw"]]]},
        {"key": "int8", "value": "int8", "layers": [[0, [3, 4]]]},
        {"key": "int8/int8", "value": "int8", "layers": []},
    ],
    ids=str,
)
def test_a_configuration_that_is_not_whole(config):
    with pytest.raises(ValueError, match=r"config lacks|no format can be made"):
        CacheFormat.from_config(config)


@pytest.mark.parametrize("spelling", EVERY_FORMAT)
def test_quantizers_are_frozen(spelling):
    with pytest.raises(AttributeError):
        qpaged.get_quantizer(spelling).granularity = "page"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": {"name": 5}}, "no format can be made from {'name': 5}: it must be an object with the name"),
        (
            {"key": 5},
            "no format can be made from 5: it must be an object with the name of a format, as {'name'",
        ),
        ({"key": {"name": "int8", "zz": 1}}, "'zz': 1}: int8 has no option zz; leave it out."),
        ({"layers": 5}, "layers must list [index, [key, value]] of each layer once, but came as 5."),
        ({"layers": [[1.7, [None, None]]]}, "layers must list [index, [key, value]] of each layer once"),
        (
            {"layers": [[1, [None, None]], [1, [None, None]]]},
            "layers must list [index, [key, value]] of each",
        ),
    ],
)
def test_a_malformed_cache_format_is_refused(change, message):
    config = qpaged.CacheFormat.of("int8").config | change
    with pytest.raises(ValueError, match=re.escape(message)):
        qpaged.CacheFormat.from_config(config)


@pytest.mark.short(1)
@pytest.mark.parametrize("name", ["plain", "x.json"])
def test_a_name_that_a_spelling_cannot_have_is_refused_and_the_others_stay(monkeypatch, name):
    entry_points.install(monkeypatch, entry_points.Point(name, "shadows", type(qpaged.get_quantizer("int8"))))
    infos, broken = installed_formats()
    assert {"int8", "int4"} <= {info.spelling.split(":")[0] for info in infos}
    assert list(broken) == [name] and "rename its entry point" in broken[name]
