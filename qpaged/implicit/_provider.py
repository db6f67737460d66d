"""The choice of the implementation behind `qpaged.implicit`: qax where qax works, else qpaged's own."""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from dataclasses import dataclass
from types import ModuleType

import jax

from qpaged._compat import IMPLICIT_JAX, QAX_JAX, dotted, version_tuple


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
        if self.name == "qax":
            return f"qax {self.detail}"
        return f"qpaged: {self.detail}"


def choose(jax_version: str) -> ModuleType | None:
    """Choose between qax and qpaged's own implementation.

    Args:
        jax_version: the version of the JAX that is installed.

    Returns:
        The module of qax, or None for our own.

    Raises:
        ImportError: neither works with this JAX.
    """
    version = version_tuple(jax_version)
    if version >= IMPLICIT_JAX:
        return None
    if version != QAX_JAX:
        raise ImportError(_unsupported(jax_version, f"it does not work with JAX {jax_version}"))
    qax, problem = _import_qax()
    if qax is None:
        raise ImportError(_unsupported(jax_version, problem))
    return qax


def provider() -> Provider:
    """Return whose names `qpaged.implicit` has: qax's or qpaged's, and in that case why not qax's.

    Asking is what tries to import an installed qax on a JAX it does not support; nothing else does.
    """
    if version_tuple(jax.__version__) < IMPLICIT_JAX:
        return Provider("qax", importlib.metadata.version("qax"))
    try:
        qax_version = importlib.metadata.version("qax")
    except importlib.metadata.PackageNotFoundError:
        return Provider("qpaged", "qax is not installed")
    _, problem = _import_qax()
    return Provider("qpaged", f"qax {qax_version} on JAX {jax.__version__}: {problem}")


def _import_qax() -> tuple[ModuleType | None, str]:
    """Import qax; return the module or None, and why it is not used."""
    with warnings.catch_warnings():
        # qax 0.4.1 uses the deprecated jax.tree_map, which its users cannot change.
        warnings.filterwarnings(
            "ignore", message=r"jax\.tree_map is deprecated", category=DeprecationWarning, module=r"qax\."
        )
        try:
            return importlib.import_module("qax"), f"it is used with JAX {dotted(QAX_JAX)} only"
        except Exception as error:  # a qax that is too old for its dependencies may raise anything
            return None, f"importing it fails with {type(error).__name__}: {error}"


def _unsupported(jax_version: str, problem: str) -> str:
    oldest = dotted(IMPLICIT_JAX)
    return (
        f"qpaged.implicit does not work with JAX {jax_version} as it is installed here. It is tested with "
        f"JAX {oldest} and later, and with JAX {dotted(QAX_JAX)} through qax 0.4.1. Of qax: {problem}. "
        f'Run: pip install -U "jax>={oldest}"  or, to use qax: pip install "qpaged[qax]"'
    )
