"""QuantizedArray, its writes and its lazy reads."""

from qpaged.arrays import _handlers as _handlers  # registers the handlers
from qpaged.arrays._dot import dot_general
from qpaged.arrays._indices import clipped
from qpaged.arrays._quantized import (
    QuantizedArray,
    check_parts,
    common_dtype,
    empty,
    fill_rows,
    float_dtype,
    in_units,
    quantize,
)
from qpaged.arrays._reads import as_slots, compute_dtype, contracted, dot, keep_slots, take_pages, weighed
from qpaged.arrays._tiles import refused
from qpaged.arrays._writes import write_rows

__all__ = [
    "QuantizedArray",
    "as_slots",
    "check_parts",
    "clipped",
    "common_dtype",
    "compute_dtype",
    "contracted",
    "dot",
    "dot_general",
    "empty",
    "fill_rows",
    "float_dtype",
    "in_units",
    "keep_slots",
    "quantize",
    "refused",
    "take_pages",
    "weighed",
    "write_rows",
]
