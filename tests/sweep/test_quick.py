"""``qpaged sweep --quick``: predictions alone, and rows as they are measured."""

import json
import re

from qpaged.cli import main

SMALL = ("--tokens", "96", "--context", "48", "--page-size", "8")
LEFT_OUT = "decode_seconds_per_step", "attention_error", "greedy_first_difference", "greedy_same"


def test_predictions_alone_are_measured_and_said_at_once(checkpoint, text_file, tmp_path, capsys):
    command = ["sweep", str(checkpoint), "--tokenizer", "bytes", "--text", str(text_file), *SMALL, "--quick"]
    assert main([*command, "--formats", "int8:token", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert "qpaged sweep: plain: 32.00 bits an element, KL 0, same top-1 100.00 %, " in said
    assert re.search(
        r"\nqpaged sweep: int8:token: [\d.]+ bits an element, KL \d.*, same top-1 .* %, \d+ s\n", said
    )
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    for run in runs:
        assert [run[key] for key in LEFT_OUT] == [None] * len(LEFT_OUT)
        assert run["attention_error_by_layer"] == []
    assert 0 == runs[0]["kl_mean"] < runs[1]["kl_mean"]
    assert (tmp_path / "report.html").exists()

    assert main([*command, "--formats", "int8:token", "--out", str(tmp_path)]) == 0
    assert "bits an element" not in capsys.readouterr().err  # nothing was measured
