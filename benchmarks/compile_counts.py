"""How many programs a generation compiles in each format, and how long a step takes to compile."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from layer_cache import empty_view
from shapes import Shape

import qpaged


@jax.jit
def prefill_step(view, rows, metadata):
    return view.write_prefill_to_cache(rows, rows, metadata)


@jax.jit
def decode_step(view, query, rows, metadata):
    view = view.write_decodes_to_cache(rows, rows, metadata)
    return view, qpaged.paged_attention(query, view, metadata)


def count_compilations(quantizer: str, shape: Shape, steps: int = 64) -> dict[str, Any]:
    """Write a prompt for each sequence, decode ``steps`` tokens of all, and return what was compiled."""
    seconds: list[float] = []  # of each compilation

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    batch = len(shape.lengths)
    table, pages = shape.tables()
    prompt_length = min(shape.lengths) - steps
    prompt = jnp.ones((prompt_length, shape.kv_heads, shape.head_dim), jnp.bfloat16)
    query = jnp.ones((batch, shape.q_heads, shape.head_dim), jnp.bfloat16)
    rows = jnp.ones((batch, shape.kv_heads, shape.head_dim), jnp.bfloat16)
    # Arrays and metadata are made first, so that what they compile is not counted.
    view = empty_view(quantizer, shape, pages)
    prefills = [
        qpaged.PagedAttentionMetadata.prefill(position=np.arange(prompt_length), page_table=row)
        for row in table
    ]
    decodes = [
        qpaged.PagedAttentionMetadata.decode(
            position=np.full(batch, prompt_length + step, np.int32), page_table=table
        )
        for step in range(steps)
    ]
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for metadata in prefills:
            view = prefill_step(view, prompt, metadata)
        after_prompts = len(seconds)
        view, out = decode_step(view, query, rows, decodes[0])
        after_first = len(seconds)
        for metadata in decodes[1:]:
            view, out = decode_step(view, query, rows, metadata)
        out.block_until_ready()
    finally:
        jax.monitoring.clear_event_listeners()
    return {
        "name": quantizer,
        "step_compile_seconds": round(sum(seconds[after_prompts:after_first]), 3),
        "programs": {
            "prompts": after_prompts,
            "first step": after_first - after_prompts,
            "other steps": len(seconds) - after_first,
        },
    }
