"""The built-in formats: plugins like any other, found through the entry points ``qpaged.quantizers``."""

from quantizers._fp8 import Fp8E4M3, Fp8E5M2
from quantizers._int8 import Int8Floor, Int8Token, int8
from quantizers._raw import Raw

__all__ = ["Fp8E4M3", "Fp8E5M2", "Int8Floor", "Int8Token", "Raw", "int8"]
