"""Settings that every test runs under; the devices must be counted out before JAX starts.

Most of a test's time is compilation, so the compiler optimizes little.
"""

import os

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0"
)

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
