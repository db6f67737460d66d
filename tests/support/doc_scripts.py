"""Loads scripts and example formats of the documentation, which is no package."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "docs/plugin"


def script(path):
    """Import a file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
