"""Import optional packages when they are used, with an error that says how to install them."""

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """An optional package is not installed; the message says how to install it."""


def need(module: str, extra: str = "sweep") -> ModuleType:
    """Import and return ``module``, which an extra of qpaged installs.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(f"{package} is needed here: {how_to_install(extra)}") from error


def how_to_install(extra: str) -> str:
    """Return the sentence that says how an extra is installed."""
    return f"""pip install -e ".[{extra}]" in qpaged's checkout installs it."""
