"""Result files: what was measured, when, on what, and with which versions."""

import datetime
import json
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax


def circumstances(packages: Iterable[str] = ()) -> dict[str, Any]:
    """Date, device and versions: of Python, jax and qpaged, and of further distributions."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in sorted({"jax", "jaxlib", "qpaged", *packages})},
    }


def save(path: Path | None, results: dict[str, Any]) -> None:
    """Write results as JSON, where a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
