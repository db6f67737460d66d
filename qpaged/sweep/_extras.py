"""What only a sweep needs: imported when used, with an error that says how to get it."""

from qpaged.models._extras import MissingExtraError, need

__all__ = ["MissingExtraError", "need", "need_sweep_extra"]

SWEEP = ("jinja2", "matplotlib", "rich", "safetensors")


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
