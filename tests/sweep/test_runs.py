"""Tests of runs as records of JSON, and of their old attributes."""

import pytest

from qpaged.sweep import METRICS, AttentionProfile, Run
from qpaged.sweep.results import run_from_record, run_record


def make_run(attention=None):
    metrics = {}
    for number, metric in enumerate(METRICS):
        metrics[metric.key] = float(number)
        if metric.has_error:
            metrics[f"{metric.key}_se"] = number / 100
    return Run(
        format="int8",
        identity="{}",
        key="int8",
        value="int8",
        layers=None,
        dtype="bfloat16",
        metrics=metrics,
        kl_parts=[0.1, 0.2],
        kl_histogram={"log10_edges": [-1.0, 0.0], "counts": [2], "below": 0},
        attention=attention,
        tokens=16,
        seconds=1.5,
    )


def test_a_run_survives_its_record():
    profile = AttentionProfile([0.1], [None], [0.2], [None], [0.3], [None], [0.4], [None])
    for attention in (None, profile):
        run = make_run(attention)
        assert run_from_record(run_record(run)) == run


def test_a_run_from_before_there_was_noise_has_none():
    record = run_record(make_run())
    del record["noise"]
    assert run_from_record(record).noise is None


def test_a_record_without_a_metric_is_refused():
    record = run_record(make_run())
    del record["kl_mean"]
    with pytest.raises(KeyError, match="kl_mean"):
        run_from_record(record)


def test_old_attributes_go_on_working_with_a_warning():
    run = make_run()
    with pytest.warns(DeprecationWarning, match=r"Run\.accuracy is now Run\.metrics"):
        assert run.accuracy.kl_mean == run.kl_mean
    with pytest.warns(DeprecationWarning, match=r"Run\.greedy is now Run\.metrics"):
        assert run.greedy.first_difference == run.metrics["greedy_first_difference"]
