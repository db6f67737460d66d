"""What is the cache among a step's arguments: which leaves, which of them keys, which axis is what."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from qpaged.adopt._arguments import Arguments, as_arrays, join
from qpaged.adopt._dataflow import Flow, follow
from qpaged.adopt._leaf import CacheLeaf, Miss, classify, short

AXIS_NAMES = ("layers", "pair", "batch", "length", "heads", "head_dim")
NEAR_MISSES = 8  # shown in an error, at most

Where: TypeAlias = str | Callable[[str], bool] | None
AxesOption: TypeAlias = Sequence[str] | Mapping[str, Sequence[str]] | None


class CacheNotFoundError(ValueError):
    """A step has no cache that can be told from its program alone, or more than one reading of it."""


@dataclass(frozen=True)
class FoundCache:
    """The cache of a step, leaf by leaf; ``print`` shows it with the evidence."""

    leaves: tuple[CacheLeaf, ...]

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments that hold it, in their order."""
        return tuple(dict.fromkeys(leaf.path.split("/")[0] for leaf in self.leaves))

    def __str__(self) -> str:
        count = Counter(leaf.role for leaf in self.leaves)
        roles = ", ".join(f"{n} {role}" for role, n in count.items())
        return "\n".join(
            [f"{len(self.leaves)} arrays in {', '.join(self.arguments)}: {roles}", *map(str, self.leaves)]
        )


def find_cache(
    step: Callable[..., Any], *args: Any, where: Where = None, axes: AxesOption = None, **kwargs: Any
) -> FoundCache:
    """Find the cache among the arguments of a step, by reading the step's program.

    A cache's arrays are those into which the step writes a part, at a place along one axis (the length), and
    which dots then read: keys where the length is kept, values where it is contracted. Nothing is run.

    Args:
        step: any JAX function that takes a cache; a decode step, or a prefill.
        *args: example arguments; ``jax.ShapeDtypeStruct`` will do for arrays.
        where: which arrays to look at: a regular expression that their paths contain, or a function of the
            path; all if None.
        axes: what the axes are, where the program does not say: a name for each axis, as
            ``("batch", "length", "heads", "head_dim")``, for all the arrays or by regular expression of path.
        **kwargs: further example arguments, passed by name.

    Returns:
        The arrays, in the order of the arguments.

    Raises:
        CacheNotFoundError: no array, or one whose axes the program leaves open; the message shows the near
            misses and the argument that settles it.
        ValueError: ``axes`` has other names, or another number of them than an array has axes; ``where`` is
            no pattern; a path of the cache is that of two arrays.
    """
    given = Arguments(step, args, kwargs)

    def program(*arrays: Any) -> Any:
        inner_args, inner_kwargs = given.replaced(arrays)
        return as_arrays(step(*inner_args, **inner_kwargs))

    closed, out = jax.make_jaxpr(program, return_shape=True)(*given.structs)
    flow, paths = follow(closed), given.paths
    returned = [join(path) for path, _ in jax.tree_util.tree_leaves_with_path(out)]
    outputs = _returned(flow, returned)
    wanted = _chosen(where)
    touched = {write.leaf for write in flow.writes} & {read.leaf for read in flow.reads}

    leaves: list[CacheLeaf] = []
    misses: list[Miss] = []
    for number, (path, aval) in enumerate(zip(paths, given.structs, strict=True)):
        if not (wanted(path) and jnp.issubdtype(aval.dtype, jnp.floating)):
            continue
        names = _named(axes, path, aval) if number in touched else None
        found = classify(path, aval, flow, number, outputs.get(number), names)
        if isinstance(found, CacheLeaf):
            leaves.append(found)
        elif found is not None:
            misses.append(found)
    if not leaves or any(miss.unclear for miss in misses):
        seen = sum(map(wanted, paths))
        raise CacheNotFoundError(_message(len(leaves), misses, where, seen))
    _check_paths(leaves, paths, returned)
    return FoundCache(_numbered(leaves, flow, paths))


# What the caller says


def _chosen(where: Where) -> Callable[[str], bool]:
    if where is None or callable(where):
        return where or (lambda path: True)
    try:
        pattern = re.compile(where)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"where must be a regular expression or a function of the path, but came as {where!r}: {error}."
        ) from error
    return lambda path: pattern.search(path) is not None


def _named(axes: AxesOption, path: str, aval: jax.ShapeDtypeStruct) -> tuple[str, ...] | None:
    """The names that ``axes`` gives an array, checked."""
    if isinstance(axes, Mapping):
        axes = next((names for pattern, names in axes.items() if re.search(pattern, path)), None)
    if axes is None:
        return None
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    known = set(names) <= set(AXIS_NAMES) and len(set(names)) == len(names)
    if not known or len(names) != len(aval.shape) or not {"length", "head_dim"} <= set(names):
        raise ValueError(
            f"axes must name each of the {len(aval.shape)} axes of {path} {short(aval)}, length and head_dim "
            f"among them, from {', '.join(AXIS_NAMES)}, but came as {names}."
        )
    return names


# What the program says


def _returned(flow: Flow, paths: Sequence[str]) -> dict[int, str]:
    """The output that returns an input, written to and in the same axes."""
    found: dict[int, str] = {}
    for views, path in zip(flow.outputs, paths, strict=True):
        for view in views:
            if view.written and view.whole:
                found.setdefault(view.leaf, path)
    return found


def _check_paths(leaves: Sequence[CacheLeaf], inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """ValueError where what a path of the cache leads to is not one array."""
    for what, paths, found in (
        ("arguments", inputs, [leaf.path for leaf in leaves]),
        ("outputs", outputs, [leaf.output for leaf in leaves]),
    ):
        twice = sorted(path for path in found if path is not None and paths.count(path) > 1)
        if twice:
            raise ValueError(
                f"step must have a path of its own for each array of its {what}, but {twice[0]} is that of "
                f"{paths.count(twice[0])}; leave slashes out of the keys."
            )


def _numbered(leaves: Sequence[CacheLeaf], flow: Flow, paths: Sequence[str]) -> tuple[CacheLeaf, ...]:
    """The leaves with their layers: their order among the dots that read arrays of their role."""
    order = {paths[read.leaf]: place for place, read in reversed(list(enumerate(flow.reads)))}
    layers: dict[str, int] = {}
    for role in ("key", "value", "key and value"):
        single = sorted((order[x.path], x.path) for x in leaves if x.role == role and x.layer is not None)
        layers |= {path: layer for layer, (_, path) in enumerate(single)}
    return tuple(CacheLeaf(**{**vars(leaf), "layer": layers.get(leaf.path)}) for leaf in leaves)


def _message(clear: int, misses: Sequence[Miss], where: Where, seen: int) -> str:
    if not seen:
        return f"where must choose arrays among the arguments, but {where!r} fits none of their paths."
    first = sorted(misses, key=lambda miss: not miss.unclear)
    shown = [f"\n    {miss.text}" for miss in first[:NEAR_MISSES]]
    if len(misses) > NEAR_MISSES:
        shown.append(f"\n    and {len(misses) - NEAR_MISSES} more")
    nearest = "".join(shown)
    if clear:
        return (
            f"step must make clear what each array of its cache is; {clear} are, but not{nearest}\n"
            f"Leave out what is no cache with where=, a pattern of the paths to look at."
        )
    rest = f" Nearest to one:{nearest}" if misses else " Give the step that decodes, cache included."
    return (
        f"step must take a cache, write into it in part (dynamic_update_slice or scatter) and read it with "
        f"dot_general, but none of its {seen} arrays is one.{rest}"
    )
