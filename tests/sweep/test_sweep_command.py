"""``qpaged sweep``, from arguments to files."""

import json

import numpy as np
import pytest

import qpaged
import qpaged.sweep._run as run_module
from qpaged.cli import main
from qpaged.sweep import DTYPES

SMALL = ("--tokens", 200, "--context", 48, "--page-size", 8)
FORMATS = "raw,int8:token/int8"

NUMBERS = {
    "bytes_per_token", "ratio", "bits_per_element", "bits_per_byte", "bits_per_byte_se", "kl_mean",
    "kl_mean_se", "kl_median", "kl_p999", "kl_max", "same_top", "attention_error", "tokens", "seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(checkpoint, text_file, tmp_path_factory):
    """The directory, and the results by format, of a sweep."""
    out = tmp_path_factory.mktemp("sweep")
    arguments = ["sweep", checkpoint, "--text", text_file, "--out", out, "--formats", FORMATS, *SMALL]
    assert main(list(map(str, arguments))) == 0
    return out, json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def runs(finished):
    return {run["format"]: run for run in finished[1]["runs"]}


def test_results_say_what_was_measured(finished, checkpoint, text_file):
    _, results = finished
    assert (results["version"], results["complete"], results["failures"]) == (1, True, [])
    assert results["model"]["path"] == str(checkpoint)
    assert results["model"]["cache_elements_per_token"] == 2 * 2 * 2 * 16
    assert len(results["model"]["sha256"]) == len(results["text"]["sha256"]) == 64
    assert (results["text"]["source"], results["text"]["bytes"]) == (str(text_file), 1000)
    settings = results["settings"]
    assert (settings["sequences"], settings["prefill"], settings["decode"]) == (4, 24, 24)
    assert {"python", "jax", "qpaged", "device", "date"} <= results["environment"].keys()


def test_every_run_has_every_number(finished):
    _, results = finished
    for run in results["runs"]:
        assert run.keys() == NUMBERS | {"format", "key", "value", "dtype", "attention_error_by_layer"}
        assert all(isinstance(run[name], int | float) for name in NUMBERS)
        assert run["tokens"] == 192
        assert len(run["attention_error_by_layer"]) == 2
        assert run["attention_error"] == max(run["attention_error_by_layer"])


def test_formats_stand_as_they_were_typed_after_the_reference(finished):
    formats = [(run["format"], run["key"], run["value"]) for run in finished[1]["runs"]]
    assert formats == [
        ("plain", "plain", "plain"),
        ("raw", "raw", "raw"),
        ("int8:token/int8", "int8:token", "int8"),
    ]


def test_bytes_are_those_of_the_formats(runs):
    elements = 128  # keys and values, 2 layers, 2 heads, head_dim 16
    assert runs["plain"]["bytes_per_token"] == 4 * elements
    assert runs["raw"]["bytes_per_token"] == 2 * elements
    token = 1 + 4 / 16  # a float32 for each head of 16
    page = 1 + 1 / (8 * 16)  # a byte for each page of 8 slots
    assert runs["int8:token/int8"]["bytes_per_token"] == elements / 2 * (token + page)
    for run in runs.values():
        assert run["ratio"] == pytest.approx(2 * elements / run["bytes_per_token"])
        assert run["bits_per_element"] == pytest.approx(8 * run["bytes_per_token"] / elements)


def test_the_reference_is_exact_and_the_rest_are_in_the_order_of_their_precision(runs):
    assert (runs["plain"]["kl_mean"], runs["plain"]["same_top"], runs["plain"]["dtype"]) == (0, 1, "float32")
    assert 0 < runs["raw"]["kl_mean"] < runs["int8:token/int8"]["kl_mean"] < 0.1
    assert 0 < runs["raw"]["attention_error"] < runs["int8:token/int8"]["attention_error"] < 0.1
    for run in runs.values():
        assert run["kl_median"] <= run["kl_p999"] <= run["kl_max"]
        assert run["bits_per_byte"] == pytest.approx(runs["plain"]["bits_per_byte"], abs=0.05)


def test_the_figure_is_a_png(finished):
    assert (finished[0] / "frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def quick(monkeypatch):
    """Measurements that take no time: logits without a model; ``quick[format]`` happens before a format's."""
    before = {}

    def no_forward(model, cache, tokens, settings, advance):
        pages = cache.views[0].key_pages
        before.get(str(getattr(pages, "quantizer", "plain")), lambda: None)()
        advance(tokens.size)
        return np.zeros((*tokens.shape, 256), np.float32)

    monkeypatch.setattr(run_module, "cached_forward", no_forward)
    monkeypatch.setattr(run_module, "plain_probes", lambda *_: [])
    monkeypatch.setattr(run_module, "attention_error", lambda *_: [0.0, 0.0])
    return before


def test_the_table_has_a_row_for_each_format_and_fits_80_columns(quick, sweep, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = sweep(*SMALL, "--formats", "int8,int8:token/fp8_e4m3").out
    assert max(map(len, said.splitlines())) <= 80
    rows = [line.split()[0] for line in said.splitlines() if line.strip()]
    assert {"plain", "int8", "int8:token/fp8_e4m3"} <= set(rows)
    assert "192 bytes in 4 sequences" in " ".join(said.split())
    assert "\x1b" not in said


def test_json_alone_is_printed_if_asked_for(quick, sweep):
    found = sweep(*SMALL, "--formats", "int8", "--json")
    assert json.loads(found.out) == json.loads((found.directory / "results.json").read_text())
    assert "qpaged sweep: int8" in found.err


def test_all_installed_formats_are_the_default(quick, sweep):
    found = sweep(*SMALL, "--json")
    formats = [run["format"] for run in json.loads(found.out)["runs"]]
    unfit = {"int2", "int2:group64", "int4", "int4:group64", "int4:group128", "mxfp4", "mxfp8"}  # head_dim 16
    assert formats == [
        "plain",
        *(spelling for spelling in qpaged.available_formats() if spelling not in unfit),
    ]
    assert "left out, since they do not go with head_dim 16: int2, int2:group64, int4," in found.err


def test_all_is_every_wrapper_too(quick, sweep, monkeypatch):
    monkeypatch.setattr(qpaged, "available_formats", lambda wrapped: ("int8", "int8+rotate")[: 1 + wrapped])
    found = sweep(*SMALL, "--formats", "all", "--json")
    assert [run["format"] for run in json.loads(found.out)["runs"]] == ["plain", "int8", "int8+rotate"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_logical_dtype_is_that_of_all_but_the_reference(quick, sweep, dtype):
    runs = json.loads(sweep(*SMALL, "--formats", "raw", "--json", "--dtype", dtype).out)["runs"]
    assert [run["dtype"] for run in runs] == ["float32", dtype]
    assert runs[1]["bytes_per_token"] == 128 * (4 if dtype == "float32" else 2)


def test_a_format_that_fails_leaves_the_others(quick, sweep):
    def fail():
        raise RuntimeError("no such\nluck")

    quick["int8"] = fail
    found = sweep(*SMALL, "--formats", "int8,raw", "--json")
    results = json.loads(found.out)
    assert found.status == 1
    assert [run["format"] for run in results["runs"]] == ["plain", "raw"]
    assert results["failures"] == [{"format": "int8", "error": "RuntimeError: no such luck"}]
    assert "int8 failed: RuntimeError: no such luck" in found.err


def test_an_interrupt_keeps_what_is_finished(quick, sweep):
    def interrupt():
        raise KeyboardInterrupt

    quick["raw"] = interrupt
    found = sweep(*SMALL, "--formats", "int8,raw,fp8_e4m3")
    results = json.loads((found.directory / "results.json").read_text())
    assert found.status == 130
    assert not results["complete"]
    assert [run["format"] for run in results["runs"]] == ["plain", "int8"]
    assert "int8" in found.out
    assert "interrupted; finished: plain, int8." in found.err


def test_an_interrupt_before_anything_is_finished_writes_nothing(quick, sweep):
    def interrupt():
        raise KeyboardInterrupt

    quick["plain"] = interrupt
    found = sweep(*SMALL, "--formats", "int8")
    assert (found.status, found.out) == (130, "")
    assert "nothing was finished" in found.err
    assert not (found.directory / "results.json").exists()
