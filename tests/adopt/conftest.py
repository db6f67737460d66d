"""Makes the models of the benchmarks importable."""

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture
def standard_promotion():
    """Run a test with the dtype promotion that other packages count on."""
    with jax.numpy_dtype_promotion("standard"):
        yield
