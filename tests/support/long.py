"""Parameters whose tests are long: the test line leaves them out, and a lane of CI runs them."""

import pytest


def first_short(count, values):
    """Return the values as parameters, of which those after the first ``count`` are long tests."""
    values = list(values)
    return [*values[:count], *(pytest.param(value, marks=pytest.mark.long) for value in values[count:])]
