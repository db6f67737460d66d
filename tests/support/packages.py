"""Packages whose models some tests need."""

import importlib
import os

import pytest


def require_packages(*names):
    """Skip the module's tests if a package is missing; with EVERY_MODEL in the environment, fail."""
    for name in names:
        if os.environ.get("EVERY_MODEL"):
            importlib.import_module(name)
        else:
            pytest.importorskip(name)
