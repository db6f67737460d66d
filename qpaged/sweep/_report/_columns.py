"""The columns of the report's table, and what each means."""

from collections.abc import Callable
from dataclasses import dataclass

from qpaged.sweep._figure import TIMES
from qpaged.sweep._number import percent, small
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
        meaning: one line.
        write: (value, standard error) as text, the error after the sign.
        carded: whether it stands in the card of a dot.
    """

    field: str
    label: str
    meaning: str
    write: Callable[[float, float | None], str]
    carded: bool = False

    def cell(self, run: Run) -> Cell:
        value, error = run[self.field], run.get(f"{self.field}_se")
        if value is None:
            return Cell(None, NONE)
        text, _, spread = self.write(value, error or None).partition(" \N{PLUS-MINUS SIGN} ")
        return Cell(value, text, spread)


def _fixed(decimals: int, scale: float = 1.0, unit: str = "") -> Callable[[float, float | None], str]:
    def write(value: float, error: float | None) -> str:
        parts = [f"{value * scale:,.{decimals}f}{unit}"]
        parts += [] if error is None else [f"{error * scale:,.{decimals}f}"]
        return " \N{PLUS-MINUS SIGN} ".join(parts)

    return write


COLUMNS = (
    Column("bytes_per_token", "bytes per token", "allocated bytes of the cache, keys and values of all layers, scales and padding included", _fixed(0), True),
    Column("ratio", "smaller than bf16", "bytes of the same cache in bfloat16 over these", _fixed(2, unit=TIMES), True),
    Column("bits_per_element", "bits per element", "of the keys and values, scales included", _fixed(2), True),
    Column("kl_mean", "KL mean", "Kullback-Leibler divergence of the next token's distribution from the reference's, in nats, mean over tokens", small, True),
    Column("kl_p999", "KL 99.9\N{NO-BREAK SPACE}%", "one token in 1,000 has more", small, True),
    Column("same_top", "same top token", "share of tokens whose likeliest next token is the reference's", percent, True),
    Column("perplexity_ratio", "perplexity ratio", "perplexity over the reference's on the same tokens", _fixed(4), True),
    Column("attention_error", "attention error", "relative error of a layer's attention output when only that layer is quantized, in the worst layer", _fixed(2, 100, " %"), True),
    Column("greedy_same", "same greedy text", "share of prompts whose greedy continuation is the reference's to the last token", _fixed(0, 100, " %"), True),
    Column("kl_median", "KL median", "half of the tokens have less", small),
    Column("kl_p99", "KL 99\N{NO-BREAK SPACE}%", "one token in 100 has more", small),
    Column("kl_max", "KL max", "of the worst token", small),
    Column("bits_per_byte", "bits per byte", "of the text, under the model; the error is that of the text and is shared by all formats", _fixed(4)),
    Column("probability_change_rms", "\N{GREEK CAPITAL LETTER DELTA}p rms", "root mean square change of the true token's probability", small),
    Column("greedy_first_difference", "first difference", "mean index of the first token of a greedy continuation that differs; the continuation's length where none does", _fixed(1)),
    Column("decode_seconds_per_step", "decode ms per step", "wall-clock of one decode step of the whole batch on this device", _fixed(2, 1e3)),
    Column("prefill_seconds_per_token", "prefill \N{MICRO SIGN}s per token", "wall-clock of prefill on this device", _fixed(0, 1e6)),
)  # fmt: skip
