"""The search for a format of each layer: measures sensitivities, solves, and verifies the choice."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qpaged._bad_argument import BadArgumentError
from qpaged._deprecated import renamed_argument
from qpaged.formats import CacheFormat
from qpaged.sweep._formats import bits_per_element
from qpaged.sweep.measure import PLAIN, Bench, Failure, Progress, Run, Sequences, Sweep, identity
from qpaged.sweep.results import is_number, tied
from qpaged.sweep.tune._budget import Budget, UnattainableError
from qpaged.sweep.tune._journal import Journal
from qpaged.sweep.tune._solver import Choice, choose, too_few_bits
from qpaged.sweep.tune._tuned import SIDES, Tuned
from qpaged.sweep.tune._verifier import Verifier

MAX_ROUNDS = 4
"""Choices that are verified, at most: after one that misses the bound on KL, the bound is tightened."""

PAIRS = 3
"""Uniform formats with keys and values apart that a choice is compared with."""

CALIBRATION = 4
"""One sequence in so many measures the sensitivities; the others verify."""


def _no_progress(spelling: str, tokens: int) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Tune:
    """A search to be run.

    Attributes:
        sweep: the model, the text, and the candidates as formats: each one quantizer for keys and values.
        budget: the bounds that the choice must keep.
        name: the name of the choice among the runs.

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
        tokens, context = self.sweep.settings.tokens, self.sweep.settings.context
        if tokens < 2 * context:
            raise BadArgumentError(
                "tokens",
                f"must be at least twice the context, {context:,}, but came as {tokens:,}: one sequence to "
                f"choose by, one to verify with.",
            )
        if len(self.sweep.sequences.tokens) < 2:
            raise ValueError(
                f"{self.sweep.text.source} holds one sequence of {context:,} tokens, but tune needs two, one "
                f"to choose by and one to verify with; give a longer text, or a smaller context."
            )
        self._check_formats()

    def _check_formats(self) -> None:
        """Raise BadArgumentError for a format that is no candidate."""
        if not self.candidates or any(CacheFormat.of(format) == PLAIN for format in self.sweep.formats):
            raise BadArgumentError(
                "formats", "must not have plain, which tune compares with in any case; leave it out."
            )
        if self.name in self.candidates:
            raise BadArgumentError("out", f"must not be {self.name}, one of the formats; give another name.")
        for spelling, candidate in self.candidates.items():
            if candidate.layers:
                raise BadArgumentError(
                    "formats",
                    f"must be formats of all layers, but {spelling} has some by layer; leave it out.",
                )
            if candidate.key != candidate.value:
                apart = ",".join(str(CacheFormat(part, part)) for part in (candidate.key, candidate.value))
                raise BadArgumentError(
                    "formats",
                    f"must not have {spelling}, as tune chooses keys and values apart; give {apart}.",
                )

    @cached_property
    def candidates(self) -> dict[str, CacheFormat]:
        """The candidates by their spelling."""
        return {
            spelling: cache_format for spelling, cache_format in self.sweep.order if cache_format != PLAIN
        }

    @property
    def layers(self) -> int:
        return self.sweep.model.layers or 0  # a model without layers is refused when the search is made

    @cached_property
    def parts(self) -> tuple[Sequences, Sequences]:
        """The sequences that measure the sensitivities, and those that verify."""
        return self.sweep.sequences.split(CALIBRATION)

    @property
    def tokens(self) -> int:
        """Tokens that are predicted, if the first choice keeps the budget."""
        calibration, verification = self.parts
        count = len(self.candidates)
        sensitivity_runs = 1 + len(SIDES) * self.layers * count
        verified_runs = 2 + count + PAIRS
        return sensitivity_runs * calibration.bytes.size + verified_runs * verification.bytes.size

    @renamed_argument("report", "progress")
    def run(self, journal: Journal, progress: Progress = _no_progress) -> Tuned:
        """Measure, choose and verify.

        Raises:
            UnattainableError: no choice keeps the budget.
        """
        self._check_bits()
        verifier = Verifier(self.sweep, self.parts[1], journal, progress)
        verifier.verify(*self.sweep.order[0])  # the reference
        failures = self._verify_candidates(verifier)
        names = tuple(spelling for spelling in self.candidates if spelling in verifier.runs)
        if not names:
            first = failures[0]
            raise UnattainableError(
                "formats", f"must have one that can be measured; {first.format} failed with: {first.error}"
            )
        bits = np.array([verifier.runs[name].bits_per_element for name in names])
        if self.budget.bits is not None:
            # Raise for too few bits now, before the long part.
            choose(bits, np.zeros((1, len(SIDES), len(bits))), self.budget.bits, math.inf)
        sensitivity = self._sensitivity(names, journal, progress)
        for key, value in self._promising_pairs(bits, sensitivity):
            pair = CacheFormat(self.candidates[names[key]].key, self.candidates[names[value]].key)
            verifier.verify(f"{names[key]}/{names[value]}", pair)
        best_uniform = self._best_uniform(verifier)
        choice, predicted = self._choice(names, bits, sensitivity, verifier, best_uniform)
        better = best_uniform is None or self._beats(verifier.runs[self.name], best_uniform)
        return Tuned(
            format=choice,
            runs=tuple(verifier.runs.values()),
            failures=tuple(failures),
            candidates=names,
            sensitivity=sensitivity,
            predicted=predicted,
            best_uniform=best_uniform,
            better=better,
            budget=self.budget,
        )

    def _check_bits(self) -> None:
        """Raise UnattainableError if the smallest format takes too many bits, before anything is measured."""
        smallest = min(self.candidates, key=self._bits)
        if self.budget.bits_or_inf < self._bits(smallest) < math.inf:
            raise too_few_bits(self._bits(smallest), smallest, self.budget.bits_or_inf)

    def _bits(self, spelling: str) -> float:
        """Return the bits per element of a candidate's pages; infinite if it does not fit the model."""
        quantizer, settings = self.candidates[spelling].key, self.sweep.settings
        assert quantizer is not None  # no candidate is plain
        page = (1, 1, settings.page_size, self.sweep.model.head_dim)
        try:
            return bits_per_element(quantizer, page, settings.dtype)
        except Exception:  # A plugin may raise anything; it fails again when it is measured.
            return math.inf

    def _verify_candidates(self, verifier: Verifier) -> list[Failure]:
        """Measure each candidate in all layers, and return those that fail."""
        failures = []
        for spelling, candidate in self.candidates.items():
            try:
                verifier.verify(spelling, candidate)
            except Exception as error:  # A plugin may raise anything; the others are still worth measuring.
                failures.append(Failure.of(spelling, error))
        return failures

    def _sensitivity(self, names: Sequence[str], journal: Journal, progress: Progress) -> np.ndarray:
        """Return KL [layers, 2, candidates] if one side of one layer is in a candidate, the rest plain."""
        sensitivity = np.empty((self.layers, len(SIDES), len(names)))
        # In float32, so that the rest of the cache is exactly the reference's.
        settings = dataclasses.replace(self.sweep.settings, dtype="float32")
        bench = None
        for layer, side, index in np.ndindex(*sensitivity.shape):
            place, candidate = f"layer {layer}, {SIDES[side]}", self.candidates[names[index]]
            key = f"{place}: {identity(candidate)}"
            kl = journal.get(key)
            if not is_number(kl):
                if bench is None:
                    bench = Bench(self.sweep.model, self.parts[0], settings, "plain", progress)
                kl = bench.mean_kl(f"{place}: {names[index]}", _one_side(layer, side, candidate))
                journal.keep(key, kl)
            sensitivity[layer, side, index] = kl
        return sensitivity

    def _promising_pairs(self, bits: np.ndarray, sensitivity: np.ndarray) -> list[tuple[int, int]]:
        """Return the :data:`PAIRS` best pairs of unlike candidates for keys and values that keep the budget.

        With a bound of KL the best have the fewest bits, else the least predicted KL.
        """
        kl = sensitivity.sum(axis=0)  # [2, candidates]
        pairs = list(itertools.permutations(range(len(bits)), 2))
        pair_bits = {(key, value): (bits[key] + bits[value]) / 2 for key, value in pairs}
        predicted = {(key, value): kl[0, key] + kl[1, value] for key, value in pairs}
        affordable = []
        for pair in pairs:
            keeps_kl = predicted[pair] <= self.budget.max_kl_or_inf
            if keeps_kl and pair_bits[pair] <= self.budget.bits_or_inf:
                affordable.append(pair)
        rank = predicted if self.budget.max_kl is None else pair_bits
        return sorted(affordable, key=rank.__getitem__)[:PAIRS]

    def _best_uniform(self, verifier: Verifier) -> Run | None:
        """Return the best of the runs so far that keep the budget, without the reference."""
        _, *uniform_runs = verifier.runs.values()  # the reference was verified first
        within_budget = [run for run in uniform_runs if self.budget.kept_by(run)]
        return min(within_budget, key=self.budget.rank, default=None)

    def _choice(
        self,
        names: Sequence[str],
        bits: np.ndarray,
        sensitivity: np.ndarray,
        verifier: Verifier,
        best_uniform: Run | None,
    ) -> tuple[CacheFormat, float | None]:
        """Return the choice, verified, and its predicted KL.

        If no sum of sensitivities promises to keep the budget, the choice is the best uniform format.
        """
        try:
            return self._search(names, bits, sensitivity, verifier)
        except UnattainableError:
            if best_uniform is None:
                raise
            cache_format = verifier.formats[best_uniform.format]
            verifier.verify(self.name, cache_format)
            return cache_format, None

    def _search(
        self, names: Sequence[str], bits: np.ndarray, sensitivity: np.ndarray, verifier: Verifier
    ) -> tuple[CacheFormat, float]:
        """Return the best choice that keeps the budget when it is measured, and its predicted KL."""
        max_kl = self.budget.max_kl_or_inf
        bound = max_kl
        for _ in range(MAX_ROUNDS):
            try:
                choice, predicted = choose(bits, sensitivity, self.budget.bits_or_inf, bound)
            except UnattainableError:
                if bound == max_kl:
                    raise
                break  # The bound was tightened below what the candidates allow.
            cache_format = self._cache_format(names, choice)
            run = verifier.verify(self.name, cache_format)
            if run.kl_mean <= max_kl:
                return cache_format, predicted
            # Sensitivities do not add up exactly: tighten the bound by how far the choice missed it, and by 5
            # % more, so that rounds do not creep up on it.
            bound *= 0.95 * max_kl / run.kl_mean
        raise UnattainableError(
            "max_kl",
            f"must be more than {max_kl:g}, as no choice that was measured keeps it: the last has "
            f"{run.kl_mean:.2g} at {run.bits_per_element:.2f} bits per element. Allow more, or give more "
            f"accurate formats.",
        )

    def _cache_format(self, names: Sequence[str], choice: Choice) -> CacheFormat:
        """Return the cache format of a choice: the commonest pair, and the layers that differ from it."""
        quantizers = [self.candidates[name].key for name in names]
        pairs = [CacheFormat(quantizers[key], quantizers[value]) for key, value in choice]
        common, _ = collections.Counter(pairs).most_common(1)[0]
        return common.with_layers({layer: pair for layer, pair in enumerate(pairs) if pair != common})

    def _beats(self, choice: Run, uniform: Run) -> bool:
        """Return True if the choice is better; where KL decides, the difference must be significant."""
        if self.budget.max_kl is not None:
            return choice.bits_per_element < uniform.bits_per_element
        return choice.kl_mean < uniform.kl_mean and not tied(choice.kl_parts, uniform.kl_parts)


def _one_side(layer: int, side: int, candidate: CacheFormat) -> CacheFormat:
    """Return the plain format with only the keys (0) or the values (1) of one layer in a candidate."""
    if SIDES[side] == "keys":
        return PLAIN.with_layers({layer: CacheFormat(key=candidate.key)})
    return PLAIN.with_layers({layer: CacheFormat(value=candidate.value)})
