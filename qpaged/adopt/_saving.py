"""Saving an adopted cache with flax, and exporting an adopted step: how both take a quantized array apart."""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from qpaged.arrays import QuantizedArray
from qpaged.arrays._quantized import PATHS
from qpaged.formats import quantizer_from_config


def register_export() -> None:
    """Let `jax.export` serialize programs of quantized arrays, here and where they are read."""
    export.register_pytree_node_serialization(
        QuantizedArray,
        serialized_name="qpaged.QuantizedArray",
        serialize_auxdata=_static_to_bytes,
        deserialize_auxdata=_static_from_bytes,
    )


def _static_to_bytes(static: tuple[Any, ...]) -> bytes:
    quantizer, channel_axis, slots_per_row, dtype = static
    record = {
        "quantizer": quantizer.config,
        "channel_axis": channel_axis,
        "slots_per_row": slots_per_row,
        "dtype": jnp.dtype(dtype).name,
    }
    return json.dumps(record).encode()


def _static_from_bytes(data: bytes) -> tuple[Any, ...]:
    record = json.loads(data)
    quantizer = quantizer_from_config(record["quantizer"])
    return quantizer, record["channel_axis"], record["slots_per_row"], jnp.dtype(record["dtype"])


def register_with_flax() -> None:
    """Let `flax.serialization` save quantized arrays, if the program has imported it."""
    serialization = sys.modules.get("flax.serialization")
    if serialization is not None:
        serialization.register_serialization_state(QuantizedArray, _state_of, _with_state, override=True)


def _state_of(array: QuantizedArray) -> dict[str, jax.Array]:
    """Return the children that an array has, by the names that paths of pytrees have for them."""
    children, _ = array.tree_flatten()
    return {name: child for name, child in zip(PATHS, children, strict=True) if child is not None}


def _with_state(array: QuantizedArray, state: dict[str, Any]) -> QuantizedArray:
    """Return an array with the children of a state, which must be of an array alike."""
    if not isinstance(state, dict):
        raise ValueError(
            f"state must be of a quantized array, but holds an array of {getattr(state, 'dtype', state)}, as "
            f"of a float cache; restore it into a float cache, and pass that through step.init."
        )
    current = _state_of(array)
    came = {name: (jnp.shape(child), jnp.dtype(child.dtype).name) for name, child in state.items()}
    wanted = {name: (jnp.shape(child), jnp.dtype(child.dtype).name) for name, child in current.items()}
    if came != wanted:
        raise ValueError(
            f"state must be of a {array.quantizer} array of shape {array.shape}, with {wanted}, but holds "
            f"{came}; make the target with step.init, as the saved cache was made."
        )
    children, static = array.tree_flatten()
    restored = [state.get(name, child) for name, child in zip(PATHS, children, strict=True)]
    return QuantizedArray.tree_unflatten(static, restored)
