"""Greedy continuations of prompts through a model's cache."""

import jax
import jax.numpy as jnp
import numpy as np

from qpaged.sweep.measure._model import Model, Stream
from qpaged.sweep.measure._settings import Settings


def greedy_continuations(
    model: Model,
    stream: Stream,
    prompts: np.ndarray,  # [prompts, tokens] int32
    settings: Settings,
) -> np.ndarray:  # [prompts, Settings.continued] int32
    """Continue each prompt with the likeliest token, again and again."""
    continuations = np.empty((len(prompts), settings.continued), np.int32)
    for first in range(0, len(prompts), settings.batch):
        batch = prompts[first : first + settings.batch]
        rows = slice(first, first + len(batch))
        continuations[rows] = _continue_batch(model, stream, batch, settings.continued)
    return continuations


def _continue_batch(model: Model, stream: Stream, prompts: np.ndarray, length: int) -> np.ndarray:
    stream.begin(len(prompts))
    chosen = np.empty(len(prompts), np.int32)
    for chunk in stream.prefill(prompts):
        # Every chunk overwrites the choice of the one before it; that of the prompt's last chunk stays.
        chosen[chunk.rows] = _likeliest(model.logits(chunk.outputs[:, -1]))
    continuation = [chosen]
    for index in range(length - 1):
        outputs = stream.decode(continuation[-1], prompts.shape[1] + index)
        continuation.append(_likeliest(model.logits(outputs)))
    return np.stack(continuation, axis=1)


def _likeliest(logits: jax.Array) -> np.ndarray:
    return np.asarray(jnp.argmax(logits, axis=-1), np.int32)
