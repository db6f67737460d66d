"""``qpaged merge``: formats that were measured apart, in one table."""

import json

import pytest

from qpaged import sweep
from qpaged.cli import main

QUICK = ("--tokenizer", "bytes", "--tokens", 100, "--context", 48, "--page-size", 8, "--quick")


def measure(checkpoint, text_file, out, formats, *options):
    arguments = (
        "sweep",
        checkpoint,
        "--text",
        text_file,
        "--out",
        out,
        "--formats",
        formats,
        *QUICK,
        *options,
    )
    assert main(list(map(str, arguments))) == 0
    return out


@pytest.fixture(scope="module")
def parts(checkpoint, text_file, tmp_path_factory):
    """Return the directories of two sweeps, and of one of all their formats."""
    folder = tmp_path_factory.mktemp("parts")
    for name in ("a", "b", "whole"):
        (folder / name).mkdir()
    return (
        measure(checkpoint, text_file, folder / "a", "int8,raw"),
        measure(checkpoint, text_file, folder / "b", "int8:token,int8"),
        measure(checkpoint, text_file, folder / "whole", "int8,raw,int8:token"),
    )


def numbers(run):
    return {name: value for name, value in run.items() if "seconds" not in name}


def test_it_gives_what_one_sweep_does(parts, tmp_path, capsys):
    first, second, whole = parts
    assert main(["merge", str(first), str(second / "results.json"), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "int8:token" in out and "raw" in out and "The report: " in out
    merged = sweep.read_results(tmp_path)
    expected = sweep.read_results(whole)
    assert [run["format"] for run in merged["runs"]] == ["plain", "int8", "raw", "int8:token"]
    by_format = {run["format"]: numbers(run) for run in expected["runs"]}
    assert {run["format"]: numbers(run) for run in merged["runs"]} == by_format
    assert merged["complete"] and not merged["failures"]
    assert (tmp_path / "report.html").exists()


def test_the_first_run_of_a_format_counts_and_failures_only_without_one(parts):
    first, second = map(sweep.read_results, parts[:2])
    first["failures"] = [{"format": "int8:token", "error": "x"}, {"format": "other", "error": "y"}]
    merged = sweep.merged([first, second])
    [of_first] = [run for run in first["runs"] if run["format"] == "int8"]
    [kept] = [run for run in merged["runs"] if run["format"] == "int8"]
    assert kept is of_first
    assert merged["failures"] == [{"format": "other", "error": "y"}]
    assert not sweep.merged([first, {**second, "complete": False}])["complete"]


def test_other_conditions_are_refused(parts, checkpoint, text_file, tmp_path, capsys):
    other = measure(checkpoint, text_file, tmp_path, "int8", "--page-size", 16)
    assert main(["merge", str(parts[0]), str(other), "--out", str(tmp_path / "out")]) == 2
    assert "number 2 differs from the first in settings; sweep both alike" in capsys.readouterr().err
    with pytest.raises(ValueError, match="results must be those of one sweep at least, but are none"):
        sweep.merged([])


def test_files_that_are_none_are_refused(parts, tmp_path, capsys):
    assert main(["merge", str(tmp_path / "nothing.json")]) == 2
    assert "nothing.json" in capsys.readouterr().err
    changed = json.loads((parts[0] / "results.json").read_text())
    changed["runs"][0]["kl_mean"] = 0.5
    (tmp_path / "results.json").write_text(json.dumps(changed))
    assert main(["merge", str(tmp_path)]) == 2
    assert "must be what qpaged sweep wrote, but cannot be read: its digest does not match" in (
        capsys.readouterr().err
    )
