"""The blocks of a cache that a user may have changed: what shows that codes and scales were changed apart."""

from __future__ import annotations

import numpy as np

from qpaged.arrays import QuantizedArray


class KnownBlocks:
    """The blocks of the arrays of a cache as a step returned them, by path."""

    def __init__(self) -> None:
        self._known: dict[str, set[tuple[int, ...]]] = {}

    def note(self, path: str, array: QuantizedArray) -> None:
        """Note the block of an array that goes out to the user."""
        self._known.setdefault(path, set()).add(array.block)

    def check(self, path: str, array: QuantizedArray) -> None:
        """Raise ValueError if something has changed the codes and the scales of an array apart.

        Shapes alone do not show it: the first 20 of 32 tokens beside both scales look like two pages of 10.
        An array with other axes than before, as a loop over layers has it, is not checked.
        """
        known = self._known.get(path)
        if not known or array.scales is None or array.ndim != len(next(iter(known))):
            return
        extents_with_scales = tuple(np.multiply(array.block, array.scales.shape))
        if array.block in known and array.shape == extents_with_scales:
            return
        raise ValueError(
            f"{path} has codes {array.codes.shape} and scales {array.scales.shape}, which do not go "
            f"together in blocks of {' or '.join(map(str, known))}, as step.init made them: jax.tree.map "
            f"changes them apart. Use step.apply(function, cache). If the cache was made elsewhere, pass "
            f"it through step.init() first."
        )
