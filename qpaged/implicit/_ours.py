"""The names of `qpaged.implicit` where they are our own."""

from qpaged.implicit._array import ImplicitArray as ImplicitArray
from qpaged.implicit._dispatch import primitive_handler as primitive_handler
from qpaged.implicit._fields import UninitializedAval as UninitializedAval
from qpaged.implicit._fields import aux_field as aux_field
from qpaged.implicit._interpreter import default_handler as default_handler
from qpaged.implicit._interpreter import materialize_nested as materialize_nested
from qpaged.implicit._interpreter import use_implicit_args as use_implicit_args
from qpaged.implicit._value import ArrayValue as ArrayValue
