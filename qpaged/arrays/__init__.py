"""QuantizedArray, its writes and its lazy reads."""

from qpaged.arrays import _handlers as _handlers
from qpaged.arrays._quantized import QuantizedArray, float_dtype, quantize
from qpaged.arrays._writes import write_rows

__all__ = ["QuantizedArray", "float_dtype", "quantize", "write_rows"]
