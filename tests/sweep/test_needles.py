"""Numbers that are hidden in texts: where they are, when they are found, and what a sweep says of them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qpaged._bad_argument import BadArgumentError
from qpaged.models.tokenizer import ByteTokenizer
from qpaged.sweep import Settings, Text
from qpaged.sweep.measure import Prefilled
from qpaged.sweep.measure._needles import STEMS, TEXTS, find, hide
from qpaged.sweep.report._verdict import _needles

LENGTH = 1200
TEXT = Text("letters", bytes(np.random.default_rng(0).integers(97, 123, 3000, np.uint8)))


@pytest.fixture(scope="module")
def needles():
    return hide(TEXT, ByteTokenizer(), LENGTH)


def decoded(tokens):
    return bytes(tokens.astype(np.uint8)).decode()


def test_each_number_is_hidden_at_its_depth_and_asked_for_at_the_end(needles):
    assert needles.tokens.shape == (TEXTS, LENGTH + 1) and needles.depth.shape == (TEXTS, LENGTH)
    for tokens, depth in zip(needles.tokens, needles.depth, strict=True):
        text = decoded(tokens)
        questions = min(text.rindex(stem) for stem in STEMS)
        letters = sum(character.islower() for character in text[:questions])
        before = 0
        for number, stem in enumerate(STEMS):
            answer = decoded(tokens[1:][depth == number])
            assert answer[0] == " " and answer[1:].isdecimal() and len(answer) == 6
            assert text.count(f"\n{stem}{answer}") == 2
            hidden = text.index(stem)
            before = sum(character.islower() for character in text[:hidden])
            assert before / letters == pytest.approx(number / (len(STEMS) - 1), abs=0.1)


def test_texts_and_their_numbers_differ(needles):
    assert len({tokens.tobytes() for tokens in needles.tokens}) == TEXTS
    answers = {decoded(row[1:][depth == 0]) for row, depth in zip(needles.tokens, needles.depth, strict=True)}
    assert len(answers) == TEXTS


class Knows:
    """A stream that gives the tokens themselves, and a model that says what follows them in the texts."""

    vocabulary = 256

    def __init__(self, needles, forgets=None):
        self._next, self._forgets = needles.tokens[:, 1:].copy(), forgets
        if forgets is not None:
            text, depth = forgets
            (places,) = np.nonzero(needles.depth[text] == depth)
            self._next[text, places[-1]] = 0
        self._first = 0

    def begin(self, sequences):
        self._batch = self._next[self._first : self._first + sequences]
        self._first += sequences

    def prefill(self, tokens):
        for start in range(0, tokens.shape[1], 250):
            columns = slice(start, min(start + 250, tokens.shape[1]))
            yield Prefilled(slice(0, len(tokens)), columns, jnp.asarray(self._batch[:, columns, None]))

    def logits(self, outputs):
        return jax.nn.one_hot(outputs[:, 0], self.vocabulary)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_a_number_is_found_if_all_of_its_tokens_are_the_likeliest(needles, batch):
    settings, fed = Settings(batch=batch), []
    knows = Knows(needles)
    score = find(knows, knows, needles, settings, fed.append)
    assert (score["found"], score["found_se"], sum(fed)) == (1, 0, TEXTS * LENGTH)
    knows = Knows(needles, forgets=(2, 1))
    score = find(knows, knows, needles, settings, fed.append)
    assert score["by_depth"] == [1, 0.75, 1, 1, 1] and score["found_by_text"] == [5, 5, 4, 5]
    assert score["found"] == 0.95 and score["found_se"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (500, r"needles must be lengths of at least [\d,]+ tokens for bytes, but has 500"),
        (5000, r"needles must be lengths that the text has, but 5,000 takes [\d,]+ of 3,000 tokens; give"),
    ],
)
def test_lengths_that_cannot_be_made_are_refused(length, message):
    with pytest.raises(BadArgumentError, match=message):
        hide(TEXT, ByteTokenizer(), length)


def run(name, *found_by_text):
    shares = np.mean(found_by_text) / len(STEMS)
    return {
        "format": name,
        "needles": [{"length": LENGTH, "found": shares, "found_by_text": list(found_by_text)}],
    }


def test_the_verdict_names_formats_that_surely_find_fewer():
    plain = run("plain", 5, 5, 5, 5)
    assert _needles([]) == ""
    assert _needles([plain, run("a", 5, 5, 4, 5), run("b", 0, 1, 0, 0)]) == (
        "plain finds 100 % of the numbers hidden in 1,200 tokens; b (5 %) surely fewer."
    )
    assert _needles([plain, run("a", 5, 5, 4, 5)]).endswith("no format surely fewer.")
    assert "too few to tell" in _needles([run("plain", 4, 4, 4, 4), run("b", 0, 0, 0, 0)])


def test_a_sweep_hides_numbers(command, tmp_path):
    letters = tmp_path / "letters"
    letters.write_bytes(TEXT.data)
    text_of_letters = tmp_path / "letters"
    text_of_letters.write_bytes(TEXT.data)
    settings = ("--tokens", "256", "--context", "128", "--quick", "--formats", "int8", "--needles", "1k")
    done = command("sweep", *settings, model=None, text=text_of_letters)
    assert done.status == 0
    assert "numbers hidden in so many tokens" in " ".join(done.out.split())
    record = json.loads((done.directory / "results.json").read_text())
    for of_run in record["runs"]:
        (score,) = of_run["needles"]
        assert score["length"] == 1024 and len(score["by_depth"]) == len(STEMS)
    page = (done.directory / "report.html").read_text()
    assert "numbers hidden in long texts" in page and "1,024: 25 %" in page


def test_lengths_beyond_the_model_are_refused(sweep):
    done = sweep("--tokens", "96", "--context", "48", "--needles", "1k")
    assert done.status == 2
    assert "--needles must be at most 64, the longest that" in " ".join(done.err.split())
