"""Operations on meshes with Explicit axes, where JAX asks for the sharding of every result.

Codes and scales of a block have no such rule of their own. What is done to them runs with the axes as Auto
axes, and each result is placed as the operation on the plain array would place it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import NamedSharding

from qpaged._compat import explicit_sharding, has_explicit_meshes, with_auto_axes
from qpaged._promotion import promoting_ranks
from qpaged.arrays._placement import sharding_of_part
from qpaged.implicit import ImplicitArray, default_handler, primitive_handler

F = TypeVar("F", bound=Callable[..., Any])


def array_handler(primitives: Any, **options: int) -> Callable[[F], F]:
    """Register a function as `primitive_handler` does, for meshes with Explicit axes too."""
    register = primitive_handler(primitives, **options)

    def decorate(function: F) -> F:
        register(promoting_ranks(on_explicit_meshes(function)))
        return function

    return decorate


def on_explicit_meshes(handler: F) -> F:
    """Return a handler of a primitive that also takes operands on meshes with Explicit axes."""
    if not has_explicit_meshes():
        return handler

    @functools.wraps(handler)
    def handle(primitive: Any, *operands: Any, **params: Any) -> Any:
        if not are_explicit(operands):
            return handler(primitive, *operands, **params)
        plain = _results_of_plain(primitive, operands, params)
        # Where the results go is known by now, and with Auto axes a dot takes no sharding for its result.
        inner = {**params, "out_sharding": None} if "out_sharding" in params else params
        return placed_as(lambda *xs: handler(primitive, *xs, **inner), operands, plain)

    return handle  # type: ignore[return-value]


def _results_of_plain(primitive: Any, operands: Sequence[Any], params: dict[str, Any]) -> Any:
    """Return the types of a primitive's results for plain operands, with their shardings."""
    structs = [_logical_struct(operand) for operand in operands]
    # The shapes that eval_shape returns have no shardings on a mesh with axes of several kinds.
    jaxpr, shapes = jax.make_jaxpr(lambda *xs: default_handler(primitive, *xs, **params), return_shape=True)(
        *structs
    )
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(shapes), jaxpr.out_avals)


def placed_as(function: Callable[..., Any], operands: Sequence[Any], plain: Any) -> Any:
    """Return ``function(*operands)`` computed with Auto axes; NotImplemented if it returns that.

    Args:
        function: returns plain or quantized arrays, in the tree of ``plain``.
        operands: plain or quantized arrays.
        plain: the shapes of the results as plain arrays, with their shardings.
    """
    is_implemented = True

    def implemented(*operands: Any) -> Any:
        nonlocal is_implemented
        out = function(*operands)
        is_implemented = out is not NotImplemented
        return out if is_implemented else ()

    # Its own shardings are not known before, so that it is traced without any first.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        shapes = jax.eval_shape(implemented, *jax.tree_util.tree_map(_without_sharding, tuple(operands)))
    if not is_implemented:
        return NotImplemented
    results = jax.tree_util.tree_leaves(shapes, is_leaf=_is_one_array)
    shardings = []
    for result, struct in zip(results, jax.tree_util.tree_leaves(plain), strict=True):
        place = functools.partial(_sharding_of_leaf, struct.sharding)
        shardings.append(jax.tree_util.tree_map(place, result))
    tree = jax.tree_util.tree_structure(shapes, is_leaf=_is_one_array)
    return with_auto_axes(function, jax.tree_util.tree_unflatten(tree, shardings))(*operands)


def _is_one_array(value: Any) -> bool:
    return isinstance(value, ImplicitArray)


def are_explicit(operands: Sequence[Any]) -> bool:
    """Return True if any leaf of the operands lies on a mesh with Explicit axes."""
    leaves = jax.tree_util.tree_leaves(list(operands))
    return any(explicit_sharding(leaf) is not None for leaf in leaves)


def _logical_struct(operand: Any) -> jax.ShapeDtypeStruct:
    is_implicit = isinstance(operand, ImplicitArray)
    sharding = operand.explicit_sharding() if is_implicit else explicit_sharding(operand)
    return jax.ShapeDtypeStruct(operand.shape, operand.dtype, sharding=sharding)


def _without_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _sharding_of_leaf(sharding: NamedSharding, leaf: Any) -> NamedSharding:
    return sharding_of_part(sharding, leaf.shape)
