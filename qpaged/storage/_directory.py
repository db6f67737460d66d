"""A directory of files with a manifest, which is there whole or not at all.

Each save writes files under new names, brings them to the disk, and then replaces the manifest, which names
them with their digests. Whenever it is interrupted, the manifest is the old one or the new one, and the files
that it names are there.
"""

import contextlib
import json
import os
import re
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from qpaged._extras import need
from qpaged._files import DIGEST, digest, has_own_digest
from qpaged._processes import Processes

MANIFEST = "manifest.json"
PARTIAL = f"{MANIFEST}.partial"
LOCK = ".lock"
WRITERS = 2  # one copies a file to the system while the other waits for the disk
OWN_FILES = re.compile(
    r"(pages|beside)-[0-9a-f]{16}-(\d+-)?\d{5,}\.safetensors|manifest\.json(\.partial)?|\.lock"
)

Tags: TypeAlias = Mapping[str, str | int]
"""What a file is of, plain JSON; "kind" is "pages" or "beside"."""
Tensors: TypeAlias = dict[str, np.ndarray]
"""The arrays of a file by name."""


def write_directory(
    path: Path,
    record: Mapping[str, Any],
    files: Iterable[tuple[Tags, Tensors]],
    processes: Processes | None = None,
) -> None:
    """Write files, one after the other, and a manifest with ``record``; remove those that were there before.

    Args:
        path: a new directory, an empty one, or one that was written by this function.
        record: plain JSON, the same in all processes.
        files: what each of this process is of, and its arrays.
        processes: those that write to the directory together; None for this one alone.

    Raises:
        ValueError: the directory holds other files.
        OSError: it cannot be written, or is being written to now, or another process failed.
    """
    processes = Processes() if processes is None else processes
    with contextlib.ExitStack() as until_written:

        def by_first(step: Callable[[], str | None]) -> str:
            """Return what the first process has done, which alone does it."""
            return processes.all_do(lambda: step() if processes.number == 0 else None)[0]

        generation = by_first(lambda: _begin(path, until_written))
        try:
            written = processes.all_do(lambda: _write_files(path, f"{generation}-{processes.number}", files))
            whole = {**record, "files": [entry for of_process in written for entry in of_process]}
            by_first(lambda: _write_partial_manifest(path, whole))
        except BaseException:
            _remove(path, lambda name: generation in name)
            raise
        # From here on the manifest may be the new one, whatever is raised: its files stay.
        by_first(lambda: _replace_manifest(path, generation))


def _begin(path: Path, until_written: contextlib.ExitStack) -> str:
    """Return a name for the files of this save, and keep others from saving to the directory."""
    path.mkdir(parents=True, exist_ok=True)
    _check_own(path)
    filelock = need("filelock", "files")
    try:
        until_written.enter_context(filelock.FileLock(path / LOCK, timeout=0))
    except filelock.Timeout as error:
        raise OSError(f"{path} is being written to now; wait, or save to another directory.") from error
    return secrets.token_hex(8)


def _write_files(path: Path, name: str, files: Iterable[tuple[Tags, Tensors]]) -> list[dict[str, Any]]:
    """Write files, and return how the manifest names them."""
    to_bytes = need("safetensors.numpy", "files").save
    written: list[dict[str, Any]] = []
    writing: deque[Future[None]] = deque()
    with ThreadPoolExecutor(WRITERS) as disk:
        for number, (tags, tensors) in enumerate(files):
            file = f"{tags['kind']}-{name}-{number:05}.safetensors"
            data = to_bytes(tensors)
            written.append({**tags, "name": file, "bytes": len(data), DIGEST: file_digest(data)})
            if len(writing) == WRITERS:
                writing.popleft().result()
            writing.append(disk.submit(_write_to_disk, path / file, data))
        for each in writing:
            each.result()
    _bring_entries_to_disk(path)
    return written


def _write_partial_manifest(path: Path, record: Mapping[str, Any]) -> None:
    """Write the manifest that is to hold, once all files are seen that it names."""
    for entry in record["files"]:
        file = path / entry["name"]
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise ValueError(
                f"path must be one directory that all processes see, but {file} of another process is not "
                f"there; give a directory of a file system that they share."
            )
    text = _manifest_text({**record, DIGEST: digest(record)})
    _write_to_disk(path / PARTIAL, text.encode())
    _bring_entries_to_disk(path)


def _replace_manifest(path: Path, generation: str) -> None:
    """Make the partial manifest the one that holds, and remove the files of those before."""
    (path / PARTIAL).replace(path / MANIFEST)
    _bring_entries_to_disk(path)
    _remove(path, lambda name: name.endswith(".safetensors") and generation not in name)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the record of a directory, with its files.

    Raises:
        FileNotFoundError: nothing was saved there whole.
        ValueError: the manifest was changed or damaged.
    """
    manifest = path / MANIFEST
    try:
        data = manifest.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            error.errno, "nothing was saved here whole; there is no manifest", str(manifest)
        ) from error
    try:
        record = json.loads(data)
        is_sound = has_own_digest(record) and _manifest_text(record).encode() == data
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{manifest} is no manifest ({error}); save the cache again.") from error
    if not is_sound:
        raise ValueError(
            f"{manifest} was changed or damaged since it was written: its digest does not match; save the "
            f"cache again."
        )
    return dict(record)


def read_file(path: Path, entry: Mapping[str, Any]) -> Tensors:
    """Return the arrays of a file that a manifest names.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is not the one that was written.
    """
    file = path / entry["name"]
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            error.errno, f"{MANIFEST} names a file that is not there; copy the whole directory", str(file)
        ) from error
    if len(data) != entry["bytes"] or file_digest(data) != entry[DIGEST]:
        raise ValueError(
            f"{file} must hold the {entry['bytes']:,} bytes that were written, but holds {len(data):,} with "
            f"another digest; it was changed, cut or exchanged: save the cache again."
        )
    tensors: Tensors = need("safetensors.numpy", "files").load(data)
    return tensors


def file_digest(data: bytes) -> str:
    """Return the digest of a file: XXH3, 128 bits."""
    hexdigest: str = need("xxhash", "files").xxh3_128_hexdigest(data)
    return hexdigest


def _manifest_text(record: Mapping[str, Any]) -> str:
    """Return the one text that a manifest has, so that no bit of it can change unseen."""
    return json.dumps(record, indent=1, sort_keys=True) + "\n"


def _check_own(path: Path) -> None:
    """Raise ValueError if there are files in a directory that were not written by :func:`write_directory`."""
    others = sorted(file.name for file in path.iterdir() if not OWN_FILES.fullmatch(file.name))
    if others:
        raise ValueError(
            f"path must be a new directory, or one with a saved cache, but {path} has other files, as "
            f"{others[0]!r}; give another."
        )


def _write_to_disk(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _bring_entries_to_disk(path: Path) -> None:
    """Wait until the names in a directory are on the disk, where the system can be asked for it."""
    with contextlib.suppress(PermissionError):  # of systems that open no directories
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path, is_old: Callable[[str], bool]) -> None:
    for file in _files(path):
        if is_old(file.name):
            file.unlink(missing_ok=True)


def _files(path: Path) -> Iterator[Path]:
    return (file for file in list(path.iterdir()) if OWN_FILES.fullmatch(file.name))
