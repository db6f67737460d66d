"""Implicit arrays, which stand for an array without storing it as a dense one: qax's protocol on current JAX.

Where qax 0.4.1 works (JAX 0.4.35) and is installed, these names are qax's own objects. From JAX 0.10.2
on they are this package's implementation of the same protocol; `provider()` says which, and why. Code
written for qax runs on both by changing the import.

The differences are these. With qax, an implicit array cannot go through cond, shard_map or a function with
custom derivatives (`jax.nn.relu` is one), nor be carried by a loop; here all of them take implicit arrays.
Here a handler that is annotated with `jax.Array` or `ArrayValue` also fits traced values. Materializing
warns with `MaterializeWarning` here, and with a plain UserWarning that begins with "Primitive" in qax.
`record_materializations` needs our own implementation. Where the names are qax's, importing this package
registers one handler with qax, because without it no inner jit would work.
"""

from typing import TYPE_CHECKING

import jax

from qpaged.implicit import _provider
from qpaged.implicit._provider import Provider, provider
from qpaged.implicit._reports import Materialization, MaterializeWarning

# Either none of the names is qax's or all are: the two implementations do not know each other's classes.
_qax = _provider.choose(jax.__version__)

# Type checkers always see our own classes.
if TYPE_CHECKING or _qax is None:
    from qpaged.implicit import _freeze as utils  # qax keeps freeze_keys in a module of this name
    from qpaged.implicit._array import ImplicitArray
    from qpaged.implicit._dispatch import primitive_handler
    from qpaged.implicit._fields import UninitializedAval, aux_field
    from qpaged.implicit._freeze import freeze_keys
    from qpaged.implicit._interpreter import default_handler, materialize_nested, use_implicit_args
    from qpaged.implicit._reports import record_materializations
    from qpaged.implicit._value import ArrayValue
else:
    from qpaged.implicit._qax_jit import handle_inner_jit
    from qpaged.implicit._reports import no_record_with_qax

    handle_inner_jit(_qax)
    ArrayValue = _qax.ArrayValue
    ImplicitArray = _qax.ImplicitArray
    UninitializedAval = _qax.UninitializedAval
    aux_field = _qax.aux_field
    default_handler = _qax.default_handler
    freeze_keys = _qax.freeze_keys
    materialize_nested = _qax.materialize_nested
    primitive_handler = _qax.primitive_handler
    record_materializations = no_record_with_qax
    use_implicit_args = _qax.use_implicit_args
    utils = _qax.utils

__all__ = [
    "ArrayValue",
    "ImplicitArray",
    "Materialization",
    "MaterializeWarning",
    "Provider",
    "UninitializedAval",
    "aux_field",
    "default_handler",
    "freeze_keys",
    "materialize_nested",
    "primitive_handler",
    "provider",
    "record_materializations",
    "use_implicit_args",
    "utils",
]
