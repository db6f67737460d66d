"""The built-in formats: plugins like any other, found through the entry points ``qpaged.quantizers``."""

from quantizers._fp8 import Fp8E4M3, Fp8E5M2
from quantizers._int2 import Int2
from quantizers._int4 import Int4, Int4Floor, Int4Whole, int4
from quantizers._int8 import Int8Floor, Int8Token, Int8Whole, int8
from quantizers._mx import Mxfp4, Mxfp8
from quantizers._nvfp4 import Nvfp4
from quantizers._offset import Offset
from quantizers._offset_floor import OffsetFloor, offset
from quantizers._raw import Raw
from quantizers._rotate import Rotate

__all__ = [
    "Fp8E4M3",
    "Fp8E5M2",
    "Int2",
    "Int4",
    "Int4Floor",
    "Int4Whole",
    "Int8Floor",
    "Int8Token",
    "Int8Whole",
    "Mxfp4",
    "Mxfp8",
    "Nvfp4",
    "Offset",
    "OffsetFloor",
    "Raw",
    "Rotate",
    "int4",
    "int8",
    "offset",
]
