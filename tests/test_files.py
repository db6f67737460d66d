"""Files are written whole or not at all."""

import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import qpaged
from qpaged._files import digest, has_own_digest, write_whole
from qpaged.models import read_config


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "first")
    write_whole(path, b"second")
    assert path.read_text() == "second" and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_a_full_disk_leaves_the_previous_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    write_whole(path, "first")

    def full(self, *args):
        if step == "write_bytes":
            self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, step, full)
    with pytest.raises(OSError, match=r"No space left on device: '.*file'"):
        write_whole(path, "second")
    monkeypatch.undo()
    assert path.read_text() == "first" and [*tmp_path.iterdir()] == [path]


def test_a_symbolic_link_is_replaced_and_not_followed(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("kept")
    link.symlink_to(target)
    write_whole(link, "new")
    assert target.read_text() == "kept" and link.read_text() == "new" and not link.is_symlink()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400])
def test_a_file_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "file"
    path.touch(mode)
    path.chmod(mode)
    write_whole(path, "new")
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == mode


def test_a_new_file_has_the_mode_that_others_have(tmp_path):
    (tmp_path / "other").touch()
    write_whole(tmp_path / "file", "new")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no such pipes")
def test_a_pipe_is_written_to_and_stays(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(path, "new")
    assert path.is_fifo() and os.read(reader, 100) == b"new"
    os.close(reader)


def test_threads_may_write_one_file(tmp_path):
    path = tmp_path / "file"
    texts = [str(number) * 100_000 for number in range(8)]
    with ThreadPoolExecutor() as threads:
        list(threads.map(write_whole, [path] * 80, texts * 10))
    assert path.read_text() in texts and [*tmp_path.iterdir()] == [path]


def test_an_interrupt_leaves_the_previous_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "first")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "second")
    assert path.read_text() == "first" and [*tmp_path.iterdir()] == [path]


NOT_JSON = ["{", "\xff", "[" * 200_000, '{"a":' * 200_000]


@pytest.mark.parametrize("text", NOT_JSON)
@pytest.mark.parametrize(
    ("read", "remedy"),
    [
        (read_config, "Copy the file again"),
        (qpaged.CacheFormat.of, "Write it with CacheFormat.save or qpaged tune"),
    ],
)
def test_what_is_no_json_is_refused_by_name(tmp_path, text, read, remedy):
    path = tmp_path / "file.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"{path} is not valid JSON \(.*\). {remedy}."):
        read(path)


def test_a_format_nested_without_end_is_refused_by_name(tmp_path):
    nested = '{"name": "+rotate", "inner":' * 2000 + '{"name": "int8", "granularity": "page"}' + "}" * 2000
    path = tmp_path / "format.json"
    path.write_text(
        f'{{"qpaged": "cache format", "version": 1, "key": {nested}, "value": null, "layers": []}}'
    )
    with pytest.raises(ValueError, match=r"format.json (holds a cache format that cannot|is not valid JSON)"):
        qpaged.CacheFormat.of(path)


def test_a_digest_is_of_the_content_in_any_order():
    record = {"b": [1, 2.5], "a": {"x": None}}
    signed = {"digest": digest(record), **record}
    assert has_own_digest({"a": {"x": None}, **signed})
    assert not has_own_digest(signed | {"b": [1, 2.25]})
    assert not has_own_digest(record) and not has_own_digest([]) and not has_own_digest(None)
