"""Tables of what the formats take: ``python docs/includes/sizes.py`` rewrites sizes.md.

The bytes are those of a pool that the format itself makes.
"""

from pathlib import Path

import jax
import jax.numpy as jnp

import qpaged

PAGE_SIZE, HEAD_DIM = 16, 128
TABLE = Path(__file__).with_name("sizes.md")


def bytes_per_token(quantizer, dtype, head_dim=HEAD_DIM):
    """Bytes that one token of one KV head takes, keys alone."""
    page = jnp.zeros((1, 1, PAGE_SIZE, head_dim), dtype)
    if quantizer is not None:
        page = jax.eval_shape(qpaged.get_quantizer(quantizer).quantize, page)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(page)) / PAGE_SIZE


def table(spellings):
    """A Markdown table, a row for each spelling; ``plain`` for plain arrays."""
    lines = ["| format | bytes per token and head | bits per element | of bfloat16 |", "|---|--:|--:|--:|"]
    whole = bytes_per_token(None, jnp.bfloat16)
    for spelling in spellings:
        size = bytes_per_token(None if spelling == "plain" else spelling, jnp.bfloat16)
        bits = 8 * size / HEAD_DIM
        lines.append(f"| `{spelling}` | {size:.2f} | {bits:.2f} | {size / whole:.1%} |")
    return "\n".join(lines) + "\n"


def built_in():
    """The formats that come with qpaged, at each of their granularities."""
    formats = qpaged.available_formats()
    return [f for f in formats if type(qpaged.get_quantizer(f)).__module__.split(".")[0] == "quantizers"]


if __name__ == "__main__":
    TABLE.write_text(table(["plain", *built_in()]))
