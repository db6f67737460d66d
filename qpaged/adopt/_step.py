"""A step whose cache is quantized: the unmodified code, run on QuantizedArrays."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qpaged.adopt._arguments import Arguments, as_arrays, beneath, join, leaves_by_path
from qpaged.adopt._found import AxesOption, CacheLeaf, FoundCache, Where, find_cache
from qpaged.arrays import QuantizedArray
from qpaged.arrays._blocks import block_max
from qpaged.arrays._quantized import empty, quantize
from qpaged.arrays._writes import overwrite
from qpaged.implicit import record_materializations, use_implicit_args
from qpaged.implicit._tree import same_layout
from qpaged.quantizer import CacheFormat, Quantizer

PAGE_SIZE = 16


class MaterializeError(RuntimeError):
    """A strict step did something to its quantized cache for which it had to be decoded whole."""


@dataclass(frozen=True)
class Materialized:
    """One place where a step decoded a quantized array whole.

    Attributes:
        primitive: what was done with it.
        shape: of the array there.
        dtype: of the array there.
        file: of the code that did it.
        line: in that file.
    """

    primitive: str
    shape: tuple[int, ...]
    dtype: Any
    file: str
    line: int

    @property
    def nbytes(self) -> int:
        """Bytes of the array as it was decoded."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        shape = ", ".join(map(str, self.shape))
        dtype = jnp.dtype(self.dtype).name
        return f"{self.primitive} {dtype}({shape}), {self.nbytes:,} bytes, at {self.file}:{self.line}"


class Report(tuple[Materialized, ...]):
    """The places where a step decoded a quantized array whole, in the order they were met."""

    def __str__(self) -> str:
        if not self:
            return "nothing was materialized"
        return "\n".join([f"{len(self)} places materialized:", *(f"    {place}" for place in self)])


def quantize_cache(
    step: Callable[..., Any],
    format: Any,
    *,
    example: Sequence[Any],
    where: Where = None,
    axes: AxesOption = None,
    page_size: int = PAGE_SIZE,
    strict: bool = False,
) -> QuantizedStep:
    """A step with the same signature whose cache is quantized; its code is run as it stands.

        step = quantize_cache(decode_step, "int8", example=(params, token, cache))
        cache = step.init(cache)
        logits, cache = jax.jit(step, donate_argnums=2)(params, token, cache)

    Args:
        step: any JAX function that takes a cache, writes to it and returns it.
        format: of the cache: a spelling as ``"int8"`` or ``"int8:channel/int4:token"``, a quantizer, or a
            ``CacheFormat``, which may differ by layer.
        example: arguments to find the cache with; ``jax.ShapeDtypeStruct`` will do for arrays.
        where: which arrays to look at, as :func:`find_cache` takes it.
        axes: what the axes are, as :func:`find_cache` takes it.
        page_size: tokens that share a scale in formats by page and channel; where it does not divide the
            length, the next smaller number that does.
        strict: whether to raise where the step must decode the cache whole, instead of warning.

    Raises:
        CacheNotFoundError: as :func:`find_cache`.
        MaterializeError: the step is strict, and the example has it decode the cache whole.
        ValueError: the format does not fit the cache, as groups that do not divide head_dim, or layers that
            it does not have.
    """
    if not isinstance(page_size, numbers.Integral) or page_size < 1:
        raise ValueError(f"page_size must be a whole number, at least 1, but is {page_size!r}; 16 is usual.")
    formats = CacheFormat.of(format)
    found = find_cache(step, *example, where=where, axes=axes)
    _check_layers(formats, found)
    quantized = QuantizedStep(step, formats, found, page_size, strict)
    quantized._trace_example(example)
    return quantized


class QuantizedStep:
    """A step whose cache is quantized; :func:`quantize_cache` makes it.

    Attributes:
        found: the cache's arrays, and how they were told.
        format: their formats.
    """

    def __init__(
        self, step: Callable[..., Any], format: CacheFormat, found: FoundCache, page_size: int, strict: bool
    ):
        self.found, self.format = found, format
        self._step, self._page_size, self._strict = step, page_size, strict
        self._run = use_implicit_args(step)
        self._places: dict[Materialized, None] = {}
        self._leaves = {leaf.path: leaf for leaf in found.leaves}
        functools.update_wrapper(self, step, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the step returns, the cache quantized as it came."""
        with record_materializations() as records:
            out = self._run(*args, **kwargs)
        decoded = [record for record in records if record.array_type == QuantizedArray.__name__]
        self._note([Materialized(r.primitive, r.shape, r.dtype, r.file, r.line) for r in decoded])
        return self._as_it_came(out, Arguments(self._step, args, kwargs))

    def of(self, step: Callable[..., Any], found: FoundCache) -> QuantizedStep:
        """A part of this step, with a part of its cache: the same format and the same report."""
        part = QuantizedStep(step, self.format, found, self._page_size, self._strict)
        part._places = self._places
        return part

    def init(self, *cache: Any) -> Any:
        """A cache, quantized: the same tree with a QuantizedArray for each of its arrays.

        Blocks of zeros are taken for unwritten. Arrays given as ``jax.ShapeDtypeStruct`` are made unwritten,
        so that a float cache never needs to be; what is not of the cache stays as it is given.

        Args:
            *cache: the argument that holds the cache, or, where several do, these in their order.

        Raises:
            ValueError: another number of trees than of arguments that hold the cache, or one that lacks some
                of its arrays.
        """
        names = self.found.arguments
        if len(cache) != len(names):
            raise ValueError(f"init must be given {', '.join(names)}, but {len(cache)} arguments came.")
        made = [self._quantized(name, tree) for name, tree in zip(names, cache, strict=True)]
        return made[0] if len(made) == 1 else tuple(made)

    def report(self) -> Report:
        """Where the step decoded its cache whole, in all programs traced so far, the example's first."""
        return Report(self._places)

    def _trace_example(self, example: Sequence[Any]) -> None:
        """Run the step on shapes, to meet what it materializes."""
        given = Arguments(self._step, example, {})

        def run(arrays: Sequence[Any]) -> Any:
            made = zip(given.paths, arrays, strict=True)
            args, kwargs = given.replaced([self._encoded(path, array) for path, array in made])
            return self(*args, **kwargs)

        jax.eval_shape(lambda arrays: as_arrays(run(arrays)), given.structs)

    def _quantized(self, name: str, tree: Any) -> Any:
        """An argument with its cache quantized."""
        missing = {path for path in self._leaves if path.split("/")[0] == name} - set(
            leaves_by_path(tree, name)
        )
        if missing:
            raise ValueError(
                f"{name} must hold the arrays of the example, but lacks {', '.join(sorted(missing))}."
            )
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: self._encoded(beneath(name, path), leaf), tree
        )

    def _encoded(self, path: str, array: Any) -> Any:
        """An array of the arguments in its format; as it is where it is not of the cache."""
        leaf = self._leaves.get(path)
        if leaf is None or (quantizer := _format(self.format, leaf)) is None:
            return array
        if not isinstance(array, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise TypeError(
                f"{path} must be an array or a jax.ShapeDtypeStruct, but came as {type(array).__name__}."
            )
        shape, length, channels = array.shape, leaf.axis("length"), leaf.axis("head_dim")
        if len(shape) != len(leaf.axes) or shape[length] == 0:
            raise ValueError(
                f"{path} must have the axes {leaf.axes}, with room for a token, but came with shape {shape}."
            )
        block = [1] * len(shape)
        page = _page(shape[length], self._page_size)
        block[length], block[channels] = quantizer.block((page, shape[channels]))
        if isinstance(array, jax.ShapeDtypeStruct):
            return empty(shape, quantizer, block, array.dtype, channels - len(shape))
        return _fresh(array, quantizer, tuple(block), channels - len(shape))

    def _as_it_came(self, out: Any, given: Arguments) -> Any:
        """What the step returned, with the cache in the format it came in."""
        came = dict(zip(given.paths, given.arrays, strict=True))
        wanted = {
            leaf.output: came.get(path) for path, leaf in self._leaves.items() if leaf.output is not None
        }

        def leaf(path: Any, value: Any) -> Any:
            like = wanted.get(join(path))
            if not isinstance(like, QuantizedArray) or same_layout(like, value):
                return value
            code = self._step.__code__ if hasattr(self._step, "__code__") else None
            place = (code.co_filename, code.co_firstlineno) if code else ("<unknown>", 0)
            self._note([Materialized("return", value.shape, value.dtype, *place)])
            return overwrite(like, value)

        return jax.tree_util.tree_map_with_path(leaf, out, is_leaf=lambda x: isinstance(x, QuantizedArray))

    def _note(self, places: Sequence[Materialized]) -> None:
        self._places.update(dict.fromkeys(places))
        if self._strict and places:
            raise MaterializeError(
                f"step must not decode its cache, since strict is set, but {Report(places)}\n"
                f"Rewrite those lines, or leave strict out to have the cache decoded there."
            )


def _check_layers(format: CacheFormat, found: FoundCache) -> None:
    """ValueError where a format is given for a layer that is not there."""
    layers = {leaf.layer for leaf in found.leaves}
    beyond = [index for index, _ in format.layers if index not in layers]
    if beyond and None not in layers:
        raise ValueError(
            f"format must name layers of the cache's {len(layers)}, counted from 0, but names {beyond}."
        )


def _format(format: CacheFormat, leaf: CacheLeaf) -> Quantizer | None:
    """The format of one array of the cache."""
    if leaf.layer is not None:
        pairs = {format.layer(leaf.layer)}
    else:
        pairs = {(format.key, format.value), *dict(format.layers).values()}
    key, value = pair = next(iter(pairs))
    for what, differ in (("layers", len(pairs) > 1), ("keys and values", key != value)):
        if differ and (what == "layers" or leaf.role == "key and value"):
            raise ValueError(
                f"format must be the same for all {what} that one array holds, as {leaf.path} does, "
                f"but came as {format}."
            )
    return pair[leaf.role == "value"]


def _page(length: int, most: int) -> int:
    """The greatest divisor of ``length`` up to ``most``."""
    return next(size for size in range(min(length, most), 0, -1) if length % size == 0)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _fresh(
    array: jax.Array, quantizer: Quantizer, block: tuple[int, ...], channel_axis: int
) -> QuantizedArray:
    """``array`` quantized, blocks of zeros as those in which nothing was written."""
    made = quantize(array, quantizer, block, array.dtype, channel_axis)
    if made.scales is None:
        return made
    used = block_max(jnp.abs(array), made.scales.shape) > 0
    return made.like(made.codes, jnp.where(used, made.scales, 0).astype(made.scales.dtype), None, made.outer)
