"""Settings that every test runs under; the devices must be counted out before JAX starts.

Most of a test's time is compilation, so the compiler optimizes little. JAX 0.10's also takes a third less
without its fusion emitters; older and newer ones have no such flag, and stop at one that they do not know.
"""

import os
from importlib.metadata import version

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "")
)

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
