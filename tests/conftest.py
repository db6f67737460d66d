"""Settings for all tests. XLA reads its flags when JAX starts, so they must be set before the import.

Most of a test's time is compilation, so the compiler optimizes little. The compiler of JAX 0.10 also takes a
third less time without its fusion emitters, and a tenth less where it does not divide a program over threads;
other versions do not know these flags, and abort.
"""

import collections
import gc
import itertools
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
    flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ["XLA_FLAGS"] = " ".join(flags)

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_compilation_cache", False)  # commands would write to the user's


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(items):
    """Mark as long what :func:`pytest.mark.short` leaves of the cases of a test."""
    cases = collections.defaultdict(list)
    for item in items:
        mark = item.get_closest_marker("short")
        if mark is not None and item.get_closest_marker("long") is None:
            cases[item.function, mark.args[0]].append(item)
    for (_, count), of_test in cases.items():
        kept = {(2 * index + 1) * len(of_test) // (2 * count) for index in range(count)}
        for index, item in enumerate(of_test):
            if index not in kept:
                item.add_marker("long")


MANY_MAPS = 15_000  # of the 65,530 memory maps that Linux lets a process have
TOO_MANY_MAPS = 40_000  # also within a module
MAPS = Path("/proc/self/maps")
tests_done = itertools.count(1)


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_are_let_go():
    """Let go of compiled programs after a module, where there are many.

    Each holds memory maps. A process that gets no more of them crashes within the compiler.
    """
    yield
    _let_go_of_programs(MANY_MAPS)


@pytest.fixture(autouse=True)
def _compiled_programs_of_long_modules_are_let_go():
    """Do so within a module, too, every few tests."""
    yield
    if next(tests_done) % 16 == 0:
        _let_go_of_programs(TOO_MANY_MAPS)


def _let_go_of_programs(most):
    """Clear JAX's caches if the process has more memory maps than that."""
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > most:
        jax.clear_caches()
        gc.collect()
