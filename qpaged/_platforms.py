"""`by_platform`: one computation with kernels for some platforms, chosen when the program is lowered.

`jax.lax.platform_dependent` does the same, but kernels cannot be partitioned by the compiler, have no
derivatives, and cannot read implicit arrays. `by_platform` uses the default instead of a kernel in all those
cases: in programs that the compiler partitions, under differentiation, under `jax.vmap`, and for implicit
operands.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
from jax.interpreters import ad, batching, mlir

from qpaged._compat import Aval, Equation, Operand, Pytree, compiler_partitions_module

PLATFORMS = "tpu", "cuda", "rocm", "cpu"

by_platform_p = jex.Primitive("by_platform")
by_platform_p.multiple_results = True


def by_platform(
    *args: Pytree, default: Callable[..., Any], partitionable: bool = False, **kernels: Callable[..., Any]
) -> Pytree:
    """Compute `default(*args)`, by the kernel for the platform that the program is lowered for, if given.

    Args:
        args: pytrees of arrays.
        default: the computation; it traces on any platform.
        partitionable: True if the kernels are plain JAX, which the compiler can partition.
        kernels: for some of :data:`PLATFORMS` a function that computes the same. It is traced when a program
            is lowered for its platform, and on no other. Pass the same function object each time.
    """
    assert set(kernels) <= set(PLATFORMS)  # nothing would be lowered for another
    operands, in_tree = jax.tree_util.tree_flatten(args)
    default_jaxpr, out_shapes = jax.make_jaxpr(default, return_shape=True)(*args)
    outs = by_platform_p.bind(
        *operands,
        default=default_jaxpr,
        partitionable=partitionable,
        platforms=tuple(kernels),
        kernels=tuple(Kernel(kernel, in_tree) for kernel in kernels.values()),
    )
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(out_shapes), outs)


class Kernel(NamedTuple):
    """A function of pytrees, to be called with their leaves."""

    function: Callable[..., Pytree]
    in_tree: jax.tree_util.PyTreeDef

    def __call__(self, *operands: Operand) -> list[Operand]:
        """Return the leaves of what the function returns."""
        args = jax.tree_util.tree_unflatten(self.in_tree, operands)
        return jax.tree_util.tree_leaves(self.function(*args))


def kernel_jaxprs(eqn: Equation) -> list[jex.ClosedJaxpr]:
    """Return the jaxprs of the kernels of a `by_platform` equation; none of any other."""
    if eqn.primitive is not by_platform_p:
        return []
    shapes = []
    for atom in eqn.invars:
        aval: Aval = atom.aval
        shapes.append(jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    return [jax.make_jaxpr(kernel)(*shapes) for kernel in eqn.params["kernels"]]


@functools.lru_cache(maxsize=256)
def _compiled(**params: Any) -> Callable[..., Any]:
    return jax.jit(functools.partial(by_platform_p.bind, **params))


@by_platform_p.def_impl
def _run_eagerly(*operands: Operand, **params: Any) -> list[jax.Array]:
    # Only a compiled program is lowered for a platform. JAX keeps one jaxpr for equal functions and shapes,
    # so an eager loop compiles once.
    outs: list[jax.Array] = _compiled(**params)(*operands)
    return outs


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
    partitionable: bool,
    platforms: tuple[str, ...],
    kernels: tuple[Kernel, ...],
) -> Sequence[Any]:
    if platform in platforms and (partitionable or not compiler_partitions_module(ctx)):
        computation: Callable[..., Any] = kernels[platforms.index(platform)].__call__
    else:
        computation = jex.jaxpr_as_fun(default)
    return mlir.lower_fun(computation, multiple_results=True)(ctx, *operands)


ad.primitive_jvps[by_platform_p] = _jvp
batching.primitive_batchers[by_platform_p] = _batch
for _platform in (None, *PLATFORMS):
    _lower_for_platform = functools.partial(_lower, platform=_platform)
    mlir.register_lowering(by_platform_p, _lower_for_platform, platform=_platform)
