"""The ``cpu`` backend: a kernel in C that reads each page once, as it is stored."""

import jax
import jax.numpy as jnp

from qpaged.attention import _cpu_library
from qpaged.attention._cpu_layout import (
    MOST_STATE_BITS,
    PLAIN,
    call_layout_of,
    codes_of,
    element_of_bits,
    pool_operands,
    scales_of,
)
from qpaged.attention._layout import kernel_refusal, mesh_refusal
from qpaged.attention._merge import Partial
from qpaged.attention._options import Options, QueryTokens
from qpaged.pools import Pages, Pool, as_quantized

LANES = 16  # channels that the kernel takes at once


def refusal() -> str | None:
    """Return why the backend takes no call at all, or None."""
    return _cpu_library.load().refusal or mesh_refusal()


def call_refusal(tokens: QueryTokens, keys: Pages, values: Pages) -> str | None:
    """Return why the backend does not take a call, or None."""
    if tokens.run_length > 1:
        return "takes decode rows alone, and leaves prompts to xla"
    reason = kernel_refusal(tokens, keys, values)
    if reason is not None:
        return reason
    head_dim = keys.shape[3]
    if head_dim % LANES:
        return f"takes a head_dim that is a multiple of {LANES}, but it is {head_dim}"
    for name, pool in (("keys", keys), ("values", values)):
        reason = _pool_refusal(pool)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _pool_refusal(pool: Pages) -> str | None:
    quantized = as_quantized(pool)
    if quantized is None:
        if isinstance(pool, Pool):
            return f"pages of type {type(pool).__name__} are not taken"
        if pool.dtype in PLAIN:
            return None
        return f"pages of {pool.dtype} are not taken"
    quantizer = quantized.quantizer
    if quantized.offset is not None:
        return f"{quantizer} comes from a lazy read, with offsets beside its scales"
    if quantized.scales is None:
        if element_of_bits(quantizer, quantized.dtype) is not None:
            return None
        return f"{quantizer} of {quantized.dtype} is not taken"
    if quantized.stored.dtype.itemsize != 1:
        return f"{quantizer} has codes of {quantized.stored.dtype}"
    if not quantizer.elementwise:
        return f"{quantizer} is declared not to be elementwise"
    if codes_of(quantizer, quantized.dtype) is None:
        if quantizer.state_bits is not None:
            limit = f"states of more than {MOST_STATE_BITS} bits, or values that are no steps of 8 bits"
            return f"{quantizer} has {limit}"
        return f"decode of {quantizer} is not elementwise"
    if None in scales_of(quantizer):
        return f"{quantizer} has scales of a kind that is not read"
    return None


def attend(tokens: QueryTokens, keys: Pages, values: Pages, options: Options) -> Partial:
    """Return the attention of each row over its sequence's pages."""
    rows, q_heads, _ = tokens.query.shape
    layout = call_layout_of(rows, q_heads, tokens.table.shape[1], keys, values)
    layout.window = options.sliding_window or 0
    layout.soft_cap = options.logits_soft_cap or 0.0
    out = jax.ShapeDtypeStruct(tokens.query.shape, jnp.float32)
    of_heads = jax.ShapeDtypeStruct((rows, q_heads), jnp.float32)
    acc, highest, total = jax.ffi.ffi_call(_cpu_library.TARGET, (out, of_heads, of_heads))(
        layout.as_array(),
        tokens.query.astype(jnp.float32) * options.softmax_scale,
        tokens.position,
        tokens.end,
        tokens.table,
        *pool_operands(keys),
        *pool_operands(values),
    )
    return Partial.of_sums(acc, highest, total)
