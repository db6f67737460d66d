"""What a cache does to a model's predictions, in float64."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Accuracy:
    """Predictions of a run beside those of the reference; KL in nats, standard errors over sequences.

    A standard error is None where there is one sequence only.
    """

    bits_per_byte: float
    bits_per_byte_se: float | None
    kl_mean: float
    kl_mean_se: float | None
    kl_median: float
    kl_p999: float
    kl_max: float
    same_top: float


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log p over the last axis, float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def kl_divergence(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """sum p (log p - log q) over the last axis, nats; rounding below 0 is cut off."""
    return np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=-1), 0.0)


def true_bits(log_q: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """-log2 q(truth) of each token."""
    return -np.take_along_axis(log_q, truth[..., None], axis=-1)[..., 0] / np.log(2)


def standard_error(values: np.ndarray) -> float | None:
    """Of the mean of ``values`` (sequences, tokens), from the means of the sequences."""
    means = values.mean(axis=1)
    return None if len(means) < 2 else float(means.std(ddof=1) / np.sqrt(len(means)))


def measure_accuracy(reference: np.ndarray, logits: np.ndarray, truth: np.ndarray) -> Accuracy:
    """Compare ``logits`` to those of the ``reference``.

    Args:
        reference: (sequences, tokens, vocabulary) floats.
        logits: likewise.
        truth: (sequences, tokens) integers, what came next.

    Raises:
        ValueError: logits that are not finite.
    """
    if not np.isfinite(logits).all():
        raise ValueError("the model's logits are not finite")
    kl, bits = np.empty(truth.shape), np.empty(truth.shape)
    for row in range(len(truth)):  # one at a time: float64 over a vocabulary is large
        log_q = log_softmax(logits[row])
        kl[row] = kl_divergence(log_softmax(reference[row]), log_q)
        bits[row] = true_bits(log_q, truth[row])
    same = reference.argmax(axis=-1) == logits.argmax(axis=-1)
    return Accuracy(
        bits_per_byte=float(bits.mean()),
        bits_per_byte_se=standard_error(bits),
        kl_mean=float(kl.mean()),
        kl_mean_se=standard_error(kl),
        kl_median=float(np.median(kl)),
        kl_p999=float(np.percentile(kl, 99.9)),
        kl_max=float(kl.max()),
        same_top=float(same.mean()),
    )
