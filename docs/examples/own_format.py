"""A format of one's own, from its equation to attention over a paged cache, in one file.

Three values, -s, 0 and s, with one scale s for a token: 2 bits an element. A package gives a format a name by
which sweep, tune and adopt find it; see docs/plugin.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

import qpaged


@dataclass(frozen=True)
class Ternary(qpaged.Quantizer):
    """c = 0, 1 or 2 for values near -s, 0 and s, with s = absmax of a token."""

    name: ClassVar[str] = "ternary"
    granularities: ClassVar[tuple[str, ...]] = ("token",)
    bits: ClassVar[int] = 2
    bound: ClassVar[float] = 0.5 + 2.0**-16  # of s; what is added is for roundings of float32

    def scale(self, absmax: jax.Array) -> jax.Array:
        return jnp.where(absmax > 0, jnp.maximum(absmax, 2.0**-120), 0)

    def encode(self, units: jax.Array) -> jax.Array:
        return (jnp.clip(jnp.round(units), -1, 1) + 1).astype(jnp.uint8)

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        return codes.astype(dtype) - 1


def attended(quantizer: Any) -> jax.Array:
    """Return attention of one token to 100 that lie in a cache of this format."""
    metadata = qpaged.PagedAttentionCacheMetaData.create(
        mesh=None,
        batch_size=1,
        num_hidden_layers=1,
        max_sequences=128,
        page_size=16,
        num_kv_heads=2,
        kv_head_dim_size=64,
        hbm_utilization=0.9,
        dtype=jnp.float32,
        quantizer=quantizer,
        memory_bytes=200_000,
    )
    cache = qpaged.PagedAttentionCache.init_cache(None, jnp.float32, metadata, quantizer=quantizer)
    allocator = qpaged.PageAllocator(metadata)
    cache = cache.reset_pages(allocator.allocate("a", length=100))
    table = allocator.page_table(["a"])
    query, key, value = jax.random.normal(jax.random.key(0), (3, 100, 2, 64))
    prompt = qpaged.PagedAttentionMetadata.prefill(position=jnp.arange(100), page_table=table[0])
    view = cache.views[0].write_prefill_to_cache(key, value, prompt)
    decode = qpaged.PagedAttentionMetadata.decode(position=[99], page_table=table)
    return qpaged.paged_attention(query[99:], view, decode)


exact = attended(None)
for quantizer in (Ternary(), qpaged.CacheFormat(Ternary(), qpaged.get_quantizer("int8:token")), "int8:token"):
    error = jnp.linalg.norm(attended(quantizer) - exact) / jnp.linalg.norm(exact)
    print(f"{quantizer}: {error:.1%} from plain pages")
