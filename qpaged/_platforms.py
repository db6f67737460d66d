"""One computation with kernels for some platforms: which of them it is, a program's lowering decides.

`jax.lax.platform_dependent` does the same, but a kernel cannot be partitioned by the compiler, has no
derivative, and cannot read implicit arrays. Here the default stands in wherever a kernel will not do: in
programs that the compiler divides over several devices, under differentiation, under `jax.vmap`, and for
implicit operands.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
from jax.interpreters import ad, batching, mlir

PLATFORMS = "tpu", "cuda"

by_platform_p = jex.Primitive("by_platform")
by_platform_p.multiple_results = True


def by_platform(*args: Any, default: Callable[..., Any], **kernels: Callable[..., Any]) -> Any:
    """`default(*args)`, or the kernel of the platform that the program is lowered for.

    Args:
        args: pytrees of arrays.
        default: what is computed; traces on any platform.
        kernels: for some of :data:`PLATFORMS` a function that computes the same.
    """
    closed, out = jax.make_jaxpr(default, return_shape=True)(*args)
    others = tuple(jax.make_jaxpr(kernel)(*args) for kernel in kernels.values())
    operands = jax.tree_util.tree_leaves(args)
    outs = by_platform_p.bind(*operands, default=closed, platforms=tuple(kernels), kernels=others)
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(out), outs)


@functools.lru_cache(maxsize=256)
def _compiled(default: Any, platforms: tuple[str, ...], kernels: tuple[Any, ...]) -> Callable[..., Any]:
    params = {"default": default, "platforms": platforms, "kernels": kernels}
    return jax.jit(functools.partial(by_platform_p.bind, **params))


@by_platform_p.def_impl
def _run(*operands: Any, **params: Any) -> list[Any]:
    return _compiled(**params)(*operands)


@by_platform_p.def_abstract_eval
def _avals(*_: Any, default: Any, **__: Any) -> list[Any]:
    return default.out_avals


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, default: Any, **_: Any) -> tuple[Any, Any]:
    moves = [not isinstance(tangent, ad.Zero) for tangent in tangents]

    def of_moving(*moving: Any) -> list[Any]:
        rest = iter(moving)
        operands = [next(rest) if moved else x for x, moved in zip(primals, moves, strict=True)]
        return jex.jaxpr_as_fun(default)(*operands)

    def chosen(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(value for value, moved in zip(values, moves, strict=True) if moved)

    return jax.jvp(of_moving, chosen(primals), chosen(tangents))


def _batched(operands: Sequence[Any], dims: Sequence[int | None], *, default: Any, **_: Any) -> Any:
    outs = jax.vmap(jex.jaxpr_as_fun(default), in_axes=tuple(dims))(*operands)
    return outs, [0] * len(outs)


def _lowered(platform: str | None, ctx: Any, *operands: Any, default: Any, **others: Any) -> Any:
    jaxpr = default
    if platform in others["platforms"] and not _divided(ctx.module_context.axis_context):
        jaxpr = others["kernels"][others["platforms"].index(platform)]
    return mlir.lower_fun(jex.jaxpr_as_fun(jaxpr), multiple_results=True)(ctx, *operands)


def _divided(context: Any) -> bool:
    """Whether the compiler divides what is lowered in this context over several devices."""
    if isinstance(context, mlir.SPMDAxisContext):
        mesh = context.mesh
        return context.manual_axes | set(mesh.manual_axes) != set(mesh.axis_names)
    return getattr(context, "num_devices", 1) != 1


ad.primitive_jvps[by_platform_p] = _jvp
batching.primitive_batchers[by_platform_p] = _batched
for _platform in (None, *PLATFORMS):
    mlir.register_lowering(by_platform_p, functools.partial(_lowered, _platform), platform=_platform)
