"""Files of results, which tell when, on what and with which versions they were measured."""

import datetime
import json
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax


def circumstances(packages: Iterable[str] = ()) -> dict[str, Any]:
    """Return the date, the device, and the versions of Python, jax, qpaged and further distributions."""
    distributions = sorted({"jax", "jaxlib", "qpaged", *packages})
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in distributions},
        },
    }


def save(path: Path | None, results: dict[str, Any]) -> None:
    """Write results as JSON if a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
