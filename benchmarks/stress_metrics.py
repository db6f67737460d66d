"""The losses of a layer whose keys and values are read back from a cache, in float64."""

import math
from dataclasses import asdict, dataclass

import numpy as np
from stress_cases import Case

HIDDEN = -1e300  # a logit of weight zero; minus infinity would turn p log p into NaN


@dataclass(frozen=True)
class Losses:
    """Losses of one layer. There is no cosine among them: a bias shared by all keys brings it near 1.

    Attributes:
        key_rms: ||k̂ - k|| / ||k||.
        attention_kl: KL(p || p̂) in nats, mean over queries; p̂ is the attention to the keys read back.
        output_error: ||out - plain out|| / ||plain out||, with keys and values read back.
        worst_channel: the largest std(k̂ - k) / std(k) of the keys over heads and channels, std over tokens.
            Softmax sees only what differs from token to token. With RMS in place of std, a constant part of
            the keys would hide that loss, and a constant error would count as one.
    """

    key_rms: float
    attention_kl: float
    output_error: float
    worst_channel: float


def measure_losses(case: Case, key: np.ndarray, value: np.ndarray) -> Losses:
    """Return the losses of a case whose keys and values read back as these [kv_heads, tokens, head_dim]."""
    key = key.astype(np.float64)
    value = value.astype(np.float64)
    log_p = log_attention(case, case.key)
    log_q = log_attention(case, key)
    channels = (key - case.key).std(axis=1) / case.key.std(axis=1)
    return Losses(
        key_rms=relative_error(key, case.key),
        attention_kl=float(kl_divergence(log_p, log_q).mean()),
        output_error=relative_error(np.exp(log_q) @ value, np.exp(log_p) @ case.value),
        worst_channel=float(channels.max()),
    )


def mean_losses(losses: list[Losses]) -> dict[str, float | None]:
    """Return the mean of each loss, to four digits; None where it is not finite."""
    rows = [asdict(row) for row in losses]
    means: dict[str, float | None] = {}
    for name in rows[0]:
        mean = float(np.mean([row[name] for row in rows]))
        means[name] = float(f"{mean:.4g}") if math.isfinite(mean) else None
    return means


def log_attention(case: Case, key: np.ndarray) -> np.ndarray:
    """Return log p of causal attention, [kv_heads, queries, tokens]."""
    logits = case.query @ key.swapaxes(-1, -2) / math.sqrt(key.shape[-1])
    logits[:, case.query_position[:, None] < np.arange(key.shape[1])] = HIDDEN
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def kl_divergence(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """Return sum p (log p - log q) over the last axis in nats, clipped at 0 against rounding."""
    return np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=-1), 0.0)


def mean_entropy(case: Case) -> float:
    """Return the mean entropy over queries of attention to the original keys, in nats."""
    log_p = log_attention(case, case.key)
    return float(-(np.exp(log_p) * log_p).sum(axis=-1).mean())


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return ||found - expected|| / ||expected||."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
