"""Files are written whole or not at all."""

import errno
from pathlib import Path

import pytest

from qpaged._files import digest, has_own_digest, write_whole


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
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "second")
    monkeypatch.undo()
    assert path.read_text() == "first" and [*tmp_path.iterdir()] == [path]


def test_a_symbolic_link_is_replaced_and_not_followed(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("kept")
    link.symlink_to(target)
    write_whole(link, "new")
    assert target.read_text() == "kept" and link.read_text() == "new" and not link.is_symlink()


def test_a_digest_is_of_the_content_in_any_order():
    record = {"b": [1, 2.5], "a": {"x": None}}
    signed = {"digest": digest(record), **record}
    assert has_own_digest({"a": {"x": None}, **signed})
    assert not has_own_digest(signed | {"b": [1, 2.25]})
    assert not has_own_digest(record) and not has_own_digest([]) and not has_own_digest(None)
