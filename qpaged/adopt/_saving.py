"""Saving an adopted cache with flax, and exporting an adopted step: how both take its arrays apart."""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jax.tree_util import PyTreeDef

from qpaged.arrays import PartlyExact, QuantizedArray
from qpaged.arrays._quantized import PATHS
from qpaged.arrays._rows import CacheArray
from qpaged.formats import quantizer_from_config

PART = "."  # between the name of a part of an array with exact pages and that of its child


def register_export() -> None:
    """Let `jax.export` serialize programs of a quantized cache, here and where they are read."""
    export.register_pytree_node_serialization(
        QuantizedArray,
        serialized_name="qpaged.QuantizedArray",
        serialize_auxdata=lambda static: json.dumps(_record_of(static)).encode(),
        deserialize_auxdata=lambda data: _static_of(json.loads(data)),
    )
    export.register_pytree_node_serialization(
        PartlyExact,
        serialized_name="qpaged.PartlyExact",
        serialize_auxdata=_exact_to_bytes,
        deserialize_auxdata=_exact_from_bytes,
    )


def _record_of(static: tuple[Any, ...]) -> dict[str, Any]:
    quantizer, channel_axis, slots_per_row, dtype = static
    return {
        "quantizer": quantizer.config,
        "channel_axis": channel_axis,
        "slots_per_row": slots_per_row,
        "dtype": jnp.dtype(dtype).name,
    }


def _static_of(record: dict[str, Any]) -> tuple[Any, ...]:
    quantizer = quantizer_from_config(record["quantizer"])
    return quantizer, record["channel_axis"], record["slots_per_row"], jnp.dtype(record["dtype"])


def _exact_to_bytes(static: tuple[Any, ...]) -> bytes:
    (codes, rows, _), axis, sinks = static
    record = {"codes": _record_of_tree(codes), "rows": _record_of_tree(rows), "axis": axis, "sinks": sinks}
    return json.dumps(record).encode()


def _exact_from_bytes(data: bytes) -> tuple[Any, ...]:
    record = json.loads(data)
    page = jax.tree_util.tree_structure(0)
    structures = _tree_of_record(record["codes"]), _tree_of_record(record["rows"]), page
    return structures, record["axis"], record["sinks"]


def _record_of_tree(structure: PyTreeDef) -> dict[str, Any]:
    """Return what makes the tree of a quantized array: its static data, and which children it has."""
    array = jax.tree_util.tree_unflatten(structure, range(structure.num_leaves))
    children, static = array.tree_flatten()
    return _record_of(static) | {"children": [child is not None for child in children]}


def _tree_of_record(record: dict[str, Any]) -> PyTreeDef:
    children = [0 if is_there else None for is_there in record["children"]]
    return jax.tree_util.tree_structure(QuantizedArray.tree_unflatten(_static_of(record), children))


def register_with_flax() -> None:
    """Let `flax.serialization` save quantized arrays, if the program has imported it."""
    serialization = sys.modules.get("flax.serialization")
    if serialization is not None:
        for kind in (QuantizedArray, PartlyExact):
            serialization.register_serialization_state(kind, _state_of, _with_state, override=True)


def _state_of(array: CacheArray) -> dict[str, jax.Array]:
    """Return the children that an array has, by the names that paths of pytrees have for them."""
    if isinstance(array, PartlyExact):
        parts = {"codes": _state_of(array.codes), "rows": _state_of(array.rows)}
        state = {f"{part}{PART}{name}": child for part, of in parts.items() for name, child in of.items()}
        return state | {"page": array.page}
    children, _ = array.tree_flatten()
    return {name: child for name, child in zip(PATHS, children, strict=True) if child is not None}


def _with_state(array: CacheArray, state: dict[str, Any]) -> CacheArray:
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
    # The children of a state are in the order in which arrays have theirs.
    return jax.tree_util.tree_unflatten(
        jax.tree_util.tree_structure(array), [state[name] for name in current]
    )
