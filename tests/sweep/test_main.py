"""Tests of what every command does about errors that are not its own: of devices, pipes and interrupts."""

import os
import subprocess
import sys

import jax
import pytest

import qpaged.cli
from qpaged._bad_argument import BadArgumentError
from qpaged.cli import main
from qpaged.cli.commands import formats

NO_MEMORY = "qpaged formats: the memory is not enough; give a smaller --batch or --context.\n"


def raising(error):
    def run(*args):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("no luck"), 2, "qpaged formats: no luck\n"),
        (BadArgumentError("help", "is of no help."), 2, "qpaged formats: --help is of no help.\n"),
        (BadArgumentError("no_flag", "is wrong."), 2, "qpaged formats: no_flag is wrong.\n"),
        (
            OSError(28, "No space left", "a.json"),
            2,
            "qpaged formats: a.json cannot be used (No space left).\n",
        ),
        (FileNotFoundError("There is no x."), 2, "qpaged formats: There is no x.\n"),
        (MemoryError(), 2, NO_MEMORY),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 6 bytes."), 2, NO_MEMORY),
        (KeyboardInterrupt(), 130, "qpaged formats: interrupted; nothing was finished.\n"),
    ],
    ids=repr,
)
def test_an_error_is_one_line(monkeypatch, capsys, error, status, message):
    monkeypatch.setattr(formats, "_run", raising(error))
    assert main(["formats"]) == status
    assert tuple(capsys.readouterr()) == ("", message)


@pytest.mark.parametrize("error", [KeyError("slip"), RuntimeError("slip"), AssertionError("slip")])
def test_a_slip_of_ours_is_not_hidden(monkeypatch, error):
    monkeypatch.setattr(formats, "_run", raising(error))
    with pytest.raises(type(error), match="slip"):
        main(["formats"])


def test_an_interrupt_before_the_command_is_known(monkeypatch, capsys):
    monkeypatch.setattr(qpaged.cli, "_parser", raising(KeyboardInterrupt()))
    assert main([]) == 130
    assert capsys.readouterr().err == "qpaged: interrupted; nothing was finished.\n"


@pytest.mark.parametrize("error", [RuntimeError(), AssertionError()])
def test_no_device_is_told(monkeypatch, capsys, error):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(formats, "_run", lambda args: jax.devices())
    monkeypatch.setattr(jax, "devices", raising(error))
    assert main(["formats"]) == 2
    message = "JAX finds no device: JAX_PLATFORMS is 'cuda'. Unset it, or install the JAX for it."
    assert capsys.readouterr().err == f"qpaged formats: {message}\n"


def test_a_closed_pipe_ends_the_command_silently():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "qpaged", "formats"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
