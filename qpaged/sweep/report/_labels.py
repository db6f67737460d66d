"""Places names beside the dots of a chart, so that they touch neither dots, lines nor each other."""

import itertools
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
        """Return True if the rectangles overlap."""
        overlaps_in_x = self.left < other.right and other.left < self.right
        overlaps_in_y = self.top < other.bottom and other.top < self.bottom
        return overlaps_in_x and overlaps_in_y


def box_around(x: float, y: float, half: float) -> Box:
    """Return the square with sides 2 * half around a point."""
    return Box(x - half, y - half, x + half, y + half)


def boxes_of_steps(front: Sequence[tuple[float, float]]) -> list[Box]:
    """Return the stepped line of a front as thin boxes, from points that ascend in x."""
    boxes = []
    for (x, y), (next_x, next_y) in itertools.pairwise(front):
        boxes.append(Box(x, y - 1, next_x, y + 1))
        boxes.append(Box(next_x - 1, y, next_x + 1, next_y))
    return boxes


def place_names(
    dots: Sequence[tuple[float, float, float, bool]], obstacles: Iterable[Box], frame: Box, height: float
) -> list[Box | None]:
    """Return a box for the name of each dot; None where there is no room.

    Nothing lies left of and below a Pareto front, so the names of its dots are placed there, right-aligned,
    and those of the other dots right of and above theirs. Each is moved away from its dot until it touches
    nothing, by :data:`REACH` at most.

    Args:
        dots: (x, y, width of the name, on the front), in the order in which names are placed.
        obstacles: dots and lines that names must not touch.
        frame: the box that names must stay in.
        height: of a name.
    """
    occupied = list(obstacles)
    boxes = []
    for x, y, width, on_front in dots:
        left = x - GAP - width if on_front else x + GAP
        # A name that would leave the frame sideways is pushed back in; its line still leads to the dot.
        left = min(max(left, frame.left), frame.right - width)
        step = STEP if on_front else -STEP
        box = _first_free(Box(left, y - height / 2, left + width, y + height / 2), step, occupied, frame)
        boxes.append(box)
        if box is not None:
            occupied.append(box)
    return boxes


def _first_free(box: Box, step: float, occupied: Sequence[Box], frame: Box) -> Box | None:
    """Move a box by ``step`` until it touches nothing; return None if it never is inside the frame."""
    for i in range(int(REACH / abs(step))):
        moved = Box(box.left, box.top + i * step, box.right, box.bottom + i * step)
        is_inside = moved.left >= frame.left and moved.top >= frame.top and moved.bottom <= frame.bottom
        if is_inside and not any(moved.touches(other) for other in occupied):
            return moved
    return None
