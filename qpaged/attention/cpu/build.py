"""Compiles the kernel of the ``cpu`` backend: as a hook of hatchling, or by ``python build.py`` in place.

Where there is no C compiler, or it fails, the package is built without the kernel, and the backend declines.
CC and CFLAGS are taken from the environment. QPAGED_NO_KERNEL=1 leaves the kernel out.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ModuleNotFoundError:  # run by hand
    BuildHookInterface = object

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "attention.so"
FLAGS = ["-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
MACOS = "11.0"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
INSTRUCTION_SETS = {
    "x86_64": {"avx2": ["-mavx2", "-mfma"], "avx512": AVX512},
}
"""By machine: the flags of each set that the kernel is compiled for once more, beside the baseline."""


class KernelHook(BuildHookInterface):
    """Compiles the kernel into the wheel, which is then one of this platform and of any Python."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and tell hatchling what came of it."""
        reason = compile_library()
        if reason is not None:
            LIBRARY.unlink(missing_ok=True)
            self.app.display_warning(f"The cpu kernel is left out: {reason}")
            return
        build_data["artifacts"].append(f"/{LIBRARY.relative_to(self.root)}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag()}"


def compile_library() -> str | None:
    """Compile the library in place and return None, or why it could not be."""
    if os.environ.get("QPAGED_NO_KERNEL") == "1":
        return "QPAGED_NO_KERNEL is 1"
    if is_up_to_date():
        return None
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if os.name != "posix" or shutil.which(compiler[0]) is None:
        return f"there is no C compiler {compiler[0]!r}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            objects = compile_objects(compiler, Path(folder))
            library = Path(folder) / LIBRARY.name
            run([*compiler, "-shared", *extra_flags(), *objects, "-o", str(library), "-lm"])
        except (OSError, subprocess.CalledProcessError) as error:
            return f"{error}\n{getattr(error, 'stderr', '')}"
        # A process that runs the old library keeps it, which a copy onto it would crash.
        beside = LIBRARY.with_suffix(".new")
        shutil.copy(library, beside)
        beside.replace(LIBRARY)
    return None


def is_up_to_date() -> bool:
    """Return True if the library is newer than all that it is made of."""
    sources = [path.stat().st_mtime for path in FOLDER.iterdir() if path.suffix in (".c", ".h", ".py")]
    return "CFLAGS" not in os.environ and LIBRARY.exists() and LIBRARY.stat().st_mtime > max(sources)


def compile_objects(compiler: list[str], folder: Path) -> list[str]:
    """Compile the handler, and the kernel once for each instruction set, at once; return the object files."""
    sources: dict[str, tuple[str, list[str]]] = {"handler": ("handler.c", [])}
    sources["baseline"] = "kernel.c", ["-DKERNEL=baseline", "-DIS_BASELINE"]
    for name, flags in INSTRUCTION_SETS.get(platform.machine(), {}).items():
        sources[name] = "kernel.c", [f"-DKERNEL={name}", *flags]
    running = []
    for name, (source, flags) in sources.items():
        output = str(folder / f"{name}.o")
        command = [*compiler, *FLAGS, *extra_flags(), *flags, "-c", str(FOLDER / source), "-o", output]
        running.append((output, command, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    for _, command, process in running:
        _, errors = process.communicate()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, stderr=errors)
    return [output for output, _, _ in running]


def extra_flags() -> list[str]:
    """Return what the environment and the platform add."""
    flags = shlex.split(os.environ.get("CFLAGS", ""))
    if platform.system() == "Darwin":
        flags += [f"-mmacosx-version-min={MACOS}"]
    return flags


def run(command: list[str]) -> None:
    """Run a command, whose errors are kept."""
    subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)


def platform_tag() -> str:
    """Return the platform in the names of wheels; for Linux one that PyPI takes only after a repair."""
    if platform.system() == "Darwin":
        return f"macosx_{MACOS.replace('.', '_')}_{platform.machine()}"
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


if __name__ == "__main__":
    raise SystemExit(compile_library())
