"""Reports of materialized arrays: as warnings, and as records for tools that list them."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.extend

from qpaged._compat import DType, Location
from qpaged.implicit._fields import normalised_dtype
from qpaged.implicit._value import ImplicitValue


class MaterializeWarning(UserWarning):
    """An implicit array was turned into a dense one, because nothing handles what was done with it.

    Issued once per primitive, class and line of code in one call of a function decorated with
    `use_implicit_args`; Python's own warning filters decide about the calls after that. A class
    declared with `warn_on_materialize=False` is never warned about.
    """


@dataclass(frozen=True)
class Materialization:
    """One implicit operand that was materialized, with the primitive and the line of code that did it.

    Attributes:
        primitive: name of the primitive that was applied to the array.
        array_type: name of the array's class.
        shape: logical shape of the array.
        dtype: logical dtype of the array.
        file: source file of the operation.
        line: line in that file.
    """

    primitive: str
    array_type: str
    shape: tuple[int, ...]
    dtype: DType
    file: str
    line: int

    @property
    def nbytes(self) -> int:
        """Bytes of the dense array."""
        return math.prod(self.shape) * normalised_dtype(self.dtype).itemsize

    def __str__(self) -> str:
        shape = ", ".join(str(size) for size in self.shape)
        dtype = normalised_dtype(self.dtype).name
        return f"{self.primitive} {dtype}({shape}), {self.nbytes:,} bytes, at {self.file}:{self.line}"


class Report(NamedTuple):
    """A materialization, and True if it is to be warned about."""

    materialization: Materialization
    warn: bool


# Context variables rather than globals, because threads and asynchronous tasks trace at the same time.
# What has been reported in the outermost call that is running; None outside of any call.
_reported: ContextVar[set[Hashable] | None] = ContextVar("reported", default=None)
# True while a function is traced for its shapes only.
_silenced: ContextVar[bool] = ContextVar("silenced", default=False)
# The line of user code around the equation that a rule evaluates.
_fallback: ContextVar[Location | None] = ContextVar("fallback", default=None)
# The lists of the open contexts of `collect_reports` and `record_materializations`.
_collections: ContextVar[tuple[list[Report], ...]] = ContextVar("collections", default=())
_recordings: ContextVar[tuple[list[Materialization], ...]] = ContextVar("recordings", default=())
# What Python's "default" filter keeps of the warnings it has shown; Python clears it when filters change.
_warning_registry: dict[Any, Any] = {}
# Code in these folders is never the user's.
_LIBRARY_FOLDERS = tuple(
    f"{Path(module.__file__).parent}{os.sep}" for module in (jax, sys.modules[__package__]) if module.__file__
)


@contextmanager
def report_each_location_once() -> Iterator[None]:
    """Report every location once until the outermost of these contexts is left."""
    if _reported.get() is not None:
        yield
        return
    token = _reported.set(set())
    try:
        yield
    finally:
        _reported.reset(token)


@contextmanager
def no_reports() -> Iterator[None]:
    """Report nothing while the context is open: for tracing that only asks for a shape."""
    token = _silenced.set(True)
    try:
        yield
    finally:
        _silenced.reset(token)


@contextmanager
def fallback_location(location: Location | None) -> Iterator[None]:
    """Report operations that have no line of user code, as JAX's own functions have none, at `location`."""
    token = _fallback.set(location if _is_user_code(location) else _fallback.get())
    try:
        yield
    finally:
        _fallback.reset(token)


@contextmanager
def record_materializations() -> Iterator[list[Materialization]]:
    """Record what is materialized while the context is open, silenced classes included.

    Arrays are materialized during tracing: a function that `jax.jit` has compiled before records nothing.

    Yields:
        A list that fills with one `Materialization` per location, shape and dtype.
    """
    records: list[Materialization] = []
    token = _recordings.set((*_recordings.get(), records))
    try:
        yield records
    finally:
        _recordings.reset(token)


@contextmanager
def collect_reports(reports: list[Report]) -> Iterator[None]:
    """Append all reports to `reports` while the context is open, silenced ones too, for `repeat_reports`."""
    token = _collections.set((*_collections.get(), reports))
    try:
        yield
    finally:
        _collections.reset(token)


def report(primitive: str, value: ImplicitValue, location: Location | None) -> None:
    """Record the materialization of `value` by `primitive`, and warn of it."""
    if location is None or not _is_user_code(location):
        location = _fallback.get() or _calling_line()
    materialization = Materialization(
        primitive, type(value).__name__, tuple(value.shape), value.dtype, location.file, location.line
    )
    _emit(Report(materialization, value.warn_on_materialize))


def repeat_reports(reports: list[Report]) -> None:
    """Repeat what was collected when a function was traced, for a call of it that does not trace again."""
    for collected in list(reports):  # the list may grow: repeating adds to the collections that are open
        _emit(collected)


def _emit(new: Report) -> None:
    for reports in _collections.get():
        if new not in reports:
            reports.append(new)
    if _silenced.get():
        return
    record = new.materialization
    if _first_time(record):
        for records in _recordings.get():
            records.append(record)
    # Shapes are not part of this key: one warning for a line is enough.
    if new.warn and _first_time((record.primitive, record.array_type, record.file, record.line)):
        _warn(record)


def _first_time(key: Hashable) -> bool:
    reported = _reported.get()
    if reported is None:
        return True
    if key in reported:
        return False
    reported.add(key)
    return True


def _warn(record: Materialization) -> None:
    message = (
        f"{record.array_type} has no handler for the primitive {record.primitive!r} here, so it is "
        f"materialized: the whole array is decoded. Rewrite this line if that costs too much. The author of "
        f"the class may register a handler with primitive_handler({record.primitive!r}), or declare the "
        f"class with warn_on_materialize=False."
    )
    # Not warnings.warn: the line is where the program was traced, which may no longer be on the stack.
    warnings.warn_explicit(message, MaterializeWarning, record.file, record.line, registry=_warning_registry)


def _is_user_code(location: Location | None) -> bool:
    return location is not None and not location.file.startswith(_LIBRARY_FOLDERS)


def _calling_line() -> Location:
    """Return the innermost line of code on the stack that is neither JAX's nor this package's."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARY_FOLDERS):
        frame = frame.f_back
    if frame is None:
        return Location("<unknown>", 0)
    return Location(frame.f_code.co_filename, frame.f_lineno)


def no_record_with_qax() -> Any:
    """Raise: stands in for `record_materializations` where the names of `qpaged.implicit` are qax's."""
    raise NotImplementedError(
        "record_materializations: qax says what it materializes in UserWarnings only. Collect those with "
        "warnings.catch_warnings(record=True), or use a JAX on which qpaged brings its own implementation: "
        'pip install -U "jax>=0.10.2"'
    )
