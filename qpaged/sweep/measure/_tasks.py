"""Multiple-choice tasks, scored by log-likelihood as lm-eval scores them.

For each choice the model gives the probability of its tokens after the query. The likeliest choice is the
answer (``acc``), or the likeliest for each of its characters (``acc_norm``).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from qpaged._bad_argument import BadArgumentError
from qpaged.models import Tokenizer
from qpaged.sweep.measure._model import Model, RaggedPart, RaggedStream
from qpaged.sweep.measure._predictions import LOGITS_AT_ONCE
from qpaged.sweep.measure._statistics import jackknife

TASK_CHUNK = 64
"""Tokens of a chunk: questions are short, and each step of the model is as long as its chunks."""


@dataclass(frozen=True)
class Question:
    """A question of a task.

    Attributes:
        query: what the model reads first.
        choices: what may follow it, after a space.
        gold: the number of the right one, from 0.
    """

    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """Questions of one kind.

    Attributes:
        name: the file's, without its ending.
        questions: at least two.
        sha256: of the file.

    Raises:
        BadArgumentError: there are fewer.
    """

    name: str
    questions: tuple[Question, ...]
    sha256: str

    def __post_init__(self) -> None:
        if len(self.questions) < 2:
            raise BadArgumentError(
                "tasks", f"must have two questions at least, but {self.name} has {len(self.questions)}."
            )


class TaskScore(TypedDict):
    """How a format answers a task.

    Attributes:
        task: its name.
        acc: the share of questions whose likeliest choice is right.
        acc_norm: that of those whose choice is right that is likeliest for each of its characters.
        same: the share of questions that are answered as from the reference, right or wrong.
        right: for each question 1 if its likeliest choice is right, else 0.
    """

    task: str
    acc: float
    acc_se: float | None
    acc_norm: float
    acc_norm_se: float | None
    same: float
    same_se: float | None
    right: list[int]


class Continuation(NamedTuple):
    """A query with one of its choices, in tokens.

    Attributes:
        tokens: [n + 1] int32; the last of them is predicted, never fed.
        predicted: how many of the last tokens are the choice.
    """

    tokens: np.ndarray
    predicted: int


def load_task(path: str | Path) -> Task:
    """Read a task from a file with a JSON object a line.

    It has ``query``, a text, ``choices``, a list of two texts or more, and ``gold``, the number of the right
    choice from 0. No text is blank.

    Raises:
        OSError: the file cannot be read.
        BadArgumentError: a line is no such object, or there are fewer than two.
    """
    data = Path(path).read_bytes()
    questions = tuple(
        _question(line, f"line {number} of {path}")
        for number, line in enumerate(data.splitlines(), 1)
        if line.strip()
    )
    return Task(Path(path).stem, questions, hashlib.sha256(data).hexdigest())


def _question(line: bytes, place: str) -> Question:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadArgumentError("tasks", f"must have JSON in each line, but {place} has {error}.") from None
    for name, (rule, is_kept) in RULES.items():
        value = record.get(name) if isinstance(record, dict) else None
        if not is_kept(value):
            raise BadArgumentError(
                "tasks", f"must have {name}, {rule}, in each line, but {place} has {value!r}."
            )
    if not record["gold"] < len(record["choices"]):
        raise BadArgumentError(
            "tasks",
            f"must have in gold the number of a choice, from 0, but {place} has {record['gold']} for "
            f"{len(record['choices'])} choices.",
        )
    return Question(record["query"], tuple(record["choices"]), record["gold"])


def _is_text(value: object) -> bool:
    """Return True for a text that is not blank, nor has half a character, as JSON may write it."""
    return isinstance(value, str) and bool(value.encode(errors="ignore").strip()) and _is_utf8(value)


def _is_utf8(text: str) -> bool:
    return text.encode(errors="replace").decode() == text


def _are_choices(value: object) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(map(_is_text, value))


def _is_index(value: object) -> bool:
    return type(value) is int and value >= 0


RULES: dict[str, tuple[str, Callable[[object], bool]]] = {
    "query": ("a text that is not blank", _is_text),
    "choices": ("a list of two texts or more, none blank", _are_choices),
    "gold": ("a whole number", _is_index),
}
"""What each field of a line must be."""


def continuations_of(task: Task, tokenizer: Tokenizer, context: int) -> list[Continuation]:
    """Return the choices of all questions in tokens, one after another.

    A choice's tokens are those that it adds to the query's, as lm-eval has it: white space at the query's end
    is counted to the choice. Of what is longer than the context, the last tokens are kept.

    Raises:
        BadArgumentError: a choice that adds no token, or more than the context; or a query without one.
    """
    found = []
    for number, question in enumerate(task.questions, 1):
        for choice in question.choices:
            tokens, predicted = _continuation(question.query, f" {choice}", tokenizer)
            if not 0 < predicted <= min(context, len(tokens) - 1):
                raise BadArgumentError(
                    "tasks",
                    f"must have choices that add from 1 to {context:,} tokens to a query that has one, but "
                    f"{choice!r} of question {number} of {task.name} adds {predicted:,} to "
                    f"{len(tokens) - predicted:,}; change the question, or give a larger context.",
                )
            found.append(Continuation(tokens[-(context + 1) :], predicted))
    return found


def _continuation(query: str, choice: str, tokenizer: Tokenizer) -> Continuation:
    stripped = query.rstrip()
    before = tokenizer.encode(stripped.encode()).ids
    whole = tokenizer.encode((query + choice).encode()).ids
    prefix = np.asarray(tokenizer.prefix, np.int32)
    return Continuation(np.concatenate([prefix, whole]).astype(np.int32), len(whole) - len(before))


def log_likelihoods(
    model: Model,
    stream: RaggedStream,
    continuations: Sequence[Continuation],
    batch: int,
    advance: Callable[[int], None],
) -> np.ndarray:
    """Return the log-likelihood of each continuation, nats, [continuations] float64.

    Args:
        stream: of the model, which holds ``batch`` sequences at once.
        advance: called with the number of tokens that were fed since the last call.
    """
    total = np.zeros(len(continuations))
    order = np.argsort([-len(each.tokens) for each in continuations], kind="stable")  # the like together
    for first in range(0, len(order), batch):
        numbers = order[first : first + batch]
        chosen = [continuations[number] for number in numbers]
        stream.begin(len(chosen))
        for part in stream.prefill_ragged([each.tokens[:-1] for each in chosen]):
            np.add.at(total, *_of_part(model, part, numbers, chosen))
        advance(sum(len(each.tokens) - 1 for each in chosen))
    return total


def _of_part(
    model: Model, part: RaggedPart, numbers: np.ndarray, chosen: Sequence[Continuation]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the continuation of each predicted token of a part, and the token's log-probability."""
    first_predicted = np.array([len(each.tokens) - 1 - each.predicted for each in chosen])
    is_asked = (part.row >= 0) & (part.position >= first_predicted[part.row])
    slots = np.flatnonzero(is_asked)
    rows = part.row[slots]
    truth = np.array(
        [chosen[row].tokens[position + 1] for row, position in zip(rows, part.position[slots], strict=True)],
        np.int32,
    )
    found = [
        np.asarray(_log_probabilities(model.logits(part.outputs[of_block]), of_truth), np.float64)[:count]
        for of_block, of_truth, count in _blocks(slots, truth, max(1, LOGITS_AT_ONCE // model.vocabulary))
    ]
    return numbers[rows], np.concatenate([*found, np.empty(0)])


def _blocks(slots: np.ndarray, truth: np.ndarray, most: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yield blocks of one size, padded, and how many of each count."""
    size = min(most, TASK_CHUNK)
    for first in range(0, len(slots), size):
        block = slice(first, first + size)
        missing = size - len(slots[block])
        yield np.pad(slots[block], (0, missing)), np.pad(truth[block], (0, missing)), size - missing


@jax.jit
def _log_probabilities(
    logits: jax.Array,  # [n, vocabulary]
    truth: jax.Array,  # [n] int32
) -> jax.Array:
    return jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), truth[:, None], axis=-1)[:, 0]


class Answers(NamedTuple):
    """The numbers of the choices that are answers, [questions]: the likeliest, and by character."""

    likeliest: np.ndarray
    by_character: np.ndarray


def answers_of(task: Task, likelihoods: np.ndarray) -> Answers:
    """Return the answers from the log-likelihoods of all choices of all questions, one after another."""
    ends = np.cumsum([len(question.choices) for question in task.questions])
    likeliest, by_character = [], []
    for question, of_choices in zip(task.questions, np.split(likelihoods, ends[:-1]), strict=True):
        likeliest.append(int(of_choices.argmax()))
        by_character.append(int((of_choices / [len(choice) for choice in question.choices]).argmax()))
    return Answers(np.array(likeliest), np.array(by_character))


def score(task: Task, answers: Answers, reference: Answers) -> TaskScore:
    """Return how good answers are, and how many are those from the reference."""
    gold = np.array([question.gold for question in task.questions])
    right = answers.likeliest == gold
    acc, acc_se = _share(right)
    acc_norm, acc_norm_se = _share(answers.by_character == gold)
    same, same_se = _share(answers.likeliest == reference.likeliest)
    return {
        "task": task.name,
        "acc": acc,
        "acc_se": acc_se,
        "acc_norm": acc_norm,
        "acc_norm_se": acc_norm_se,
        "same": same,
        "same_se": same_se,
        "right": right.astype(int).tolist(),
    }


def _share(holds: np.ndarray) -> tuple[float, float | None]:
    """Return the share of questions for which something holds, and its standard error over them."""
    sums = np.stack([holds, np.ones(len(holds))], axis=1).astype(np.float64)
    estimate = jackknife(sums, lambda total: total[0] / total[1])
    assert estimate.value is not None  # there are questions
    return estimate.value, estimate.error
