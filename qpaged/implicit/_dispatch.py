"""Which handler answers for a primitive: multiple dispatch on the annotations of its arguments."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from qpaged import _compat
from qpaged.implicit._value import is_implicit

Handler = Callable[..., Any]
Types = tuple[type, ...]  # the alternatives of one annotation

_ANYTHING: Types = (object,)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class _Candidate:
    """One registered handler: what it accepts, in order, and what it accepts of further arguments."""

    function: Handler
    required: int
    positions: tuple[Types, ...]
    rest: Types | None
    keywords: frozenset[str] | None  # None where it takes **params
    precedence: int

    def types_at(self, index: int) -> Types:
        return self.positions[index] if index < len(self.positions) else self.rest or ()

    def accepts(self, classes: Sequence[type]) -> bool:
        if len(classes) < self.required or (self.rest is None and len(classes) > len(self.positions)):
            return False
        return all(issubclass(cls, self.types_at(index)) for index, cls in enumerate(classes))

    def narrower(self, other: _Candidate, arity: int) -> bool:
        """Whether everything this accepts at `arity` arguments, the other accepts too."""
        return all(
            all(issubclass(cls, other.types_at(index)) for cls in self.types_at(index))
            for index in range(arity)
        )

    @property
    def signature(self) -> tuple[Any, ...]:
        return self.required, self.positions, self.rest, self.precedence

    @property
    def described(self) -> str:
        code = inspect.unwrap(self.function)
        line = getattr(getattr(code, "__code__", None), "co_firstlineno", "?")
        return f"{code.__module__}.{getattr(code, '__qualname__', code)} (line {line})"


class Handlers:
    """The handlers that programs have registered. `version` changes with every registration."""

    def __init__(self) -> None:
        self._candidates: dict[Any, list[_Candidate]] = {}
        self.version = 0

    def register(self, primitive: Any, candidate: _Candidate) -> None:
        # A signature registered again replaces the former handler, as when a notebook cell is run twice.
        kept = [c for c in self._candidates.get(primitive, ()) if c.signature != candidate.signature]
        self._candidates[primitive] = [*kept, candidate]
        self.version += 1

    def find(self, primitive: Any, values: Sequence[Any]) -> _Candidate | None:
        """The most specific handler for these values, of those the one with the highest precedence.

        Raises:
            TypeError: two handlers fit equally well.
        """
        classes = [type(value) if is_implicit(value) else jax.Array for value in values]
        fitting = [c for c in self._candidates.get(primitive, ()) if c.accepts(classes)]
        best = [c for c in fitting if not any(_beats(other, c, len(classes)) for other in fitting)]
        top = [c for c in best if c.precedence == max(c.precedence for c in best)]
        if len(top) > 1:
            raise _ambiguous(primitive, classes, top)
        return top[0] if top else None


def _beats(left: _Candidate, right: _Candidate, arity: int) -> bool:
    return left.narrower(right, arity) and not right.narrower(left, arity)


def _ambiguous(primitive: Any, classes: Sequence[type], candidates: Sequence[_Candidate]) -> TypeError:
    names = ", ".join(cls.__name__ for cls in classes)
    tied = " and ".join(c.described for c in candidates)
    return TypeError(
        f"primitive_handler: {tied} fit {primitive.name}({names}) equally well. Annotate one of them more "
        f"narrowly, register a handler for exactly these types, or give one a higher precedence."
    )


handlers = Handlers()


def primitive_handler(
    primitives: str | _compat.Primitive | Iterable[str | _compat.Primitive], precedence: int = 0
) -> Callable[[Handler], Handler]:
    """Register the decorated function as what a primitive means for certain implicit arrays.

    The function is called as `handler(primitive, *args, **params)`. Annotate the positional arguments
    it cares about with an `ImplicitArray` subclass, `ArrayValue` or `jax.Array` (traced values count),
    or a union of them; without an annotation anything fits. Of the handlers that fit, the most
    specific one is called, then the one with the highest precedence. It may return implicit arrays,
    or `NotImplemented` to have the default behaviour. Take `**params`: JAX adds parameters to its
    primitives over time. A handler without it is not given parameters it does not name that are None.

    Args:
        primitives: a primitive, its name in `jax.lax` without `_p`, or several of either.
        precedence: decides between handlers that are equally specific.

    Raises:
        ValueError: no primitive has that name.
        TypeError: an annotation is not one of the above.
    """
    several = [primitives] if isinstance(primitives, str | _compat.Primitive) else list(primitives)
    resolved = [_compat.primitive_named(p) if isinstance(p, str) else p for p in several]

    def register(function: Handler) -> Handler:
        candidate = _candidate(function, precedence)
        for primitive in resolved:
            handlers.register(primitive, candidate)
        return function

    return register


def call_handler(candidate: _Candidate, primitive: Any, values: Sequence[Any], params: dict[str, Any]) -> Any:
    """Call a handler, without the unused parameters that it was written too early to know."""
    names = candidate.keywords
    if names is not None:
        unknown = [name for name, value in params.items() if name not in names and value is not None]
        if unknown:
            raise TypeError(
                f"{candidate.described}: {primitive.name} was called with the parameter {unknown[0]!r} "
                f"({params[unknown[0]]!r}), which this handler does not take. Name it after the operands, "
                f"or add **params."
            )
        params = {name: value for name, value in params.items() if name in names}
    return candidate.function(primitive, *values, **params)


def _candidate(function: Handler, precedence: int) -> _Candidate:
    parameters = list(inspect.signature(function).parameters.values())
    hints = typing.get_type_hints(function)
    positional = [p for p in parameters if p.kind in _POSITIONAL]
    if not positional:
        raise TypeError(
            f"primitive_handler: {function!r} takes no positional arguments. The first argument of a handler "
            f"is the primitive, the others are its operands."
        )
    operands = positional[1:]
    rest = next((p for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return _Candidate(
        function=function,
        required=sum(p.default is p.empty for p in operands),
        positions=tuple(_types(function, p.name, hints.get(p.name, object)) for p in operands),
        rest=None if rest is None else _types(function, rest.name, hints.get(rest.name, object)),
        keywords=None if open_ended else frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY),
        precedence=precedence,
    )


def _types(function: Handler, argument: str, annotation: Any) -> Types:
    """The classes an annotation stands for."""
    if annotation is Any:
        return _ANYTHING
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _types(function, argument, typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return tuple(t for part in typing.get_args(annotation) for t in _types(function, argument, part))
    if isinstance(annotation, type) and origin is None:
        return (annotation,)
    raise TypeError(
        f"primitive_handler: argument {argument!r} of {function!r} is annotated with {annotation!r}. "
        f"Annotate it with an ImplicitArray subclass, ArrayValue, jax.Array, Any or a union of these."
    )
