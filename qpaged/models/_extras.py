"""Import optional packages when they are used, with an error that says how to install them."""

import importlib
from types import ModuleType

HOW_TO_INSTALL = """pip install -e ".[sweep]" in qpaged's checkout installs it."""


class MissingExtraError(ImportError):
    """An optional package is not installed; the message says how to install it."""


def need(module: str) -> ModuleType:
    """Import and return ``module``.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(f"{package} is needed here: {HOW_TO_INSTALL}") from error
