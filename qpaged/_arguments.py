"""Checks of arguments, whose messages say which one, the rule, what came, and what to do."""

import math
import numbers
import operator
from types import UnionType

import jax
import jax.numpy as jnp

LONGEST = 60  # characters of a value in a message

MOST = 10_000  # layers, or experts of a layer


def shown(value: object) -> str:
    """Return a value as messages show it: in a few words."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = repr(value)
    return text if len(text) <= LONGEST and "\n" not in text else f"a {type(value).__name__}"


def check_type(name: str, value: object, kind: type | UnionType, rule: str, advice: str) -> None:
    """Raise TypeError unless ``value`` is of the ``kind``, which ``rule`` puts in words."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {rule}, but got {shown(value)}; {advice}.")


def whole_number(name: str, value: object) -> int:
    """Return ``value`` as an int, or raise TypeError if it is none."""
    try:
        if isinstance(value, bool):
            raise TypeError("True and False count nothing")
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:  # which says more of a traced value
        raise TypeError(f"{name} must be an integer, but came as {value!r}; give a whole number.") from error


def positive(name: str, value: object) -> int:
    """Return ``value`` as a positive int, or raise what is wrong with it."""
    number = whole_number(name, value)
    if number < 1:
        raise ValueError(f"{name} must be positive, but came as {number}; give at least 1.")
    return number


def check_count(name: str, count: int) -> None:
    """Raise ValueError for more layers or experts than any model has: to go over them would never end."""
    if count > MOST:
        raise ValueError(f"{name} must be at most {MOST:,}, but came as {count:,}.")


def byte_count(name: str, value: object) -> int:
    """Return a number of bytes as an int, or raise what is wrong with it."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if is_number and math.isfinite(value):  # type: ignore[arg-type]
        return int(value)  # type: ignore[call-overload]
    error = ValueError if is_number else TypeError
    raise error(f"{name} must be a number of bytes, but got {shown(value)}; 80 GiB are 80 * 2**30.")


def as_array(name: str, values: object) -> jax.Array:
    """Return ``values`` as an array, or raise TypeError if they are none."""
    try:
        if values is None:
            raise TypeError("older versions of JAX make NaN of None")
        return jnp.asarray(values)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be an array of floats, but got {shown(values)}; give a jax.Array, or what "
            f"jnp.asarray makes one of."
        ) from error
