"""Find out what a program does with its inputs: which parts of them it writes, and which dots read them.

The program is a jaxpr, and the analysis is an abstract interpretation of it: nothing is computed. Every
variable is mapped to its views, one :class:`View` for each input whose elements it may hold. A view says
along which axes of the input each axis of the variable runs. With a cache ``k`` of shape (batch, length,
heads, head_dim), whose axes are numbered 0 to 3:

    value                          input_axes of its view        selected
    k                              ({0}, {1}, {2}, {3})
    k.transpose(0, 2, 1, 3)        ({0}, {2}, {1}, {3})
    k[None]                        ({}, {0}, {1}, {2}, {3})
    k.reshape(batch, length, -1)   ({0}, {1}, {2, 3})
    k[:, 7]                        ({0}, {2}, {3})               {(1, 7)}
    k + 1                          ({0}, {1}, {2}, {3})          (and rebuilt_by says that an add made it)

Each primitive has a rule that turns the views of its operands into those of its outputs. On the way the rules
record every partial write (dynamic_update_slice, scatter) and every read (dot_general), in axes of the input.
Where control flow joins (branches of a cond, iterations of a loop), views are merged: the merged view runs
along every axis along which any of them runs. A variable without views holds nothing of any input.

The files: ``_views`` has the abstract values, ``_effects`` what is recorded, ``_moves`` and ``_accesses`` the
rules for moving, writing and reading, and ``_interpret`` the walk over the equations, calls and control flow.
``_zero_tests`` is a walk of its own, for comparisons with zero.
"""

from qpaged.adopt._dataflow._effects import Dataflow, Read, Write
from qpaged.adopt._dataflow._interpret import trace_dataflow
from qpaged.adopt._dataflow._views import NO_AXES, Axes, Operation, View
from qpaged.adopt._dataflow._zero_tests import ZeroTests

__all__ = ["NO_AXES", "Axes", "Dataflow", "Operation", "Read", "View", "Write", "ZeroTests", "trace_dataflow"]
