"""Multiple-choice tasks: what they are read from, how they are scored, and what a sweep says of them."""

import json

import jax
import numpy as np
import pytest
from support.dense_attention import dense_attention

from qpaged._bad_argument import BadArgumentError
from qpaged.formats import CacheFormat
from qpaged.models import forward
from qpaged.models.tokenizer import ByteTokenizer
from qpaged.sweep import Settings, Sweep, load_model, load_step, load_task, load_text
from qpaged.sweep.measure._tasks import (
    Answers,
    Question,
    Task,
    answers_of,
    continuations_of,
    log_likelihoods,
    score,
)

QUESTIONS = [
    {"query": "The sky is", "choices": ["blue", "a kind of soup", "up"], "gold": 0},
    {"query": "One and one ", "choices": ["are two", "is eleven in some languages"], "gold": 1},
    {"query": "x", "choices": ["y", "z"], "gold": 1},
]
SMALL = ("--tokens", "96", "--context", "48", "--page-size", "8", "--quick", "--formats", "int2:token")


@pytest.fixture
def task_file(tmp_path):
    path = tmp_path / "small.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n\n")
    return path


@pytest.fixture
def task(task_file):
    return load_task(task_file)


def test_a_task_is_read_from_lines(task):
    assert (task.name, len(task.sha256)) == ("small", 64)
    assert task.questions[0] == Question("The sky is", ("blue", "a kind of soup", "up"), 0)


def test_choices_follow_the_query_after_a_space_and_take_the_spaces_at_its_end(task):
    texts = []
    for tokens, predicted in continuations_of(task, ByteTokenizer(), 64):
        text = bytes(tokens.astype(np.uint8)).decode()
        texts.append((text[:-predicted], text[-predicted:]))
    assert texts[0] == ("The sky is", " blue")
    assert texts[3] == ("One and one", "  are two")


@pytest.mark.parametrize("end", ["\n", " \t", "\u00a0"])
def test_any_white_space_at_its_end_is_of_the_choice(end):
    task = Task("t", (Question(f"Q:{end}", ("b", "c"), 0),) * 2, "")
    tokens, predicted = continuations_of(task, ByteTokenizer(), 64)[0]
    assert (bytes(tokens.astype(np.uint8)), predicted) == (f"Q:{end} b".encode(), len(f"{end} b".encode()))


def test_of_what_is_too_long_the_end_is_read(task):
    for tokens, predicted in continuations_of(task, ByteTokenizer(), 32):
        assert len(tokens) <= 33 and predicted < len(tokens)
    tokens, predicted = continuations_of(task, ByteTokenizer(), 32)[4]
    assert (bytes(tokens.astype(np.uint8)), predicted) == (b" one  is eleven in some languages", 29)


class Words(ByteTokenizer):
    """A tokenizer with a token for each letter or digit alone: what is added to those may be nothing."""

    def encode(self, data):
        return super().encode(bytes(byte for byte in data if chr(byte).isalnum()))


@pytest.mark.parametrize(
    ("query", "choices", "numbers"),
    [
        ("What?", ("!", "a"), "'!' of question 1 of t adds 0 to 4"),
        ("?", ("a", "b"), "'a' of question 1 of t adds 1 to 0"),
        ("What?", ("a" * 17, "b"), "adds 17 to 4"),
    ],
)
def test_choices_that_cannot_be_predicted_are_refused(query, choices, numbers):
    task = Task("t", (Question(query, choices, 0),) * 2, "")
    with pytest.raises(
        BadArgumentError, match=rf"add from 1 to 16 tokens to a query that has one, .*{numbers}"
    ):
        continuations_of(task, Words(), 16)


def likelihoods(model, task, spelling, **settings):
    settings = Settings(tokens=64, context=64, page_size=8, **settings)
    stream = model.stream(CacheFormat.of(spelling), settings, settings.batch)
    continuations = continuations_of(task, model.tokenizer, settings.context)
    fed = []
    found = log_likelihoods(model, stream, continuations, settings.batch, fed.append)
    assert sum(fed) == sum(len(each.tokens) - 1 for each in continuations)
    return found


@pytest.mark.parametrize(("batch", "chunk"), [(3, 64), (2, 5), (7, 11)])
def test_likelihoods_are_those_of_each_text_alone(checkpoint, task, batch, chunk):
    model = load_model(checkpoint, "bytes")
    expected = []
    for tokens, predicted in continuations_of(task, model.tokenizer, 64):
        position = np.arange(len(tokens) - 1)
        attend = lambda layer, *rows: dense_attention(model.config.attention(layer), *rows)  # noqa: E731
        logits = forward(model.params, model.config, tokens[:-1], position, attend, "float32")
        of_truth = np.asarray(jax.nn.log_softmax(logits))[position, tokens[1:]]
        expected.append(of_truth[-predicted:].sum())
    found = likelihoods(model, task, "plain", batch=batch, chunk=chunk)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_formats_change_them(checkpoint, task):
    model = load_model(checkpoint, "bytes")
    plain, int2 = (
        likelihoods(model, task, spelling, batch=4, chunk=16) for spelling in ("plain", "int2:token")
    )
    assert np.abs(plain - int2).max() > 1e-3
    assert (np.abs(plain - int2) < 0.5 * np.abs(plain)).all()


def test_a_step_takes_no_tasks(checkpoint, task, text_file, monkeypatch):
    monkeypatch.setenv("CHECKPOINT", str(checkpoint))
    settings = Settings(tokens=96, context=48, page_size=8)
    model = load_step("support.contiguous_step:make_step", settings, "bytes")
    with pytest.raises(BadArgumentError, match=r"tasks must be left out for .*, which takes as many tokens"):
        Sweep(model, load_text(text_file), ("int8:token",), settings, (task,))


def test_answers_and_scores():
    questions = tuple(Question("q", choices, gold) for choices, gold in [(("a", "bcd"), 1), (("e", "f"), 0)])
    task = Task("t", questions, "")
    answers = answers_of(task, np.array([-1.0, -2.0, -3.0, -2.0]))
    assert (answers.likeliest.tolist(), answers.by_character.tolist()) == ([0, 1], [1, 1])
    found = score(task, answers, Answers(np.array([0, 0]), np.array([0, 0])))
    assert (found["acc"], found["acc_norm"], found["same"], found["right"]) == (0, 0.5, 0.5, [0, 0])
    assert found["acc_norm_se"] == pytest.approx(0.5)  # of one in two: their deviation over the root of 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "tasks must have JSON in each line, but line 2 of .*small.jsonl has Expecting"),
        ("[]", "tasks must have query, a text that is not blank, in each line, but line 2 .* None"),
        ({"query": " "}, "query, a text that is not blank, in each line, but line 2 of .* has ' '"),
        ({"query": "\ud800"}, "query, a text that is not blank, in each line, but line 2 of .* has"),
        ("[" * 100_000, "tasks must have JSON in each line, but line 2 of .* has maximum recursion"),
        (
            {"choices": ["a"]},
            r"choices, a list of two texts or more, none blank, .* has \['a'\]",
        ),
        ({"gold": "0"}, "gold, a whole number, in each line, but .* has '0'"),
        ({"gold": 3}, "in gold the number of a choice, from 0, but line 2 of .* has 3 for 3 choices"),
    ],
)
def test_lines_that_are_no_question_are_refused(task_file, line, message):
    text = line if isinstance(line, str) else json.dumps(QUESTIONS[0] | line)
    task_file.write_text(f"{json.dumps(QUESTIONS[0])}\n{text}\n")
    with pytest.raises(BadArgumentError, match=message):
        load_task(task_file)


def test_one_question_is_too_few(task_file):
    task_file.write_text(json.dumps(QUESTIONS[0]))
    with pytest.raises(BadArgumentError, match="two questions at least, but small has 1"):
        load_task(task_file)


def test_a_sweep_scores_every_format_and_goes_on_where_it_stopped(sweep, task_file):
    done = sweep(*SMALL, "--tasks", task_file)
    results = json.loads((done.directory / "results.json").read_text())
    (described,) = results["tasks"]
    assert (described["name"], described["questions"]) == ("small", 3)
    plain, int2 = (run["tasks"][0] for run in results["runs"])
    assert plain["same"] == 1 >= int2["same"]
    assert "small: 3 questions" in done.out and "of small, no format surely less often." in done.out
    assert "<h2>small</h2>" in (done.directory / "report.html").read_text()
    assert "every format is known" in sweep(*SMALL, "--tasks", task_file).err
    task_file.write_text("\n".join(map(json.dumps, QUESTIONS[:2])))
    assert "results.json was of another sweep" in sweep(*SMALL, "--tasks", task_file).err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--tasks", "gone.jsonl"),
            "--tasks 'gone.jsonl' cannot be read (No such file or directory); give a",
        ),
        (("--step", "a:b", "--tasks", "x"), "--tasks must be left out with --step, which takes as many"),
    ],
)
def test_tasks_that_cannot_be_had_are_refused(command, arguments, message):
    assert f"qpaged sweep: {message}" in command("sweep", *arguments, model=None).err


def test_tasks_of_one_name_are_refused(sweep, task_file):
    done = sweep(*SMALL, "--tasks", task_file, "--tasks", task_file)
    assert "--tasks must have names of their own, but are small, small." in done.err
