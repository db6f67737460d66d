"""Tests of ``qpaged sweep``, from arguments to files."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import qpaged
from qpaged._files import DIGEST, digest
from qpaged.cli import main
from qpaged.models.tokenizer import ByteTokenizer
from qpaged.sweep import DTYPES, METRICS, claimed, default_formats
from qpaged.sweep._formats import LADDER
from qpaged.sweep.results._record import LATER

SMALL = ("--tokens", 200, "--context", 48, "--page-size", 8)
FORMATS = "raw,int8:token/int8"

AVERAGES = {
    "bits_per_byte", "perplexity", "perplexity_ratio", "kl_mean", "probability_change_rms", "same_top",
    "greedy_first_difference", "greedy_same",
}  # fmt: skip
NUMBERS = {
    "bytes_per_token", "ratio", "bits_per_element", "kl_median", "kl_p90", "kl_p99", "kl_p999", "kl_max",
    "attention_error", "decode_seconds_per_step", "prefill_seconds_per_token", "tokens", "seconds",
    *AVERAGES, *(f"{name}_se" for name in AVERAGES),
}  # fmt: skip
BY_LAYER = {
    f"attention_{name}_by_layer{se}"
    for name in ("error", "error_keys", "error_values", "kl")
    for se in ("", "_se")
}


@pytest.fixture(scope="module")
def finished(checkpoint, text_file, tmp_path_factory):
    """Return the directory and the results of a sweep."""
    out = tmp_path_factory.mktemp("sweep")
    arguments = [
        "sweep",
        checkpoint,
        "--tokenizer",
        "bytes",
        "--text",
        text_file,
        "--out",
        out,
        "--formats",
        FORMATS,
    ]
    arguments += SMALL
    assert main(list(map(str, arguments))) == 0
    return out, json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def runs(finished):
    return {run["format"]: run for run in finished[1]["runs"]}


def test_results_record_the_model_the_text_and_the_settings(finished, checkpoint, text_file):
    _, results = finished
    assert (results["version"], results["complete"], results["failures"]) == (2, True, [])
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
        names = {"format", "identity", "key", "value", "layers", "dtype", "kl_parts", "kl_histogram"}
        assert run.keys() >= NUMBERS | BY_LAYER | names  # what version 2 has had from its beginning
        metrics = {metric.key for metric in METRICS} | {f"{m.key}_se" for m in METRICS if m.has_error}
        assert run.keys() == metrics | BY_LAYER | LATER | names | {"tokens", "seconds"}
        assert all(isinstance(run[name], int | float) for name in NUMBERS)
        assert run["tokens"] == 192 == sum(run["kl_histogram"]["counts"]) + run["kl_histogram"]["below"]
        assert all(len(run[name]) == 2 for name in BY_LAYER)
        assert run["attention_error"] == max(run["attention_error_by_layer"])
        assert (run["prefill_seconds_per_token"], run["decode_seconds_per_step"]) > (0, 0)


def test_the_reference_is_compared_with_itself_under_other_conditions(finished):
    reference, *others = finished[1]["runs"]
    chunks, dtype = reference["noise"]
    assert (chunks["conditions"], dtype["conditions"]) == (
        "chunks of 12, 2 sequences at once",
        "computing in bfloat16",
    )
    assert 0 <= chunks["kl_mean"] < 1e-8 < dtype["kl_mean"]
    assert np.mean(dtype["kl_parts"]) == pytest.approx(dtype["kl_mean"])
    assert all(run["noise"] is None for run in others)


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


def test_the_reference_is_exact_and_more_precise_formats_are_closer(runs):
    assert (runs["plain"]["kl_mean"], runs["plain"]["same_top"], runs["plain"]["dtype"]) == (0, 1, "float32")
    assert 0 < runs["raw"]["kl_mean"] < runs["int8:token/int8"]["kl_mean"] < 0.1
    assert 0 < runs["raw"]["attention_error"] < runs["int8:token/int8"]["attention_error"] < 0.1
    assert (runs["plain"]["greedy_same"], runs["plain"]["greedy_first_difference"]) == (1, 24)
    for run in runs.values():
        assert run["kl_median"] <= run["kl_p90"] <= run["kl_p99"] <= run["kl_p999"] <= run["kl_max"]
        assert run["bits_per_byte"] == pytest.approx(runs["plain"]["bits_per_byte"], abs=0.05)
        ratio = run["perplexity"] / runs["plain"]["perplexity"]
        assert run["perplexity_ratio"] == pytest.approx(ratio) == pytest.approx(1, abs=0.05)


def test_errors_of_keys_and_of_values_are_measured_apart(runs):
    plain, run = runs["plain"], runs["int8:token/int8"]
    assert plain["attention_error_by_layer"] == plain["attention_kl_by_layer"] == [0, 0]
    for layer in range(2):
        keys = run["attention_error_keys_by_layer"][layer]
        values = run["attention_error_values_by_layer"][layer]
        both = run["attention_error_by_layer"][layer]
        assert 0 < max(keys, values) < both < keys + values
        assert 0 < run["attention_kl_by_layer"][layer] < 0.01


def test_all_files_are_written(finished):
    written = {path.name for path in finished[0].iterdir()}
    assert written == {
        ".results.lock", "results.json", "report.html", "frontier.png", "frontier.svg", "layers.png",
        "layers.svg",
    }  # fmt: skip


def test_the_table_has_a_row_for_each_format_and_fits_80_columns(quick, sweep, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    output = sweep(*SMALL, "--formats", "int8,int8:token/fp8_e4m3").out
    *lines, report = output.splitlines()
    assert max(map(len, lines)) <= 80 and report.endswith("report.html")
    rows = [line.split()[0] for line in output.splitlines() if line.strip()]
    assert {"plain", "int8", "int8:token/fp8_e4m3"} <= set(rows)
    assert "text.txt: 192 tokens" in " ".join(output.split())
    assert "\x1b" not in output


def test_json_alone_is_printed_if_asked_for(quick, sweep):
    result = sweep(*SMALL, "--formats", "int8", "--json")
    assert json.loads(result.out) == json.loads((result.directory / "results.json").read_text())
    assert "qpaged sweep: int8" in result.err


def accepts_head_dim(spelling, head_dim):
    """Return True if the format can hold pages of that head_dim."""
    try:
        qpaged.get_quantizer(spelling).empty((1, 1, 8, head_dim), jnp.float32)
    except ValueError:
        return False
    return True


@pytest.mark.long
def test_formats_worth_a_look_are_the_default(quick, sweep):
    result = sweep(*SMALL, "--json")
    formats = [run["format"] for run in json.loads(result.out)["runs"]]
    left_out = ["int4+rotate", "int4+rotate+exact128", "int2+offset+rotate"]  # groups of 32
    assert formats == ["plain", *(format for format in LADDER if format not in left_out)]
    first, *others = result.err.splitlines()
    assert f"{len(formats)} formats, 192 tokens each; files go to {result.directory}" in first
    assert f"left out, since they do not go with head_dim 16: {', '.join(left_out)}." in others[0]


def test_formats_of_other_packages_are_among_the_default(monkeypatch):
    assert default_formats() == list(LADDER)
    monkeypatch.setattr("qpaged.sweep._formats.BUILT_IN", "another")
    assert set(default_formats()) == {*LADDER, *qpaged.available_formats()}


def test_all_is_every_wrapper_too(quick, sweep, monkeypatch):
    monkeypatch.setattr(qpaged, "available_formats", lambda wrapped: ("int8", "int8+rotate")[: 1 + wrapped])
    result = sweep(*SMALL, "--formats", "all", "--json")
    assert [run["format"] for run in json.loads(result.out)["runs"]] == ["plain", "int8", "int8+rotate"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_logical_dtype_applies_to_all_formats_but_the_reference(quick, sweep, dtype):
    runs = json.loads(sweep(*SMALL, "--formats", "raw", "--json", "--dtype", dtype).out)["runs"]
    assert [run["dtype"] for run in runs] == ["float32", dtype]
    assert runs[1]["bytes_per_token"] == 128 * (4 if dtype == "float32" else 2)


def test_a_format_that_fails_leaves_the_others(quick, sweep):
    def fail():
        raise RuntimeError("no such\nluck")

    quick.before["int8"] = fail
    result = sweep(*SMALL, "--formats", "int8,raw", "--json")
    results = json.loads(result.out)
    assert result.status == 1
    assert [run["format"] for run in results["runs"]] == ["plain", "raw"]
    assert results["failures"] == [{"format": "int8", "error": "RuntimeError: no such luck"}]
    assert "int8 failed: RuntimeError: no such luck" in result.err


def test_an_interrupt_keeps_what_is_finished(quick, sweep):
    def interrupt():
        raise KeyboardInterrupt

    quick.before["raw"] = interrupt
    result = sweep(*SMALL, "--formats", "int8,raw,fp8_e4m3")
    results = json.loads((result.directory / "results.json").read_text())
    assert result.status == 130
    assert not results["complete"]
    assert [run["format"] for run in results["runs"]] == ["plain", "int8"]
    assert "int8" in result.out
    assert "interrupted; finished: plain, int8." in result.err


def interrupted(quick, sweep, format, formats):
    """Run a sweep that is interrupted at a format."""

    def interrupt():
        raise KeyboardInterrupt

    quick.before[format] = interrupt
    assert sweep(*SMALL, "--formats", formats).status == 130
    del quick.before[format]
    quick.ran.clear()


def test_a_rerun_goes_on_where_it_was_interrupted(quick, sweep):
    interrupted(quick, sweep, "raw", "int8,raw,fp8_e4m3")
    result = sweep(*SMALL, "--formats", "int8,raw,fp8_e4m3", "--json")
    results = json.loads(result.out)
    assert (result.status, results["complete"]) == (0, True)
    assert set(quick.ran) == {"plain", "raw", "fp8_e4m3"}
    assert [run["format"] for run in results["runs"]] == ["plain", "int8", "raw", "fp8_e4m3"]
    assert "results.json has runs of plain, int8 already" in result.err
    assert ", by the time that those took." in result.err


def test_a_rerun_keeps_every_known_run(quick, sweep):
    # Neither formats that it was not asked for, nor those after the place where it is interrupted.
    sweep(*SMALL, "--formats", "int8,raw")
    interrupted(quick, sweep, "fp8_e4m3", "fp8_e4m3,int8")
    result = sweep(*SMALL, "--formats", "int8", "--json")
    assert quick.ran == []
    assert [run["format"] for run in json.loads(result.out)["runs"]] == ["plain", "int8", "raw"]


def test_results_of_another_sweep_are_set_aside(quick, sweep):
    first = sweep(*SMALL, "--formats", "int8")
    result = sweep(*SMALL, "--formats", "int8", "--seed", 1)
    assert "was of another sweep, or damaged, and is kept as results.old.json" in result.err
    kept = json.loads((first.directory / "results.old.json").read_text())
    assert kept["settings"]["seed"] is None


def test_the_same_text_by_another_name_is_the_same(quick, sweep, text_file):
    sweep(*SMALL, "--formats", "int8")
    quick.ran.clear()
    assert sweep(
        *SMALL, "--formats", "int8", text=text_file.parent / "." / ".." / text_file.parent.name / "text.txt"
    )
    assert quick.ran == []


def test_the_reference_alone_is_a_sweep(quick_with_figures, sweep):
    result = sweep(*SMALL, "--formats", "plain")
    assert result.status == 0 and (result.directory / "report.html").exists()


def test_markup_and_mathematics_in_names_are_plain_text(quick_with_figures, sweep, tmp_path, text_file):
    path = tmp_path / "t$x^{$ [red]a[b].txt"
    path.write_bytes(text_file.read_bytes())
    result = sweep(*SMALL, "--formats", "int8", text=path)
    assert result.status == 0 and "[red]a[b].txt" in "".join(result.out.split("\n")).replace(" " * 2, "")


def test_a_narrow_terminal_shows_the_main_columns(quick, sweep, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    rows = [line.split() for line in sweep(*SMALL, "--formats", "int8:token").out.splitlines()]
    assert ["int8:token", "*"] in [row[:2] for row in rows if len(row) == 5]


def test_a_rerun_of_what_is_finished_measures_nothing(quick, sweep):
    first = sweep(*SMALL, "--formats", "int8,raw", "--json")
    quick.ran.clear()
    again = sweep(*SMALL, "--formats", "raw,int8:page", "--json")  # int8 by its full name
    assert quick.ran == []
    runs = {run["identity"]: run for run in json.loads(first.out)["runs"]}
    for run in json.loads(again.out)["runs"]:
        assert run == runs[run["identity"]] | {"format": run["format"]}


@pytest.mark.short(2)
@pytest.mark.parametrize(
    "change",
    [("--fresh",), ("--seed", 1), ("--page-size", 16), ("--dtype", "float16"), ("--batch", 2)],
    ids=str,
)
def test_other_conditions_are_measured_anew(quick, sweep, change):
    sweep(*SMALL, "--formats", "int8")
    quick.ran.clear()
    assert sweep(*SMALL, "--formats", "int8", *change).status == 0
    assert set(quick.ran) == {"plain", "int8"}


def test_other_tokens_before_each_text_are_measured_anew(quick, sweep, monkeypatch):
    """They are no part of the tokenizer's hash: tokenizer_config.json decides on them."""
    sweep(*SMALL, "--formats", "int8")
    quick.ran.clear()
    monkeypatch.setattr(
        qpaged.sweep.measure._decoder, "load_tokenizer", lambda path: ByteTokenizer(prefix=(7,))
    )
    results = json.loads(sweep(*SMALL, "--formats", "int8", "--json").out)
    assert set(quick.ran) == {"plain", "int8"}
    assert results["text"]["prefix"] == [7] and results["text"]["tokenizer_sha256"] is None


def test_results_that_do_not_say_what_stood_before_each_text_are_set_aside(quick, sweep):
    directory = sweep(*SMALL, "--formats", "int8").directory
    results = json.loads((directory / "results.json").read_text())
    del results["text"]["prefix"]
    (directory / "results.json").write_text(json.dumps(results | {"digest": digest(results)}))
    quick.ran.clear()
    assert sweep(*SMALL, "--formats", "int8").status == 0
    assert set(quick.ran) == {"plain", "int8"} and (directory / "results.old.json").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1}', '{"runs": 3}'])
def test_a_results_file_that_cannot_be_used_is_measured_anew(quick, sweep, text):
    directory = sweep(*SMALL, "--formats", "int8").directory
    (directory / "results.json").write_text(text)
    quick.ran.clear()
    assert sweep(*SMALL, "--formats", "int8").status == 0
    assert set(quick.ran) == {"plain", "int8"}
    assert json.loads((directory / "results.json").read_text())["version"] == 2


def with_value(name, value):
    """Return a function that changes a field of the last run, and the digest with it."""

    def change(text):
        record = json.loads(text)
        assert name in record["runs"][-1]
        record["runs"][-1][name] = value
        return json.dumps({**record, DIGEST: digest(record)})

    return change


def damaged(text, place):
    return text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: damaged(text, text.index('"kl_mean": ', len(text) // 2) + len('"kl_mean": ')),
        lambda text: damaged(text, len(text) // 3),
        lambda text: text.replace('"kl_parts": [', '"kl_parts": [{}, '),
        lambda text: text.replace('"runs": [', '"runs": [7, '),
        lambda text: text[: len(text) // 2],
        lambda text: "[" * 100_000,
        with_value("kl_mean", "x"),
        with_value("kl_mean", None),
        with_value("probability_change_rms", float("inf")),
        with_value("tokens", 1.5),
        with_value("kl_parts", [None]),
    ],
)
def test_a_damaged_results_file_is_set_aside_and_measured_anew(quick, sweep, damage):
    directory = sweep(*SMALL, "--formats", "int8").directory
    path = directory / "results.json"
    text = damage(path.read_text())
    path.write_text(text)
    quick.ran.clear()
    assert sweep(*SMALL, "--formats", "int8").status == 0
    assert set(quick.ran) == {"plain", "int8"}
    assert (directory / "results.old.json").read_text() == text


def test_a_second_sweep_into_the_same_directory_is_refused(quick, sweep, tmp_path):
    (tmp_path / "out").mkdir()
    with claimed(tmp_path / "out"):
        result = sweep(*SMALL, "--formats", "int8")
    assert result.status == 2 and "--out must be for one sweep or search at a time, but" in result.err
    assert not quick.ran
    assert sweep(*SMALL, "--formats", "int8").status == 0


def test_a_lock_that_was_opened_before_its_release_keeps_others_out(tmp_path):
    fcntl = pytest.importorskip("fcntl", reason="this system locks files in another way")
    with claimed(tmp_path):
        late = (tmp_path / ".results.lock").open()
    with late:
        fcntl.flock(late, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="wait for it, or give another path"), claimed(tmp_path):
            pass
    with claimed(tmp_path):
        pass


def test_a_directory_in_the_place_of_a_file_is_noticed_before_anything_is_measured(quick, sweep, tmp_path):
    (tmp_path / "out/report.html").mkdir(parents=True)
    result = sweep(*SMALL, "--formats", "int8")
    assert result.status == 2 and "has a directory report.html, where a file is to go" in result.err
    assert not quick.ran


def test_results_are_on_disk_after_each_format(quick, sweep, tmp_path):
    def killed():
        runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
        assert [run["format"] for run in runs] == ["plain", "int8"]

    quick.before["raw"] = killed
    assert sweep(*SMALL, "--formats", "int8,raw").status == 0


def test_formats_by_layer_come_from_a_file(quick, sweep, tmp_path):
    path = tmp_path / "format.json"
    qpaged.CacheFormat.of("int8").with_layers({1: "plain/int8:token"}).save(path)
    run = json.loads(sweep(*SMALL, "--formats", path, "--json").out)["runs"][1]
    assert run["format"] == "format.json"
    assert run["layers"] == [["int8", "int8"], ["plain", "int8:token"]]
    assert run["bytes_per_token"] == 64 * (1 + 1 / 128) + 32 * 2 + 32 * (1 + 4 / 16)


def test_an_interrupt_before_anything_is_finished_writes_nothing(quick, sweep):
    def interrupt():
        raise KeyboardInterrupt

    quick.before["plain"] = interrupt
    result = sweep(*SMALL, "--formats", "int8")
    assert (result.status, result.out) == (130, "")
    assert "nothing was finished" in result.err
    assert not (result.directory / "results.json").exists()
