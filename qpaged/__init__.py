"""A paged KV cache for JAX, plain or quantized, behind one API."""
