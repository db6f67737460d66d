"""A format for each layer, keys and values apart: the best within a budget, by measured sensitivities."""

import collections
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from qpaged.quantizer import CacheFormat
from qpaged.sweep._formats import fitting
from qpaged.sweep._number import small
from qpaged.sweep._reading import tied
from qpaged.sweep._result import run_of, run_record
from qpaged.sweep._run import PLAIN, Bench, Failure, Report, Run, Sweep, identity, spellings
from qpaged.sweep._text import Sequences

CANDIDATES = (
    "int8:token+offset", "int8:token", "int8", "int8:channel+offset",
    "int4+offset+rotate", "int4+rotate", "int4:token+rotate", "int4:channel+offset",
    "int2+offset+rotate", "int2+offset", "int2+rotate",
)  # fmt: skip
"""What is chosen from if nothing else is said."""

SIDES = ("keys", "values")
FINEST = 2**14
"""Bits are counted exactly in parts, unless these would be finer: then in :data:`COARSE` ones, rounded up."""
COARSE = 256
ROUNDS = 4
"""How often a choice is made, at most: after one that misses the bound on KL, for a tighter bound."""
PAIRS = 3
"""How many formats with keys and values apart, the same in all layers, a choice is compared with."""
CALIBRATION = 4
"""One sequence in so many tells the sensitivities; the others verify."""

Choice: TypeAlias = tuple[tuple[int, int], ...]
"""For each layer the candidates of its keys and of its values."""


@dataclass(frozen=True)
class Budget:
    """What a choice must keep.

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
            raise ValueError("bits or max_kl must be given, or both, as in --bits 5 --max-kl 0.01.")
        for name in ("bits", "max_kl"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, but came as {value}.")

    def kept_by(self, run: Run) -> bool:
        """Whether a measured run keeps it."""
        small = self.bits is None or run.bits_per_element <= self.bits
        return small and (self.max_kl is None or run.accuracy.kl_mean <= self.max_kl)

    def __str__(self) -> str:
        bits = [] if self.bits is None else [f"{self.bits:g} bits per element"]
        return " and ".join(bits + ([] if self.max_kl is None else [f"a mean KL of {self.max_kl:g}"]))


class UnattainableError(ValueError):
    """No choice among the candidates keeps the budget; the message says what comes nearest."""


@dataclass(frozen=True)
class Tuned:
    """A choice, verified end to end.

    Attributes:
        format: the choice.
        runs: the plain cache, the uniform formats, and last the choice.
        failures: candidates that could not be measured.
        candidates: the others, as they were given.
        sensitivity: (layers, 2, candidates): mean KL if only the keys, or only the values, of one layer are
            stored in a candidate; nats a token.
        predicted: the sum of the sensitivities of what was chosen; None where no sum promised to keep the
            budget, and the choice is the best uniform format.
        best_uniform: the best of the uniform runs that keep the budget; None if none does.
        better: whether the choice beats that, by more than twice the standard error of the difference.
    """

    format: CacheFormat
    runs: tuple[Run, ...]
    failures: tuple[Failure, ...]
    candidates: tuple[str, ...]
    sensitivity: np.ndarray
    predicted: float | None
    best_uniform: Run | None
    better: bool
    budget: Budget

    @property
    def verdict(self) -> str:
        """Whether to take the choice, in words."""
        choice, uniform = (run and _told(run) for run in (self.runs[-1], self.best_uniform))
        if self.best_uniform is None:
            return f"By layer: {choice}. No format that is the same in all layers keeps {self.budget}."
        name = self.best_uniform.format
        if self.better:
            return f"By layer: {choice}. The best that is the same in all layers, {name}: {uniform}."
        return f"{name} in all layers does as well: {uniform}; by layer: {choice}. Take the simpler one."

    @property
    def record(self) -> dict[str, Any]:
        """As it stands in ``results.json``."""
        return {
            "bits": self.budget.bits,
            "max_kl": self.budget.max_kl,
            "choice": self.runs[-1].format,
            "predicted_kl": self.predicted,
            "best_uniform": self.best_uniform and self.best_uniform.format,
            "better": self.better,
            "verdict": self.verdict,
            "candidates": list(self.candidates),
            "sensitivity": {side: self.sensitivity[:, i].tolist() for i, side in enumerate(SIDES)},
            "layers": spellings(self.format, len(self.sensitivity)),
        }


class Journal:
    """What was measured, in a file, so that a rerun need not measure it again.

    Args:
        path: of the file; what it holds of other conditions is dropped.
        conditions: JSON values that the measurements hang on.
        fresh: whether what it holds is dropped in any case.
    """

    def __init__(self, path: Path, conditions: Any, fresh: bool = False):
        self.path = path
        self._record = {"conditions": json.loads(json.dumps(conditions)), "values": {}}
        if fresh:
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["conditions"] == self._record["conditions"] and isinstance(found["values"], dict):
                self._record = found
        except (OSError, ValueError, KeyError, TypeError):
            pass  # a search may always be started anew

    def get(self, key: str) -> Any:
        """What was kept under ``key``; None if nothing was."""
        return self._record["values"].get(key)

    def keep(self, key: str, value: Any) -> None:
        """Write a JSON value, whole or not at all."""
        self._record["values"][key] = value
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        partial.write_text(json.dumps(self._record), encoding="utf-8")
        partial.replace(self.path)


@dataclass(frozen=True)
class Tune:
    """A search to be run.

    Attributes:
        sweep: the model, the text, and the candidates as formats: one quantizer each, for keys and values
            alike.
        budget: what the choice must keep.
        name: of the choice, among the runs.

    Raises:
        ValueError: a candidate with a slash or with layers of its own; a text of a single sequence; a model
            whose layers share an array.
    """

    sweep: Sweep
    budget: Budget
    name: str

    def __post_init__(self) -> None:
        if self.sweep.model.layers is None:
            raise ValueError(
                f"{self.sweep.model.name} must have an array for each layer, so that layers can differ in "
                f"format, but holds several in one."
            )
        if len(self.sweep.sequences.tokens) < 2:
            raise ValueError(
                "the text must hold two sequences at least, one to choose by and one to verify with, but "
                "holds one; give a longer text or more tokens, or a smaller context."
            )
        if not self.candidates or any(CacheFormat.of(format) == PLAIN for format in self.sweep.formats):
            raise ValueError(
                f"formats must be other than plain, but came as {', '.join(self.sweep.formats)}."
            )
        if self.name in self.candidates:
            raise ValueError(f"--out must have another name than {self.name}, which is one of the formats.")
        for spelling, format in self.candidates.items():
            if format.layers or format.key != format.value:
                raise ValueError(
                    f"each of the formats must be one for keys and values alike, but {spelling!r} came."
                )

    @cached_property
    def candidates(self) -> dict[str, CacheFormat]:
        """By spelling."""
        return {spelling: format for spelling, format in self.sweep.order if format != PLAIN}

    @property
    def layers(self) -> int:
        return self.sweep.model.layers or 0

    @cached_property
    def parts(self) -> tuple[Sequences, Sequences]:
        """The sequences that tell the sensitivities, and those that verify."""
        return self.sweep.sequences.split(CALIBRATION)

    @property
    def tokens(self) -> int:
        """Tokens that are predicted in one round of verification."""
        choose, verify = (part.bytes.size for part in self.parts)
        count = len(self.candidates)
        return (1 + 2 * self.layers * count) * choose + (2 + count + PAIRS) * verify

    def run(self, journal: Journal, report: Report = lambda format, tokens: None) -> Tuned:
        """Measure, choose and verify.

        Raises:
            UnattainableError: no choice keeps the budget.
        """
        verify = _Verifier(self, journal, report)
        verify(*self.sweep.order[0])
        failures = []
        for spelling, format in self.candidates.items():
            try:
                verify(spelling, format)
            except Exception as error:  # a plugin's own; the others are still worth having
                failures.append(Failure(spelling, " ".join(f"{type(error).__name__}: {error}".split())))
        names = tuple(spelling for spelling in self.candidates if spelling in verify.runs)
        if not names:
            raise UnattainableError(f"none of the formats can be measured; the first: {failures[0].error}")
        bits = np.array([verify.runs[name].bits_per_element for name in names])
        if self.budget.bits is not None:  # before the long part
            choose(bits, np.zeros((1, 2, len(bits))), self.budget.bits, math.inf)
        sensitivity = self._sensitivity(names, journal, report)
        for pair in self._pairs(bits, sensitivity):
            key, value = (self.candidates[names[i]].key for i in pair)
            verify("/".join(names[i] for i in pair), CacheFormat(key, value))
        uniform = [run for run in list(verify.runs.values())[1:] if self.budget.kept_by(run)]
        best = min(uniform, key=self._badness, default=None)
        try:
            choice, predicted = self._search(names, bits, sensitivity, verify)
        except UnattainableError:
            if best is None:
                raise
            choice, predicted = verify.formats[best.format], math.nan
            verify(self.name, choice)
        return Tuned(
            format=choice,
            runs=tuple(verify.runs.values()),
            failures=tuple(failures),
            candidates=names,
            sensitivity=sensitivity,
            predicted=None if math.isnan(predicted) else predicted,
            best_uniform=best,
            better=best is None or self._beats(verify.runs[self.name], best),
            budget=self.budget,
        )

    def _sensitivity(self, names: Sequence[str], journal: Journal, report: Report) -> np.ndarray:
        """(layers, 2, candidates): KL if one side of one layer is stored in a candidate, all else plain."""
        found = np.empty((self.layers, len(SIDES), len(names)))
        settings = dataclasses.replace(self.sweep.settings, dtype="float32")  # the rest stays exact
        bench = None
        for layer, side, candidate in np.ndindex(*found.shape):
            what = f"layer {layer}, {SIDES[side]}: {names[candidate]}"
            key = f"layer {layer}, {SIDES[side]}: {identity(self.candidates[names[candidate]])}"
            kl = journal.get(key)
            if kl is None:
                bench = bench or Bench(self.sweep.model, self.parts[0], settings, "plain", report)
                quantizer = self.candidates[names[candidate]].key
                pair = CacheFormat(key=quantizer) if side == 0 else CacheFormat(value=quantizer)
                kl = bench.accuracy(what, PLAIN.with_layers({layer: pair})).kl_mean
                journal.keep(key, kl)
            found[layer, side, candidate] = kl
        return found

    def _pairs(self, bits: np.ndarray, sensitivity: np.ndarray) -> list[tuple[int, int]]:
        """The :data:`PAIRS` candidates for keys and for values, unlike, that promise most in the budget."""
        kl = sensitivity.sum(axis=0)
        pairs = list(itertools.permutations(range(len(bits)), 2))
        size = {pair: bits[list(pair)].mean() for pair in pairs}
        promise = {pair: kl[0, pair[0]] + kl[1, pair[1]] for pair in pairs}
        if self.budget.bits is not None:
            fit = [pair for pair in pairs if size[pair] <= self.budget.bits]
            return sorted(fit, key=promise.__getitem__)[:PAIRS]
        return sorted((pair for pair in pairs if promise[pair] <= self.budget.max_kl), key=size.__getitem__)[
            :PAIRS
        ]

    def _search(
        self, names: Sequence[str], bits: np.ndarray, sensitivity: np.ndarray, verify: "_Verifier"
    ) -> tuple[CacheFormat, float]:
        """The best choice that keeps the budget when it is measured, and the KL that was expected of it."""
        room, bound = self.budget.bits or math.inf, self.budget.max_kl or math.inf
        for _ in range(ROUNDS):
            try:
                choice, expected = choose(bits, sensitivity, room, bound)
            except UnattainableError:
                if bound == (self.budget.max_kl or math.inf):
                    raise
                break  # the bound was tightened beyond what there is
            format = self._format(names, choice)
            run = verify(self.name, format)
            if self.budget.max_kl is None or run.accuracy.kl_mean <= self.budget.max_kl:
                return format, expected
            bound *= 0.95 * self.budget.max_kl / run.accuracy.kl_mean
        raise UnattainableError(
            f"no choice that was measured keeps {self.budget}: the last has KL {run.accuracy.kl_mean:.2g} "
            f"at {run.bits_per_element:.2f} bits per element; allow more KL, or give more accurate formats."
        )

    def _format(self, names: Sequence[str], choice: Choice) -> CacheFormat:
        """The cache format of a choice: what is commonest, and the layers that differ from it."""
        quantizers = [self.candidates[name].key for name in names]
        pairs = [CacheFormat(quantizers[key], quantizers[value]) for key, value in choice]
        common, _ = collections.Counter(pairs).most_common(1)[0]
        return common.with_layers({layer: pair for layer, pair in enumerate(pairs) if pair != common})

    def _badness(self, run: Run) -> tuple[float, float]:
        """What is to be small: KL within bounded bits, bits within a bounded KL."""
        both = run.accuracy.kl_mean, run.bits_per_element
        return both if self.budget.max_kl is None else both[::-1]

    def _beats(self, choice: Run, uniform: Run) -> bool:
        """Whether the choice is better, beyond doubt where KL decides."""
        if self.budget.max_kl is not None:
            return choice.bits_per_element < uniform.bits_per_element
        same = tied(vars(choice.accuracy), vars(uniform.accuracy))
        return not same and choice.accuracy.kl_mean < uniform.accuracy.kl_mean


class _Verifier:
    """Measures formats on the sequences that verify; what the journal holds is not measured again."""

    def __init__(self, tune: Tune, journal: Journal, report: Report):
        self.runs: dict[str, Run] = {}
        self.formats: dict[str, CacheFormat] = {}
        self._tune, self._journal, self._report = tune, journal, report

    @cached_property
    def _bench(self) -> Bench:
        sweep = self._tune.sweep
        return Bench(sweep.model, self._tune.parts[1], sweep.settings, sweep.order[0][0], self._report)

    def __call__(self, spelling: str, format: CacheFormat) -> Run:
        key, self.formats[spelling] = f"run: {identity(format)}", format
        record = self._journal.get(key)
        run = self._bench.measure(spelling, format) if record is None else run_of(record)
        self._journal.keep(key, run_record(run))
        self.runs[spelling] = dataclasses.replace(run, format=spelling)
        return self.runs[spelling]


def choose(
    bits: np.ndarray, sensitivity: np.ndarray, most_bits: float, most_kl: float
) -> tuple[Choice, float]:
    """The choice with the least sum of sensitivities within ``most_bits``.

    Where ``most_kl`` is finite, the one of the fewest bits that keeps both.

    Args:
        bits: (candidates,) bits per element.
        sensitivity: (layers, 2, candidates).

    Returns:
        The choice, and its sum of sensitivities.

    Raises:
        UnattainableError: there is none.
    """
    layers, sides, count = sensitivity.shape
    items = sensitivity.reshape(layers * sides, count)
    exact = [Fraction(each).limit_denominator(FINEST) for each in bits.tolist()]
    grid = math.lcm(*(each.denominator for each in exact))
    grid = grid if grid <= FINEST else COARSE
    cost = np.array([math.ceil(each * grid) for each in exact])
    spare = cost - cost.min()  # what a candidate costs beyond the cheapest
    room = len(items) * spare.max()
    if most_bits < math.inf:
        room = min(room, math.floor(most_bits * grid * len(items) + 1e-6) - len(items) * cost.min())
    if room < 0:
        raise UnattainableError(
            f"bits must be at least {bits.min():.3f}, which the smallest of the formats takes, "
            f"but came as {most_bits:g}."
        )
    least = np.zeros(room + 1)  # least[c]: the least sum within a cost of c beyond the cheapest
    picks = np.empty((len(items), room + 1), np.int16)
    for item, kl in enumerate(items):
        options = np.full((count, room + 1), np.inf)
        for candidate in np.flatnonzero(spare <= room):
            options[candidate, spare[candidate] :] = least[: room + 1 - spare[candidate]] + kl[candidate]
        picks[item], least = options.argmin(axis=0), options.min(axis=0)
    within = np.flatnonzero(least <= most_kl)
    if not len(within):
        raise UnattainableError(
            f"max_kl must be at least about {least[-1]:.2g}, the least that the formats promise"
            + (f" within {most_bits:g} bits" if most_bits < math.inf else "")
            + f", but {most_kl:.2g} was looked for; allow more, or give more accurate formats."
        )
    at = room if most_kl == math.inf else within[0]
    found = []
    for item in reversed(range(len(items))):
        found.append(int(picks[item, at]))
        at -= spare[found[-1]]
    found.reverse()
    total = sum(kl[pick] for kl, pick in zip(items, found, strict=True))
    return tuple(zip(found[0::2], found[1::2], strict=True)), float(total)


def default_candidates(head_dim: int) -> list[str]:
    """Those of :data:`CANDIDATES` that go with a head_dim."""
    return fitting(CANDIDATES, head_dim)[0]


def _told(run: Run) -> str:
    return f"KL {small(run.accuracy.kl_mean, run.accuracy.kl_mean_se)} at {run.bits_per_element:.2f} bits"
