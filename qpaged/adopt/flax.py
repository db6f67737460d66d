"""Flax: nnx modules whose cache variables are quantized in place, and linen modules with quantized ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from flax import nnx

from qpaged.adopt._found import AxesOption, FoundCache, Where
from qpaged.adopt._leaf import CacheLeaf
from qpaged.adopt._step import PAGE_SIZE, QuantizedStep, quantize_cache


def quantize_linen(
    module: Any,
    format: Any,
    *,
    example: Sequence[Any],
    where: Where = None,
    axes: AxesOption = None,
    page_size: int = PAGE_SIZE,
    strict: bool = False,
    mutable: Any = ("cache",),
) -> QuantizedStep:
    """A linen module's ``apply`` with the cache among its variables quantized.

        step = quantize_linen(module, "int8", example=(variables, token))
        variables = step.init(variables)
        out, updates = jax.jit(step)(variables, token)
        variables |= updates

    Args:
        module: a linen module that decodes, as ``MultiHeadDotProductAttention(decode=True)``.
        format: as :func:`qpaged.adopt.quantize_cache` takes it.
        example: variables, cache included, and the inputs of one step.
        where: as :func:`qpaged.adopt.find_cache` takes it.
        axes: as there.
        page_size: as :func:`qpaged.adopt.quantize_cache` takes it.
        strict: as there.
        mutable: the collections that ``apply`` returns.

    Raises:
        CacheNotFoundError: as :func:`qpaged.adopt.quantize_cache`.
    """

    def step(variables: Any, *args: Any, **kwargs: Any) -> Any:
        return module.apply(variables, *args, mutable=list(mutable), **kwargs)

    return quantize_cache(
        step, format, example=example, where=where, axes=axes, page_size=page_size, strict=strict
    )


def quantize_nnx(
    model: nnx.Module,
    format: Any,
    *,
    example: Sequence[Any],
    call: Callable[..., Any] | None = None,
    where: Where = None,
    axes: AxesOption = None,
    page_size: int = PAGE_SIZE,
    strict: bool = False,
) -> QuantizedStep:
    """Quantize the cache of an nnx module in place; ``model(...)``, ``nnx.jit`` and ``nnx.scan`` go on.

        quantize_nnx(model, "int8", example=(token,))
        out = model(token)

    The variables get QuantizedArrays for values, and each module that holds some runs its own ``__call__`` on
    them: these instances, no other, get a class of the same name derived from their own.

    Args:
        model: with its cache initialized, and layers stacked or not.
        format: as :func:`qpaged.adopt.quantize_cache` takes it.
        example: the inputs of one step.
        call: how the model is called, as ``call(model, *example)``; by itself if None.
        where: as :func:`qpaged.adopt.find_cache` takes it, of paths that begin with "state/".
        axes: as there.
        page_size: as :func:`qpaged.adopt.quantize_cache` takes it.
        strict: as there.

    Returns:
        The step, from the module's state and inputs to outputs and state; it has ``found`` and ``report()``.

    Raises:
        CacheNotFoundError: as :func:`qpaged.adopt.quantize_cache`.
        TypeError: not an nnx module.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be an nnx module, but came as {type(model).__name__}; quantize_linen takes linen's."
        )
    invoke = call or (lambda module, *args: module(*args))
    graph, state = nnx.split(model)

    def step(state: Any, *args: Any) -> Any:
        module = nnx.merge(graph, state)
        return invoke(module, *args), nnx.state(module)

    adopted = quantize_cache(
        step, format, example=(state, *example), where=where, axes=axes, page_size=page_size, strict=strict
    )
    nnx.update(model, adopted.init(state))
    owners: dict[int, tuple[Any, list[CacheLeaf]]] = {}
    for leaf in adopted.found.leaves:
        path, owner = _owner(model, leaf)
        name = leaf.path.removeprefix(f"{path}/")
        mine = replace(leaf, path=f"state/{name}", output=f"1/{name}")  # as the owner's own step has them
        owners.setdefault(id(owner), (owner, []))[1].append(mine)
    for owner, leaves in owners.values():
        _adopt(owner, adopted, FoundCache(tuple(leaves)))
    return adopted


def _owner(model: nnx.Module, leaf: CacheLeaf) -> tuple[str, nnx.Module]:
    """The innermost module that can be called and has the variable, and its path."""
    around = {"/".join(("state", *map(str, path))): module for path, module in nnx.iter_modules(model)}
    callable_ones = [
        path for path, module in around.items() if leaf.path.startswith(f"{path}/") and callable(module)
    ]
    path = max(callable_ones, key=len)
    return path, around[path]


def _adopt(module: nnx.Module, adopted: QuantizedStep, found: FoundCache) -> None:
    """Have a module run its own code on its quantized variables."""
    own: Any = type(module)
    metaclass: Any = type(own)

    def step(state: Any, graph: Any, args: Any, kwargs: Any) -> Any:
        merged = nnx.merge(graph, state)
        return own.__call__(merged, *args, **kwargs), nnx.state(merged)

    # Derived from its own class alone, or Python would not let an instance change to it.
    members = {
        "__module__": own.__module__,
        "__call__": _call_quantized,
        "quantized_step": adopted.of(step, found),
    }
    object.__setattr__(module, "__class__", metaclass(own.__name__, (own,), members))


def _call_quantized(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a module whose variables are quantized."""
    graph, state = nnx.split(module)
    out, state = module.quantized_step(state, graph, args, kwargs)
    nnx.update(module, state)
    return out
