"""Files that are written whole or not at all, files of JSON, and the digest by which damage is noticed."""

import hashlib
import json
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DIGEST = "digest"


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file in one step: a reader never meets half of it, and a full disk leaves the previous file.

    Whoever may read the previous file may read the new one. A symbolic link is replaced by the file, and
    what it leads to is left alone. A device or a pipe is written to, not replaced.

    Raises:
        OSError: the file cannot be written.
    """
    content = data.encode() if isinstance(data, str) else data
    is_replaced = path.exists()
    if is_replaced and not path.is_file():
        path.write_bytes(content)
        return
    # A name of its own keeps two writers, be they threads, from writing the same partial file.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        if is_replaced:
            partial.touch(0o600)  # nobody else is to read it until it has the previous file's mode
        partial.write_bytes(content)
        if is_replaced:
            shutil.copymode(path, partial)
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk names no file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def read_json(path: Path, remedy: str = "Copy the file again.") -> Any:
    """Return the contents of a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or nested too deeply to be read; ``remedy`` ends the message.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). {remedy}") from error


def digest(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the JSON of a record without its digest, whatever its order and spaces."""
    content = {key: value for key, value in record.items() if key != DIGEST}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def has_own_digest(record: Any) -> bool:
    """Return True if a record is as it was when its digest was taken."""
    return isinstance(record, Mapping) and record.get(DIGEST) == digest(record)
