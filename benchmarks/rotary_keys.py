"""Compares keys that are quantized after the rotary embedding with keys that are quantized before it.

    python benchmarks/real_models.py prepare --folder build/real
    python benchmarks/rotary_keys.py --folder build/real --out benchmarks/results/rotary_keys.json

A simulation beside the cache, which stores keys as models give them, rotated: attention over a whole sequence
at once, in which a query sees the keys of older pages quantized and then decoded, and those of the first page
and of the last 128 tokens as they are. Values are exact. Keys before the embedding are the same keys turned
back. The KL is of the predictions from a position on, to those with exact keys; both are compared sequence by
sequence.
"""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from real_measure import load, settings_for
from real_sources import MODELS, TEXT
from record import circumstances, save

import qpaged
from qpaged import sweep
from qpaged.models import DecoderConfig, final_hidden, output_logits
from qpaged.models.rope import rotary_angles, rotate

CONTEXT, FROM, PAGE_SIZE, TAIL = 2048, 1024, 64, 128
FORMATS = "trellis3:channel", "trellis2:channel"
LOGITS = 128  # positions whose logits are there at once


@functools.partial(jax.jit, static_argnames=("config", "layer", "spelling", "before"))
def attend(
    query: jax.Array,  # [tokens, q_heads, head_dim]
    key: jax.Array,  # [tokens, kv_heads, head_dim]
    value: jax.Array,  # [tokens, kv_heads, head_dim]
    config: DecoderConfig,
    layer: int,
    spelling: str | None,
    before: bool,
) -> jax.Array:  # [tokens, q_heads, head_dim]
    """Return attention in which older keys are in a format, quantized before the embedding or after it."""
    options, group = config.attention(layer), query.shape[1] // key.shape[1]
    position = jnp.arange(len(query), dtype=jnp.int32)
    at, slot = position[:, None], position[None]
    seen = slot <= at
    if options.sliding_window is not None:
        seen &= slot > at - options.sliding_window

    def scores(keys: jax.Array) -> jax.Array:
        products = jnp.einsum("qhd,khd->hqk", query, jnp.repeat(keys, group, 1)) * options.softmax_scale
        cap = options.logits_soft_cap
        return products if cap is None else cap * jnp.tanh(products / cap)

    logits = scores(key)
    if spelling is not None:
        page_end = (slot // PAGE_SIZE + 1) * PAGE_SIZE
        is_packed = (page_end <= at + 1 - TAIL) & (slot >= PAGE_SIZE)
        logits = jnp.where(
            is_packed, scores(_decoded(key, position, config, layer, spelling, before)), logits
        )
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
    return jnp.einsum("hqk,khd->qhd", weights, jnp.repeat(value, group, 1))


def _decoded(
    key: jax.Array, position: jax.Array, config: DecoderConfig, layer: int, spelling: str, before: bool
) -> jax.Array:
    """Return keys [tokens, kv_heads, head_dim] as pages of a format hold them."""
    rope, heads = config.layer_rope(layer), key.shape[1]
    if before:
        key = rotate(key, rotary_angles(rope, config.head_dim, -position))
    pages = key.transpose(1, 0, 2).reshape(heads, -1, PAGE_SIZE, config.head_dim)
    decoded = qpaged.get_quantizer(spelling).quantize(pages).materialize()
    key = decoded.reshape(heads, -1, config.head_dim).transpose(1, 0, 2)
    return rotate(key, rotary_angles(rope, config.head_dim, position)) if before else key


def hidden(model: sweep.Decoder, tokens: np.ndarray, spelling: str | None, before: bool = False) -> jax.Array:
    """Return the last hidden states [tokens, hidden_size]."""
    position = np.arange(len(tokens), dtype=np.int32)

    def of_layer(layer: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attend(query, key, value, model.config, layer, spelling, before)

    return final_hidden(model.params, model.config, tokens, position, of_layer)


def mean_kl(model: sweep.Decoder, reference: jax.Array, outputs: jax.Array) -> float:
    """Return the mean KL over positions from :data:`FROM` on, nats a token."""

    @jax.jit
    def of_part(reference: jax.Array, outputs: jax.Array) -> jax.Array:
        log_p, log_q = (
            jax.nn.log_softmax(output_logits(model.params, model.config, part))
            for part in (reference, outputs)
        )
        return (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1)

    starts = range(FROM, len(reference), LOGITS)
    parts = [of_part(*(x[start : start + LOGITS] for x in (reference, outputs))) for start in starts]
    return float(jnp.concatenate(parts).mean())


def measure(model: sweep.Decoder, title: str, tokens: np.ndarray, spelling: str) -> dict[str, object]:
    """Return the KL of each sequence both ways, and the mean of their ratio with its standard error."""
    kl: dict[str, list[float]] = {"after": [], "before": []}
    for sequence in tokens:
        exact = hidden(model, sequence, None)
        for name, of_name in kl.items():
            of_name.append(mean_kl(model, exact, hidden(model, sequence, spelling, name == "before")))
    ratios = np.log(np.divide(kl["before"], kl["after"]))
    error = ratios.std(ddof=1) / np.sqrt(len(ratios))
    return {
        "model": title,
        "format": spelling,
        "kl": kl,
        "ratio": float(np.exp(ratios.mean())),
        "ratio_log_se": float(error),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/real"), help="of the prepared models")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--formats", default=",".join(FORMATS), help="of keys, separated by commas")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    arguments = parser.parse_args()
    text = sweep.Text(TEXT.title, (arguments.folder / TEXT.name).read_bytes())
    settings = settings_for(CONTEXT, arguments.sequences, PAGE_SIZE)
    runs = []
    for source in MODELS:
        model = load(arguments.folder / source.name, CONTEXT)
        tokens = sweep.Sweep(model, text, (), settings).sequences.tokens[:, :-1]
        for spelling in arguments.formats.split(","):
            runs.append(measure(model, source.title, tokens, spelling))
            print(runs[-1], flush=True)
    conditions = {"context": CONTEXT, "from": FROM, "page_size": PAGE_SIZE, "tail": TAIL}
    save(arguments.out, {**circumstances(), **conditions, "runs": runs})


if __name__ == "__main__":
    main()
