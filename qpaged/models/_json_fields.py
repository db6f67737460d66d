"""Read fields of a JSON object, with errors that name the field and what came."""

from collections.abc import Mapping
from typing import Any

import numpy as np

Json = Mapping[str, Any]

# What is computed with is float32, so no more is taken, which float64 then multiplies without overflow.
LEAST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
LARGEST_INTEGER = 2**63 - 1


def read_object(fields: Json, name: str) -> Json:
    """Return the object in a field; an empty one if the field is missing or null."""
    value = fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be an object of fields, but came as {value!r}.")
    return value


def read_number(fields: Json, name: str) -> float:
    """Return the positive number in a field."""
    return _check_number(name, fields.get(name))


def read_numbers(fields: Json, name: str) -> tuple[float, ...]:
    """Return the list of positive numbers in a field."""
    values = fields.get(name)
    if not isinstance(values, list):
        raise ValueError(f"{name} must be a list of numbers, but came as {values!r}.")
    return tuple(_check_number(name, value) for value in values)


def _check_number(name: str, value: object) -> float:
    # True and False are ints to Python, but no numbers in JSON.
    if isinstance(value, int | float) and not isinstance(value, bool) and LEAST <= value <= LARGEST:
        return float(value)
    raise ValueError(f"{name} must be a positive number that float32 holds, but came as {value!r:.60}.")


def read_integer(fields: Json, name: str, minimum: int) -> int:
    """Return the whole number in a field."""
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= LARGEST_INTEGER:
        raise ValueError(
            f"{name} must be a whole number of at least {minimum} that 64 bits hold, but came as "
            f"{value!r:.60}."
        )
    return value


def read_flag(fields: Json, name: str) -> bool:
    """Return the boolean in a field."""
    value = fields.get(name)
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, but came as {value!r}.")
    return value
