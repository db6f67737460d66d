"""What a sweep found, and its JSON form."""

import dataclasses
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

import qpaged
from qpaged.sweep._attention import AttentionProfile
from qpaged.sweep._metrics import Accuracy
from qpaged.sweep._model import Model
from qpaged.sweep._run import Failure, Greedy, Run, Sweep

VERSION = 2
RESULTS = "results.json"
LAST = ("decode_seconds_per_step", "prefill_seconds_per_token", "tokens", "seconds")  # in a run's record


@dataclass(frozen=True)
class SweepResult:
    """The runs of a sweep, and all that is needed to do it again.

    Attributes:
        tune: the record of a :class:`Tuned`; None for a sweep.
    """

    sweep: Sweep
    runs: tuple[Run, ...]
    failures: tuple[Failure, ...] = ()
    complete: bool = True
    tune: dict[str, Any] | None = None
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; see :func:`run_record` for those of a run."""
        record = {
            "version": VERSION,
            "complete": self.complete,
            **conditions(self.sweep),
            "runs": [run_record(run) for run in self.runs],
            "failures": [dataclasses.asdict(failure) for failure in self.failures],
        }
        record["environment"] |= {"date": self.date}
        if self.runs:  # a search measures on a part of them
            record["settings"]["sequences"] = self.runs[0].tokens // self.sweep.settings.context
        return record if self.tune is None else record | {"tune": self.tune}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"


def conditions(sweep: Sweep) -> dict[str, Any]:
    """What the numbers of a run hang on, but for its format."""
    text, settings = sweep.text, sweep.settings
    return {
        "model": _model_record(sweep.model),
        "text": {
            "source": text.source,
            "bytes": len(text.data),
            "sha256": text.sha256,
            "tokenizer": sweep.model.tokenizer.name,
            "tokenizer_sha256": sweep.model.tokenizer.sha256,
        },
        "reference": sweep.model.reference,
        "settings": dataclasses.asdict(settings)
        | {
            "decode": settings.decoded,
            "prefill": settings.prefilled,
            "generated": settings.continued,
            "prompt": settings.prompt,
            "sequences": len(sweep.sequences.tokens),
        },
        "environment": _environment(),
    }


def run_record(run: Run) -> dict[str, Any]:
    """A run as JSON: its fields, those of its parts among them; attention's errors by layer and the worst."""
    record = dataclasses.asdict(run)
    accuracy, greedy, attention = (record.pop(name) for name in ("accuracy", "greedy", "attention"))
    rest = {name: record.pop(name) for name in LAST}
    return (
        record
        | accuracy
        | {f"greedy_{name}": value for name, value in greedy.items()}
        | {"attention_error": run.worst_attention_error}
        | {_by_layer(each.name): (attention or {}).get(each.name, []) for each in fields(AttentionProfile)}
        | rest
    )


def run_of(record: Mapping[str, Any]) -> Run:
    """The inverse of :func:`run_record`.

    Raises:
        KeyError: a number is missing.
    """

    def part(kind: Any, name: Any) -> Any:
        return kind(**{each.name: record[name(each.name)] for each in fields(kind)})

    attention = None if record["attention_error"] is None else part(AttentionProfile, _by_layer)
    parts = {
        "accuracy": part(Accuracy, str),
        "greedy": part(Greedy, "greedy_{}".format),
        "attention": attention,
    }
    names = {each.name for each in fields(Run)} - parts.keys()
    return Run(**{name: record[name] for name in names}, **parts)


def known_runs(sweep: Sweep, directory: Path) -> tuple[Run, ...]:
    """The runs that an earlier sweep left in ``directory`` and that this one would repeat.

    None of them where the file there is of another version, model, text, tokenizer, settings or environment,
    or no results at all: a sweep may always be started anew.
    """
    try:
        record = json.loads((directory / RESULTS).read_text(encoding="utf-8"))
        if record["version"] != VERSION or same_conditions(record) != same_conditions(conditions(sweep)):
            return ()
        return tuple(run_of(run) for run in record["runs"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ()


def same_conditions(record: Mapping[str, Any]) -> Any:
    """What must be the same for results to be taken up again: hashes, settings and versions, but no names."""
    environment = {name: value for name, value in record["environment"].items() if name != "date"}
    hashes = record["model"]["sha256"], record["text"]["sha256"], record["text"]["tokenizer_sha256"]
    return json.loads(json.dumps([hashes, record["reference"], record["settings"], environment]))


def set_aside(directory: Path) -> Path | None:
    """Rename the results that lie in ``directory``, so that those of another sweep do not replace them."""
    path = directory / RESULTS
    if not path.exists():
        return None
    return path.replace(directory / "results.old.json")


def write_json(result: SweepResult, directory: Path) -> Path:
    """Write ``results.json``, whole or not at all."""
    path = directory / RESULTS
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(result.to_json(), encoding="utf-8")
    partial.replace(path)
    return path


def _by_layer(name: str) -> str:
    """``error_se`` as ``attention_error_by_layer_se``."""
    stem, se = (name[:-3], "_se") if name.endswith("_se") else (name, "")
    return f"attention_{stem}_by_layer{se}"


def _model_record(model: Model) -> dict[str, Any]:
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


def _environment() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "qpaged": qpaged.__version__,
        "device": jax.devices()[0].device_kind,
        "platform": f"{platform.system()} {platform.machine()}",
    }
