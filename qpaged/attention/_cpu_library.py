"""The compiled library of the ``cpu`` backend: found beside this file, or not there, with the reason."""

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import jax

from qpaged.attention._cpu_layout import CallLayout

TARGET = "qpaged_attend"
PATH = Path(__file__).parent / "cpu" / "attention.so"


class Loaded(NamedTuple):
    """What came of loading the library.

    Attributes:
        refusal: why it cannot be used; None if it can.
        instruction_set: what it runs on this processor: "avx512", "avx2" or "baseline".
    """

    refusal: str | None
    instruction_set: str | None = None


@functools.cache
def load() -> Loaded:
    """Load the library and register its handler with XLA, once."""
    if not hasattr(jax, "ffi"):
        return Loaded(f"needs JAX 0.5 or newer, but this is {jax.__version__}")
    if not PATH.exists():
        return Loaded(
            "is not compiled in this installation; install a C compiler (cc), and then this package again"
        )
    try:
        library = ctypes.CDLL(str(PATH))
    except OSError as error:
        return Loaded(f"cannot be loaded: {error}")
    library.qpaged_layout_size.restype = ctypes.c_int64
    if library.qpaged_layout_size() != ctypes.sizeof(CallLayout):
        return Loaded("was compiled from another version of this package; install the package again")
    library.qpaged_instruction_set.restype = ctypes.c_char_p
    try:
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.qpaged_attend), platform="cpu")
    except Exception as error:  # XLA has no type of its own for a version that it does not take
        return Loaded(f"is refused by this jaxlib: {error}")
    return Loaded(None, library.qpaged_instruction_set().decode())
