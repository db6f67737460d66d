"""What a layer loses with its keys and values read back from a cache, in float64."""

import math
from dataclasses import asdict, dataclass

import numpy as np
from stress_cases import Case

HIDDEN = -1e300  # a logit of no weight; minus infinity would make 0 * inf of what nobody sees


@dataclass(frozen=True)
class Losses:
    """Losses of one layer; not cosines, which a bias shared by all keys brings near 1 whatever is lost.

    Attributes:
        key_rms: ||k̂ - k|| / ||k||.
        attention_kl: KL(p || p̂) in nats, mean over queries; p̂ is of the keys read back.
        output_error: ||out - plain out|| / ||plain out||, with keys and values read back.
        worst_channel: of the keys, the largest std(k̂ - k) / std(k) over heads and channels, std over tokens.
            With RMS in place of std, a constant part would count as signal and hide the loss of what differs
            from token to token, which is all that softmax sees; nor does it see a constant error.
    """

    key_rms: float
    attention_kl: float
    output_error: float
    worst_channel: float


def measure_losses(case: Case, key: np.ndarray, value: np.ndarray) -> Losses:
    """The losses of ``case`` with these (kv_heads, tokens, head_dim) in place of its keys and values."""
    key, value = key.astype(np.float64), value.astype(np.float64)
    log_p, log_q = log_attention(case, case.key), log_attention(case, key)
    channels = (key - case.key).std(axis=1) / case.key.std(axis=1)
    return Losses(
        key_rms=relative_error(key, case.key),
        attention_kl=float(kl_divergence(log_p, log_q).mean()),
        output_error=relative_error(np.exp(log_q) @ value, np.exp(log_p) @ case.value),
        worst_channel=float(channels.max()),
    )


def mean_losses(losses: list[Losses]) -> dict[str, float | None]:
    """The mean of each, to four digits; None where it is not finite."""
    rows = [asdict(row) for row in losses]
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return {name: float(f"{mean:.4g}") if math.isfinite(mean) else None for name, mean in means.items()}


def log_attention(case: Case, key: np.ndarray) -> np.ndarray:
    """log p of causal attention, (kv_heads, queries, tokens)."""
    logits = case.query @ key.swapaxes(-1, -2) / math.sqrt(key.shape[-1])
    logits[:, case.query_position[:, None] < np.arange(key.shape[1])] = HIDDEN
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def kl_divergence(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """sum p (log p - log q) over the last axis, nats; rounding below 0 is cut off."""
    return np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=-1), 0.0)


def mean_entropy(case: Case) -> float:
    """Mean entropy of the plain attention over queries, nats."""
    log_p = log_attention(case, case.key)
    return float(-(np.exp(log_p) * log_p).sum(axis=-1).mean())


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """||found - expected|| / ||expected||."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
