"""What gets materialized: the warnings, and a record for tools that want to list it."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.extend

Place = tuple[str, int]  # file, line


class MaterializeWarning(UserWarning):
    """An implicit array was turned into a dense one, because nothing handles what was done with it.

    Issued once per place (primitive, class and line of code) in one call of a function decorated with
    `use_implicit_args`; Python's own warning filters decide about the calls after that. A class
    declared with `warn_on_materialize=False` is never warned about.
    """


@dataclass(frozen=True)
class Materialization:
    """One implicit operand that was materialized: by which primitive, and where in the code."""

    primitive: str
    array_type: str
    shape: tuple[int, ...]
    dtype: Any
    file: str
    line: int


Note = tuple[Materialization, bool]  # and whether to warn of it

# Set within one outermost call: what has been reported already. None outside of any call.
_reported: ContextVar[set[Any] | None] = ContextVar("reported", default=None)
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
_around: ContextVar[Place | None] = ContextVar("around", default=None)
_collections: ContextVar[tuple[list[Note], ...]] = ContextVar("collections", default=())
_recordings: ContextVar[tuple[list[Materialization], ...]] = ContextVar("recordings", default=())
# Python's bookkeeping of what its "default" action has shown; it is cleared when filters change.
_shown: dict[Any, Any] = {}
_OWN_FOLDERS = tuple(
    f"{Path(module.__file__).parent}{os.sep}" for module in (jax, sys.modules[__package__]) if module.__file__
)


@contextmanager
def one_call() -> Iterator[None]:
    """Report every place once until the outermost of these contexts is left."""
    token = _reported.set(set()) if _reported.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _reported.reset(token)


@contextmanager
def silence() -> Iterator[None]:
    """Report nothing: for tracing that only asks for a shape."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


@contextmanager
def inside(place: Place | None) -> Iterator[None]:
    """Report what has no line of its own, as JAX's own functions have none, at that of the call around it."""
    token = _around.set(place if _is_of_user(place) else _around.get())
    try:
        yield
    finally:
        _around.reset(token)


@contextmanager
def record_materializations() -> Iterator[list[Materialization]]:
    """Collect what is materialized while the context is open, silenced classes included.

    Tracing is what materializes: a function that `jax.jit` has compiled before records nothing.

    Yields:
        A list that fills with one `Materialization` per place, shape and dtype.
    """
    records: list[Materialization] = []
    token = _recordings.set((*_recordings.get(), records))
    try:
        yield records
    finally:
        _recordings.reset(token)


def report(primitive: str, value: Any, place: Place | None) -> None:
    """Record, and warn of, the materialization of `value` by `primitive`."""
    file, line = (place if _is_of_user(place) else _around.get()) or _caller()
    record = Materialization(primitive, type(value).__name__, tuple(value.shape), value.dtype, file, line)
    _take(record, value.warn_on_materialize)


def repeat(notes: list[Note]) -> None:
    """Report again what was collected when a function was traced, now that it is called without tracing."""
    for record, warn in list(notes):
        _take(record, warn)


@contextmanager
def collect(notes: list[Note]) -> Iterator[None]:
    """Keep everything reported while the context is open, for `repeat`."""
    token = _collections.set((*_collections.get(), notes))
    try:
        yield
    finally:
        _collections.reset(token)


def _take(record: Materialization, warn: bool) -> None:
    for notes in _collections.get():
        if (record, warn) not in notes:
            notes.append((record, warn))
    if _quiet.get():
        return
    if _first_time(record):
        for records in _recordings.get():
            records.append(record)
    place = (record.primitive, record.array_type, record.file, record.line)
    if warn and _first_time(place):
        _warn(record)


def _is_of_user(place: Place | None) -> bool:
    return place is not None and not place[0].startswith(_OWN_FOLDERS)


def _first_time(key: Any) -> bool:
    seen = _reported.get()
    if seen is None:
        return True
    fresh = key not in seen
    seen.add(key)
    return fresh


def _warn(record: Materialization) -> None:
    message = (
        f"{record.array_type} has no handler for the primitive {record.primitive!r}, so it is materialized. "
        f"Register one with primitive_handler({record.primitive!r}), or declare the class with "
        f"warn_on_materialize=False."
    )
    warnings.warn_explicit(message, MaterializeWarning, record.file, record.line, registry=_shown)


def _caller() -> Place:
    """The innermost line of code on the stack that is neither JAX's nor this package's."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_OWN_FOLDERS):
        frame = frame.f_back
    return (frame.f_code.co_filename, frame.f_lineno) if frame else ("<unknown>", 0)


def no_record_with_qax() -> Any:
    """Stands in for `record_materializations` where the names of `qpaged.implicit` are qax's."""
    raise NotImplementedError(
        "record_materializations: qax says what it materializes in UserWarnings only. Collect those with "
        "warnings.catch_warnings(record=True), or use a JAX on which qpaged brings its own implementation: "
        'pip install -U "jax>=0.10.2"'
    )
