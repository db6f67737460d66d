"""The metrics of a sweep: how each is computed from a run, and how tables, reports and docs show it.

To add a metric, write its function and add one entry to :data:`METRICS`. The table in the terminal,
``report.html``, ``results.json`` and the documentation's tables all read it from there. If it needs a number
of each token that is not computed yet, add that to :class:`Predictions` and :func:`compare`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from qpaged.sweep._numbers import TIMES, NumberFormat, fixed, percent, scientific_excess, small
from qpaged.sweep.measure._attention import AttentionProfile
from qpaged.sweep.measure._statistics import Estimate, divergence, jackknife, token_estimate

BF16_BYTES = 2

Array = TypeVar("Array", jax.Array, np.ndarray)


class Predictions(NamedTuple, Generic[Array]):
    """Every predicted token in a format beside the reference's prediction; arrays [sequences, tokens].

    Attributes:
        kl: KL divergence from the reference's distribution p to this one q, sum of p log(p / q), in nats.
        log_p: log probability of the true token in the reference.
        log_q: log probability of the true token in this format.
        same_top: 1 where both give the same token the highest probability, else 0.
    """

    kl: Array
    log_p: Array
    log_q: Array
    same_top: Array


@dataclass(frozen=True)
class Measurement:
    """Everything that was measured of one format, from which its metrics are computed.

    Attributes:
        predictions: float64 arrays [sequences, tokens].
        token_bytes: [sequences, tokens], bytes of text that each predicted token stands for.
        continuations: [prompts, tokens], greedy continuations through the format's cache.
        reference_continuations: [prompts, tokens], those through the reference cache.
        attention: None for models whose layers cannot be inspected.
        bytes_per_token: of the allocated cache, keys and values of all layers, scales included.
        elements_per_token: elements of keys and values of all layers.
        decode_seconds_per_step: of the fastest step; None if nothing was decoded.
        prefill_seconds_per_token: median; None if nothing was prefilled.
    """

    predictions: Predictions[np.ndarray]
    token_bytes: np.ndarray
    continuations: np.ndarray
    reference_continuations: np.ndarray
    attention: AttentionProfile | None
    bytes_per_token: float
    elements_per_token: int
    decode_seconds_per_step: float | None
    prefill_seconds_per_token: float | None


# Widths of a terminal from which on it has room for more columns.
ALWAYS, NARROW, WIDE = 0, 72, 118


@dataclass(frozen=True)
class TableColumn:
    """How tables of text show a metric: those of the terminal and of the documentation.

    Attributes:
        heading: of the column, in two lines.
        number: writes the value and its standard error.
        min_width: the terminal must have this many columns to show it; None for the documentation only.
        with_error: True if the standard error is shown too, where the terminal is wide.
        in_docs: True if the documentation's tables of results have the column.
    """

    heading: str
    number: NumberFormat
    min_width: int | None = WIDE
    with_error: bool = False
    in_docs: bool = False

    @property
    def one_line_heading(self) -> str:
        return self.heading.replace("/\n", "/").replace("\n", " ")


@dataclass(frozen=True)
class Metric:
    """One number of every run.

    Attributes:
        key: its name in ``results.json``.
        meaning: one line for the report and the documentation.
        compute: computes it from a measurement.
        better: which values are better.
        has_error: True if ``results.json`` has its standard error too, under ``<key>_se``.
        label: the heading of its column in the report; the report leaves it out if empty.
        number: writes the value and its standard error in the report.
        on_card: True if the card of a dot in the report's chart shows it.
        table: its column in tables of text; None if it has none.
    """

    key: str
    meaning: str
    compute: Callable[[Measurement], Estimate]
    better: Literal["lower", "higher"] = "lower"
    has_error: bool = False
    label: str = ""
    number: NumberFormat = small
    on_card: bool = False
    table: TableColumn | None = None


@jax.jit
def compare(
    reference: jax.Array,  # [..., vocabulary]
    logits: jax.Array,  # [..., vocabulary]
    truth: jax.Array,  # [...] integers: the tokens that came next
) -> Predictions[jax.Array]:
    """Compare predictions with the reference's token by token, in float32."""
    log_p = jax.nn.log_softmax(reference.astype(jnp.float32), axis=-1)
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return Predictions(
        kl=divergence(log_p, log_q),
        log_p=_of_true_token(log_p, truth),
        log_q=_of_true_token(log_q, truth),
        same_top=reference.argmax(axis=-1) == logits.argmax(axis=-1),
    )


def compute_metrics(measurement: Measurement) -> dict[str, float | None]:
    """Compute every metric, and the standard error of each that has one under ``<key>_se``.

    Raises:
        ValueError: the predictions are not finite.
    """
    predictions = measurement.predictions
    if not (np.isfinite(predictions.kl).all() and np.isfinite(predictions.log_q).all()):
        raise ValueError("the model's logits are not finite")
    values: dict[str, float | None] = {}
    for metric in METRICS:
        estimate = metric.compute(measurement)
        values[metric.key] = estimate.value
        if metric.has_error:
            values[f"{metric.key}_se"] = estimate.error
    return values


def _of_true_token(log_probabilities: jax.Array, truth: jax.Array) -> jax.Array:
    return jnp.take_along_axis(log_probabilities, truth[..., None], axis=-1)[..., 0]


def _ratio_of_sums(sums: np.ndarray) -> float:
    numerator, denominator = sums
    return numerator / denominator


def _mean(values: np.ndarray) -> Estimate:
    """Estimate the mean of per-token values [sequences, tokens]."""
    return token_estimate(_ratio_of_sums, values, np.ones_like(values))


def _function_of_mean(function: Callable[[float], float], values: np.ndarray) -> Estimate:
    """Estimate a function of the mean of per-token values [sequences, tokens]."""

    def statistic(sums: np.ndarray) -> float:
        return function(_ratio_of_sums(sums))

    return token_estimate(statistic, values, np.ones_like(values))


def _prompt_mean(values: np.ndarray) -> Estimate:
    """Estimate the mean of values [prompts], if there are any; its standard error is over prompts."""
    if not len(values):
        return Estimate(None)
    sums = np.stack([values, np.ones(len(values))], axis=1).astype(np.float64)
    return jackknife(sums, _ratio_of_sums)


def _bits_per_byte(measurement: Measurement) -> Estimate:
    def statistic(sums: np.ndarray) -> float:
        nats, size = sums
        return nats / size / np.log(2)

    return token_estimate(statistic, -measurement.predictions.log_q, measurement.token_bytes)


def _perplexity(measurement: Measurement) -> Estimate:
    return _function_of_mean(np.exp, -measurement.predictions.log_q)


def _perplexity_ratio(measurement: Measurement) -> Estimate:
    # From the difference of each token, so that the error common to both perplexities cancels.
    excess = measurement.predictions.log_p - measurement.predictions.log_q
    return _function_of_mean(np.exp, excess)


def _probability_change_rms(measurement: Measurement) -> Estimate:
    change = np.exp(measurement.predictions.log_q) - np.exp(measurement.predictions.log_p)
    return _function_of_mean(np.sqrt, np.square(change))


def _kl_mean(measurement: Measurement) -> Estimate:
    return _mean(measurement.predictions.kl)


def _kl_percentile(percentile: float) -> Callable[[Measurement], Estimate]:
    def compute(measurement: Measurement) -> Estimate:
        return Estimate(float(np.percentile(measurement.predictions.kl, percentile)))

    return compute


def _same_top(measurement: Measurement) -> Estimate:
    return _mean(measurement.predictions.same_top)


def _greedy_first_difference(measurement: Measurement) -> Estimate:
    differs = measurement.continuations != measurement.reference_continuations
    # A column of differences past the end makes argmax the whole length where none differs.
    end = np.ones((len(differs), 1), bool)
    return _prompt_mean(np.concatenate([differs, end], axis=1).argmax(axis=1))


def _greedy_same(measurement: Measurement) -> Estimate:
    return _prompt_mean((measurement.continuations == measurement.reference_continuations).all(axis=1))


def _attention_error(measurement: Measurement) -> Estimate:
    if measurement.attention is None:
        return Estimate(None)
    return Estimate(max(measurement.attention.error))


def _bytes_per_token(measurement: Measurement) -> Estimate:
    return Estimate(measurement.bytes_per_token)


def _bf16_ratio(measurement: Measurement) -> Estimate:
    return Estimate(BF16_BYTES * measurement.elements_per_token / measurement.bytes_per_token)


def _bits_per_element(measurement: Measurement) -> Estimate:
    return Estimate(8 * measurement.bytes_per_token / measurement.elements_per_token)


def _decode_seconds(measurement: Measurement) -> Estimate:
    return Estimate(measurement.decode_seconds_per_step)


def _prefill_seconds(measurement: Measurement) -> Estimate:
    return Estimate(measurement.prefill_seconds_per_token)


METRICS = (
    Metric(
        "bytes_per_token",
        "allocated, keys and values of all layers, scales and padding included",
        _bytes_per_token,
        label="bytes per token",
        number=fixed(0),
        on_card=True,
        table=TableColumn("bytes/\ntoken", fixed(0), NARROW, in_docs=True),
    ),
    Metric(
        "ratio",
        "bytes of the same cache in bfloat16 over these",
        _bf16_ratio,
        better="higher",
        label="smaller than bf16",
        number=fixed(2, unit=TIMES),
        on_card=True,
        table=TableColumn("ratio", fixed(2), ALWAYS),
    ),
    Metric(
        "bits_per_element",
        "of the keys and values, scales included",
        _bits_per_element,
        label="bits per element",
        number=fixed(2),
        on_card=True,
        table=TableColumn("bits/\nelement", fixed(2), None, in_docs=True),
    ),
    Metric(
        "kl_mean",
        "divergence from the reference's next-token distribution, nats, mean of tokens",
        _kl_mean,
        has_error=True,
        label="KL mean",
        on_card=True,
        table=TableColumn("KL\nmean", small, ALWAYS, with_error=True, in_docs=True),
    ),
    Metric(
        "kl_p999",
        "one token in 1,000 has more",
        _kl_percentile(99.9),
        label="KL 99.9\N{NO-BREAK SPACE}%",
        on_card=True,
        table=TableColumn("KL\n99.9 %", small, NARROW, in_docs=True),
    ),
    Metric(
        "same_top",
        "share of tokens whose likeliest next token is the reference's",
        _same_top,
        better="higher",
        has_error=True,
        label="same top token",
        number=percent,
        on_card=True,
        table=TableColumn("same\ntop-1", fixed(2, 100, "%"), ALWAYS, in_docs=True),
    ),
    Metric(
        "perplexity_ratio",
        "perplexity over the reference's on the same tokens",
        _perplexity_ratio,
        has_error=True,
        label="perplexity ratio",
        number=fixed(4),
        on_card=True,
        table=TableColumn("perplexity\nratio - 1", scientific_excess, NARROW, with_error=True, in_docs=True),
    ),
    Metric(
        "attention_error",
        "relative, when one layer alone is quantized; the worst layer's",
        _attention_error,
        label="attention error",
        number=fixed(2, 100, " %"),
        on_card=True,
        table=TableColumn("attn\nerror", fixed(1, 100, "%"), NARROW, in_docs=True),
    ),
    Metric(
        "greedy_same",
        "share of prompts whose greedy continuation is the reference's to its end",
        _greedy_same,
        better="higher",
        has_error=True,
        label="same greedy text",
        number=fixed(0, 100, " %"),
        on_card=True,
    ),
    Metric("kl_median", "half of the tokens have less", _kl_percentile(50), label="KL median"),
    Metric("kl_p90", "one token in 10 has more", _kl_percentile(90)),
    Metric("kl_p99", "one token in 100 has more", _kl_percentile(99), label="KL 99\N{NO-BREAK SPACE}%"),
    Metric("kl_max", "of the worst token", _kl_percentile(100), label="KL max"),
    Metric("perplexity", "of the text, under the model", _perplexity, has_error=True),
    Metric(
        "bits_per_byte",
        "of the text, under the model; the error is the text's, and shared by all formats",
        _bits_per_byte,
        has_error=True,
        label="bits per byte",
        number=fixed(4),
    ),
    Metric(
        "probability_change_rms",
        "root mean square change of the true token's probability",
        _probability_change_rms,
        has_error=True,
        label="\N{GREEK CAPITAL LETTER DELTA}p rms",
        table=TableColumn("RMS\n\N{GREEK CAPITAL LETTER DELTA}p", small),
    ),
    Metric(
        "greedy_first_difference",
        "mean index of the first greedy token that differs; the text's length if none does",
        _greedy_first_difference,
        better="higher",
        has_error=True,
        label="first difference",
        number=fixed(1),
        table=TableColumn("greedy\ntokens", fixed(1), NARROW),
    ),
    Metric(
        "decode_seconds_per_step",
        "wall-clock of one decode step of the whole batch on this device, the fastest",
        _decode_seconds,
        label="decode ms per step",
        number=fixed(2, 1e3),
        table=TableColumn("ms/\nstep", fixed(1, 1e3)),
    ),
    Metric(
        "prefill_seconds_per_token",
        "wall-clock of prefill on this device",
        _prefill_seconds,
        label="prefill \N{MICRO SIGN}s per token",
        number=fixed(0, 1e6),
    ),
)
