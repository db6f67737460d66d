"""Flax modules with a quantized cache: nnx modules are changed in place, linen modules get a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax import nnx

from qpaged._deprecated import renamed_argument
from qpaged.adopt._arguments import Pytree
from qpaged.adopt._cache_leaf import CacheLeaf, FoundCache
from qpaged.adopt._options import AxesOption, Where
from qpaged.adopt._step import PAGE_SIZE, QuantizedStep, quantize_cache
from qpaged.formats import CacheFormat, Quantizer

if TYPE_CHECKING:
    from flax import linen


@renamed_argument("format", "quantizer")
def quantize_linen(
    module: linen.Module,
    quantizer: str | Path | Quantizer | CacheFormat | None,
    *,
    example: Sequence[Any],
    where: Where = None,
    axes: AxesOption = None,
    page_size: int = PAGE_SIZE,
    strict: bool = False,
    mutable: Sequence[str] = ("cache",),
) -> QuantizedStep:
    """Return a linen module's ``apply`` as a step, with the cache among its variables quantized.

        step = quantize_linen(module, "int8", example=(variables, token))
        variables = step.init(variables)
        out, updates = jax.jit(step)(variables, token)
        variables |= updates

    Args:
        module: a linen module that decodes, as ``MultiHeadDotProductAttention(decode=True)``.
        quantizer: as :func:`qpaged.adopt.quantize_cache` takes it.
        example: variables, cache included, and the inputs of one step.
        where: as :func:`qpaged.adopt.find_cache` takes it.
        axes: as :func:`qpaged.adopt.find_cache` takes them.
        page_size: as :func:`qpaged.adopt.quantize_cache` takes it.
        strict: as :func:`qpaged.adopt.quantize_cache` takes it.
        mutable: the collections that ``apply`` returns.

    Raises:
        CacheNotFoundError: as :func:`qpaged.adopt.quantize_cache`.
    """

    def step(variables: Pytree, *args: Any, **kwargs: Any) -> Any:
        return module.apply(variables, *args, mutable=list(mutable), **kwargs)

    return quantize_cache(
        step, quantizer, example=example, where=where, axes=axes, page_size=page_size, strict=strict
    )


@renamed_argument("format", "quantizer")
def quantize_nnx(
    model: nnx.Module,
    quantizer: str | Path | Quantizer | CacheFormat | None,
    *,
    example: Sequence[Any],
    call: Callable[..., Any] | None = None,
    where: Where = None,
    axes: AxesOption = None,
    page_size: int = PAGE_SIZE,
    strict: bool = False,
) -> QuantizedStep:
    """Quantize the cache of an nnx module in place, which is then called as before.

        quantize_nnx(model, "int8", example=(token,))
        out = model(token)

    The cache variables get QuantizedArrays for values, and each module that owns some runs its own
    ``__call__`` on them: these instances, and no others, get a class of the same name that is derived from
    their own. ``nnx.jit`` and ``nnx.scan`` of the module work as before, too.

    Args:
        model: with its cache initialized, and layers stacked or not.
        quantizer: as :func:`qpaged.adopt.quantize_cache` takes it.
        example: the inputs of one step.
        call: how to call the model, as ``call(model, *example)``; ``model(*example)`` if None.
        where: as :func:`qpaged.adopt.find_cache` takes it, of paths that begin with "state/".
        axes: as :func:`qpaged.adopt.find_cache` takes them.
        page_size: as :func:`qpaged.adopt.quantize_cache` takes it.
        strict: as :func:`qpaged.adopt.quantize_cache` takes it.

    Returns:
        The step, from the module's state and inputs to outputs and state; it has ``found`` and ``report()``.

    Raises:
        CacheNotFoundError: as :func:`qpaged.adopt.quantize_cache`.
        TypeError: not an nnx module.
        ValueError: variables of the cache are in no module that can be called.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be an nnx module, but came as {type(model).__name__}; quantize_linen takes linen's."
        )
    call_model = call or _call
    graphdef, state = nnx.split(model)

    def step(state: Pytree, *args: Any) -> tuple[Any, Pytree]:
        merged = nnx.merge(graphdef, state)
        return call_model(merged, *args), nnx.state(merged)

    quantized_step = quantize_cache(
        step, quantizer, example=(state, *example), where=where, axes=axes, page_size=page_size, strict=strict
    )
    caches = _caches_by_owner(model, quantized_step.found)  # raises before anything of the model changes
    nnx.update(model, quantized_step.init(state))
    for owner, found in caches:
        _quantize_call(owner, quantized_step, found)
    return quantized_step


def _call(model: Callable[..., Any], *args: Any) -> Any:
    return model(*args)


def _caches_by_owner(model: nnx.Module, found: FoundCache) -> list[tuple[nnx.Module, FoundCache]]:
    """Return every module that owns cache variables, with its part of the cache."""
    owners: dict[str, nnx.Module] = {}
    leaves: dict[str, list[CacheLeaf]] = {}
    for leaf in found.leaves:
        owner_path, owner = _owner(model, leaf)
        owners[owner_path] = owner
        leaves.setdefault(owner_path, []).append(_relative_to(owner_path, leaf))
    return [(owner, FoundCache(tuple(leaves[owner_path]))) for owner_path, owner in owners.items()]


def _owner(model: nnx.Module, leaf: CacheLeaf) -> tuple[str, nnx.Module]:
    """Return the path and the module of the innermost callable module that has the variable."""
    owners: dict[str, nnx.Module] = {}
    for keys, module in nnx.iter_modules(model):
        path = "/".join(("state", *map(str, keys)))
        if leaf.path.startswith(f"{path}/") and callable(module):
            owners[path] = module
    if not owners:
        raise ValueError(
            f"model must have a module with __call__ around each variable of its cache, but {leaf.path} is "
            f"in none; give the module that attends a __call__."
        )
    innermost = max(owners, key=len)
    return innermost, owners[innermost]


def _relative_to(owner_path: str, leaf: CacheLeaf) -> CacheLeaf:
    """Return the leaf with the paths that it has in a step of its owner: step(state, ...) -> (out, state)."""
    name = leaf.path.removeprefix(f"{owner_path}/")
    return replace(leaf, path=f"state/{name}", output=f"1/{name}")


def _quantize_call(module: nnx.Module, quantized_step: QuantizedStep, found: FoundCache) -> None:
    """Change the class of a module to one that runs the module's own code on its quantized variables."""
    own_class: Any = type(module)
    metaclass: Any = type(own_class)  # nnx modules have one of their own

    def step(state: Pytree, graphdef: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Pytree]:
        merged = nnx.merge(graphdef, state)
        return own_class.__call__(merged, *args, **kwargs), nnx.state(merged)

    members = {
        "__module__": own_class.__module__,
        "__call__": _call_quantized,
        "quantized_step": quantized_step.restrict(step, found),
    }
    # With a second base class, Python would refuse to assign to the instance's __class__.
    quantized_class = metaclass(own_class.__name__, (own_class,), members)
    # nnx's own __setattr__ would take the class for an attribute of the module.
    object.__setattr__(module, "__class__", quantized_class)


def _call_quantized(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a module whose variables are quantized, and update them: the ``__call__`` of its class."""
    graphdef, state = nnx.split(module)
    out, state = module.quantized_step(state, graphdef, args, kwargs)
    nnx.update(module, state)
    return out
