"""What only some functions need: imported when used, with an error that says how to get it."""

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """An optional package is not installed; the message is the cure."""


def need(module: str) -> ModuleType:
    """Import ``module``.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(f'{package} is needed here: pip install "qpaged[sweep]"') from error
