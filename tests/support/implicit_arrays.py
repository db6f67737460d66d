"""Small implicit arrays of codes and a scale, with handlers for a few primitives."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import qpaged.implicit as qi

ours = pytest.mark.skipif(
    qi.provider().name == "qax", reason="qax has no rule for this; it is our implementation's"
)


@dataclass
class Scaled(qi.ImplicitArray, warn_on_materialize=False):
    """Represents codes * scale; its shape is stored, as in qax's classes."""

    codes: Any
    scale: Any

    def materialize(self):
        return self.codes.astype(self.scale.dtype) * self.scale


@dataclass
class Derived(qi.ImplicitArray):
    """Represents codes * scale; its shape is that of the codes. It has no handler for `sin`."""

    codes: Any
    scale: Any

    @property
    def shape(self):
        return self.codes.shape

    @shape.setter
    def shape(self, value):
        pass

    @property
    def dtype(self):
        return self.scale.dtype

    @dtype.setter
    def dtype(self, value):
        pass

    def __post_init__(self):
        pass

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        return [(key("codes"), self.codes), (key("scale"), self.scale)], ()

    def tree_flatten(self):
        return (self.codes, self.scale), ()

    @classmethod
    def tree_unflatten(cls, aux, children):
        array = object.__new__(cls)
        array.codes, array.scale = children
        return array

    def materialize(self):
        return self.codes.astype(self.scale.dtype) * self.scale


KINDS = (Scaled, Derived)


@qi.primitive_handler("mul")
def _(primitive, a: Scaled | Derived, b: Any, **params):
    """Multiply the scale by a scalar."""
    if jnp.shape(b) != () or isinstance(b, qi.ImplicitArray):
        return NotImplemented
    return type(a)(a.codes, a.scale * b)


@qi.primitive_handler("neg")
def _(primitive, a: Scaled | Derived, **params):
    return type(a)(-a.codes, a.scale)


@qi.primitive_handler("dynamic_update_slice")
def _(primitive, a: Scaled | Derived, update: Any, *starts: Any, **params):
    codes = qi.default_handler(primitive, a.codes, update.astype(a.codes.dtype), *starts, **params)
    return type(a)(codes, a.scale)


def example(kind: type, shape: tuple[int, ...] = (4, 3)) -> Any:
    """Return an array with small integer codes and scale 1/2, so that arithmetic is exact."""
    size = 1
    for n in shape:
        size *= n
    codes = (jnp.arange(size, dtype=jnp.int32).reshape(shape) - 3).astype(jnp.int8)
    return kind(codes, jnp.full((1,) * len(shape), 0.5, jnp.float32))


def dense(array: Any) -> jax.Array:
    """Return the values that the array represents, without its handlers."""
    return array.codes.astype(jnp.float32) * array.scale
