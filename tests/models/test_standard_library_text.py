"""The two splits share no file, and are the same on every machine."""

import sysconfig
from pathlib import Path

import pytest

from qpaged.models import standard_library_files, standard_library_text
from qpaged.models import text as text_module

ROOT = Path(sysconfig.get_path("stdlib"))


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Return the directory of a standard library without files, in which a test can put some."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def relative_names(split):
    return {path.relative_to(ROOT).as_posix() for path in standard_library_files(split)}


def test_splits_are_disjoint():
    assert not relative_names("train") & relative_names("held_out")


def test_about_one_file_in_sixteen_is_held_out():
    train, held_out = len(relative_names("train")), len(relative_names("held_out"))
    assert 0.03 < held_out / (train + held_out) < 0.1


def test_split_of_a_file_never_changes():
    """The bundled model was trained on one split, so no file may change sides."""
    assert {"argparse.py", "asyncio/events.py", "typing.py"} <= relative_names("train")
    assert {"copy.py", "random.py", "traceback.py"} <= relative_names("held_out")


def test_splits_do_not_depend_on_the_librarys_directory(library):
    for name in ("argparse.py", "asyncio/events.py"):
        path = library / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("pass\n")
    assert standard_library_files("train") == [library / "argparse.py", library / "asyncio" / "events.py"]


def test_tests_encodings_and_packages_are_left_out():
    for split in ("train", "held_out"):
        for name in relative_names(split):
            parts = name.split("/")
            assert not {"test", "tests", "idle_test", "site-packages", "encodings"} & set(parts[:-1])
            assert not parts[-1].startswith("_sysconfigdata")


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_text_is_deterministic(split):
    assert standard_library_text(split, 50_000) == standard_library_text(split, 50_000)


def test_shorter_text_is_a_prefix():
    longer = standard_library_text("held_out", 20_000)
    assert len(longer) == 20_000
    assert standard_library_text("held_out", 3_000) == longer[:3_000]


def test_seed_changes_the_order_only():
    first = standard_library_text("held_out", seed=0)
    second = standard_library_text("held_out", seed=1)
    assert first != second
    assert sorted(first) == sorted(second)


def test_no_file_dominates(library):
    (library / "argparse.py").write_bytes(b"a" * 2 * text_module.FILE_LIMIT)
    (library / "typing.py").write_bytes(b"b" * 100)
    text = standard_library_text("train")
    assert (text.count(b"a"), text.count(b"b")) == (text_module.FILE_LIMIT, 100)
    assert text.count(b"\n") == 1


def test_an_interpreter_without_sources_is_named(library):
    with pytest.raises(FileNotFoundError, match=r"holds no .py sources .* give a text of your own"):
        standard_library_text("train", 100)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match='split must be "train" or "held_out"; got \'test\''):
        standard_library_files("test")


@pytest.mark.parametrize("max_bytes", [0, -1])
def test_max_bytes_must_be_positive(max_bytes):
    with pytest.raises(ValueError, match=f"max_bytes must be at least 1.* got {max_bytes}"):
        standard_library_text("train", max_bytes)
