"""The options of find_cache: which arrays to look at, and what their axes are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import jax

from qpaged.adopt._classify import short_aval

AXIS_NAMES = ("layers", "pair", "batch", "length", "heads", "head_dim")

SHOWN = 6  # paths in an error

Where: TypeAlias = str | Callable[[str], bool] | None
AxesOption: TypeAlias = Sequence[str] | Mapping[str, Sequence[str]] | None


def path_filter(where: Where) -> Callable[[str], bool]:
    """Return a function that decides by its path whether an array is looked at.

    Raises:
        ValueError: ``where`` is no pattern.
    """
    if where is None:
        return _any_path
    if callable(where):
        return where
    try:
        pattern = re.compile(where)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"where must be a regular expression or a function of the path, but came as {where!r}: {error}."
        ) from error

    def matches(path: str) -> bool:
        return pattern.search(path) is not None

    return matches


def _any_path(path: str) -> bool:
    return True


def axis_names_for(axes: AxesOption, path: str, aval: jax.ShapeDtypeStruct) -> tuple[str, ...] | None:
    """Return the names that ``axes`` gives the axes of an array; None if it gives none.

    Raises:
        ValueError: the names are not those of this array's axes.
    """
    if isinstance(axes, Mapping):
        axes = next((names for pattern, names in axes.items() if re.search(pattern, path)), None)
    if axes is None:
        return None
    if not isinstance(axes, Sequence):
        raise ValueError(
            f"axes must be the names of axes, or a dictionary of them by pattern, but came as {axes!r}."
        )
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    _check_axis_names(names, path, aval)
    return names


def check_patterns(axes: AxesOption, paths: Sequence[str]) -> None:
    """Raise ValueError for a pattern of ``axes`` that fits no path."""
    if not isinstance(axes, Mapping):
        return
    for pattern in axes:
        if not any(re.search(pattern, path) for path in paths):
            raise ValueError(
                f"axes must have patterns of the arrays' paths, but {pattern!r} fits none: {listed(paths)}."
            )


def listed(paths: Sequence[str]) -> str:
    """Return some paths, with commas between."""
    shown = ", ".join(paths[:SHOWN])
    return f"{shown} and {len(paths) - SHOWN} more" if len(paths) > SHOWN else shown


def _check_axis_names(names: tuple[str, ...], path: str, aval: jax.ShapeDtypeStruct) -> None:
    one_each = len(names) == len(aval.shape) and len(set(names)) == len(names)
    known = set(names) <= set(AXIS_NAMES)
    if not (one_each and known and {"length", "head_dim"} <= set(names)):
        raise ValueError(
            f"axes must name each of the {len(aval.shape)} axes of {path} {short_aval(aval)}, length and "
            f"head_dim among them, from {', '.join(AXIS_NAMES)}, but came as {names}."
        )
