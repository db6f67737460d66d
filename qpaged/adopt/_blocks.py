"""The blocks of a cache that a user may have changed: what shows that codes and scales were changed apart."""

from __future__ import annotations

import numpy as np

from qpaged.arrays import PartlyExact, QuantizedArray
from qpaged.arrays._rows import CacheArray


class KnownBlocks:
    """The blocks of the arrays of a cache as a step returned them, by path."""

    def __init__(self) -> None:
        self._known: dict[str, set[tuple[int, ...]]] = {}

    def note(self, path: str, array: CacheArray) -> None:
        """Note the block of an array that goes out to the user."""
        self._known.setdefault(path, set()).add(array.block)

    def check(self, path: str, array: CacheArray) -> None:
        """Raise ValueError if something has changed the codes and the scales of an array apart.

        Shapes alone do not show it: the first 20 of 32 tokens beside both scales look like two pages of 10.
        An array with other axes than before, as a loop over layers has it, is not checked.
        """
        known = self._known.get(path)
        codes: QuantizedArray = array.codes if isinstance(array, PartlyExact) else array
        if not known or codes.scales is None or codes.ndim != len(next(iter(known))):
            return
        extents_with_scales = tuple(np.multiply(codes.block, codes.scales.shape))
        if codes.block in known and codes.shape == extents_with_scales:
            return
        raise ValueError(
            f"{path} has codes {codes.codes.shape} and scales {codes.scales.shape}, which do not go "
            f"together in blocks of {' or '.join(map(str, known))}, as step.init made them: jax.tree.map "
            f"changes them apart. Use step.apply(function, cache). If the cache was made elsewhere, pass "
            f"it through step.init() first."
        )
