"""What only some commands need: imported when used, with an error that says how to get it."""

import importlib
from types import ModuleType

SWEEP = ("matplotlib", "rich", "safetensors")


class MissingExtraError(ImportError):
    """An optional package is not installed; the message is the cure."""


def need(module: str, extra: str = "sweep") -> ModuleType:
    """Import ``module``.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(f'{package} is needed here: pip install "qpaged[{extra}]"') from error


def need_all(modules: tuple[str, ...] = SWEEP, extra: str = "sweep") -> None:
    """Import every one of ``modules``, so that a long job does not fail at its end.

    Raises:
        MissingExtraError: naming all that are missing.
    """
    missing = []
    for module in modules:
        try:
            need(module, extra)
        except MissingExtraError:
            missing.append(module)
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise MissingExtraError(f'{", ".join(missing)} {verb} needed here: pip install "qpaged[{extra}]"')
