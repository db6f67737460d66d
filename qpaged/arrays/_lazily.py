"""How handlers call JAX on implicit arrays."""

from qpaged.implicit import provider, use_implicit_args
from qpaged.implicit._interpreter import use_implicit_args_lazily

LAZILY = provider().name == "qpaged"  # qax does not look into arrays inside of arrays
lazily = use_implicit_args_lazily if LAZILY else use_implicit_args
"""A decorator as `use_implicit_args`, but what handlers get of it may defer work."""
