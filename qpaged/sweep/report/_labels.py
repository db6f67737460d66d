"""Names beside the dots of a figure, where they touch nothing."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

GAP = 10.0  # from a dot's centre to its name
REACH = 45.0  # by which a name is moved at most
STEP = 3.0  # by which a name is moved until it is free


@dataclass(frozen=True)
class Box:
    """A rectangle; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def touches(self, other: "Box") -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


def around(x: float, y: float, half: float) -> Box:
    """The square about a point."""
    return Box(x - half, y - half, x + half, y + half)


def place_names(
    dots: Sequence[tuple[float, float, float, bool]], obstacles: Iterable[Box], frame: Box, height: float
) -> list[Box | None]:
    """A box for each dot's name; None where there is no room.

    Nothing lies left of and below a Pareto front, so that names of its dots stand there, right-aligned, and
    those of the others right of and above theirs. Each is moved away from its dot until it touches nothing,
    by :data:`REACH` at most.

    Args:
        dots: (x, y, width of the name, whether on the front), in the order in which places are given out.
        obstacles: what names must not touch: dots and lines.
        frame: what they must stay in.
        height: of a name.
    """
    taken, places = list(obstacles), []
    for x, y, width, below in dots:
        left = x - GAP - width if below else x + GAP
        left = min(max(left, frame.left), frame.right - width)
        place = _first_free(left, y - height / 2, width, height, STEP if below else -STEP, taken, frame)
        places.append(place)
        taken += [place] if place else []
    return places


def _first_free(
    left: float, top: float, width: float, height: float, step: float, taken: Sequence[Box], frame: Box
) -> Box | None:
    for i in range(int(REACH / abs(step))):
        box = Box(left, top + i * step, left + width, top + i * step + height)
        inside = box.left >= frame.left and box.top >= frame.top and box.bottom <= frame.bottom
        if inside and not any(box.touches(other) for other in taken):
            return box
    return None
