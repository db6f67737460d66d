"""What qax 0.4.1 needs to work on JAX 0.4.35, said in its own terms."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.extend.core as jex


def handle_inner_jit(qax: ModuleType) -> None:
    """Give qax a handler for jit, which evaluates what is inside.

    Its built-in rule does not know that JAX keeps a layout for every argument of an inner jit. With it
    any implicit array of other than one leaf fails in every function of jax.numpy, in `x + y` too.
    """
    (eqn,) = jax.make_jaxpr(jax.jit(lambda x: x))(0.0).eqns

    @qax.primitive_handler(eqn.primitive)
    def inner_jit(primitive: jax.core.Primitive, *operands: Any, jaxpr: Any, **params: Any) -> Any:  # type: ignore[name-defined]
        return qax.use_implicit_args(jex.jaxpr_as_fun(jaxpr))(*operands)
