"""Integer indices, brought to int32 without wrapping."""

from typing import Any

import numpy as np

BEFORE = -1  # what every negative index becomes; writes drop it, reads skip it
LARGEST = np.iinfo(np.int32).max


def clipped(values: Any) -> Any:
    """An integer array as int32; what is beyond its range is put at its ends, as far out of any array."""
    if not np.can_cast(values.dtype, np.int32):
        values = values.clip(0 if values.dtype.kind == "u" else BEFORE, LARGEST)
    return values.astype(np.int32)
