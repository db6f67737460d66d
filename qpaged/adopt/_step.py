"""Run a step's unmodified code on a quantized cache."""

from __future__ import annotations

import functools
import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from qpaged._compat import jit_options_of
from qpaged._deprecated import renamed_argument, warn_renamed
from qpaged._eager import any_traced
from qpaged.adopt._arguments import (
    Arguments,
    KeyPath,
    Pytree,
    as_arrays,
    example_arguments,
    path_name,
    path_under,
)
from qpaged.adopt._blocks import KnownBlocks
from qpaged.adopt._cache_leaf import FoundCache
from qpaged.adopt._encode import (
    check_layers,
    check_zeros,
    has_format,
    has_whole_pages,
    quantize_leaf,
    quantizer_for,
)
from qpaged.adopt._find import find_in
from qpaged.adopt._options import AxesOption, Where
from qpaged.adopt._report import MaterializeError, Report, listed
from qpaged.adopt._saving import register_with_flax
from qpaged.arrays import PartlyExact, QuantizedArray, is_cache_array, overwrite, overwrite_exact
from qpaged.arrays._deferred import Deferred
from qpaged.arrays._joined import Joined
from qpaged.arrays._rows import CacheArray
from qpaged.formats import CacheFormat, Quantizer
from qpaged.implicit import (
    ImplicitArray,
    Materialization,
    materialize_nested,
    record_materializations,
    use_implicit_args,
)
from qpaged.implicit._tree import same_layout, same_structure

PAGE_SIZE = 16


@renamed_argument("format", "quantizer")
def quantize_cache(
    step: Callable[..., Any],
    quantizer: str | Path | Quantizer | CacheFormat | None,
    *,
    example: Sequence[Any] | Mapping[str, Any],
    where: Where = None,
    axes: AxesOption = None,
    page_size: int = PAGE_SIZE,
    strict: bool = False,
) -> QuantizedStep:
    """Return a step with the same signature whose cache is quantized; its code runs as it stands.

        step = quantize_cache(decode_step, "int8", example=(params, token, cache))
        cache = step.init(cache)
        logits, cache = jax.jit(step, donate_argnums=2)(params, token, cache)

    Args:
        step: any JAX function that takes a cache, writes to it and returns it.
        quantizer: the format of the cache: a spelling as ``"int8"`` or ``"int8:channel/int4:token"``, a
            quantizer, or a ``CacheFormat``, which may differ by layer.
        example: arguments to find the cache with: a tuple, or a dictionary by name. ``jax.ShapeDtypeStruct``
            will do for arrays.
        where: which arrays to look at, as :func:`find_cache` takes it.
        axes: the names of the axes, as :func:`find_cache` takes them.
        page_size: tokens that share a scale in formats by page and channel; if it does not divide the length,
            the next smaller number that does.
        strict: whether to raise an error, instead of a warning, where an array of the cache must be decoded
            as a whole.

    Raises:
        CacheNotFoundError: as :func:`find_cache`.
        TypeError: the example is not of the step's arguments.
        MaterializeError: the step is strict, and run on the example it decodes an array of the cache as a
            whole.
        ValueError: the format does not fit the cache, as groups that do not divide head_dim, or layers that
            it does not have; or the step tells unwritten slots by zeros, which the format does not keep.
    """
    if not isinstance(page_size, numbers.Integral) or page_size < 1:
        raise ValueError(f"page_size must be a whole number, at least 1, but is {page_size!r}; 16 is usual.")
    if not callable(step):
        raise TypeError(f"step must be a function that takes a cache, but came as {type(step).__name__}.")
    cache_format = CacheFormat.of(quantizer)
    args, kwargs = example_arguments(step, example)
    found = find_in(step, Arguments(step, args, kwargs), where, axes)
    check_layers(cache_format, found)
    check_zeros(cache_format, found)
    quantized_step = QuantizedStep(step, cache_format, found, page_size, strict)
    quantized_step._trace_example(args, kwargs)
    return quantized_step


@dataclass
class _History:
    """What a step and its parts have met so far.

    Attributes:
        materialized: the places where arrays were decoded, in the order in which they were met.
        blocks: the blocks of the arrays that ``init`` and ``apply`` returned.
        ran_on_floats: whether the last program that was traced had a cache of floats.
        warned_of_floats: whether the user was told of one.
    """

    materialized: dict[Materialization, None] = field(default_factory=dict)
    blocks: KnownBlocks = field(default_factory=KnownBlocks)
    ran_on_floats: bool = False
    warned_of_floats: bool = False


class QuantizedStep:
    """A step whose cache is quantized; :func:`quantize_cache` makes it.

    Attributes:
        found: the arrays of the cache, with the evidence.
        quantizer: the quantizers of its keys and values.
    """

    @renamed_argument("format", "quantizer")
    def __init__(
        self,
        step: Callable[..., Any],
        quantizer: CacheFormat,
        found: FoundCache,
        page_size: int,
        strict: bool,
    ) -> None:
        self.found = found
        self.quantizer = quantizer
        self._step = step
        self._page_size = page_size
        self._strict = strict
        self._run = use_implicit_args(step)
        self._history = _History()
        self._leaves = {leaf.path: leaf for leaf in found.leaves}
        self._jitted = self._jit_as_step()
        # So that jit and inspect see the step's own name and signature; its attributes are not copied.
        functools.update_wrapper(self, step, updated=())

    def __repr__(self) -> str:
        name = getattr(self._step, "__name__", type(self._step).__name__)
        return f"QuantizedStep({name}, {self.quantizer}, {len(self.found.leaves)} arrays of its cache)"

    @property
    def format(self) -> CacheFormat:
        """The old name of :attr:`quantizer`."""
        warn_renamed("format of QuantizedStep", "quantizer")
        return self.quantizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step, and return what it returns, the cache quantized as it was given.

        Between steps, change the cache by :meth:`apply`: ``jax.tree.map`` alone reaches codes and scales
        apart, so that a cache that it rolled by a token, say, would be wrong without a word.
        """
        if self._jitted is None or any_traced(args, kwargs):
            return self._run_step(*args, **kwargs)
        return self._jitted(*args, **kwargs)

    def _jit_as_step(self) -> Callable[..., Any] | None:
        """Return the call jitted, with the same arguments static or donated, if the step was jitted."""
        options = jit_options_of(self._step)
        if options is None:
            return None

        def run(*args: Any, **kwargs: Any) -> Any:
            return self._run_step(*args, **kwargs)

        return jax.jit(functools.update_wrapper(run, self._step, updated=()), **options)

    def _run_step(self, *args: Any, **kwargs: Any) -> Any:
        arguments = Arguments(self._step, args, kwargs)
        self._warn_of_float_arrays(arguments)
        self._check_blocks(arguments)
        with record_materializations() as records:
            out = self._run(*args, **kwargs)
        # Weights may be implicit arrays of other classes, and may be decoded as they like.
        of_cache = {kind.__name__ for kind in (QuantizedArray, PartlyExact, Joined, Deferred)}
        decoded = [record for record in records if record.array_type in of_cache]
        self._add_to_report(decoded)
        return self._requantize_outputs(out, arguments)

    def restrict(self, step: Callable[..., Any], found: FoundCache) -> QuantizedStep:
        """Return a part of this step with a part of its cache: the same quantizers, and the same report."""
        part = QuantizedStep(step, self.quantizer, found, self._page_size, self._strict)
        part._history = self._history
        return part

    def of(self, step: Callable[..., Any], found: FoundCache) -> QuantizedStep:
        """The old name of :meth:`restrict`."""
        warn_renamed("of() of QuantizedStep", "restrict()")
        return self.restrict(step, found)

    def init(self, *cache: Pytree) -> Pytree:
        """Quantize a cache: return the same tree with a QuantizedArray in place of each of its arrays.

        Blocks of zeros count as unwritten. Arrays given as ``jax.ShapeDtypeStruct`` are made unwritten, so
        that a float cache never has to exist; leaves that are not of the cache stay as they are given.

        Args:
            *cache: the argument that holds the cache, or, if several do, these in their order.

        Raises:
            ValueError: another number of trees than of arguments that hold the cache, or one that lacks some
                of its arrays.
        """
        register_with_flax()
        names = self.found.arguments
        if len(cache) != len(names):
            raise ValueError(
                f"init takes {len(names)} argument{'s'[: len(names) > 1]}, {', '.join(names)}, but got "
                f"{len(cache)}."
            )
        quantized = [self._quantize_argument(name, tree) for name, tree in zip(names, cache, strict=True)]
        if len(quantized) == 1:
            return quantized[0]
        return tuple(quantized)

    def apply(self, function: Callable[..., Pytree], cache: Pytree, *args: Any) -> Pytree:
        """Apply a function of your own to the cache, as if it were made of float arrays.

            cache = step.apply(lambda cache: jax.tree.map(lambda a: jnp.roll(a, -1, axis=1), cache), cache)

        Args:
            function: takes the cache and ``args``, and returns a cache of the same tree; its arrays may have
                another batch or length.
            cache: as :meth:`init` returns it: a tuple, if several arguments hold the cache.
            *args: what else the function takes.

        Returns:
            The cache, quantized as :meth:`init` quantizes. What the function only moves stays as it was
            quantized; an array that it moves by parts of a page, or that it computes, is quantized anew.

        Raises:
            ValueError: the function returns another tree.
        """
        out = jax.tree_util.tree_map(
            _stored_or_decoded, use_implicit_args(function)(cache, *args), is_leaf=_is_implicit
        )
        names = self.found.arguments
        before, after = ((cache,), (out,)) if len(names) == 1 else (cache, out)
        arrays, tree = jax.tree_util.tree_flatten_with_path(before, is_leaf=is_cache_array)
        values = jax.tree_util.tree_leaves(after, is_leaf=is_cache_array)
        tree_after: Any = jax.tree_util.tree_structure(after, is_leaf=is_cache_array)
        if tree_after != tree:
            raise ValueError(
                f"function must return the tree of the cache, {tree}, but returned {tree_after}; return "
                f"other results from a function of their own."
            )
        changed = []
        for ((number, *keys), array), value in zip(arrays, values, strict=True):
            path = path_under(names[number.idx], keys)
            changed.append(self._remember_blocks(path, self._requantize(path, array, value)))
        changed_trees = jax.tree_util.tree_unflatten(tree, changed)
        return changed_trees[0] if len(names) == 1 else changed_trees

    def _requantize(self, path: str, before: Any, value: Any) -> Any:
        """Return an array of a changed cache as :meth:`init` quantizes it, if it was quantized before."""
        if not is_cache_array(before) or same_layout(before, value):
            return value
        if value.shape == before.shape:
            return _overwritten(before, value)
        if is_cache_array(value):
            if same_structure(value, before) and value.block == before.block and has_whole_pages(value):
                return value  # whole pages or sequences were added or taken away
            value = value.materialize()
        return self._quantize_array(path, value)

    def report(self) -> Report:
        """Return the places where the step decoded an array of its cache as a whole, and what is quantized.

        The places are of all programs traced so far, the example's first; bytes are of the example's cache.
        """
        return Report(self._history.materialized, self._quantized_bytes())

    def _quantized_bytes(self) -> str:
        """Return a line that says which arrays of the example's cache are quantized, and their bytes."""
        if self._history.ran_on_floats:
            return (
                "not quantized: the step ran on a cache of floats, which was not passed through step.init()"
            )
        plain = {leaf.path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in self.found.leaves}
        stored = {path: self._quantized_shape(path, struct) for path, struct in plain.items()}
        count = sum(map(is_cache_array, stored.values()))
        return (
            f"{self.quantizer}: {count} of {len(plain)} arrays of the cache quantized, "
            f"{_nbytes(plain):,} -> {_nbytes(stored):,} bytes"
        )

    def _quantized_shape(self, path: str, struct: jax.ShapeDtypeStruct) -> Pytree:
        return jax.eval_shape(lambda: self._quantize_array(path, struct))

    def _trace_example(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Run the step on shapes: tracing shows what it materializes, as this does not depend on values."""
        arguments = Arguments(self._step, args, kwargs)

        def run(arrays: Sequence[Any]) -> Pytree:
            quantized = []
            for path, array in zip(arguments.paths, arrays, strict=True):
                quantized.append(self._quantize_array(path, array))
            args, kwargs = arguments.with_arrays(quantized)
            return as_arrays(self._run_step(*args, **kwargs))

        jax.eval_shape(run, arguments.avals)

    def _warn_of_float_arrays(self, arguments: Arguments) -> None:
        """Warn, once, if arrays of the cache come as they were before :meth:`init`."""
        plain = []
        for path, array in zip(arguments.paths, arguments.arrays, strict=True):
            leaf = self._leaves.get(path)
            if leaf and not is_cache_array(array) and quantizer_for(leaf, self.quantizer) is not None:
                plain.append(path)
        warned = self._history.warned_of_floats
        self._history.ran_on_floats = bool(plain)
        if plain and not warned:
            self._history.warned_of_floats = True
            warnings.warn(
                f"step should get its cache as {self.quantizer}, but {len(plain)} arrays of it are floats, "
                f"{plain[0]} first, and stay so; pass the cache through step.init() before the first step.",
                stacklevel=3,
            )

    def _check_blocks(self, arguments: Arguments) -> None:
        """Raise ValueError for an array of another format, or of codes and scales that were changed apart."""
        for path, array in zip(arguments.paths, arguments.arrays, strict=True):
            if is_cache_array(array):
                self._check_format(path, array)
                self._history.blocks.check(path, array)

    def _quantize_argument(self, name: str, tree: Pytree) -> Pytree:
        """Return an argument with the arrays of the cache in it quantized."""
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_cache_array)
        given = {path_under(name, keys) for keys, _ in leaves}
        wanted = {leaf.path for leaf in self.found.leaves if leaf.argument == name}
        missing = sorted(wanted - given)
        if missing:
            raise ValueError(f"{name} must hold the arrays of the example, but lacks {', '.join(missing)}.")

        def quantize(keys: KeyPath, array: Any) -> Any:
            path = path_under(name, keys)
            return self._remember_blocks(path, self._quantize_array(path, array))

        return jax.tree_util.tree_map_with_path(quantize, tree, is_leaf=is_cache_array)

    def _quantize_array(self, path: str, array: Any) -> Any:
        """Return an array of the arguments, quantized if it is one of the cache and is not yet."""
        leaf = self._leaves.get(path)
        if leaf is None:
            return array
        quantizer = quantizer_for(leaf, self.quantizer)
        if quantizer is None:
            return array
        if not is_cache_array(array):
            return quantize_leaf(leaf, array, quantizer, self._page_size)
        self._check_format(path, array)
        return array

    def _check_format(self, path: str, array: CacheArray) -> None:
        """Raise ValueError for an array of the cache that was quantized for another step."""
        leaf = self._leaves.get(path)
        quantizer = None if leaf is None else quantizer_for(leaf, self.quantizer)
        if quantizer is not None and not has_format(array, quantizer):
            raise ValueError(
                f"{path} must be of {quantizer}, the format of this step, but came as {array.quantizer}; "
                f"pass the float cache through this step's own init()."
            )

    def _remember_blocks(self, path: str, array: Any) -> Any:
        """Return an array of a cache that goes out to the user, after noting its blocks."""
        if path in self._leaves and is_cache_array(array):
            self._history.blocks.note(path, array)
        return array

    def _requantize_outputs(self, out: Pytree, arguments: Arguments) -> Pytree:
        """Return what the step returned, with the cache in the layout in which it was given.

        A loop that carries the cache, and a donated jit, need the same types in and out. The step may have
        decoded an array, or have moved it to other blocks.
        """
        given = dict(zip(arguments.paths, arguments.arrays, strict=True))
        by_output = {leaf.output: leaf.path for leaf in self.found.leaves if leaf.output is not None}

        def requantize(keys: KeyPath, value: Any) -> Any:
            path = by_output.get(path_name(keys), "")
            original = given.get(path)
            if original is None or not is_cache_array(original) or same_layout(original, value):
                return value
            if isinstance(original, PartlyExact):
                raise ValueError(
                    f"quantizer must have no exact pages for a cache that a step changes otherwise than by "
                    f"writes at positions, as it does {path} here, but came as {self.quantizer}: which token "
                    f"a row is of cannot be told then. Leave out +exact and +sink, or write rows alone."
                )
            file, line = _first_line(self._step)
            array_type = type(original).__name__
            returned = Materialization("return", array_type, value.shape, value.dtype, file, line)
            self._add_to_report([returned])
            return overwrite(original, value)

        return jax.tree_util.tree_map_with_path(requantize, out, is_leaf=_is_implicit)

    def _add_to_report(self, places: Sequence[Materialization]) -> None:
        """Add places to the report; raise MaterializeError if there are any and the step is strict."""
        self._history.materialized.update(dict.fromkeys(places))
        if self._strict and places:
            raise MaterializeError(
                f"step must not dequantize arrays of its cache as a whole, since strict is set, but "
                f"{listed(places)}\nRewrite that, or leave strict out to have them dequantized there."
            )


def _is_implicit(value: Any) -> bool:
    return isinstance(value, ImplicitArray)


def _stored_or_decoded(value: Any) -> Any:
    """Return an array as a cache holds it, or decoded, where a lazy read has made another of it."""
    if not _is_implicit(value) or is_cache_array(value):
        return value
    return materialize_nested(value, full=True)


def _overwritten(array: CacheArray, new: Any) -> CacheArray:
    """Return an array of the cache with all of it replaced."""
    if not isinstance(array, PartlyExact):
        return overwrite(array, new)
    return overwrite_exact(array, new.materialize() if isinstance(new, ImplicitArray) else new)


def _nbytes(structs: Pytree) -> int:
    return sum(struct.size * struct.dtype.itemsize for struct in jax.tree_util.tree_leaves(structs))


def _first_line(function: Callable[..., Any]) -> tuple[str, int]:
    """Return file and line of a function; of callables without code, that they are unknown."""
    code = getattr(function, "__code__", None)
    if code is None:
        return "<unknown>", 0
    return code.co_filename, code.co_firstlineno
