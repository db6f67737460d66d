"""Whose ImplicitArray this is: qax's, where qax works, or ours."""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from dataclasses import dataclass
from types import ModuleType

import jax

from qpaged._compat import version_tuple

QAX_JAX = (0, 4, 35)
OLDEST_JAX = (0, 10, 2)


@dataclass(frozen=True)
class Provider:
    """Where the names of `qpaged.implicit` come from.

    Attributes:
        name: "qax" or "qpaged".
        detail: qax's version, or why qax is not used.
    """

    name: str
    detail: str

    def __str__(self) -> str:
        return f"qax {self.detail}" if self.name == "qax" else f"qpaged: {self.detail}"


def choose(jax_version: str) -> ModuleType | None:
    """Decide between qax and our own implementation.

    Args:
        jax_version: the version of the JAX that is installed.

    Returns:
        The module of qax, or None for our own.

    Raises:
        ImportError: neither works with this JAX.
    """
    version = version_tuple(jax_version)
    if version >= OLDEST_JAX:
        return None
    qax, problem = _import_qax() if version == QAX_JAX else (None, f"it does not work with JAX {jax_version}")
    if qax is None:
        raise ImportError(_unsupported(jax_version, problem))
    return qax


def provider() -> Provider:
    """Whether the names of `qpaged.implicit` are qax's, and if not, why not.

    Asking is what tries to import an installed qax on a JAX it does not support; nothing else does.
    """
    if version_tuple(jax.__version__) < OLDEST_JAX:
        return Provider("qax", importlib.metadata.version("qax"))
    try:
        installed = importlib.metadata.version("qax")
    except importlib.metadata.PackageNotFoundError:
        return Provider("qpaged", "qax is not installed")
    _, problem = _import_qax()
    return Provider("qpaged", f"qax {installed} on JAX {jax.__version__}: {problem}")


def _import_qax() -> tuple[ModuleType | None, str]:
    with warnings.catch_warnings():
        # qax 0.4.1 spells jax.tree_util.tree_map the old way; nothing its user could change.
        warnings.filterwarnings(
            "ignore", message=r"jax\.tree_map is deprecated", category=DeprecationWarning, module=r"qax\."
        )
        try:
            return importlib.import_module("qax"), "it is used with JAX 0.4.35 only"
        except Exception as error:  # a broken qax raises whatever its dependencies changed into
            return None, f"importing it fails with {type(error).__name__}: {error}"


def _unsupported(jax_version: str, problem: str) -> str:
    return (
        f"qpaged.implicit does not work with JAX {jax_version} as it is installed here. It is tested with "
        f"JAX 0.10.2 and later, and with JAX 0.4.35 through qax 0.4.1. Of qax: {problem}. "
        f'Run: pip install -U "jax>=0.10.2"  or, to use qax: pip install "qpaged[qax]"'
    )
