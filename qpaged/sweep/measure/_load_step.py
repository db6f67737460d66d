"""Loads the step that ``--step module:function`` names; errors say what of it is wrong, and where."""

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from qpaged._bad_argument import BadArgumentError
from qpaged.models import load_tokenizer
from qpaged.sweep._memory import is_out_of_memory
from qpaged.sweep.measure._settings import Settings
from qpaged.sweep.measure._step import StepModel, described, is_pair
from qpaged.sweep.measure._step_stream import Pytree, Step

MakeStep: TypeAlias = Callable[[int, int], tuple[Step, Pytree]]
"""make_step(sequences, length) returns (step, state) for so many sequences of up to so many tokens."""


def load_step(spelling: str, settings: Settings, tokenizer: str | None = None) -> StepModel:
    """Load the model that the :data:`MakeStep` at ``"module:function"`` returns.

    Modules in the working directory are found, too.

    Args:
        tokenizer: a directory with a ``tokenizer.json``; bytes if None.

    Raises:
        BadArgumentError: a spelling without a colon, a module or function that does not exist, or a step that
            fails, is none, or has no cache that can be found.
    """
    module, _, name = spelling.partition(":")
    if not module or not name:
        raise BadArgumentError(
            "step",
            f"must be MODULE:FUNCTION, as model:make_step for model.py in the working directory, but came as "
            f"{spelling!r}.",
        )
    if module.endswith(".py"):
        raise BadArgumentError("step", f"{spelling} must leave out .py: {module.removesuffix('.py')}:{name}.")
    make_step, file = _import(spelling, module, name)
    _check_takes(spelling, "it", make_step, ("sequences", "length"))
    text_tokenizer = load_tokenizer(tokenizer or "bytes")
    try:
        step, state = _step_and_state(spelling, make_step(settings.batch, settings.context))
        model = StepModel(
            name=spelling,
            step=step,
            state=jax.tree_util.tree_map(jnp.asarray, state),
            sequences=settings.batch,
            longest=settings.context,
            tokenizer=text_tokenizer,
            path=spelling,
        )
        model.check(min(settings.chunk, settings.prefilled))
    except BadArgumentError:
        raise
    except (Exception, SystemExit) as error:  # The function is the user's and may raise anything.
        if is_out_of_memory(error):
            raise
        raise _failure(spelling, "failed with", error, file) from error
    return model


def _import(spelling: str, module: str, name: str) -> tuple[Any, str | None]:
    """Return what a module has under a name, and the module's file."""
    working_directory = str(Path.cwd())
    if working_directory not in sys.path:
        sys.path.insert(0, working_directory)
    file = None
    try:
        spec = importlib.util.find_spec(module)
        if spec is not None:
            file = spec.origin
            imported = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # as modules raise that are scripts
        raise _failure(spelling, "cannot be imported:", error, file) from error
    if spec is None:
        raise BadArgumentError(
            "step",
            f"{spelling} cannot be imported: there is no module {module}, neither installed nor in the "
            f"working directory.",
        )
    if not hasattr(imported, name):
        raise BadArgumentError("step", f"{spelling} cannot be imported: {file} has no {name}.")
    return getattr(imported, name), file


def _check_takes(spelling: str, who: str, function: Any, arguments: Sequence[str]) -> None:
    """Raise BadArgumentError unless a function takes so many arguments."""
    if not callable(function):
        raise BadArgumentError(
            "step", f"{spelling}: {who} must be a function, but is of type {type(function).__name__}."
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # it has no signature that Python could read
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        rule = f"{spelling}: {who} must take ({', '.join(arguments)}), but takes {signature}."
        raise BadArgumentError("step", rule) from None


def _step_and_state(spelling: str, made: Any) -> tuple[Step, Pytree]:
    """Return what a :data:`MakeStep` made, checked to be a step and a state of arrays."""
    if not is_pair(made):
        raise BadArgumentError(
            "step", f"{spelling} must return (step, state), but returned {described(made)}."
        )
    step, state = made
    _check_takes(spelling, "its step", step, ("state", "tokens", "positions"))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float):
            place = jax.tree_util.keystr(path)
            raise BadArgumentError(
                "step",
                f"{spelling}: its state must hold arrays alone, but state{place} is of type "
                f"{type(leaf).__name__}.",
            )
    return step, state


def _failure(spelling: str, what: str, error: BaseException, file: str | None) -> BadArgumentError:
    """Return the error for what the user's module raised, with the last line of its file that led there."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError):
        file, lines, reason = error.filename, [error.lineno], error.msg
    else:
        first_line = f"{type(error).__name__}: {error}".partition("\n")[0]
        reason = first_line.rstrip(".")
    where = f" ({Path(file).name}, line {lines[-1]})" if file and lines else ""
    return BadArgumentError("step", f"{spelling} {what} {reason}{where}.")
