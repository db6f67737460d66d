"""`by_platform`: one computation with kernels for some platforms, chosen when the program is lowered.

`jax.lax.platform_dependent` does the same, but kernels cannot be partitioned by the compiler, have no
derivatives, and cannot read implicit arrays. `by_platform` uses the default instead of a kernel in all those
cases: in programs that the compiler partitions, under differentiation, under `jax.vmap`, and for implicit
operands.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
from jax.interpreters import ad, batching, mlir

from qpaged._compat import Aval, Jaxpr, Operand, Pytree, compiler_partitions_module

PLATFORMS = "tpu", "cuda"

by_platform_p = jex.Primitive("by_platform")
by_platform_p.multiple_results = True


def by_platform(*args: Pytree, default: Callable[..., Any], **kernels: Callable[..., Any]) -> Pytree:
    """Compute `default(*args)`, by the kernel for the platform that the program is lowered for, if given.

    Args:
        args: pytrees of arrays.
        default: the computation; it traces on any platform.
        kernels: for some of :data:`PLATFORMS` a function that computes the same.
    """
    default_jaxpr, out_shapes = jax.make_jaxpr(default, return_shape=True)(*args)
    kernel_jaxprs = tuple(jax.make_jaxpr(kernel)(*args) for kernel in kernels.values())
    outs = by_platform_p.bind(
        *jax.tree_util.tree_leaves(args),
        default=default_jaxpr,
        platforms=tuple(kernels),
        kernels=kernel_jaxprs,
    )
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(out_shapes), outs)


@functools.lru_cache(maxsize=256)
def _compiled(default: Jaxpr, platforms: tuple[str, ...], kernels: tuple[Jaxpr, ...]) -> Callable[..., Any]:
    def bind(*operands: Operand) -> list[Any]:
        return by_platform_p.bind(*operands, default=default, platforms=platforms, kernels=kernels)

    return jax.jit(bind)


@by_platform_p.def_impl
def _run_eagerly(
    *operands: Operand, default: Jaxpr, platforms: tuple[str, ...], kernels: tuple[Jaxpr, ...]
) -> list[jax.Array]:
    # Only a compiled program is lowered for a platform. JAX keeps one jaxpr for equal functions and shapes,
    # so an eager loop compiles once.
    return _compiled(default, platforms, kernels)(*operands)


@by_platform_p.def_abstract_eval
def _out_avals(*_: Aval, default: jex.ClosedJaxpr, **__: Any) -> list[Any]:
    return default.out_avals


def _jvp(
    primals: Sequence[Operand], tangents: Sequence[Any], *, default: jex.ClosedJaxpr, **_: Any
) -> tuple[Any, Any]:
    """Differentiate the default with respect to the operands that have a tangent."""
    has_tangent = [not isinstance(tangent, ad.Zero) for tangent in tangents]

    def function_of_differentiated(*differentiated: Operand) -> list[Any]:
        remaining = iter(differentiated)
        operands = [next(remaining) if has else x for x, has in zip(primals, has_tangent, strict=True)]
        return jex.jaxpr_as_fun(default)(*operands)

    def with_tangent(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(value for value, has in zip(values, has_tangent, strict=True) if has)

    return jax.jvp(function_of_differentiated, with_tangent(primals), with_tangent(tangents))


def _batch(
    operands: Sequence[Operand], dims: Sequence[int | None], *, default: jex.ClosedJaxpr, **_: Any
) -> tuple[list[Any], list[int]]:
    outs = jax.vmap(jex.jaxpr_as_fun(default), in_axes=tuple(dims))(*operands)
    return outs, [0] * len(outs)


def _lower(
    ctx: mlir.LoweringRuleContext,
    *operands: Any,
    platform: str | None,
    default: jex.ClosedJaxpr,
    platforms: tuple[str, ...],
    kernels: tuple[jex.ClosedJaxpr, ...],
) -> Sequence[Any]:
    jaxpr = default
    if platform in platforms and not compiler_partitions_module(ctx):
        jaxpr = kernels[platforms.index(platform)]
    return mlir.lower_fun(jex.jaxpr_as_fun(jaxpr), multiple_results=True)(ctx, *operands)


ad.primitive_jvps[by_platform_p] = _jvp
batching.primitive_batchers[by_platform_p] = _batch
for _platform in (None, *PLATFORMS):
    _lower_for_platform = functools.partial(_lower, platform=_platform)
    mlir.register_lowering(by_platform_p, _lower_for_platform, platform=_platform)
