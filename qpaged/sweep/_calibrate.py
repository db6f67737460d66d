"""Calibrates static scales: runs a model over a text, and takes the largest keys and values of each layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qpaged.arrays import TransformRule
from qpaged.formats import CacheFormat, CacheScales, Quantizer, without_granularity
from qpaged.sweep.measure import PLAIN, Decoder, Progress, Settings, Text, chunks, cut

DEFAULT = "fp8_e4m3:head"
"""The format that is calibrated by default; its scales serve ``fp8_e4m3:tensor``, too."""

Pair = tuple[jax.Array, jax.Array]
"""Of keys and of values."""


def static_quantizers(cache_format: CacheFormat) -> tuple[Quantizer, Quantizer]:
    """Return the formats of keys and of values, which scales are calibrated for.

    Raises:
        ValueError: they have no static scales, or differ by layer.
    """
    static = []
    for part in cache_format.layer(0):
        if isinstance(part, Quantizer) and part.has_static_scales:
            static.append(part)
    if len(static) != 2 or cache_format.layers:
        raise ValueError(
            f"{cache_format} is not of static scales alone, for the keys and the values of all layers; give "
            f"{DEFAULT}, say, whose scales serve fp8_e4m3:tensor, exact pages and pairs with others, too."
        )
    return static[0], static[1]


def chosen_for(cache_format: CacheFormat) -> str:
    """Return what scales of a format say that they were chosen for: its name, without a granularity."""
    return "/".join(dict.fromkeys(map(without_granularity, static_quantizers(cache_format))))


def calibrate(
    model: Decoder, text: Text, settings: Settings, cache_format: CacheFormat, progress: Progress
) -> CacheScales:
    """Return the scales under which no key or value of a text saturates.

    The model reads the text with a plain cache; scales are those that the format's own rule gives for the
    largest magnitude of the keys, as they are cached, and of the values.

    Args:
        model: of a checkpoint.
        text: what it reads.
        settings: how much of it, in sequences of what length.
        cache_format: with static scales, for a tensor or for each KV head.
        progress: is told of tokens as they are read.

    Raises:
        ValueError: a format without static scales, a text that is too short, or keys or values that are
            not finite.
    """
    key_format, value_format = static_quantizers(cache_format)
    transforms = key_format.transform, value_format.transform
    tokens = cut(text, model.tokenizer, settings).tokens[:, :-1]
    stream = model.stream(PLAIN, settings, min(settings.batch, len(tokens)))
    absmax = [(jnp.zeros(model.kv_heads), jnp.zeros(model.kv_heads))] * model.layers
    for first in range(0, len(tokens), settings.batch):
        batch = tokens[first : first + settings.batch]
        stream.begin(len(batch))
        for chunk in chunks(batch, stream.chunk):
            metadata, length = chunk.metadata(stream.table), jnp.int32(chunk.tokens.size)

            def attend(layer: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
                absmax[layer] = _larger(absmax[layer], (key, value), length, transforms)  # noqa: B023
                return stream.attend(layer, query, key, value, metadata)  # noqa: B023

            model.hidden(chunk.flat_tokens(len(stream.table)), metadata.ragged_position, attend)
            progress("keys and values", chunk.tokens.size)
    keys, values = np.swapaxes(np.asarray(jax.device_get(absmax)), 0, 1)  # [layers, kv_heads]
    _check_finite(model.name, keys, values)
    return CacheScales(_scales(key_format, keys), _scales(value_format, values), chosen_for(cache_format))


@functools.partial(jax.jit, static_argnames="transforms")
def _larger(
    absmax: Pair,  # [kv_heads]
    rows: Pair,  # [tokens, kv_heads, head_dim]
    length: jax.Array,  # []
    transforms: tuple[TransformRule | None, TransformRule | None],
) -> Pair:
    """Return the largest magnitudes so far, of the first ``length`` tokens here and of those before."""
    larger = []
    for before, x, transform in zip(absmax, rows, transforms, strict=True):
        held = x.astype(jnp.float32)
        if transform is not None:
            held = transform.forward(held, -1)
        is_token = jnp.arange(len(x), dtype=jnp.int32) < length
        # The maximum over many numbers leaves NaN out on CPU, but not infinity.
        magnitude = jnp.where(jnp.isnan(held), jnp.inf, jnp.abs(held))
        largest = jnp.where(is_token[:, None, None], magnitude, 0).max(axis=(0, 2))
        larger.append(jnp.maximum(before, largest))
    return larger[0], larger[1]


def _check_finite(name: str, keys: np.ndarray, values: np.ndarray) -> None:
    """Raise ValueError for a layer whose largest keys or values are no finite numbers."""
    for side, absmax in (("keys", keys), ("values", values)):
        layers = np.flatnonzero(~np.isfinite(absmax).all(axis=-1))
        if len(layers):
            raise ValueError(
                f"{name} must have finite {side} to be calibrated, but those of layer {layers[0]} are not; "
                f"check its weights."
            )


def _scales(quantizer: Quantizer, absmax: np.ndarray) -> np.ndarray:
    """Return the scales of layers, (layers,) or (layers, kv_heads), for magnitudes (layers, kv_heads).

    Heads that are zeros get the scale of the largest, so that a pool with one scale is not given theirs.
    """
    absmax = np.where(absmax > 0, absmax, absmax.max(axis=-1, keepdims=True))
    if quantizer.granularity == "tensor":
        absmax = absmax.max(axis=-1)
    stored = quantizer.fit(jnp.asarray(-absmax), jnp.asarray(absmax))
    return np.asarray(quantizer.multiplier(stored))
