"""The models of the benchmarks are tested, too."""

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture
def standard_promotion():
    """The promotion of dtypes that other packages count on."""
    with jax.numpy_dtype_promotion("standard"):
        yield
