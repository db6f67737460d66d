"""Errors of JAX that come from the machine: no device, or too little memory."""

import os

import jax

from qpaged.sweep._memory import is_out_of_memory


def device_trouble(error: Exception) -> str | None:
    """Return what is wrong with the machine, if that is what the error comes from."""
    if not isinstance(error, RuntimeError | AssertionError | MemoryError):
        return None
    if is_out_of_memory(error):
        return "the memory is not enough; give a smaller --batch or --context."
    try:
        jax.devices()
    except (RuntimeError, AssertionError):  # JAX raises either
        platforms = os.environ.get("JAX_PLATFORMS")
        return f"JAX finds no device: JAX_PLATFORMS is {platforms!r}. Unset it, or install the JAX for it."
    return None
