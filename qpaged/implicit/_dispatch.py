"""Multiple dispatch: which handler a primitive is given to, by the annotations of the handlers' arguments."""

from __future__ import annotations

import inspect
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax

from qpaged import _compat
from qpaged._compat import Operand, Params, Primitive
from qpaged.implicit._value import is_implicit

Function: TypeAlias = Callable[..., Any]
Classes: TypeAlias = tuple[type, ...]  # the alternatives that one annotation allows

_ANY_CLASS: Classes = (object,)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Handler:
    """A registered function with the classes of operands and the parameters that it accepts.

    Attributes:
        function: the function that was registered.
        required: number of operands without a default.
        operand_classes: for each positional operand, the classes that its annotation allows.
        variadic_classes: the same for the operands in *args; None without *args.
        keywords: names of the keyword-only arguments; None if the function takes **params.
        precedence: decides between handlers that are equally specific.
    """

    function: Function
    required: int
    operand_classes: tuple[Classes, ...]
    variadic_classes: Classes | None
    keywords: frozenset[str] | None
    precedence: int

    def classes_at(self, index: int) -> Classes:
        """Return the classes that the operand at `index` may have."""
        if index < len(self.operand_classes):
            return self.operand_classes[index]
        return self.variadic_classes or ()

    def accepts(self, classes: Sequence[type]) -> bool:
        """Return True if operands of these classes fit."""
        if len(classes) < self.required:
            return False
        if self.variadic_classes is None and len(classes) > len(self.operand_classes):
            return False
        return all(issubclass(cls, self.classes_at(index)) for index, cls in enumerate(classes))

    def is_within(self, other: Handler, arity: int) -> bool:
        """Return True if `other` accepts every `arity` operands that this handler accepts."""
        for index in range(arity):
            if not all(issubclass(cls, other.classes_at(index)) for cls in self.classes_at(index)):
                return False
        return True

    @property
    def signature(self) -> tuple[Any, ...]:
        """What makes two registrations the same handler."""
        return self.required, self.operand_classes, self.variadic_classes, self.precedence

    @property
    def description(self) -> str:
        """Module, name and line of the function, for error messages."""
        function = inspect.unwrap(self.function)
        name = getattr(function, "__qualname__", function)
        line = getattr(getattr(function, "__code__", None), "co_firstlineno", "?")
        return f"{function.__module__}.{name} (line {line})"


class HandlerRegistry:
    """The handlers that programs have registered. `version` changes with every registration."""

    def __init__(self) -> None:
        self._handlers: dict[Primitive, list[Handler]] = {}
        self.version = 0

    def register(self, primitive: Primitive, handler: Handler) -> None:
        """Add a handler; it replaces one of the same signature, as when a notebook cell is run twice."""
        former = self._handlers.get(primitive, ())
        kept = [other for other in former if other.signature != handler.signature]
        self._handlers[primitive] = [*kept, handler]
        self.version += 1

    def find(self, primitive: Primitive, operands: Sequence[Operand]) -> Handler | None:
        """Return the most specific handler for these operands, among equals that of the highest precedence.

        Raises:
            TypeError: two handlers fit equally well.
        """
        # Everything else counts as jax.Array, so that handlers need not know of tracers and literals.
        classes = [type(operand) if is_implicit(operand) else jax.Array for operand in operands]
        arity = len(classes)
        fitting = [h for h in self._handlers.get(primitive, ()) if h.accepts(classes)]
        if not fitting:
            return None
        best = [h for h in fitting if not any(_more_specific(other, h, arity) for other in fitting)]
        precedence = max(h.precedence for h in best)
        winners = [h for h in best if h.precedence == precedence]
        if len(winners) > 1:
            raise _ambiguous(primitive, classes, winners)
        return winners[0]


def _more_specific(left: Handler, right: Handler, arity: int) -> bool:
    return left.is_within(right, arity) and not right.is_within(left, arity)


def _ambiguous(primitive: Primitive, classes: Sequence[type], handlers: Sequence[Handler]) -> TypeError:
    names = ", ".join(cls.__name__ for cls in classes)
    tied = " and ".join(handler.description for handler in handlers)
    return TypeError(
        f"primitive_handler: {tied} fit {primitive.name}({names}) equally well. Annotate one of them more "
        f"narrowly, register a handler for exactly these types, or give one a higher precedence."
    )


registry = HandlerRegistry()  # of the process, as JAX's rules for primitives are


def primitive_handler(
    primitives: str | Primitive | Iterable[str | Primitive], precedence: int = 0
) -> Callable[[Function], Function]:
    """Register the decorated function as the meaning of a primitive for certain implicit arrays.

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
    if isinstance(primitives, str | Primitive):
        primitives = [primitives]
    resolved: list[Primitive] = []
    for primitive in primitives:
        if not isinstance(primitive, str):
            resolved.append(primitive)
        elif _compat.was_removed(primitive):
            warnings.warn(
                f"primitive_handler: this JAX has no primitive {primitive!r} any more, so the handler is "
                f"never called; handle the primitives that jax.lax.{primitive} is made of today.",
                stacklevel=2,
            )
        else:
            resolved.append(_compat.primitive_named(primitive))

    def register(function: Function) -> Function:
        handler = _handler(function, precedence)
        for primitive in resolved:
            registry.register(primitive, handler)
        return function

    return register


def call_handler(handler: Handler, primitive: Primitive, operands: Sequence[Operand], params: Params) -> Any:
    """Call a handler, without the unused parameters that JAX has added since it was written."""
    if handler.keywords is None:
        return handler.function(primitive, *operands, **params)
    for name, value in params.items():
        if name not in handler.keywords and value is not None:
            raise TypeError(
                f"{handler.description}: {primitive.name} was called with the parameter {name!r} "
                f"({value!r}), which this handler does not take. Name it after the operands, "
                f"or add **params."
            )
    accepted = {name: value for name, value in params.items() if name in handler.keywords}
    return handler.function(primitive, *operands, **accepted)


def _handler(function: Function, precedence: int) -> Handler:
    """Read the signature of a function that is registered as a handler."""
    parameters = list(inspect.signature(function).parameters.values())
    annotations = typing.get_type_hints(function)  # unlike __annotations__, never strings
    positional = [p for p in parameters if p.kind in _POSITIONAL]
    if not positional:
        raise TypeError(
            f"primitive_handler: {function!r} takes no positional arguments. The first argument of a handler "
            f"is the primitive, the others are its operands."
        )

    def classes_of(parameter: inspect.Parameter) -> Classes:
        return _classes(function, parameter.name, annotations.get(parameter.name, object))

    operands = positional[1:]
    variadic_classes = None
    keywords: frozenset[str] | None = frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            variadic_classes = classes_of(parameter)
        elif parameter.kind is parameter.VAR_KEYWORD:
            keywords = None
    return Handler(
        function=function,
        required=sum(operand.default is operand.empty for operand in operands),
        operand_classes=tuple(classes_of(operand) for operand in operands),
        variadic_classes=variadic_classes,
        keywords=keywords,
        precedence=precedence,
    )


def _classes(function: Function, argument: str, annotation: object) -> Classes:
    """Return the classes that an annotation stands for."""
    if annotation is Any:
        return _ANY_CLASS
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _classes(function, argument, typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        alternatives: Classes = ()
        for alternative in typing.get_args(annotation):
            alternatives += _classes(function, argument, alternative)
        return alternatives
    if isinstance(annotation, type) and origin is None:
        return (annotation,)
    raise TypeError(
        f"primitive_handler: argument {argument!r} of {function!r} is annotated with {annotation!r}. "
        f"Annotate it with an ImplicitArray subclass, ArrayValue, jax.Array, Any or a union of these."
    )
