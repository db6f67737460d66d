"""Keeps compiled programs between commands: most of a short sweep is spent on compiling them."""

import os
import platform
from pathlib import Path

import jax

SMALL_PROGRAMS_TOO = {
    "jax_persistent_cache_min_compile_time_secs": 0.3,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def keep_programs() -> None:
    """Have JAX keep compiled programs in the user's cache directory, unless it was told otherwise.

    ``JAX_COMPILATION_CACHE_DIR`` names another directory, and ``JAX_ENABLE_COMPILATION_CACHE=0`` keeps none.
    Each machine has a directory of its own, since what was compiled for one processor may stop another.
    """
    settings = jax.config.values
    if settings["jax_compilation_cache_dir"] or not settings["jax_enable_compilation_cache"]:
        return
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(caches, "qpaged", "programs", platform.node() or "unnamed")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # There is no home, or nothing can be written; nothing needs to be kept.
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    for name, value in SMALL_PROGRAMS_TOO.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
