"""Frozen pages of a format: the rows that were written, the bytes that were stored, and the values read back.

A file is a saved view whose keys are in the format and whose values are plain: the same rows, as they came.
"""

import base64
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import qpaged

FOLDER = Path(__file__).parents[1] / "frozen"
PAGES, SLOTS = 2, 4
STATIC_SCALE = 0.17  # under which outliers saturate in e4m3
TABLE = np.array([1, 0], np.int32)
POSITIONS = np.array([0, 5, 1, 2, 4, 3], np.int32)  # two slots stay empty
METADATA = qpaged.PagedAttentionMetadata.prefill(position=POSITIONS, page_table=TABLE)
VALUES = jax.jit(lambda pool: pool.dequantize())


def path_of(spelling):
    """Return the file of a format: its spelling, with a dot for the colon that some file systems refuse."""
    return FOLDER / f"{spelling.replace(':', '.')}.json"


def head_dim_of(spelling):
    """Return the smallest head_dim that the format's groups divide, and at least 16."""
    group = qpaged.get_quantizer(spelling).granularity.removeprefix("group")
    if not group.isdigit():
        return 16
    return max(16, int(group))


def rows_of(head_dim):
    """Return rows [tokens, 1, head_dim], float32, that integer arithmetic gives on every machine.

    Values lie between -8 and 8. One in nine is zero, one in thirteen is an outlier, one channel in eight lies
    around 3, and one token is a thousandth of the others.
    """
    index = np.arange(len(POSITIONS) * head_dim, dtype=np.uint64)
    state = (index * np.uint64(2654435761) + np.uint64(12345)) & np.uint64(0xFFFFFFFF)
    state = (state ^ (state >> np.uint64(15))) * np.uint64(2246822519) & np.uint64(0xFFFFFFFF)
    x = ((state >> np.uint64(16)).astype(np.int64) - 2**15) * 2.0**-12
    x = np.where(index % 9 == 4, 0.0, np.where(index % 13 == 7, x * 32, x))
    x = x.reshape(len(POSITIONS), 1, head_dim)
    x = x + np.where(np.arange(head_dim) % 8 == 5, 3.0, 0.0)
    x[2] *= 2.0**-10
    return x.astype(np.float32)


def view_of(spelling, rows):
    """Return a view to which one prefill wrote the rows."""
    head_dim = rows.shape[-1]
    config = qpaged.PagedAttentionCacheMetaData(1, 1, PAGES, PAGES, PAGES * SLOTS, SLOTS, 1, head_dim, 0.5)
    view = qpaged.PagedAttentionCacheView.init(None, jnp.float32, config, 0, None, f"{spelling}/plain")
    if qpaged.get_quantizer(spelling).has_static_scales:
        view = view.with_scales(key=STATIC_SCALE)
    return jax.jit(lambda view, rows: view.write_prefill_to_cache(rows, rows, METADATA))(view, rows)


def written_slots(pool):
    """Return the written slots of a pool [1, pages, slots, head_dim], in the tokens' order."""
    page = TABLE[POSITIONS // SLOTS]
    slot = POSITIONS % SLOTS
    return np.swapaxes(np.asarray(pool)[:, page, slot], 0, 1)  # [tokens, 1, head_dim]


def record_of(spelling):
    """Return the record that is frozen: values are base64 of little-endian float32."""
    view = view_of(spelling, rows_of(head_dim_of(spelling)))
    values = written_slots(VALUES(view.key_pages)).astype("<f4")
    data = base64.b64encode(values.tobytes()).decode("ascii")
    return {"format": spelling, "values": data, "view": json.loads(view.to_json())}


def freeze(spellings):
    """Write the files that are missing; one that exists is never written again."""
    for spelling in spellings:
        path = path_of(spelling)
        if not path.exists():
            record = json.dumps(record_of(spelling))
            with path.open("x", encoding="utf-8") as file:
                file.write(f"{record}\n")
            print(f"wrote {path}", file=sys.stderr)
