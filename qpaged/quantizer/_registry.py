"""Formats by name: the entry points ``qpaged.quantizers`` of whatever is installed, read when asked."""

import warnings
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from qpaged.quantizer._contract import Quantizer

GROUP = "qpaged.quantizers"


class RegistryError(ValueError):
    """A spelling that names no usable format: unknown, claimed twice, or broken."""


def available_quantizers() -> tuple[str, ...]:
    """Names of the installed formats, sorted."""
    return tuple(sorted(_claims()))


def available_formats() -> tuple[str, ...]:
    """Spellings of every installed format at each of its granularities, the default first.

    A format that cannot be had (its package is broken, or two claim its name) is warned of and left out.
    """
    spellings: list[str] = []
    for name in available_quantizers():
        try:
            spellings += [str(_build(name, granularity=g)) for g in _build(name).granularities]
        except RegistryError as error:
            warnings.warn(str(error), stacklevel=2)
    return tuple(spellings)


def get_quantizer(spelling: "str | Quantizer") -> Quantizer:
    """The quantizer that a spelling ``name[:granularity]`` names; a quantizer is returned as it is.

    Raises:
        RegistryError: no installed package has that name, several have, or the granularity is not offered.
        TypeError: neither a string nor a quantizer.
    """
    if isinstance(spelling, Quantizer):
        return spelling
    if not isinstance(spelling, str):
        raise TypeError(
            f"quantizer must be a spelling such as 'int8:token' or a qpaged.Quantizer, but came as "
            f"{type(spelling).__name__}."
        )
    head, *wrappers = spelling.split("+")
    if wrappers:
        raise RegistryError(
            f"{spelling!r}: no wrapper named {wrappers[0]!r} is installed; drop the '+' part."
        )
    name, colon, granularity = head.partition(":")
    try:
        return _build(name, granularity=granularity) if colon else _build(name)
    except (TypeError, ValueError) as error:
        if isinstance(error, RegistryError):
            raise
        raise RegistryError(f"{spelling!r}: {error}") from error


def quantizer_from_config(config: Any) -> Quantizer:
    """The quantizer that :attr:`Quantizer.config` describes.

    Raises:
        RegistryError: malformed, or the installed format of that name is another one.
    """
    try:
        options = dict(config)
        quantizer = _build(options.pop("name"), **options)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, RegistryError):
            raise
        raise RegistryError(f"no format can be made from {config!r}: {error}") from error
    if quantizer.config != config:
        raise RegistryError(
            f"the format was {config}, but the installed {config['name']} makes {quantizer.config}; "
            f"install the version of its package that wrote it."
        )
    return quantizer


def _build(name: str, **options: Any) -> Quantizer:
    claims = _claims()
    if name not in claims:
        raise RegistryError(
            f"no format is named {name!r}; installed are {', '.join(sorted(claims)) or 'none'}. "
            f"Formats are found through the entry points {GROUP!r} of installed packages."
        )
    factory = _load(name, claims[name])
    quantizer = factory(**options)
    if not isinstance(quantizer, Quantizer):
        raise RegistryError(
            f"the entry point {name!r} must make a qpaged.Quantizer, but made a {type(quantizer).__name__}."
        )
    return quantizer


def _claims() -> dict[str, dict[str, EntryPoint]]:
    """For each name, the packages that claim it (an installation seen twice on the path counts once)."""
    claims: dict[str, dict[str, EntryPoint]] = defaultdict(dict)
    for point in entry_points(group=GROUP):
        claims[point.name][point.dist.name if point.dist else point.value] = point
    return claims


def _load(name: str, claims: dict[str, EntryPoint]) -> Callable[..., object]:
    if len(claims) > 1:
        raise RegistryError(
            f"the name {name!r} is claimed by {len(claims)} packages, {' and '.join(sorted(claims))}; "
            f"uninstall all but one of them."
        )
    ((package, point),) = claims.items()
    try:
        return point.load()
    except Exception as error:  # whatever another package raises as it is imported
        raise RegistryError(
            f"the format {name!r} of package {package} cannot be loaded from {point.value!r}: {error}. "
            f"Reinstall that package, and see that no other package hides its modules."
        ) from error
