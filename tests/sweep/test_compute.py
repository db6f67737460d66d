"""What a sweep computes in, in what pieces, and what it compiles ahead."""

import dataclasses
import json
import logging
import threading

import jax
import numpy as np
import pytest

import qpaged
from qpaged.sweep import Settings, Sweep, load_model, load_text
from qpaged.sweep.measure import _predictions
from qpaged.sweep.measure._ahead import one_ahead

SMALL = ("--tokens", "96", "--context", "48", "--page-size", "8", "--quick", "--formats", "int8")


def runs_of(done):
    return {run["format"]: run for run in json.loads((done.directory / "results.json").read_text())["runs"]}


def test_a_model_in_bfloat16_is_another_model(sweep):
    in_float32 = runs_of(sweep(*SMALL))
    done = sweep(*SMALL, "--compute", "bfloat16")
    assert "checkpoint0 in bfloat16 on" in done.err
    assert "results.json was of another sweep" in done.err  # and is kept beside the new one
    runs = runs_of(done)
    assert runs["plain"]["kl_mean"] == 0 < runs["int8"]["kl_mean"] != in_float32["int8"]["kl_mean"]
    assert runs["plain"]["bits_per_byte"] != in_float32["plain"]["bits_per_byte"]


def test_compute_does_not_go_with_a_step(command):
    done = command("sweep", "--step", "a:b", "--compute", "bfloat16", model=None)
    assert done.status == 2
    assert "--compute must be left out with --step, which computes as it does." in done.err


def test_a_model_computes_in_no_other_dtype(checkpoint):
    with pytest.raises(ValueError, match="compute must be one of float32, bfloat16, but came as 'int8'"):
        load_model(checkpoint, "bytes").computing_in("int8")


def small_sweep(checkpoint, text_file, *formats):
    settings = Settings.of_predictions_alone(tokens=96, context=48, page_size=8, chunk=10)
    return Sweep(load_model(checkpoint, "bytes"), load_text(text_file), formats, settings)


def test_logits_in_blocks_are_the_same(checkpoint, text_file, monkeypatch):
    job = small_sweep(checkpoint, text_file, "int8")
    (_, whole) = job.run(lambda *_: None)
    monkeypatch.setattr(_predictions, "LOGITS_AT_ONCE", 3 * job.model.vocabulary)
    (_, in_blocks) = job.run(lambda *_: None)
    np.testing.assert_allclose(in_blocks.kl_parts, whole.kl_parts, rtol=1e-5)
    assert in_blocks.metrics["same_top"] == whole.metrics["same_top"]


@pytest.mark.short(1)
@pytest.mark.parametrize("spelling", ["int8", "int4:token+rotate+exact1"])
def test_what_is_compiled_ahead_is_not_compiled_again(checkpoint, text_file, spelling, caplog):
    jax.clear_caches()
    job = small_sweep(checkpoint, text_file, spelling)
    cache_format, rows = qpaged.CacheFormat.of(spelling), len(job.sequences.tokens)
    settings = dataclasses.replace(job.settings, decode=4)
    stream = job.model.stream(cache_format, settings, rows)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        job.model.compile(cache_format, settings, rows)
        assert "Finished XLA compilation of jit(_write_and_attend)" in caplog.text
        caplog.clear()
        stream.begin(rows)
        for _ in stream.prefill(job.sequences.tokens[:, : settings.prefilled]):
            pass
        stream.decode(job.sequences.tokens[:, 0], settings.prefilled)
    assert "XLA compilation of jit(_final_norm)" in caplog.text  # which belongs to the model
    assert "compilation of jit(_write_and_attend)" not in caplog.text and "jit(_reset)" not in caplog.text


def test_each_item_is_prepared_while_the_one_before_it_is_worked_on():
    prepared, third = [], threading.Event()

    def prepare(item):
        prepared.append(item)
        if item == 2:
            third.set()
        if item == 1:
            raise ValueError("as the work itself will")

    items = one_ahead([0, 1, 2, 3], prepare)
    assert next(items) == 0 and prepared[0] == 0
    assert next(items) == 1 and prepared[:2] == [0, 1]
    assert third.wait(10) and prepared == [0, 1, 2]  # while the second is worked on, and no further
    assert list(items) == [2, 3] and prepared == [0, 1, 2, 3]
