"""Writes the table of the formats' sizes: ``python docs/includes/sizes.py`` rewrites sizes.md.

The bytes are those of a pool that the format itself makes.
"""

from pathlib import Path

import jax
import jax.numpy as jnp

import qpaged

PAGE_SIZE = 16
HEAD_DIM = 128
TABLE = Path(__file__).with_name("sizes.md")


def bytes_per_token(quantizer, dtype, head_dim=HEAD_DIM):
    """Return the bytes that the key of one token and one KV head takes, with its share of a page's scales."""

    def bytes_of(pages):
        pool = jax.ShapeDtypeStruct((1, pages, PAGE_SIZE, head_dim), dtype)
        if quantizer is not None:
            pool = jax.eval_shape(qpaged.get_quantizer(quantizer).quantize, pool)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(pool))

    return (bytes_of(2) - bytes_of(1)) / PAGE_SIZE


def table(spellings):
    """Return a Markdown table with a row for each spelling; ``plain`` stands for plain arrays."""
    lines = ["| format | bytes per token and head | bits per element | of bfloat16 |", "|---|--:|--:|--:|"]
    bfloat16_size = bytes_per_token(None, jnp.bfloat16)
    for spelling in spellings:
        size = bytes_per_token(None if spelling == "plain" else spelling, jnp.bfloat16)
        bits = 8 * size / HEAD_DIM
        lines.append(f"| `{spelling}` | {size:.2f} | {bits:.2f} | {size / bfloat16_size:.1%} |")
    return "\n".join(lines) + "\n"


def built_in():
    """Return the formats that come with qpaged, at each of their granularities."""
    spellings = []
    for spelling in qpaged.available_formats():
        module = type(qpaged.get_quantizer(spelling)).__module__
        if module.partition(".")[0] == "quantizers":
            spellings.append(spelling)
    return spellings


if __name__ == "__main__":
    TABLE.write_text(table(["plain", *built_in()]))
