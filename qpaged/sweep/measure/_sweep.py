"""A sweep: measures the reference, then every format that was asked for."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax

from qpaged._bad_argument import BadArgumentError
from qpaged._deprecated import renamed_argument
from qpaged.formats import CacheFormat
from qpaged.sweep.measure._ahead import one_ahead
from qpaged.sweep.measure._bench import Bench, Progress
from qpaged.sweep.measure._model import Model
from qpaged.sweep.measure._needles import Needles, hide
from qpaged.sweep.measure._run import PLAIN, Failure, Run, identity
from qpaged.sweep.measure._settings import Settings
from qpaged.sweep.measure._tasks import Continuation, Task, continuations_of
from qpaged.sweep.measure._text import Sequences, Text, cut


def sweep_order(formats: Sequence[str]) -> list[tuple[str, CacheFormat]]:
    """Return each format once with its name, the plain reference first.

    Names are spellings; a file of a format is named without its directory where that is unambiguous.

    Raises:
        RegistryError: a spelling that names no installed format.
        OSError, ValueError: a format's file that cannot be read.
    """
    # A file of formats is shown by its name alone, unless two have the same one.
    file_names = [Path(spelling).name for spelling in formats if spelling.endswith(".json")]
    named: dict[str, CacheFormat] = {}
    for spelling in formats:
        cache_format = CacheFormat.of(spelling)
        if cache_format in named.values():
            continue
        file_name = Path(spelling).name
        name = file_name if file_names.count(file_name) == 1 else spelling
        named[name] = cache_format
    plain = [pair for pair in named.items() if pair[1] == PLAIN] or [("plain", PLAIN)]
    others = [pair for pair in named.items() if pair[1] != PLAIN]
    return [plain[0], *others]


@dataclass(frozen=True)
class Sweep:
    """A sweep to be run: formats, the plain float32 reference first, on a model and a text.

    Attributes:
        formats: spellings that :meth:`qpaged.CacheFormat.of` takes; the reference is added if missing.
        tasks: multiple-choice tasks that each format answers, too.

    Raises:
        RegistryError: a spelling that names no installed format.
        ValueError: a text shorter than one sequence, or a context longer than the model's.
        BadArgumentError: lengths of needles that the model or the text does not have; two tasks of one name,
            one that the tokenizer cannot take apart, or one for a model whose streams take as many tokens of
            each sequence.
    """

    model: Model
    text: Text
    formats: tuple[str, ...]
    settings: Settings
    tasks: tuple[Task, ...] = ()

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise BadArgumentError("tasks", f"must have names of their own, but are {', '.join(names)}.")
        if self.tasks and not self.model.takes_ragged:
            raise BadArgumentError(
                "tasks",
                f"must be left out for {self.model.name}, which takes as many tokens of each sequence.",
            )
        longest = self.model.longest
        if self.settings.context > longest:
            raise BadArgumentError(
                "context",
                f"must be at most {longest:,}, the longest that {self.model.name} was made for, but came as "
                f"{self.settings.context:,}.",
            )
        tokenizer = self.model.tokenizer
        if tokenizer.vocab_size > self.model.vocabulary:
            raise BadArgumentError(
                "tokenizer",
                f"must have at most the {self.model.vocabulary:,} tokens of the model, but {tokenizer.name} "
                f"has {tokenizer.vocab_size:,}; give the one that the model was trained with.",
            )
        # Compute these now, so that bad formats and texts raise before any work is done.
        _ = self.order, self.sequences, self.continuations, self.needles

    @cached_property
    def order(self) -> list[tuple[str, CacheFormat]]:
        """Each spelling once, with the format that it names; the reference first."""
        return sweep_order(self.formats)

    @cached_property
    def sequences(self) -> Sequences:
        """The tokens that are fed and predicted."""
        return cut(self.text, self.model.tokenizer, self.settings)

    @cached_property
    def continuations(self) -> list[list[Continuation]]:
        """The choices of each task, in tokens."""
        context = self.settings.context
        return [continuations_of(task, self.model.tokenizer, context) for task in self.tasks]

    @cached_property
    def needles(self) -> list[Needles]:
        """Texts of each length with hidden numbers."""
        for length in self.settings.needles:
            if length > self.model.longest:
                raise BadArgumentError(
                    "needles",
                    f"must be at most {self.model.longest:,}, the longest that {self.model.name} was made "
                    f"for, but has {length:,}.",
                )
        return [hide(self.text, self.model.tokenizer, length) for length in self.settings.needles]

    @property
    def tokens(self) -> int:
        """Tokens that are predicted in each format."""
        return len(self.sequences.tokens) * self.settings.context

    def tokens_to_predict(self, known: Sequence[Run]) -> int:
        """Return the tokens that are predicted in all, those for the noise of the reference included."""
        runs = len(self.pending(known))
        of_tasks = sum(len(each.tokens) - 1 for of_task in self.continuations for each in of_task)
        of_needles = sum(needles.depth.size for needles in self.needles)
        total = (self.tokens + of_tasks + of_needles) * runs
        if not runs or not self.settings.noise:
            return total
        others = self.settings.halved(len(self.sequences.tokens)), self.model.in_another_dtype()
        return total + self.tokens * sum(other is not None for other in others)

    def pending(self, known: Sequence[Run]) -> list[str]:
        """Return the formats still to be measured; the reference is among them if any format is."""
        known_identities = {run.identity for run in known}
        pending = [
            spelling
            for spelling, cache_format in self.order
            if identity(cache_format) not in known_identities
        ]
        plain = self.order[0][0]
        if pending and pending[0] != plain:
            return [plain, *pending]
        return pending

    @renamed_argument("report", "progress")
    def run(self, progress: Progress, known: Sequence[Run] = ()) -> Iterator[Run | Failure]:
        """Yield each format as it is measured, so that a caller who stops early keeps what came before.

        Runs that are ``known`` from an earlier sweep under the same conditions are not measured again, except
        for the reference, to whose predictions the others are compared.
        A format that fails is yielded as a failure, and the others go on; an error of the reference is
        raised, since nothing can be measured without it.
        """
        known_runs = {run.identity: run for run in known}
        pending = self.pending(known)
        compiled = one_ahead([pair for pair in self.order if pair[0] in pending], self._compile)
        (plain, _), *others = self.order
        bench = None
        if pending:
            next(compiled)
            tasks = list(zip(self.tasks, self.continuations, strict=True))
            bench = Bench(self.model, self.sequences, self.settings, plain, progress, tasks, self.needles)
            yield bench.plain
        else:
            yield dataclasses.replace(known_runs[identity(PLAIN)], format=plain)
        for spelling, cache_format in others:
            known_run = known_runs.get(identity(cache_format))
            if known_run is not None:
                yield dataclasses.replace(known_run, format=spelling)
                continue
            assert bench is not None
            next(compiled)
            try:
                yield bench.measure(spelling, cache_format)
            except Exception as error:  # A plugin may raise anything; the others are still worth measuring.
                if jax.process_count() > 1:
                    raise  # or other processes, where it did not fail, would wait for this one
                yield Failure.of(spelling, error)

    def _compile(self, named: tuple[str, CacheFormat]) -> None:
        """Compile what a format runs, but for the reference, which nothing could be measured beside."""
        _, cache_format = named
        if cache_format != PLAIN:
            rows = min(self.settings.batch, len(self.sequences.tokens))
            self.model.compile(cache_format, self.settings, rows)
