"""Tells errors of too little memory from others."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if the host, or a device by way of JAX, had too little memory."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
