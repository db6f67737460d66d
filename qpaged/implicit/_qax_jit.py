"""The handler that qax 0.4.1 needs for jit on JAX 0.4.35, written with qax's own names."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.extend.core as jex


def handle_inner_jit(qax: ModuleType) -> None:
    """Register a handler with qax that evaluates the function inside a jit.

    The built-in rule of qax does not know that JAX keeps a layout for every argument of an inner jit. With
    it any implicit array of other than one leaf fails in every function of jax.numpy, in `x + y` too.
    """
    # Under this JAX the primitive has no public name, so it is taken from an equation.
    (eqn,) = jax.make_jaxpr(jax.jit(lambda x: x))(0.0).eqns

    @qax.primitive_handler(eqn.primitive)
    def inner_jit(primitive: jex.Primitive, *operands: Any, jaxpr: jex.ClosedJaxpr, **params: Any) -> Any:
        return qax.use_implicit_args(jex.jaxpr_as_fun(jaxpr))(*operands)
