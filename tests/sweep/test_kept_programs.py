"""Commands have JAX keep what it compiles, where the user wants it, if at all."""

import os
import platform

import jax
import pytest

from qpaged.cli._programs import keep_programs

NAMES = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(autouse=True)
def _as_a_command_starts(monkeypatch, tmp_path):
    before = {name: getattr(jax.config, name) for name in NAMES}
    jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_a_directory_of_the_machine(tmp_path):
    keep_programs()
    folder = tmp_path / "qpaged" / "programs" / platform.node()
    assert jax.config.jax_compilation_cache_dir == str(folder) and folder.is_dir()


def test_a_directory_of_the_user_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    keep_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert not (tmp_path / "qpaged").exists()


def test_nothing_is_kept_where_jax_keeps_nothing(tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)
    keep_programs()
    assert not jax.config.jax_compilation_cache_dir and not os.listdir(tmp_path)


def test_a_command_runs_where_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_programs()
    assert not jax.config.jax_compilation_cache_dir
