"""Wrappers: formats made of another format."""

import dataclasses
from typing import Any, ClassVar

import jax

from qpaged.formats._checks import check_attributes, check_methods
from qpaged.formats._contract import Quantizer


class _OfInner:
    """An attribute that a wrapper passes on from the format it wraps."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, wrapper: Any, owner: type) -> Any:
        return self if wrapper is None else getattr(wrapper.inner, self.name)


@dataclasses.dataclass(frozen=True)
class Wrapper(Quantizer):
    """A format made of another one, spelled ``inner+name``. What a subclass does not override is the inner's.

    Register it under its name with a plus: ``"+name" = "package:Class"``.

    Attributes:
        inner: the wrapped format, itself a wrapper or not.

    Raises:
        ValueError: the same wrapper is in the inner one already, or :meth:`check` refuses it.
    """

    inner: Quantizer = None  # type: ignore[assignment]  # after a field with a default

    granularities: ClassVar[Any] = _OfInner()
    bits: ClassVar[Any] = _OfInner()
    state_bits: ClassVar[Any] = _OfInner()
    scale_dtype: ClassVar[Any] = _OfInner()
    bound: ClassVar[Any] = _OfInner()
    gaussian_loss: ClassVar[Any] = _OfInner()
    levels: ClassVar[Any] = _OfInner()
    elementwise: ClassVar[Any] = _OfInner()
    nan_scale: ClassVar[Any] = _OfInner()
    growth: ClassVar[Any] = _OfInner()
    block_fit: ClassVar[Any] = _OfInner()
    offset: ClassVar[Any] = _OfInner()
    global_scale: ClassVar[Any] = _OfInner()
    transform: ClassVar[Any] = _OfInner()

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Quantizer):
            raise TypeError(f"inner must be a qpaged.Quantizer, but came as {self.inner!r}.")
        check_attributes(self)
        object.__setattr__(self, "granularity", self.inner.granularity)
        if self.name in wrappers_of(self.inner):
            raise ValueError(f"+{self.name} may be given once, but {self.inner} has it already.")
        self.check()
        check_methods(self)

    def check(self) -> None:
        """Raise ValueError if ``inner`` is a format that this wrapper does not go with."""

    @property
    def order_bound(self) -> float:
        return self.inner.order_bound

    @property
    def of_whole_blocks(self) -> Quantizer:
        inner = self.inner.of_whole_blocks
        if inner == self.inner:
            return self
        try:
            return dataclasses.replace(self, inner=inner)
        except (TypeError, ValueError):  # it goes with formats that grow alone, or is made in another way
            return self

    def code_dtype(self, dtype: Any) -> Any:
        return self.inner.code_dtype(dtype)

    def scale(self, absmax: jax.Array) -> jax.Array:
        return self.inner.scale(absmax)

    def encode(self, units: jax.Array) -> jax.Array:
        return self.inner.encode(units)

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        return self.inner.decode(codes, dtype)

    def multiplier(self, scales: jax.Array) -> jax.Array:
        return self.inner.multiplier(scales)

    def fit(self, low: jax.Array, high: jax.Array) -> jax.Array:
        return self.inner.fit(low, high)

    def to_units(self, x: jax.Array, scales: jax.Array) -> jax.Array:
        return self.inner.to_units(x, scales)

    def encode_under(self, x: jax.Array, scales: jax.Array) -> jax.Array:
        return self.inner.encode_under(x, scales)

    def error_bound(self, x: jax.Array, multipliers: jax.Array) -> jax.Array:
        return self.inner.error_bound(x, multipliers)

    def block(self, shape: Any) -> tuple[int, ...]:
        return self.inner.block(shape)

    @property
    def config(self) -> dict[str, Any]:
        """The wrapper's name and options, and the configuration of what it wraps."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del options["granularity"]
        return {"name": f"+{self.name}", **options, "inner": self.inner.config}

    def __str__(self) -> str:
        return f"{self.inner}+{self.name}"


def wrappers_of(quantizer: Quantizer) -> tuple[str, ...]:
    """Return the names of the wrappers that a format is made with, the innermost first."""
    if not isinstance(quantizer, Wrapper):
        return ()
    return (*wrappers_of(quantizer.inner), quantizer.name)
