"""Integer indices, brought to int32 without wrapping."""

from typing import Any

import numpy as np

BEFORE_FIRST = -1  # what every negative index becomes; writes drop it, reads skip it
LARGEST_INT32 = np.iinfo(np.int32).max


def clip_to_int32(values: Any) -> Any:
    """Return integers of JAX or NumPy as int32.

    Those beyond its range become its ends, which are as far out of any array.
    """
    if not np.can_cast(values.dtype, np.int32):
        lowest = 0 if values.dtype.kind == "u" else BEFORE_FIRST
        values = values.clip(lowest, LARGEST_INT32)
    return values.astype(np.int32)
