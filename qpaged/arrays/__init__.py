"""QuantizedArray, its writes and its lazy reads."""

from qpaged._deprecated import renamed_attributes
from qpaged.arrays import _exact_dot as _exact_dot  # these three register handlers
from qpaged.arrays import _exact_tokens as _exact_tokens
from qpaged.arrays import _join_handlers as _join_handlers
from qpaged.arrays._dot import dot_general
from qpaged.arrays._dtypes import common_dtype, dtype_of_floats, float_dtype, is_dtype
from qpaged.arrays._elementwise import not_elementwise
from qpaged.arrays._encoding import in_units
from qpaged.arrays._indices import clip_to_int32
from qpaged.arrays._lane_rows import LANES
from qpaged.arrays._packing import PLANES, codes_together, extract_codes, has_planes, join_planes, pack
from qpaged.arrays._pages import clear_pages, copy_pages, final_targets, put_pages, read_pages
from qpaged.arrays._partly_exact import PartlyExact, is_cache_array, overwrite_exact
from qpaged.arrays._protocol import (
    ArrayFormat,
    BlockFitRule,
    GlobalScaleRule,
    GrowthRule,
    OffsetRule,
    TransformRule,
)
from qpaged.arrays._quantize import check_parts, empty, fill_lane_rows, overwrite, quantize
from qpaged.arrays._quantized import BlockParts, QuantizedArray, is_quantized
from qpaged.arrays._slots import (
    as_slots,
    compute_dtype,
    dot,
    gather_pages,
    invert_output,
    mask_slots,
    to_float32,
    transform_query,
    untransformed,
)
from qpaged.arrays._trellis import extract_states, trellis_codes, windows
from qpaged.arrays._writes import takes_rows, write_rows

__all__ = [
    "LANES",
    "PLANES",
    "ArrayFormat",
    "BlockFitRule",
    "BlockParts",
    "GlobalScaleRule",
    "GrowthRule",
    "OffsetRule",
    "PartlyExact",
    "QuantizedArray",
    "TransformRule",
    "as_slots",
    "check_parts",
    "clear_pages",
    "clip_to_int32",
    "codes_together",
    "common_dtype",
    "compute_dtype",
    "copy_pages",
    "dot",
    "dot_general",
    "dtype_of_floats",
    "empty",
    "extract_codes",
    "extract_states",
    "fill_lane_rows",
    "final_targets",
    "float_dtype",
    "gather_pages",
    "has_planes",
    "in_units",
    "invert_output",
    "is_cache_array",
    "is_dtype",
    "is_quantized",
    "join_planes",
    "mask_slots",
    "not_elementwise",
    "overwrite",
    "overwrite_exact",
    "pack",
    "put_pages",
    "quantize",
    "read_pages",
    "takes_rows",
    "to_float32",
    "transform_query",
    "trellis_codes",
    "untransformed",
    "windows",
    "write_rows",
]

__getattr__ = renamed_attributes(
    __name__,
    {
        "clipped": "qpaged.arrays.clip_to_int32",
        "fill_rows": "qpaged.arrays.fill_lane_rows",
        "keep_slots": "qpaged.arrays.mask_slots",
        "refused": "qpaged.arrays.not_elementwise",
        "take_pages": "qpaged.arrays.gather_pages",
    },
)
