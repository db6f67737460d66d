"""The columns of the report's table, and what each means."""

from collections.abc import Callable
from dataclasses import dataclass

from qpaged.sweep._figure import TIMES
from qpaged.sweep._number import PLUS_MINUS, percent, small
from qpaged.sweep._reading import Run

NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """A number as it sorts, as it reads, and its standard error."""

    value: float | None
    text: str
    error: str = ""


@dataclass(frozen=True)
class Column:
    """One number of every run.

    Attributes:
        field: of the run; its standard error is ``<field>_se`` where there is one.
        label: the column's head.
        write: (value, standard error) as text, the error after the sign.
        meaning: one line.
        carded: whether it stands in the card of a dot.
    """

    field: str
    label: str
    write: Callable[[float, float | None], str]
    meaning: str
    carded: bool = False

    def cell(self, run: Run) -> Cell:
        value, error = run[self.field], run.get(f"{self.field}_se")
        if value is None:
            return Cell(None, NONE)
        text, _, spread = self.write(value, error or None).partition(f" {PLUS_MINUS} ")
        return Cell(value, text, spread)


def _fixed(decimals: int, scale: float = 1.0, unit: str = "") -> Callable[[float, float | None], str]:
    def write(value: float, error: float | None) -> str:
        parts = [f"{value * scale:,.{decimals}f}{unit}"]
        parts += [] if error is None else [f"{error * scale:,.{decimals}f}"]
        return f" {PLUS_MINUS} ".join(parts)

    return write


COLUMNS = (
    Column("bytes_per_token", "bytes per token", _fixed(0),
           "allocated, keys and values of all layers, scales and padding included", carded=True),
    Column("ratio", "smaller than bf16", _fixed(2, unit=TIMES),
           "bytes of the same cache in bfloat16 over these", carded=True),
    Column("bits_per_element", "bits per element", _fixed(2),
           "of the keys and values, scales included", carded=True),
    Column("kl_mean", "KL mean", small,
           "divergence from the reference's next-token distribution, nats, mean of tokens", carded=True),
    Column("kl_p999", "KL 99.9\N{NO-BREAK SPACE}%", small,
           "one token in 1,000 has more", carded=True),
    Column("same_top", "same top token", percent,
           "share of tokens whose likeliest next token is the reference's", carded=True),
    Column("perplexity_ratio", "perplexity ratio", _fixed(4),
           "perplexity over the reference's on the same tokens", carded=True),
    Column("attention_error", "attention error", _fixed(2, 100, " %"),
           "relative, when one layer alone is quantized; the worst layer's", carded=True),
    Column("greedy_same", "same greedy text", _fixed(0, 100, " %"),
           "share of prompts whose greedy continuation is the reference's to its end", carded=True),
    Column("kl_median", "KL median", small,
           "half of the tokens have less"),
    Column("kl_p99", "KL 99\N{NO-BREAK SPACE}%", small,
           "one token in 100 has more"),
    Column("kl_max", "KL max", small,
           "of the worst token"),
    Column("bits_per_byte", "bits per byte", _fixed(4),
           "of the text, under the model; the error is the text's, and shared by all formats"),
    Column("probability_change_rms", "\N{GREEK CAPITAL LETTER DELTA}p rms", small,
           "root mean square change of the true token's probability"),
    Column("greedy_first_difference", "first difference", _fixed(1),
           "mean index of the first greedy token that differs; the text's length if none does"),
    Column("decode_seconds_per_step", "decode ms per step", _fixed(2, 1e3),
           "wall-clock of one decode step of the whole batch on this device"),
    Column("prefill_seconds_per_token", "prefill \N{MICRO SIGN}s per token", _fixed(0, 1e6),
           "wall-clock of prefill on this device"),
)  # fmt: skip
