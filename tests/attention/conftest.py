"""Put benchmarks/ on the path: the tests use the named shapes of benchmarks/shapes.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
