"""Arrays that are represented in another way than as a dense array: qax's protocol on current JAX.

Where qax 0.4.1 works (JAX 0.4.35) and is installed, these names are qax's own objects. From JAX 0.10.2
on they are this package's implementation of the same protocol, and `provider()` says why. Code
written for qax runs on both by changing the import.

What differs. With qax, an implicit array cannot go through cond, shard_map or a function with derivatives
of its own (`jax.nn.relu` is one), nor be carried by a loop; here all of them
take implicit arrays. Here a handler that is annotated with `jax.Array` or `ArrayValue` also fits traced
values. Materializing warns with `MaterializeWarning` here, and with a plain UserWarning that begins with
"Primitive" in qax. `record_materializations` needs our own implementation. Importing this package where
the names are qax's registers one handler with it, without which no inner jit would work.
"""

from typing import TYPE_CHECKING

import jax

from qpaged.implicit import _notes, _provider
from qpaged.implicit._notes import Materialization, MaterializeWarning
from qpaged.implicit._provider import Provider, provider

_qax = _provider.choose(jax.__version__)

if TYPE_CHECKING or _qax is None:
    from qpaged.implicit import _freeze as utils  # qax keeps freeze_keys in a module of this name
    from qpaged.implicit._freeze import freeze_keys
    from qpaged.implicit._notes import record_materializations
    from qpaged.implicit._ours import (
        ArrayValue,
        ImplicitArray,
        UninitializedAval,
        aux_field,
        default_handler,
        materialize_nested,
        primitive_handler,
        use_implicit_args,
    )
else:
    from qpaged.implicit._qax_lane import handle_inner_jit

    handle_inner_jit(_qax)
    ArrayValue = _qax.ArrayValue
    ImplicitArray = _qax.ImplicitArray
    UninitializedAval = _qax.UninitializedAval
    aux_field = _qax.aux_field
    default_handler = _qax.default_handler
    freeze_keys = _qax.freeze_keys
    materialize_nested = _qax.materialize_nested
    primitive_handler = _qax.primitive_handler
    record_materializations = _notes.no_record_with_qax
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
