"""The formats that a search chooses from by default."""

from qpaged.sweep._formats import fitting

CANDIDATES = (
    "int8:token+rotate", "int8:token", "int8", "int8:channel", "int6:token+rotate", "int5:token+rotate",
    "int4+offset+rotate", "int4+rotate", "int4:token+rotate", "int4:channel+offset",
    "int3:token+rotate", "int2+offset+rotate",
)  # fmt: skip


def default_candidates(head_dim: int) -> list[str]:
    """Return those of :data:`CANDIDATES` that a cache of this head_dim can have."""
    return fitting(CANDIDATES, head_dim)[0]
