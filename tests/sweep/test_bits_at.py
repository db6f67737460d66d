"""Bytes that are counted for sequences of another length than those that are measured."""

import json

import pytest

SMALL = ("--tokens", 96, "--context", 48, "--page-size", 8, "--quick")


def bits_of(done):
    return {
        run["format"]: run["bits_per_element"]
        for run in json.loads((done.directory / "results.json").read_text())["runs"]
    }


def test_exact_pages_are_a_small_part_of_long_sequences(sweep):
    formats = ("--formats", "int8,int8+exact8")
    short = bits_of(sweep(*SMALL, *formats))
    done = sweep(*SMALL, *formats, "--bits-at", "32k")
    long = bits_of(done)
    assert long["int8"] == short["int8"]
    assert short["int8+exact8"] > 10 and 0 < long["int8+exact8"] - long["int8"] < 0.1
    assert "Bytes are those of sequences of 32,768 tokens." in " ".join(done.out.split())


def test_a_budget_of_bits_is_one_of_long_sequences(sweep, command, text_file, checkpoint, tmp_path):
    arguments = (*SMALL, "--formats", "int8+exact8", "--bits", "8.2", "--out", tmp_path / "a.json")
    assert command("tune", *arguments, model=checkpoint).status == 1
    assert command("tune", *arguments, "--bits-at", "32k", model=checkpoint).status == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits-at", "1"), "--bits-at must be at least 2, but came as 1"),
        (
            ("--bits-at", "2", "--step", "a:b"),
            "--bits-at must be left out with --step, whose cache has one length",
        ),
    ],
)
def test_a_length_that_cannot_be_counted(sweep, command, options, message):
    done = command("sweep", *options, model=None)
    assert done.status == 2
    assert message in " ".join(done.err.split())
