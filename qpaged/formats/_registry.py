"""Formats by name: the entry points ``qpaged.quantizers`` of whatever is installed, read when asked."""

import contextlib
import difflib
import functools
import inspect
import itertools
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from qpaged._arguments import shown
from qpaged.arrays import is_dtype
from qpaged.formats._contract import Quantizer
from qpaged.formats._spelling import parse

GROUP = "qpaged.quantizers"
PLUS = "+"  # what the names of wrappers begin with


PLAIN = "plain"  # the spelling of plain arrays


class RegistryError(ValueError):
    """A spelling that names no usable format: unknown, claimed twice, or broken."""


def available_quantizers() -> tuple[str, ...]:
    """Return the names of the installed formats, sorted."""
    return tuple(sorted(name for name in _claims() if not name.startswith(PLUS)))


def available_wrappers() -> tuple[str, ...]:
    """Return the names of the installed wrappers, sorted, each with its plus."""
    return tuple(sorted(name for name in _claims() if name.startswith(PLUS)))


def available_formats(*, wrapped: bool = False, packed: bool = False) -> tuple[str, ...]:
    """Return the spellings of every installed format at each of its granularities, the default first.

    A format that cannot be had (its package is broken, or two claim its name) is warned of and left out.

    Args:
        wrapped: whether to list each in every set of wrappers that goes with it, too.
        packed: whether to list those, too, that :attr:`need exact pages <Quantizer.needs_exact_pages>`.
    """
    spellings: list[str] = []
    for name in available_quantizers():
        try:
            formats = _formats_of(name, wrapped)
            spellings += [str(each) for each in formats if packed or not each.needs_exact_pages]
        except RegistryError as error:
            warnings.warn(str(error), stacklevel=2)
        except (TypeError, ValueError) as error:
            warnings.warn(f"{name!r}: {error}", stacklevel=2)
    return tuple(spellings)


def _formats_of(name: str, wrapped: bool) -> list[Quantizer]:
    """Return a format at each of its granularities, as :func:`available_formats` lists them."""
    formats: list[Quantizer] = []
    for granularity in _build(name).granularities:
        formats += _in_wrappers(_build(name, granularity=granularity), wrapped)
    return formats


def _in_wrappers(bare: Quantizer, wrapped: bool) -> Iterator[Quantizer]:
    """Yield the format, and if ``wrapped`` in every set of wrappers that goes with it."""
    names = available_wrappers() if wrapped else ()
    for count in range(len(names) + 1):
        for chosen in itertools.combinations(names, count):
            with contextlib.suppress(TypeError, ValueError):  # a wrapper that does not go with it, or cannot
                yield functools.reduce(_wrap, chosen, bare)


def get_quantizer(spelling: "str | Quantizer") -> Quantizer:
    """Return the quantizer that a spelling ``name[:granularity][+wrapper]...`` names; a quantizer as it is.

    Raises:
        RegistryError: no installed package has that name, several have, the granularity is not offered, or a
            wrapper does not go with the format.
        TypeError: neither a string nor a quantizer.
    """
    if isinstance(spelling, Quantizer):
        return spelling
    if not isinstance(spelling, str):
        raise no_format(spelling, "a spelling such as 'int8:token' or a qpaged.Quantizer")
    try:
        _check_is_quantizer(spelling)
        name, granularity, wrappers = parse(spelling)
        bare = _build(name) if granularity is None else _build(name, granularity=granularity)
        quantizer = bare
        for wrapper in wrappers:
            quantizer = _wrap(quantizer, PLUS + wrapper)
        return quantizer
    except (TypeError, ValueError) as error:
        if repr(spelling) in str(error):
            raise RegistryError(str(error)) from error
        raise RegistryError(f"{spelling!r}: {error}") from error


def no_format(value: object, rule: str) -> TypeError:
    """Return the error for what was given for a format and is none; ``rule`` says what may be given."""
    advice = "qpaged.available_formats() lists the spellings"
    if is_dtype(value):
        advice = "for pages of codes give the spelling of a format, such as 'int8'"
    elif isinstance(value, type) and issubclass(value, Quantizer) and not inspect.isabstract(value):
        advice = f"give an instance, {value.__name__}()"
    return TypeError(f"quantizer must be {rule}, but got {shown(value)}; {advice}.")


def _check_is_quantizer(spelling: str) -> None:
    """Raise ValueError for what :meth:`CacheFormat.of` alone takes: plain, files, keys and values apart."""
    if spelling in _claims():
        return  # a package has the name, which is refused as that package's
    if spelling == PLAIN:
        raise ValueError(f"{PLAIN!r} is no quantizer; give None, or CacheFormat.of({PLAIN!r}).")
    if spelling.startswith((f"{PLAIN}:", f"{PLAIN}{PLUS}")):
        raise ValueError(
            f"{spelling!r} is no format: plain has no granularity or wrapper; write plain alone."
        )
    if "/" in spelling or spelling.endswith(".json"):
        raise ValueError(f"{spelling!r} is no quantizer; CacheFormat.of takes files and KEYS/VALUES.")


def quantizer_from_config(config: Any) -> Quantizer:
    """Return the quantizer that :attr:`Quantizer.config` describes.

    Raises:
        RegistryError: malformed, or the installed format of that name is another one.
    """
    try:
        if not isinstance(config, Mapping) or not isinstance(config.get("name"), str):
            raise TypeError("it must be an object with the name of a format, as {'name': 'int8'}.")
        options = dict(config)
        name = options.pop("name")
        if "inner" in options:
            options["inner"] = quantizer_from_config(options["inner"])
        quantizer = _build(name, **options)
    except (TypeError, ValueError) as error:
        if isinstance(error, RegistryError):
            raise
        raise RegistryError(f"no format can be made from {config!r}: {error}") from error
    if quantizer.config != config:
        raise RegistryError(
            f"the format was {config}, but the installed {config['name']} makes {quantizer.config}; "
            f"install the version of its package that wrote it."
        )
    return quantizer


def _wrap(inner: Quantizer, name: str) -> Quantizer:
    return _build(name, inner=inner)


def _build(name: str, **options: Any) -> Quantizer:
    """Return what the entry point ``name`` makes of ``options``; RegistryError says what is wrong."""
    claims = _claims()
    if name not in claims:
        kind = "wrapper" if name.startswith(PLUS) else "format"
        installed = sorted(other for other in claims if other.startswith(PLUS) == name.startswith(PLUS))
        raise RegistryError(f"no {kind} is named {name!r}; {_advice(name, installed)}")
    factory = _load(name, claims[name])
    try:
        _check_options(name, factory, options)
        quantizer = factory(**options)
    except (TypeError, ValueError):
        raise  # it refuses the options
    except (Exception, SystemExit) as error:  # whatever another package does
        raise RegistryError(
            f"the format {name!r} of package {next(iter(claims[name]))} cannot be made: "
            f"{type(error).__name__}: {error}. Tell the authors of that package."
        ) from error
    if not isinstance(quantizer, Quantizer):
        raise RegistryError(
            f"the entry point {name!r} must make a qpaged.Quantizer, but made a {type(quantizer).__name__}."
        )
    return quantizer


def _advice(name: str, installed: Sequence[str]) -> str:
    """Return which names there are, and the one that was perhaps meant."""
    if not installed:
        return f"none is installed: a package has them in its entry points {GROUP!r}."
    plain = "" if name.startswith(PLUS) else f", and {PLAIN}"
    near = difflib.get_close_matches(name.lower(), installed, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"there are {', '.join(installed)}{plain}.{hint}"


def _check_options(name: str, factory: Callable[..., object], options: Mapping[str, Any]) -> None:
    """Raise TypeError for an option that the format does not have."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # it has no signature that Python could read
        return
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = sorted(options.keys() - parameters.keys())
    if unknown and not takes_any:
        raise TypeError(f"{name} has no option {', '.join(unknown)}; leave it out.")


def _claims() -> dict[str, dict[str, EntryPoint]]:
    """Return the packages that claim each name, by name; one installed or removed later is seen at once."""
    return _read_claims(tuple((folder, _modified(folder)) for folder in sys.path))


@functools.lru_cache(maxsize=1)  # reading the metadata of every installed package takes milliseconds
def _read_claims(_import_path: tuple[tuple[str, int | None], ...]) -> dict[str, dict[str, EntryPoint]]:
    """Return :func:`_claims` as of one state of the import path."""
    claims: dict[str, dict[str, EntryPoint]] = defaultdict(dict)
    for point in entry_points(group=GROUP):
        package = point.dist.name if point.dist else point.value
        claims[point.name][package] = point  # an installation seen twice on the path counts once
    return dict(claims)


def _modified(folder: str) -> int | None:
    """Return when a package was last installed in the folder or removed; None without such a folder."""
    try:
        return os.stat(folder or os.curdir).st_mtime_ns
    except OSError:
        return None


def _load(name: str, claims: dict[str, EntryPoint]) -> Callable[..., object]:
    """Return what the one entry point of that name refers to."""
    if len(claims) > 1:
        raise RegistryError(
            f"the name {name!r} is claimed by {len(claims)} packages, {' and '.join(sorted(claims))}; "
            f"uninstall all but one of them."
        )
    package, point = next(iter(claims.items()))
    if name == PLAIN or name.endswith(".json"):
        raise RegistryError(
            f"the format {name!r} of package {package} cannot be asked for: {PLAIN!r} is for plain arrays, "
            f"and a name that ends in .json for a file; rename its entry point."
        )
    try:
        return point.load()
    except (Exception, SystemExit) as error:  # whatever another package does as it is imported
        raise RegistryError(
            f"the format {name!r} of package {package} cannot be loaded from {point.value!r}: "
            f"{type(error).__name__}: {error}. "
            f"Reinstall that package, and see that no other package hides its modules."
        ) from error
