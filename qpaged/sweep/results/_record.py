"""The result of a sweep, and its form as JSON."""

import dataclasses
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

import jax

import qpaged
from qpaged._bad_argument import BadArgumentError
from qpaged._files import DIGEST, digest
from qpaged.sweep.measure import METRICS, AttentionProfile, Failure, Model, Run, Sweep

VERSION = 2

MAX_KL = 0.01
"""Nats a token: the mean KL up to which verdicts take a format to be good enough, unless told otherwise."""

LATER = frozenset({"noise", "tasks", "needles", "kl_by_position", "kl_by_position_se"})
"""Fields of a run that results from before they existed do not have."""

Record = dict[str, Any]
"""A JSON object."""


@dataclass(frozen=True)
class SweepResult:
    """The runs of a sweep, and everything that is needed to repeat it.

    Attributes:
        complete: False after an interrupt.
        tune: the record of a :class:`Tuned`; None for a sweep.
        max_kl: nats a token; the mean KL up to which the verdict takes a format to be good enough.

    Raises:
        BadArgumentError: ``max_kl`` is not positive, or not finite.
    """

    sweep: Sweep
    runs: tuple[Run, ...]
    failures: tuple[Failure, ...] = ()
    complete: bool = True
    tune: Record | None = None
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    max_kl: float = MAX_KL

    def __post_init__(self) -> None:
        check_max_kl(self.max_kl)

    def to_dict(self) -> Record:
        """Return plain JSON values; see :func:`run_record` for those of a run."""
        record = {
            "version": VERSION,
            "complete": self.complete,
            "max_kl": self.max_kl,
            **conditions(self.sweep),
            "runs": [run_record(run) for run in self.runs],
            "failures": [dataclasses.asdict(failure) for failure in self.failures],
        }
        record["environment"]["date"] = self.date
        if self.runs:
            # A search measures its runs on some of the sequences only.
            record["settings"]["sequences"] = self.runs[0].tokens // self.sweep.settings.context
        if self.tune is not None:
            record["tune"] = self.tune
        return record

    def to_json(self) -> str:
        return json_of(self.to_dict())


def check_max_kl(max_kl: float) -> None:
    """Raise BadArgumentError unless a KL is positive and finite."""
    if not 0 < max_kl < math.inf:
        raise BadArgumentError(
            "max_kl", f"must be above 0 nats a token, and finite, but came as {max_kl:g}; {MAX_KL} is usual."
        )


def json_of(record: Record) -> str:
    """Return a record as JSON, with its digest."""
    record = {name: value for name, value in record.items() if name != DIGEST}
    return json.dumps({**record, DIGEST: digest(record)}, indent=2, allow_nan=False) + "\n"


def conditions(sweep: Sweep) -> Record:
    """Return everything but the format that the numbers of a run depend on."""
    text, settings, tokenizer = sweep.text, sweep.settings, sweep.model.tokenizer
    return {
        "model": _model_record(sweep.model),
        "text": {
            "source": text.source,
            "bytes": len(text.data),
            "sha256": text.sha256,
            "tokenizer": tokenizer.name,
            "tokenizer_sha256": tokenizer.sha256,
            # Not in the hash: tokenizer_config.json, beside the tokenizer's file, has a say in it.
            "prefix": list(tokenizer.prefix),
        },
        "tasks": [
            {"name": task.name, "questions": len(task.questions), "sha256": task.sha256}
            for task in sweep.tasks
        ],
        "reference": sweep.model.reference,
        "settings": {
            **dataclasses.asdict(settings),
            "decode": settings.decoded,
            "prefill": settings.prefilled,
            "generated": settings.continued,
            "prompt": settings.prompt,
            "sequences": len(sweep.sequences.tokens),
        },
        "environment": _environment_record(),
    }


def same_conditions(record: Mapping[str, Any]) -> list[Any]:
    """Return the part of the conditions that must be equal for results to be resumed.

    That is hashes, the prefix, settings, versions and tasks; other names and dates may differ.

    Raises:
        KeyError: the record is of an earlier version, which did not say all of that.
    """
    text = record["text"]
    environment = {name: value for name, value in record["environment"].items() if name != "date"}
    hashes = [record["model"]["sha256"], text["sha256"], text["tokenizer_sha256"]]
    tasks = [[task["name"], task["sha256"]] for task in record.get("tasks", [])]
    parts = [hashes, text["prefix"], record["reference"], record["settings"], environment, tasks]
    return json.loads(json.dumps(parts))  # so that values compare equal to those read from a file


def run_record(run: Run) -> Record:
    """Return a run as JSON: its fields, its metrics, and the attention errors by layer."""
    record: Record = {}
    for attribute in fields(Run):
        if attribute.name == "metrics":
            record |= run.metrics
        elif attribute.name == "attention":
            record |= _attention_record(run.attention)
        else:
            record[attribute.name] = getattr(run, attribute.name)
    return record


def run_from_record(record: Mapping[str, Any]) -> Run:
    """Return the run that :func:`run_record` recorded.

    Raises:
        KeyError: a field or a metric is missing.
        ValueError: a metric is no finite number, or a field is of another type.
    """
    values: Record = {}
    for attribute in fields(Run):
        if attribute.name == "metrics":
            values["metrics"] = _recorded_metrics(record)
        elif attribute.name == "attention":
            values["attention"] = _recorded_attention(record)
        elif attribute.name in LATER:
            values[attribute.name] = record.get(attribute.name)
        else:
            values[attribute.name] = record[attribute.name]
    types = {"format": str, "identity": str, "key": str, "value": str, "dtype": str, "tokens": int}
    wrong = [name for name, kind in types.items() if type(values[name]) is not kind]
    parts = values["kl_parts"]
    if wrong or not isinstance(parts, list) or not all(map(is_number, [values["seconds"], *parts])):
        raise ValueError(f"runs must have {', '.join(types)}, seconds and kl_parts of their types.")
    return Run(**values)


def is_number(value: Any) -> bool:
    """Return True for a finite number, as of JSON."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _recorded_metrics(record: Mapping[str, Any]) -> dict[str, float | None]:
    metrics = {}
    for metric in METRICS:
        metrics[metric.key] = record[metric.key]
        if metric.has_error:
            metrics[f"{metric.key}_se"] = record[f"{metric.key}_se"]
    wrong = [key for key, value in metrics.items() if value is not None and not is_number(value)]
    if wrong or not is_number(metrics["kl_mean"]):
        raise ValueError(
            f"metrics must be finite numbers, or null, but {', '.join(wrong) or 'kl_mean'} is not."
        )
    return metrics


def _attention_record(attention: AttentionProfile | None) -> Record:
    """Return the attention errors by layer; empty lists where layers cannot be inspected."""
    names = [attribute.name for attribute in fields(AttentionProfile)]
    if attention is None:
        return {_layer_key(name): [] for name in names}
    return {_layer_key(name): getattr(attention, name) for name in names}


def _recorded_attention(record: Mapping[str, Any]) -> AttentionProfile | None:
    names = [attribute.name for attribute in fields(AttentionProfile)]
    lists = {name: record[_layer_key(name)] for name in names}
    if not lists["error"]:
        return None
    return AttentionProfile(**lists)


def _layer_key(name: str) -> str:
    """Return the JSON key of a field of AttentionProfile, as ``attention_error_by_layer_se`` of error_se."""
    if name.endswith("_se"):
        return f"attention_{name.removesuffix('_se')}_by_layer_se"
    return f"attention_{name}_by_layer"


def _model_record(model: Model) -> Record:
    return {
        "name": model.name,
        "path": model.path or "bundled tiny model",
        "architecture": model.architecture,
        "parameters": model.parameters,
        "layers": model.layers,
        "kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "cache_elements_per_token": model.elements_per_token,
        "sha256": model.sha256,
    }


def _environment_record() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "qpaged": qpaged.__version__,
        "device": jax.devices()[0].device_kind,
        "platform": f"{platform.system()} {platform.machine()}",
    }
