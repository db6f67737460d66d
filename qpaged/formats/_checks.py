"""Slips of a format's author, refused where its class is defined or when an instance is made."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from qpaged.arrays import PLANES

if TYPE_CHECKING:
    from qpaged.formats._contract import Quantizer

PACKED_BITS = tuple(PLANES)
TILE = jax.ShapeDtypeStruct((8, 128), jnp.float32)  # slots and channels, which encode may combine

RENAMED = {
    "holds": "growth, an object with covers(scales, low, high)",
    "refit": "growth, an object with grown_scale(scales, greatest_code, low, high)",
    "grow": "growth, an object with requantize(codes, old, new)",
    "shareable": "growth, which is None where scales cannot grow",
    "shift": "offset, an object with from_scales(scales)",
    "outer_dtype": "global_scale, an object with dtype, scale(absmax) and multiplier(stored)",
    "outer_scale": "global_scale, an object with scale(absmax)",
    "outer_multiplier": "global_scale, an object with multiplier(stored)",
    "transforms": "transform, which is None or an object with forward(x, axis) and inverse(x, axis)",
    "inverse": "transform, an object with inverse(x, axis)",
    "tiled": "elementwise",
    "past_end": "nan_scale",
}
"""What the contract's older names became. One that was overridden silently would be wrong silently."""


ABILITIES = {
    "growth": ("covers", "grown_scale", "requantize"),
    "block_fit": ("scale",),
    "offset": ("from_scales",),
    "global_scale": ("dtype", "scale", "multiplier"),
    "transform": ("forward", "inverse"),
}
"""What few formats have, and what each object of it must have."""


def check_class(cls: type, before: type) -> None:
    """Raise TypeError for ``bits`` that nothing packs, and for what is overridden under its old name.

    Bases that stand ``before`` the contract are looked at, too: mixins override what comes after them.
    """
    defined: dict[str, Any] = {}
    for base in reversed(cls.__mro__[: cls.__mro__.index(before)]):
        defined |= vars(base)
    for old, new in RENAMED.items():
        if old in defined:
            raise TypeError(f"{cls.__name__}.{old} is now {new}; rename it, for the old name is not called.")
    if callable(defined.get("transform")):
        raise TypeError(
            f"{cls.__name__}.transform must be None or an object with forward(x, axis) and inverse(x, axis), "
            f"but is a method; give such an object, as a property if it depends on the instance."
        )
    bits = defined.get("bits", PACKED_BITS[0])
    if bits not in PACKED_BITS and not hasattr(bits, "__get__"):  # a property is asked when it is needed
        advice = "take the next larger one"
        if not isinstance(bits, int) or bits > PACKED_BITS[0]:
            advice = f"take {PACKED_BITS[0]} for one code per element, however wide code_dtype makes it"
        raise TypeError(
            f"{cls.__name__}.bits must be one of {', '.join(map(str, PACKED_BITS))}, which are what codes "
            f"are packed by, but is {bits!r}; {advice}."
        )


def check_attributes(quantizer: "Quantizer") -> None:
    """Raise TypeError for a class without ``name`` or ``bound``, narrow float scales, and too many states."""
    cls = type(quantizer)
    for attribute, meaning in (
        ("name", "the first part of its spelling"),
        ("bound", "its largest error in units of the scale"),
    ):
        if getattr(quantizer, attribute, None) is None:
            raise TypeError(f"{cls.__name__} must have a class attribute {attribute}, {meaning}; set it.")
    _check_scale_dtype(quantizer.name, quantizer.scale_dtype)
    bits, state_bits = quantizer.bits, quantizer.state_bits
    if state_bits is not None and not (bits < 8 and bits < state_bits <= bits + 8):
        raise TypeError(
            f"{cls.__name__}.state_bits must be None, or more than its {bits} bits by at most 8, where "
            f"codes have less than 8, but is {state_bits!r}; take fewer states."
        )


def check_methods(quantizer: "Quantizer") -> None:
    """Raise TypeError for half an ability, and if ``encode`` does not return integers.

    Only shapes are traced: nothing is computed.
    """
    cls = type(quantizer)
    for ability, needed in ABILITIES.items():
        rule = getattr(quantizer, ability)
        missing = [name for name in needed if not hasattr(rule, name)]
        if rule is not None and missing:
            raise TypeError(
                f"{cls.__name__}.{ability} must be None or an object with {', '.join(needed)}, but is "
                f"{rule!r}, which lacks {', '.join(missing)}."
            )
    if quantizer.block_fit is not None:
        for ability in ("growth", "global_scale"):
            if getattr(quantizer, ability) is not None:
                raise TypeError(
                    f"{cls.__name__}.{ability} must be None beside block_fit, which gives one scale for all "
                    f"of a block; return None."
                )
    if quantizer.state_bits is not None and quantizer.growth is not None:
        raise TypeError(
            f"{cls.__name__}.growth must be None for a trellis, whose codes are not rounded one by one; "
            f"return None, and pages whose tokens share scales go with exact ones."
        )
    if quantizer.scale_dtype is None:
        return
    try:
        codes = jax.eval_shape(quantizer.encode, TILE)
    except Exception:  # an instance that is not complete yet, or a slip that its first use will show
        return
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise TypeError(
            f"{cls.__name__}.encode must return integers, but returns {codes.dtype.name}; cast "
            f"them to int8 or uint8, or give the bits of a float with lax.bitcast_convert_type."
        )


def _check_scale_dtype(name: str, dtype: Any) -> None:
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4:
        raise TypeError(
            f"scale_dtype must be float32 or an integer dtype, but is {jnp.dtype(dtype).name} for {name}, "
            f"and XLA on CPU copies a whole array of narrow floats at each write; store the bits of it in "
            f"an integer of its width, and read them in multiplier()."
        )
