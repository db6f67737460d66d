"""What a sweep found, and its JSON form."""

import dataclasses
import json
import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

import qpaged
from qpaged.sweep._model import Model
from qpaged.sweep._run import Failure, Run
from qpaged.sweep._settings import Settings
from qpaged.sweep._text import Text

VERSION = 1


@dataclass(frozen=True)
class SweepResult:
    """The runs of a sweep, and all that is needed to do it again."""

    model: Model
    text: Text
    settings: Settings
    runs: tuple[Run, ...]
    failures: tuple[Failure, ...] = ()
    complete: bool = True
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def sequences(self) -> int:
        """Sequences that were measured."""
        return self.runs[0].tokens // self.settings.context if self.runs else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; see :func:`run_record` for those of a run."""
        return {
            "version": VERSION,
            "complete": self.complete,
            "model": _model_record(self.model),
            "text": {"source": self.text.source, "bytes": len(self.text.data), "sha256": self.text.sha256},
            "reference": "plain pages in float32, the precision that the model computes in",
            "settings": _settings_record(self.settings) | {"sequences": self.sequences},
            "environment": _environment() | {"date": self.date},
            "runs": [run_record(run) for run in self.runs],
            "failures": [dataclasses.asdict(failure) for failure in self.failures],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"


def pareto_front(runs: tuple[Run, ...]) -> list[Run]:
    """The runs that no other beats: none is both as small and as close, and better in one; smallest first."""
    front: list[Run] = []
    for run in sorted(runs, key=lambda run: (run.bytes_per_token, run.accuracy.kl_mean)):
        if not front or run.accuracy.kl_mean < front[-1].accuracy.kl_mean:
            front.append(run)
    return front


def run_record(run: Run) -> dict[str, Any]:
    """A run as JSON: its fields, the accuracy's among them; errors of attention by layer and the worst."""
    record = dataclasses.asdict(run)
    accuracy, errors = record.pop("accuracy"), list(record.pop("attention_error"))
    rest = {name: record.pop(name) for name in ("tokens", "seconds")}
    rest["seconds"] = round(rest["seconds"], 3)
    worst = run.worst_attention_error
    return record | accuracy | {"attention_error": worst, "attention_error_by_layer": errors} | rest


def write_json(result: SweepResult, directory: Path) -> Path:
    """Write ``results.json``."""
    path = directory / "results.json"
    path.write_text(result.to_json(), encoding="utf-8")
    return path


def _model_record(model: Model) -> dict[str, Any]:
    sizes = {"parameters": model.parameters, "cache_elements_per_token": model.elements_per_token}
    return {"name": model.name, "path": model.path or "bundled tiny model", **sizes, "sha256": model.sha256}


def _settings_record(settings: Settings) -> dict[str, Any]:
    return dataclasses.asdict(settings) | {"decode": settings.decoded, "prefill": settings.prefilled}


def _environment() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "qpaged": qpaged.__version__,
        "device": jax.devices()[0].device_kind,
        "platform": f"{platform.system()} {platform.machine()}",
    }
