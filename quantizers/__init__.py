"""The built-in formats: plugins like any other, found through the entry points ``qpaged.quantizers``."""

from quantizers._fp8 import Fp8E4M3, Fp8E4M3Static, Fp8E5M2, Fp8E5M2Static, fp8_e4m3, fp8_e5m2
from quantizers._int import (
    Int3,
    Int3Floor,
    Int3Whole,
    Int4,
    Int4Floor,
    Int4Whole,
    Int5,
    Int5Floor,
    Int5Whole,
    Int6,
    Int6Floor,
    Int6Whole,
    int3,
    int4,
    int5,
    int6,
)
from quantizers._int2 import Int2, Int2Floor, Int2Whole, int2
from quantizers._int8 import Int8Floor, Int8Token, Int8Whole, int8
from quantizers._lloyd import Lloyd2, Lloyd3, Lloyd4
from quantizers._mx import Mxfp4, Mxfp8
from quantizers._nvfp4 import Nvfp4
from quantizers._offset import Offset
from quantizers._offset_floor import OffsetFloor, offset
from quantizers._raw import Raw
from quantizers._rotate import Rotate
from quantizers._trellis import (
    Trellis2,
    Trellis2Channel,
    Trellis3,
    Trellis3Channel,
    trellis2,
    trellis3,
)

__all__ = [
    "Fp8E4M3",
    "Fp8E4M3Static",
    "Fp8E5M2",
    "Fp8E5M2Static",
    "Int2",
    "Int2Floor",
    "Int2Whole",
    "Int3",
    "Int3Floor",
    "Int3Whole",
    "Int4",
    "Int4Floor",
    "Int4Whole",
    "Int5",
    "Int5Floor",
    "Int5Whole",
    "Int6",
    "Int6Floor",
    "Int6Whole",
    "Int8Floor",
    "Int8Token",
    "Int8Whole",
    "Lloyd2",
    "Lloyd3",
    "Lloyd4",
    "Mxfp4",
    "Mxfp8",
    "Nvfp4",
    "Offset",
    "OffsetFloor",
    "Raw",
    "Rotate",
    "Trellis2",
    "Trellis2Channel",
    "Trellis3",
    "Trellis3Channel",
    "fp8_e4m3",
    "fp8_e5m2",
    "int2",
    "int3",
    "int4",
    "int5",
    "int6",
    "int8",
    "offset",
    "trellis2",
    "trellis3",
]
