"""Tests of ``qpaged tune``, and of the choice that it makes."""

import itertools
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

import qpaged
from qpaged.sweep import Journal, Tune, UnattainableError, claimed
from qpaged.sweep.tune._solver import choose

SMALL = ("--tokens", 400, "--context", 48, "--page-size", 8)
BITS = np.array([8.25, 4.5, 4.25, 2.5])


def sensitivities(seed, layers=2):
    """Return random sensitivities [layers, 2, candidates], as large as KL is at these bits."""
    scale = np.exp2(-2 * BITS)
    return np.random.default_rng(seed).exponential(size=(layers, 2, len(BITS))) * scale


def every_choice(sensitivity):
    """Yield (mean bits, summed KL) of all choices."""
    items = sensitivity.reshape(-1, len(BITS))
    for picks in itertools.product(range(len(BITS)), repeat=len(items)):
        yield BITS[list(picks)].mean(), sum(kl[pick] for kl, pick in zip(items, picks, strict=True))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("most", [2.5, 2.8, 4.4, 5.0, 100.0])
def test_no_choice_within_the_bits_promises_less_kl(seed, most):
    sensitivity = sensitivities(seed)
    choice, kl = choose(BITS, sensitivity, most, math.inf)
    assert BITS[np.array(choice)].mean() <= most
    assert kl == pytest.approx(min(kl for bits, kl in every_choice(sensitivity) if bits <= most))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_no_choice_within_the_kl_takes_fewer_bits(seed, share):
    sensitivity = sensitivities(seed)
    bound = share * max(kl for _, kl in every_choice(sensitivity))
    choice, kl = choose(BITS, sensitivity, math.inf, bound)
    assert kl <= bound
    fewest = min(bits for bits, kl in every_choice(sensitivity) if kl <= bound)
    assert BITS[np.array(choice)].mean() == pytest.approx(fewest)


def test_bits_are_counted_exactly():
    odd = np.array([8 + 1 / 192, 4 + 1 / 3])  # in no power of two
    free = np.array([[[0.0, 1.0], [0.0, 1.0]]])
    assert choose(odd, free, 8 + 1 / 192, math.inf)[0] == ((0, 0),)
    assert choose(odd, free, 8 + 1 / 200, math.inf)[0] in (((0, 1),), ((1, 0),))


def test_an_unattainable_bound_names_the_attainable_one():
    with pytest.raises(UnattainableError, match=r"bits must be at least 2\.500.* but came as 2"):
        choose(BITS, sensitivities(0), 2, math.inf)
    with pytest.raises(UnattainableError, match=r"max_kl must be at least about .* within 4 bits"):
        choose(BITS, sensitivities(0), 4, 1e-12)


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    return tmp_path_factory.mktemp("journal") / "format.json.partial"


def test_a_journal_keeps_what_was_measured_under_the_same_conditions(journal):
    Journal(journal, {"model": "a"}).keep("x", 1.5)
    assert Journal(journal, {"model": "a"}).get("x") == 1.5
    assert Journal(journal, {"model": "b"}).get("x") is None
    assert Journal(journal, {"model": "a"}, fresh=True).get("x") is None
    for text in ("{", "[]", '{"conditions": {"model": "a"}}'):
        journal.write_text(text)
        assert Journal(journal, {"model": "a"}).get("x") is None
    Journal(journal, {"model": "a"}).keep("x", 1.5)
    journal.write_text(journal.read_text().replace("1.5", "2.5"))  # a digit that changed
    assert Journal(journal, {"model": "a"}).get("x") is None


@pytest.fixture
def tune(command):
    """Return ``tune(*arguments)``: it runs the command on the small model."""
    return lambda *arguments: command("tune", *SMALL, *arguments, out="format.json")


@pytest.mark.long
def test_a_choice_is_verified_written_and_taken_by_the_cache(tune, tmp_path):
    result = tune("--bits", 8, "--formats", "int8:token,int4:token", "--json")
    assert result.status == 0
    results = json.loads(result.out)
    *uniform, choice = results["runs"]
    tuned = results["tune"]
    assert choice["format"] == tuned["choice"] == "format.json"
    assert choice["bits_per_element"] == (2 * 10 + 2 * 5) / 4 and choice["layers"] == tuned["layers"]
    pairs = {"int8:token/int4:token", "int4:token/int8:token"}
    assert {run["format"] for run in uniform} == {"plain", "int8:token", "int4:token"} | pairs
    keys, values = np.array(tuned["sensitivity"]["keys"]), np.array(tuned["sensitivity"]["values"])
    assert (keys[:, 1] > keys[:, 0]).all()  # int8 changes less than int4
    assert (values[:, 1] > values[:, 0]).all()
    gain = np.stack([keys[:, 1] - keys[:, 0], values[:, 1] - values[:, 0]], axis=1)
    eight = [[each == "int8:token" for each in pair] for pair in tuned["layers"]]
    most_gain = gain >= np.sort(gain, axis=None)[2]
    assert (np.array(eight) == most_gain).all()
    assert choice["kl_mean"] < next(run for run in uniform if run["format"] == "int4:token")["kl_mean"]

    metadata = qpaged.PagedAttentionCacheMetaData(1, 2, 4, 4, 32, 8, 2, 16, 0.9)
    cache = qpaged.PagedAttentionCache.init_cache(
        None, jnp.bfloat16, metadata, quantizer=str(tmp_path / "format.json")
    )
    size = cache.nbytes / (4 * 8)
    assert size == choice["bytes_per_token"]
    assert not (tmp_path / "format.json.partial").exists()
    assert "2 candidates for keys and values of 2 layers" in result.err.splitlines()[0]


def test_the_fewest_bits_within_a_kl(tune, quick):
    results = json.loads(tune("--max-kl", 0.5, "--formats", "int8:token,int4:token", "--json").out)
    assert results["tune"]["layers"] == [["int4:token"] * 2] * 2  # nothing costs anything here: the smallest
    assert results["tune"]["best_uniform"] == "int4:token" and not results["tune"]["better"]


def test_a_search_goes_on_where_it_was_interrupted(tune, quick, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    arguments = ("--bits", 6, "--formats", "int8:token,int4:token")
    part = "plain (1: plain/int8:token)"
    quick.before[part] = interrupt
    result = tune(*arguments)
    assert result.status == 130
    assert "format.json.partial keeps what was measured" in result.err
    assert not (tmp_path / "format.json").exists()
    del quick.before[part]
    before = set(quick.ran)
    quick.ran.clear()
    assert tune(*arguments).status == 0
    assert set(quick.ran) & before <= {"plain", part}
    assert part in quick.ran


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--bits or --max-kl is needed, or both, as in --bits 5 --max-kl 0.01."),
        ("--bits 0", "--bits must be positive and finite, but came as 0."),
        ("--max-kl nan", "--max-kl must be positive and finite, but came as nan."),
        (
            "--bits 9 --formats int8/int4:token",
            "--formats must not have int8/int4:token, as tune chooses keys",
        ),
        ("--bits 9 --formats int9", "--formats cannot be used: no format is named 'int9'"),
        ("--bits 9 --formats int8,plain", "--formats must not have plain, which tune compares with in any"),
        (
            "--bits 9 --tokens 48",
            "--tokens must be at least twice the context, 48, but came as 48: one sequence",
        ),
        (
            "--bits 9 --context 600 --tokens 200",
            "--tokens must be at least the context, 600, but came as 200;",
        ),
    ],
)
def test_bad_arguments_are_refused_in_the_words_of_the_flags(tune, quick, arguments, message):
    result = tune(*arguments.split())
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith(f"qpaged tune: {message}")


def test_a_uniform_format_that_keeps_the_budget_is_chosen_if_no_sum_does(tune, quick, monkeypatch):
    monkeypatch.setattr(Tune, "_sensitivity", lambda self, names, *_: np.ones((2, 2, len(names))))
    results = json.loads(tune("--max-kl", 0.1, "--formats", "int8:token,int4:token", "--json").out)
    assert results["tune"]["layers"] == [["int4:token"] * 2] * 2 and results["tune"]["predicted_kl"] is None


@pytest.mark.parametrize(("option", "name"), [("--out", "format.json"), ("--report", "format")])
def test_a_second_search_for_the_same_file_or_report_is_refused(tune, quick, tmp_path, option, name):
    (tmp_path / "format").mkdir()
    other = ("--report", tmp_path / "other") if option == "--out" else ()
    with claimed(tmp_path / name):
        result = tune("--bits", 8, "--formats", "int8:token", *other)
    assert result.status == 2 and not quick.ran
    assert f"{option} must be for one sweep or search at a time, but" in result.err
    assert f"writes to {tmp_path / name}; wait for it" in result.err


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("format.txt", "must name a file that ends in .json, as format.json, but came as '{out}'."),
        (".json", "must name a file that ends in .json, as format.json, but came as '{out}'."),
        ("file/format.json", "{out} cannot be written: {parent} is a file, not a directory."),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(command, quick, tmp_path, out, message):
    (tmp_path / "file").touch()
    result = command("tune", *SMALL, "--bits", 5, out=out)
    assert result.status == 2
    path = tmp_path / out
    assert result.err == f"qpaged tune: --out {message.format(out=path, parent=path.parent)}\n"


def test_a_budget_that_no_format_keeps_fails(tune, quick, tmp_path):
    result = tune("--bits", 3, "--formats", "int8:token,int4:token")
    assert result.status == 1
    assert "--bits must be at least 5.000, what int4:token takes, but came as 3; give more" in result.err
    assert not quick.ran  # it is known before anything is measured
    assert not (tmp_path / "format.json").exists()


def test_formats_that_all_fail_are_told_why(tune, quick):
    def fail():
        raise RuntimeError("no luck")

    quick.before |= {"int8:token": fail, "int4:token": fail}
    result = tune("--bits", 8, "--formats", "int8:token,int4:token")
    assert result.status == 1
    message = "--formats must have one that can be measured; int8:token failed with: RuntimeError: no luck"
    assert message in result.err


def test_a_kl_that_no_choice_keeps_is_told_in_the_words_of_the_flag(tune, quick, monkeypatch):
    monkeypatch.setattr(Tune, "_sensitivity", lambda self, names, *_: np.ones((2, 2, len(names))))
    monkeypatch.setattr(Tune, "_best_uniform", lambda self, verifier: None)
    result = tune("--max-kl", 0.1, "--formats", "int8:token,int4:token")
    assert result.status == 1
    message = (
        "--max-kl must be at least about 4, what the closest choice of these formats has, but came as 0.1"
    )
    assert message in result.err


def test_a_candidate_that_fails_leaves_the_others(tune, quick):
    def fail():
        raise RuntimeError("no luck")

    quick.before["int8:token"] = fail
    result = tune("--bits", 8, "--formats", "int8:token,int4:token", "--json")
    assert result.status == 1
    assert json.loads(result.out)["failures"] == [{"format": "int8:token", "error": "RuntimeError: no luck"}]
