"""Everything that can be done to a pool of pages, whatever its kind.

A pool is (kv_heads, pages, page_size, head_dim): a plain array, a :class:`~qpaged.QuantizedArray`, or an
implicit array of another class. Code that takes a pool calls these functions and never asks what it is. Each
kind is a subclass of :class:`Pool`, in a file of its own. A pytree of a new kind subclasses :class:`Pool`
itself, and needs no entry anywhere.
"""

from qpaged.pools._exact import ExactPages
from qpaged.pools._flat import FlatPool, as_flat, at_layer, of_all_layers
from qpaged.pools._in_keys import ValuesInKeys
from qpaged.pools._interleaved import InterleavedPages
from qpaged.pools._kinds import (
    as_quantized,
    clear_pages,
    copy_pages,
    count_bytes,
    describe,
    explicit_sharding_of,
    fill_lane_rows,
    format_of,
    from_record,
    gather_slots,
    has_exact_pages,
    is_exact,
    is_narrow_float,
    kind_of,
    mesh_of,
    needs_implicit_args,
    pack_pages,
    packed,
    packed_format,
    put_pages,
    static_scales,
    take_pages,
    to_record,
    values_within,
    with_packed,
    with_static_scales,
    write_both,
    write_slots,
)
from qpaged.pools._pool import Pages, Pool, PoolBytes, SlotMapping, Slots, bytes_of, no_record_of

__all__ = [
    "ExactPages",
    "FlatPool",
    "InterleavedPages",
    "Pages",
    "Pool",
    "PoolBytes",
    "SlotMapping",
    "Slots",
    "ValuesInKeys",
    "as_flat",
    "as_quantized",
    "at_layer",
    "bytes_of",
    "clear_pages",
    "copy_pages",
    "count_bytes",
    "describe",
    "explicit_sharding_of",
    "fill_lane_rows",
    "format_of",
    "from_record",
    "gather_slots",
    "has_exact_pages",
    "is_exact",
    "is_narrow_float",
    "kind_of",
    "mesh_of",
    "needs_implicit_args",
    "no_record_of",
    "of_all_layers",
    "pack_pages",
    "packed",
    "packed_format",
    "put_pages",
    "static_scales",
    "take_pages",
    "to_record",
    "values_within",
    "with_packed",
    "with_static_scales",
    "write_both",
    "write_slots",
]
