"""Settings for all tests. XLA reads its flags when JAX starts, so they must be set before the import.

Most of a test's time is compilation, so the compiler optimizes little. The compiler of JAX 0.10 also takes a
third less time without its fusion emitters; other versions do not know that flag, and abort.
"""

import gc
import os
from importlib.metadata import version
from pathlib import Path

import pytest

flags = [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
]
if version("jaxlib").startswith("0.10."):
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(flags)

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_compilation_cache", False)  # commands would write to the user's

MANY_MAPS = 15_000  # of the 65,530 memory maps that Linux lets a process have
MAPS = Path("/proc/self/maps")


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_are_let_go():
    """Let go of compiled programs after a module, where there are many.

    Each holds memory maps. A process that gets no more of them crashes within the compiler.
    """
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
        gc.collect()
