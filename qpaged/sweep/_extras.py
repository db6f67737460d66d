"""Packages that only a sweep needs: imported on use, with an error that says how to install them."""

from qpaged._extras import MissingExtraError, how_to_install, need

__all__ = ["MissingExtraError", "need", "need_sweep_extra"]

SWEEP = ("filelock", "jinja2", "matplotlib", "rich", "safetensors")


def need_sweep_extra() -> None:
    """Import every package that a sweep needs, so that a long job does not fail at its end.

    Raises:
        MissingExtraError: packages are missing; all of them are named.
    """
    missing = [module for module in SWEEP if not _is_installed(module)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise MissingExtraError(f"{', '.join(missing)} {verb} needed here: {how_to_install('sweep')}")


def _is_installed(module: str) -> bool:
    try:
        need(module)
    except MissingExtraError:
        return False
    return True
