"""What only some commands need: imported when used, with an error that says how to get it."""

import importlib
from types import ModuleType

SWEEP = ("matplotlib", "rich", "safetensors")


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


def need_sweep_extra() -> None:
    """Import all that a sweep needs, so that a long job does not fail at its end.

    Raises:
        MissingExtraError: naming all that are missing.
    """
    missing = [module for module in SWEEP if not _installed(module)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise MissingExtraError(f'{", ".join(missing)} {verb} needed here: pip install "qpaged[sweep]"')


def _installed(module: str) -> bool:
    try:
        need(module)
    except MissingExtraError:
        return False
    return True
