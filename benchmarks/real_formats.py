"""Schemes of other projects that ``real_models.py`` measures on qpaged's pages, beside its formats.

spiritbuun's fork of llama.cpp has a trellis for keys and values alike, of 256 states at 2 bits and of 512 at
3, whose values are a trained table: rotated, with one norm a token, and nothing exact. Here a row closes to a
ring and has a bfloat16 scale that follows from its norm, as in ``trellis2``.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from qpaged import CacheFormat, trellis_codes
from qpaged.arrays._trellis import unpacked_states
from quantizers import Rotate
from quantizers._trellis import OfTokens, States

LARGEST = 127
DEVIATION = 40.0


@functools.cache
def trained_table(bits: int, state_bits: int, rounds: int = 40) -> np.ndarray:
    """Return integers for states, (2^state_bits,), trained on gaussians of :data:`DEVIATION`.

    In each round a state takes the mean of the values that the best paths follow through it.
    """
    generator = np.random.default_rng(0)
    rows = DEVIATION * generator.normal(size=(1024, 128)).astype(np.float32)
    table = DEVIATION * generator.normal(size=2**state_bits)
    for _ in range(rounds):
        table = np.clip(np.round(table), -LARGEST, LARGEST).astype(np.int32)
        with jax.ensure_compile_time_eval():  # it may first be asked for while a program is traced
            codes = trellis_codes(rows, bits, state_bits, table)
            states = np.asarray(unpacked_states(codes, bits, state_bits, axis=-1)).ravel()
        count = np.bincount(states, minlength=len(table))
        total = np.bincount(states, rows.ravel(), len(table))
        table = np.where(count, total / np.maximum(count, 1), table)
    return np.clip(np.round(table), -LARGEST, LARGEST).astype(np.int32)


class Trained(OfTokens):
    """A trellis whose values are a trained table."""

    deviation: ClassVar[float] = DEVIATION

    def values(self, states: States) -> States:
        table = trained_table(self.bits, self.state_bits)
        return table[states] if isinstance(states, np.ndarray) else jnp.asarray(table)[states]


@dataclass(frozen=True)
class Trained2(Trained):
    """Of 256 states, at 2 bits."""

    name: ClassVar[str] = "trained2"
    bits: ClassVar[int] = 2
    state_bits: ClassVar[int] = 8
    stretch: ClassVar[float] = 1.065


@dataclass(frozen=True)
class Trained3(Trained):
    """Of 512 states, at 3 bits."""

    name: ClassVar[str] = "trained3"
    bits: ClassVar[int] = 3
    state_bits: ClassVar[int] = 9
    stretch: ClassVar[float] = 1.02


SCHEMES = {
    "trellis of 256 states at 2 bits": Rotate(inner=Trained2()),
    "trellis of 512 states at 3 bits": Rotate(inner=Trained3()),
}


def format_of(spelling: str) -> CacheFormat:
    """Return a scheme of another project by its name, or a format by its spelling."""
    scheme = SCHEMES.get(spelling)
    return CacheFormat.of(spelling) if scheme is None else CacheFormat(scheme, scheme)


def engine_of(spelling: str) -> str:
    """Return whose a format is."""
    return "spiritbuun's scheme" if spelling in SCHEMES else "qpaged"
