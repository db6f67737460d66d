"""The pages that are free, on each of the devices that share the pages of a sequence."""

from collections.abc import Iterable, Iterator


class FreePages:
    """Gives out pages so that every device has about as many of a sequence's, and so as much to attend to.

    Args:
        pages: of all devices, the first ones on the first device.
        devices: how many there are.

    Raises:
        ValueError: the pages do not divide.
    """

    def __init__(self, pages: int, devices: int):
        if pages % devices:
            raise ValueError(
                f"devices must divide num_pages_per_layer, {pages:,}, as those along cp do, but came as "
                f"{devices}."
            )
        self._of_device = pages // devices
        # Given out from the end: those that were freed last first, and of fresh ones the lowest.
        self._pages = [
            list(range(first + self._of_device - 1, first - 1, -1))
            for first in range(0, pages, self._of_device)
        ]

    def __len__(self) -> int:
        return sum(map(len, self._pages))

    def __iter__(self) -> Iterator[int]:
        return (page for of_device in self._pages for page in of_device)

    def take(self) -> int:
        """Return a page of the device that has the most; there is one."""
        return max(self._pages, key=len).pop()

    def add(self, page: int) -> None:
        """Take back a page."""
        self._pages[page // self._of_device].append(page)

    def restore(self, pages: Iterable[int]) -> None:
        """Have these pages, and no others, in this order."""
        for of_device in self._pages:
            of_device.clear()
        for page in pages:
            self.add(page)
