"""Numbers as people read them, with as many digits as their error bars allow."""

PLUS_MINUS = "\N{PLUS-MINUS SIGN}"


def small(value: float, error: float | None = None) -> str:
    """Two digits, more where the error is finer: 0.0046 ± 0.0003; 7.3e-5 ± 0.6e-5 below a thousandth."""
    power = _power(value)
    scale, suffix = (10.0**power, f"e{power}") if power < -3 else (1.0, "")
    decimals = max(0, 1 - (0 if suffix else power))
    if error:
        decimals = max(decimals, -_power(error / scale))
    if value == 0:
        decimals = min(decimals, 3)
    parts = [value] if error is None else [value, error]
    return f" {PLUS_MINUS} ".join(f"{part / scale:.{decimals}f}{suffix}" if part else "0" for part in parts)


def percent(value: float, error: float | None = None) -> str:
    """Of a share: 99.66 % ± 0.05."""
    return f"{100 * value:.2f} %" + ("" if error is None else f" {PLUS_MINUS} {100 * error:.2f}")


def millions(count: int) -> str:
    """2_400_000 as '2.4 M'."""
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"


def _power(value: float) -> int:
    """Of ten, in scientific notation with two digits."""
    return int(f"{value:.1e}".partition("e")[2])
