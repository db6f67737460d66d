"""Several processes that do one thing together, as saving a cache: what fails in one of them fails in all."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from qpaged._files import digest


class Processes:
    """The processes that have devices of a mesh.

    Args:
        mesh: None, or one of this process alone, for this process without the others.

    Raises:
        ValueError: a mesh of some of the processes.
    """

    def __init__(self, mesh: Mesh | AbstractMesh | None = None):
        devices = mesh.devices.flat if isinstance(mesh, Mesh) else ()
        numbers = {device.process_index for device in devices}
        self.are_many = bool(numbers - {jax.process_index()})
        if self.are_many and len(numbers) != jax.process_count():
            raise ValueError(
                f"mesh must have devices of this process alone, or of all {jax.process_count()}, but has "
                f"some of {len(numbers)}; give one of either kind."
            )

    @property
    def number(self) -> int:
        """Which of them this process is; 0 if it is alone."""
        return jax.process_index() if self.are_many else 0

    def all_do(self, step: Callable[[], Any]) -> list[Any]:
        """Return what a step gives, plain JSON, in each of the processes, all of which take it.

        Raises:
            OSError: it failed in another process. What fails in this one is raised as it is.
        """
        if not self.are_many:
            return [step()]
        failure: BaseException | None = None
        said: dict[str, Any] = {}
        try:
            said = {"done": step()}
        except BaseException as error:
            failure, said = error, {"failed": f"{type(error).__name__}: {error}"}
        everyone = [json.loads(text) for text in _gathered(json.dumps(said).encode())]
        if failure is not None:
            raise failure
        for number, other in enumerate(everyone):
            if "failed" in other:
                raise OSError(f"process {number} failed, so that no other goes on: {other['failed']}")
        return [other["done"] for other in everyone]

    def agree_on(self, name: str, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what a step gives, plain JSON, the same in each of the processes, all of which take it.

        Args:
            name: the argument that it is made of.
            step: fails in all where it fails in one.

        Raises:
            ValueError: it gives something else in another process.
            OSError: it failed in another process.
        """
        made: dict[str, Any] = {}

        def take() -> str:
            made.update(step())
            return digest(made)

        digests = self.all_do(take)
        if len(set(digests)) > 1:
            raise ValueError(
                f"{name} must be the same in all processes, but is another one in some; make the same calls "
                f"in each."
            )
        return made


def _gathered(data: bytes) -> list[bytes]:
    """Return the bytes of every process, in their order."""
    from jax.experimental import multihost_utils

    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]
