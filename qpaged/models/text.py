"""Provide text that needs no download: the standard library of the running interpreter.

Files are split by a hash of their path, so a file that was held out from training under one Python version
is held out under every other.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "held_out"]

HELD_OUT_EVERY = 16
"""One of this many files is held out."""

FILE_LIMIT = 131_072
"""Bytes of one file that are used, so that no single file dominates a text."""

# Tests repeat the code they test; the encodings are generated tables rather than text; the rest is not
# part of the library itself.
EXCLUDED_DIRECTORIES = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__"}
)


def standard_library_files(split: Split) -> list[Path]:
    """Return the standard library's source files of one split, sorted by path.

    Raises `ValueError` for an unknown split, `FileNotFoundError` where the interpreter ships no sources.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f'split must be "train" or "held_out"; got {split!r}.')
    wants_held_out = split == "held_out"
    root = _library_root()
    return [path for path in _source_files(root) if _is_held_out(root, path) == wants_held_out]


def standard_library_text(split: Split, max_bytes: int | None = None, seed: int = 0) -> bytes:
    """Return the files of a split in an order drawn by `seed`, joined by newlines and cut at `max_bytes`.

    Each file contributes at most `FILE_LIMIT` bytes. The same interpreter, split and seed give the same
    bytes, and a smaller `max_bytes` gives a prefix of a larger one. Raises as `standard_library_files`.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, or None for everything; got {max_bytes}.")
    root = _library_root()

    def random_order(path: Path) -> int:
        return _hash(f"{seed}:{_module_path(root, path)}")

    files = sorted(standard_library_files(split), key=random_order)
    text = b"\n".join(path.read_bytes()[:FILE_LIMIT] for path in files)
    return text[:max_bytes]


def _library_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _source_files(root: Path) -> list[Path]:
    """Return all source files of the library, sorted by path; raise FileNotFoundError without any."""
    files = sorted(_iterate_source_files(root))
    if not files:
        raise FileNotFoundError(
            f"The standard library at {root} holds no .py sources (a zipped or stripped interpreter). "
            "Use an interpreter that ships them, or give a text of your own."
        )
    return files


def _iterate_source_files(root: Path) -> Iterator[Path]:
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        # _sysconfigdata records how this very interpreter was built, paths included.
        if EXCLUDED_DIRECTORIES.isdisjoint(parts[:-1]) and not path.name.startswith("_sysconfigdata"):
            yield path


def _is_held_out(root: Path, path: Path) -> bool:
    # By hash, not by place in the list: a module that a Python version adds moves no other one.
    return _hash(_module_path(root, path)) % HELD_OUT_EVERY == 0


def _module_path(root: Path, path: Path) -> str:
    """Return the path within the library, which is the same on every machine."""
    return path.relative_to(root).as_posix()


def _hash(text: str) -> int:
    """Return a 64-bit hash that, unlike Python's own, is the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
