"""The budget that a choice of formats must keep."""

import math
from dataclasses import dataclass

from qpaged._bad_argument import BadArgumentError
from qpaged.sweep.measure import Run


@dataclass(frozen=True)
class Budget:
    """Bounds on the bits and on the KL of a choice.

    Attributes:
        bits: bits per element of keys and values, scales included, at most; None for no bound.
        max_kl: mean KL to the plain cache, nats a token, at most; None for no bound.

    Raises:
        ValueError: neither is given, or one is not positive.
    """

    bits: float | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        if self.bits is None and self.max_kl is None:
            raise ValueError("--bits or --max-kl is needed, or both, as in --bits 5 --max-kl 0.01.")
        for name in ("bits", "max_kl"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise BadArgumentError(name, f"must be positive and finite, but came as {value:g}.")

    @property
    def bits_or_inf(self) -> float:
        """The bound on bits; infinite if there is none."""
        return math.inf if self.bits is None else self.bits

    @property
    def max_kl_or_inf(self) -> float:
        """The bound on KL; infinite if there is none."""
        return math.inf if self.max_kl is None else self.max_kl

    def kept_by(self, run: Run) -> bool:
        """Return True if a measured run keeps the budget."""
        return run.bits_per_element <= self.bits_or_inf and run.kl_mean <= self.max_kl_or_inf

    def rank(self, run: Run) -> tuple[float, float]:
        """Return a key that sorts the best runs first: by bits where KL is bounded, else by KL."""
        if self.max_kl is None:
            return run.kl_mean, run.bits_per_element
        return run.bits_per_element, run.kl_mean

    def __str__(self) -> str:
        bounds = []
        if self.bits is not None:
            bounds.append(f"{self.bits:g} bits per element")
        if self.max_kl is not None:
            bounds.append(f"a mean KL of {self.max_kl:g}")
        return " and ".join(bounds)


class UnattainableError(BadArgumentError):
    """No choice among the candidates keeps the budget; the message says what comes nearest."""
