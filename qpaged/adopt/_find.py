"""Find the cache among a step's arguments, by reading the step's program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp

from qpaged.adopt._arguments import Arguments, Pytree, as_arrays, path_name
from qpaged.adopt._cache_leaf import CacheLeaf, FoundCache, Role
from qpaged.adopt._classify import Candidate, Rejected, classify
from qpaged.adopt._dataflow import Dataflow, Operation, ZeroTests, trace_dataflow
from qpaged.adopt._options import (
    AxesOption,
    Where,
    axis_names_for,
    check_patterns,
    listed,
    path_filter,
)

NEAR_MISSES = 8  # shown in an error, at most


class CacheNotFoundError(ValueError):
    """A step has no cache that can be told from its program alone, or more than one reading of it."""


def find_cache(
    step: Callable[..., Any], *args: Any, where: Where = None, axes: AxesOption = None, **kwargs: Any
) -> FoundCache:
    """Find the cache among the arguments of a step, by reading the step's program.

    The arrays of a cache are those that the step overwrites in part, along one axis (the length), and that
    dots then read: as keys if the dot keeps the length, as values if it contracts it. Nothing is run.

    Args:
        step: any JAX function that takes a cache; a decode step, or a prefill.
        *args: example arguments; ``jax.ShapeDtypeStruct`` will do for arrays.
        where: which arrays to look at: a regular expression that is searched for in their paths, or a
            function of the path; all if None.
        axes: the names of the axes, if the program leaves them open: one name for each axis, as
            ``("batch", "length", "heads", "head_dim")``, for all the arrays or by regular expression of path.
        **kwargs: further example arguments, passed by name.

    Returns:
        The arrays, in the order of the arguments.

    Raises:
        CacheNotFoundError: no array is one of a cache, or the program leaves open what the axes of one are;
            the message shows the near misses and the argument that settles it.
        ValueError: ``axes`` has other names, or another number of them than an array has axes; ``where`` is
            no pattern; two arrays of the cache have the same path.
    """
    return find_in(step, Arguments(step, args, kwargs), where, axes)


def find_in(step: Callable[..., Any], arguments: Arguments, where: Where, axes: AxesOption) -> FoundCache:
    """Do what :func:`find_cache` does, for arguments of any names."""
    dataflow, outputs, zero_tests = _trace(step, arguments)
    output_paths = [output.path for output in outputs]
    is_chosen = path_filter(where)
    check_patterns(axes, arguments.paths)
    # Tokens and positions are integers, and a cache of integers is quantized already.
    candidates = [
        candidate
        for candidate in _candidates(arguments, dataflow, outputs)
        if is_chosen(candidate.path) and jnp.issubdtype(candidate.aval.dtype, jnp.floating)
    ]
    leaves, rejected = _classify_all(candidates, axes)
    # An unclear array may be half of the cache: to leave it as it is would quantize the keys alone, say.
    if not leaves or any(rejection.unclear for rejection in rejected):
        raise CacheNotFoundError(_explain(len(leaves), rejected, where, arguments, is_chosen))
    _check_unique("arguments", arguments.paths, [leaf.path for leaf in leaves])
    _check_unique("outputs", output_paths, [leaf.output for leaf in leaves])
    relied_on = _additions(dataflow) | zero_tests
    leaves = [_with_zero_test(leaf, arguments.paths, relied_on) for leaf in leaves]
    return FoundCache(_number_layers(leaves, dataflow, arguments.paths))


class Output(NamedTuple):
    """An array that a step returns."""

    path: str
    shape: tuple[int, ...]


def _trace(
    step: Callable[..., Any], arguments: Arguments
) -> tuple[Dataflow, list[Output], dict[int, Operation]]:
    """Return the dataflow of a step's program, its outputs, and by input its comparisons with zero."""

    def program(*arrays: Any) -> Pytree:
        args, kwargs = arguments.with_arrays(arrays)
        return as_arrays(step(*args, **kwargs))

    # Shapes suffice to trace, and the example may have nothing else.
    jaxpr, out = jax.make_jaxpr(program, return_shape=True)(*arguments.avals)
    outputs = [Output(path_name(keys), aval.shape) for keys, aval in jax.tree_util.tree_leaves_with_path(out)]
    return trace_dataflow(jaxpr), outputs, ZeroTests(jaxpr).found


def _additions(dataflow: Dataflow) -> dict[int, Operation]:
    """Return by input an operation that writes by adding, which takes unwritten slots for zeros."""
    return {write.input_index: write.operation for write in dataflow.writes if write.adds}


def _with_zero_test(leaf: CacheLeaf, paths: Sequence[str], zero_tests: Mapping[int, Operation]) -> CacheLeaf:
    zero_test = zero_tests.get(paths.index(leaf.path))
    return leaf if zero_test is None else replace(leaf, zero_test=str(zero_test))


def _candidates(arguments: Arguments, dataflow: Dataflow, outputs: Sequence[Output]) -> Iterable[Candidate]:
    """Yield every array of the arguments with what the program does with it."""
    returned_as = _outputs_by_input(arguments, dataflow, outputs)
    for input_index, (path, aval) in enumerate(zip(arguments.paths, arguments.avals, strict=True)):
        yield Candidate.from_dataflow(dataflow, input_index, path, aval, returned_as.get(input_index))


def _outputs_by_input(arguments: Arguments, dataflow: Dataflow, outputs: Sequence[Output]) -> dict[int, str]:
    """Return for each input the path of the first output that returns all of it after a write."""
    returned_as: dict[int, str] = {}
    for views, output in zip(dataflow.outputs, outputs, strict=True):
        for view in views:
            # A part of a cache, as the row that was written, may be returned before the cache.
            covers_shape = output.shape == arguments.avals[view.input_index].shape
            if view.written and view.covers_input and covers_shape:
                returned_as.setdefault(view.input_index, output.path)
    return returned_as


def _classify_all(
    candidates: Iterable[Candidate], axes: AxesOption
) -> tuple[list[CacheLeaf], list[Rejected]]:
    leaves: list[CacheLeaf] = []
    rejected: list[Rejected] = []
    for candidate in candidates:
        axis_names = None
        # The caller names the axes of the cache, not those of weights and inputs beside it.
        if candidate.writes and candidate.reads:
            axis_names = axis_names_for(axes, candidate.path, candidate.aval)
        decision = classify(candidate, axis_names)
        if isinstance(decision, CacheLeaf):
            leaves.append(decision)
        elif decision is not None:
            rejected.append(decision)
    return leaves, rejected


def _check_unique(kind: str, all_paths: Sequence[str], cache_paths: Iterable[str | None]) -> None:
    """Raise ValueError if a path of the cache leads to several arrays: keys with slashes can do that."""
    ambiguous = sorted(path for path in cache_paths if path is not None and all_paths.count(path) > 1)
    if ambiguous:
        raise ValueError(
            f"step must have a path of its own for each array of its {kind}, but {ambiguous[0]} is that of "
            f"{all_paths.count(ambiguous[0])}; leave slashes out of the keys."
        )


def _number_layers(
    leaves: Sequence[CacheLeaf], dataflow: Dataflow, paths: Sequence[str]
) -> tuple[CacheLeaf, ...]:
    """Return the leaves with their layers: the order in which dots read the arrays of each role."""
    first_read: dict[str, int] = {}
    for position, read in enumerate(dataflow.reads):
        first_read.setdefault(paths[read.input_index], position)
    layers: dict[str, int] = {}
    for role in get_args(Role):
        single = [leaf.path for leaf in leaves if leaf.role == role and leaf.layer is not None]
        for layer, path in enumerate(sorted(single, key=first_read.__getitem__)):
            layers[path] = layer
    return tuple(replace(leaf, layer=layers.get(leaf.path)) for leaf in leaves)


# The message where no cache is found


def _explain(
    num_leaves: int,
    rejected: Sequence[Rejected],
    where: Where,
    arguments: Arguments,
    is_chosen: Callable[[str], bool],
) -> str:
    """Return the message of a CacheNotFoundError: the near misses, and the argument that settles it."""
    chosen = [aval for path, aval in zip(arguments.paths, arguments.avals, strict=True) if is_chosen(path)]
    if not chosen:
        return (
            f"where must choose arrays among the arguments, but {where!r} fits none of their paths: "
            f"{listed(arguments.paths)}."
        )
    near_misses = _list_near_misses(rejected)
    if num_leaves:
        return (
            f"step must make clear what each array of its cache is; {num_leaves} are, but not{near_misses}\n"
            f"Leave out what is no cache with where=, a pattern of the paths to look at."
        )
    advice = f"Nearest to that:{near_misses}" if rejected else "Give the step that decodes, cache included."
    if any(aval.dtype in (jnp.int8, jnp.uint8) for aval in chosen):
        advice += "\nArrays of 8-bit integers are quantized already: turn the model's own quantization off."
    return (
        f"step must take a cache, write into it in part (dynamic_update_slice or scatter) and read it with "
        f"dot_general, but it does so with none of its {len(chosen)} arrays. {advice}"
    )


def _list_near_misses(rejected: Sequence[Rejected]) -> str:
    """Return a line for each rejected array, the unclear ones first."""
    unclear = [rejection for rejection in rejected if rejection.unclear]
    others = [rejection for rejection in rejected if not rejection.unclear]
    lines = [f"\n    {rejection.message}" for rejection in (unclear + others)[:NEAR_MISSES]]
    if len(rejected) > NEAR_MISSES:
        lines.append(f"\n    and {len(rejected) - NEAR_MISSES} more")
    return "".join(lines)
