"""The file of results of ``real_models.py``: one record for each model, format and condition."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np
from record import circumstances

from qpaged.sweep.measure import Predictions, token_estimate

RESULTS = Path(__file__).parent / "results" / "real_models.json"
BIN = 64
"""Positions of a bin of the KL by position."""


class Identity(TypedDict):
    """What tells whether two records are of the same measurement; a newer one may have other code.

    Attributes:
        engine: ``qpaged``, or the peer that was measured.
        skip_first: positions of each sequence that the numbers leave out.
        text: the SHA-256 of the text, whose source is in :attr:`Results.texts`.
        code: a hash of the code that the numbers depend on, or the peer's version.
    """

    engine: str
    model: str
    format: str
    context: int
    sequences: int
    page_size: int
    skip_first: int
    text: str
    code: str


class Summary(TypedDict):
    """Numbers of a format's predictions; KL is that from the float cache's, in nats a token.

    Attributes:
        tokens: how many, from position ``skip_first`` on.
        kl_mean_se: the standard error of the mean, over sequences or parts of them.
        same_top: share of tokens whose likeliest next token is the float cache's.
        nll: of the text in this format, in nats a token.
        kl_by_position: means over bins of 64 positions, all positions included.
    """

    tokens: int
    kl_mean: float
    kl_mean_se: float | None
    kl_median: float
    kl_p99: float
    same_top: float
    same_top_se: float | None
    nll: float
    kl_by_position: list[float]


class Record(Identity, Summary):
    """What was measured of one format under one condition.

    Attributes:
        bits_packed: bits of a value in packed pages, scales included.
        bits: bits of a value of the whole cache of one sequence, by its tokens.
        seconds: of the measurement, compilations included.
    """

    bits_packed: float
    bits: dict[str, float]
    seconds: float
    date: str
    versions: dict[str, str]


class Results(TypedDict):
    """The file.

    Attributes:
        device: what the newest record was measured on.
        models: of each model, its sizes, its packages and the hash of its checkpoint.
        texts: of each text, by its hash, its source and bytes.
    """

    device: str
    models: dict[str, dict[str, str | int]]
    texts: dict[str, dict[str, str | int]]
    runs: list[Record]


def summarize(predictions: Predictions[np.ndarray], skip_first: int = 0) -> Summary:
    """Summarize predictions [sequences, context] of the positions from ``skip_first`` on."""
    kl = predictions.kl[:, skip_first:]
    same_top = predictions.same_top[:, skip_first:]
    mean, top = _mean(kl), _mean(same_top)
    by_position = predictions.kl.mean(axis=0)
    bins = [by_position[start : start + BIN].mean() for start in range(0, len(by_position), BIN)]
    return {
        "tokens": kl.size,
        "kl_mean": mean[0],
        "kl_mean_se": mean[1],
        "kl_median": _short(np.median(kl)),
        "kl_p99": _short(np.percentile(kl, 99)),
        "same_top": top[0],
        "same_top_se": top[1],
        "nll": _short(-predictions.log_q[:, skip_first:].mean()),
        "kl_by_position": [_short(value) for value in bins],
    }


def _mean(values: np.ndarray) -> tuple[float, float | None]:
    """Return the mean of values [sequences, tokens] and its standard error."""

    def statistic(sums: np.ndarray) -> float:
        total, count = sums
        return total / count

    value, error = token_estimate(statistic, values, np.ones_like(values))
    assert value is not None
    if error is None:
        return _short(value), None
    return _short(value), _short(error)


def _short(value: float | np.floating) -> float:
    """Return a number of four digits."""
    return float(f"{value:.4g}")


def empty() -> Results:
    """Return results without records."""
    return {"device": "", "models": {}, "texts": {}, "runs": []}


def read(path: Path = RESULTS) -> Results:
    """Read a file of results; there are none if it does not exist."""
    if not path.exists():
        return empty()
    results: Results = json.loads(path.read_text())
    return results


def find(results: Results, identity: Identity) -> Record | None:
    """Return the record of a measurement; None if there is none."""
    return next((run for run in results["runs"] if _identity(run) == _identity(identity)), None)


def add(results: Results, record: Record) -> None:
    """Add a record in place of that of the same measurement with whatever code."""
    results["device"] = circumstances()["device"]
    for index, run in enumerate(results["runs"]):
        if _identity(run) | {"code": ""} == _identity(record) | {"code": ""}:
            results["runs"][index] = record
            return
    results["runs"].append(record)


def _identity(record: Mapping[str, object]) -> dict[str, object]:
    """Return the fields of a record that :class:`Identity` has."""
    return {name: record[name] for name in Identity.__annotations__}


def save(results: Results, path: Path = RESULTS) -> None:
    """Write the results in one step, with a line for each record."""
    head = {name: value for name, value in results.items() if name != "runs"}
    runs = ",\n".join(f"  {json.dumps(run, allow_nan=False)}" for run in results["runs"])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "runs": [\n{runs}\n ]\n}}\n')
    partial.replace(path)
