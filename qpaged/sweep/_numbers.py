"""Formats numbers for readers, with as many digits as their standard errors allow."""

from collections.abc import Callable

PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"

NumberFormat = Callable[[float, float | None], str]
"""number_format(value, standard_error) returns ``value`` or ``value ± standard error`` as text."""

# Powers of ten below this one are written with an exponent: 0.0046, but 7.3e-5.
SMALLEST_PLAIN_POWER = -3


def small(value: float, error: float | None = None) -> str:
    """Return a number with two digits, or more where its error is finer: 0.0046 ± 0.0003, 7.3e-5 ± 0.6e-5."""
    power = _power_of_ten(value)
    scale, suffix, decimals = 1.0, "", max(0, 1 - power)
    if power < SMALLEST_PLAIN_POWER:
        scale, suffix, decimals = 10.0**power, f"e{power}", 1
    if error:
        decimals = max(decimals, -_power_of_ten(error / scale))
    if value == 0:
        decimals = min(decimals, 3)
    numbers = [value]
    if error is not None:
        numbers.append(error)
    texts = [f"{number / scale:.{decimals}f}{suffix}" if number else "0" for number in numbers]
    return _with_error(*texts)


def scientific_excess(value: float, error: float | None = None) -> str:
    """Return how much a ratio exceeds 1, with its sign: +2.3e-02 ± 2e-03."""
    if value == 1 and not error:
        return "0"
    if error is None:
        return f"{value - 1:+.1e}"
    return _with_error(f"{value - 1:+.1e}", f"{error:.0e}")


def percent(value: float, error: float | None = None) -> str:
    """Return a share in percent: 99.66 % ± 0.05."""
    if error is None:
        return f"{100 * value:.2f} %"
    return _with_error(f"{100 * value:.2f} %", f"{100 * error:.2f}")


def whole_percent(value: float, error: float | None = None) -> str:
    """Return a share of few things in percent: 95 % ± 5."""
    if error is None:
        return f"{100 * value:.0f} %"
    return _with_error(f"{100 * value:.0f} %", f"{100 * error:.0f}")


def fixed(decimals: int, scale: float = 1.0, unit: str = "") -> NumberFormat:
    """Return a format with so many decimals, for values that are multiplied by ``scale`` first."""

    def number_format(value: float, error: float | None = None) -> str:
        text = f"{value * scale:,.{decimals}f}{unit}"
        if error is None:
            return text
        return _with_error(text, f"{error * scale:,.{decimals}f}")

    return number_format


def millions(count: int) -> str:
    """Return a count in millions, as '2.4 M' for 2_400_000; counts below 100,000 are written out."""
    if count < 1e5:
        return f"{count:,}"
    return f"{count / 1e6:.1f} M"


def rough_duration(seconds: float) -> str:
    """Return a duration as people say it: '40 s', '3 min', '2.5 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _with_error(value: str, error: str | None = None) -> str:
    if error is None:
        return value
    return f"{value} {PLUS_MINUS} {error}"


def _power_of_ten(value: float) -> int:
    """Return the exponent of a number in scientific notation, after it is rounded to two digits."""
    return int(f"{value:.1e}".partition("e")[2])
