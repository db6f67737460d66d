"""Results of a sweep: ``results.json``, how it is written, resumed from and read."""

from qpaged.sweep.results._files import (
    RESULTS,
    claimed,
    known_runs,
    set_aside,
    write_json,
    write_record,
)
from qpaged.sweep.results._merge import merged, read_results
from qpaged.sweep.results._reading import (
    BROKEN,
    CONFIDENT_ERRORS,
    Results,
    RunRecord,
    check,
    closest_first,
    is_broken,
    log_floor,
    pareto_front,
    tied,
    title,
)
from qpaged.sweep.results._record import (
    SweepResult,
    conditions,
    is_number,
    json_of,
    run_from_record,
    run_record,
    same_conditions,
)

__all__ = [
    "BROKEN",
    "CONFIDENT_ERRORS",
    "RESULTS",
    "Results",
    "RunRecord",
    "SweepResult",
    "check",
    "claimed",
    "closest_first",
    "conditions",
    "is_broken",
    "is_number",
    "json_of",
    "known_runs",
    "log_floor",
    "merged",
    "pareto_front",
    "read_results",
    "run_from_record",
    "run_record",
    "same_conditions",
    "set_aside",
    "tied",
    "title",
    "write_json",
    "write_record",
]
