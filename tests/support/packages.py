"""Packages whose models are adopted or compared with: tests of them need the packages."""

import importlib
import os

import pytest


def require_packages(*names):
    """Skip a module's tests where a package is not installed, unless the environment asks for every model."""
    for name in names:
        if os.environ.get("EVERY_MODEL"):
            importlib.import_module(name)
        else:
            pytest.importorskip(name)
