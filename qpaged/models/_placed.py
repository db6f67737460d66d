"""Weights that lie over several devices, each of which reads its own part from the files."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from qpaged.models._safetensors import DTYPES, StoredTensor

INPUTS_DIVIDED = "o_proj.weight", "down_proj.weight"
"""Matrices whose inputs are divided, as what they are given is; of others the outputs are."""


def sharding_of(name: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Return how a weight is divided over all devices of a mesh; whole on each where it does not divide.

    Matrices are as Shoeybi et al., "Megatron-LM", 2019, divide them.
    """
    spec: list[str | tuple[str, ...] | None] = [None] * len(shape)
    axis = len(shape) - (1 if name.endswith(INPUTS_DIVIDED) else 2)
    if len(shape) > 1 and shape[axis] % mesh.size == 0:
        spec[axis] = mesh.axis_names
    return NamedSharding(mesh, PartitionSpec(*spec))


def read_placed(
    parts: Sequence[StoredTensor], shape: Sequence[int], dtype: DTypeLike | None, sharding: NamedSharding
) -> jax.Array:
    """Return a weight that is stored in one tensor, or in one for each expert, read as it will lie.

    Args:
        parts: the tensors.
        shape: of the weight.
        dtype: to which it is cast; as it is stored if None.
        sharding: how it will lie.
    """
    arrays = [np.memmap(part.path, DTYPES[part.dtype], "r", part.offset, part.shape) for part in parts]

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # JAX gives one for each part
        if len(arrays[0].shape) == len(shape):
            values = np.asarray(arrays[0][index])
        else:
            experts, *rest = index
            values = np.stack([array[tuple(rest)] for array in arrays[experts]])
        return values if dtype is None else values.astype(dtype)

    return jax.make_array_from_callback(tuple(shape), sharding, read).block_until_ready()
