"""Text that needs no download: the standard library of the running interpreter.

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
"""One file in this many is held out."""

FILE_LIMIT = 131_072
"""Bytes of one file that are used, so that no single file dominates a text."""

# Tests repeat the code they test; the encodings are generated tables rather than text; the rest is not
# part of the library itself.
EXCLUDED_DIRECTORIES = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__"}
)


def standard_library_files(split: Split) -> list[Path]:
    """The standard library's source files of one split, sorted by path.

    Raises `ValueError` for an unknown split, `FileNotFoundError` where the interpreter ships no sources.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f'split must be "train" or "held_out"; got {split!r}.')
    root = _root()
    return [path for path in _source_files(root) if _is_held_out(root, path) == (split == "held_out")]


def standard_library_text(split: Split, max_bytes: int | None = None, seed: int = 0) -> bytes:
    """The files of a split in an order drawn by `seed`, joined by newlines and cut at `max_bytes`.

    Each file contributes at most `FILE_LIMIT` bytes. The same interpreter, split and seed give the same
    bytes, and a smaller `max_bytes` gives a prefix of a larger one. Raises as `standard_library_files`.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, or None for everything; got {max_bytes}.")
    root = _root()
    files = sorted(standard_library_files(split), key=lambda path: _hash(f"{seed}:{_name(root, path)}"))
    text = b"\n".join(path.read_bytes()[:FILE_LIMIT] for path in files)
    return text[:max_bytes]


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _source_files(root: Path) -> list[Path]:
    files = sorted(_walk(root))
    if not files:
        raise FileNotFoundError(
            f"The standard library at {root} holds no .py sources (a zipped or stripped interpreter). "
            "Use an interpreter that ships them, or give a text of your own."
        )
    return files


def _walk(root: Path) -> Iterator[Path]:
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        # _sysconfigdata records how this very interpreter was built, paths included.
        if EXCLUDED_DIRECTORIES.isdisjoint(parts[:-1]) and not path.name.startswith("_sysconfigdata"):
            yield path


def _is_held_out(root: Path, path: Path) -> bool:
    return _hash(_name(root, path)) % HELD_OUT_EVERY == 0


def _name(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
