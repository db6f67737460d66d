"""Every difference between JAX versions that qpaged knows about, and nothing else.

Only names of `jax`, `jax.core` and `jax.extend` are used; nothing is imported from `jax._src`.
This module also imports on the JAX that qax needs, where most of its functions are never called.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
import jax.extend.source_info_util as source_info_util
from jax.sharding import PartitionSpec

Tracer = jax.core.Tracer
Primitive = jex.Primitive
ShapedArray = jax.core.ShapedArray

# The names that programs written for other JAX versions use for today's primitives.
_OLD_PRIMITIVE_NAMES = {"pjit": "jit", "checkpoint": "remat", "remat2": "remat", "add_any": "add_jaxvals"}


def version_tuple(version: str) -> tuple[int, ...]:
    """The leading numbers of a version string, at most three of them."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")[:3]) if match else ()


def primitive_named(name: str) -> Primitive:
    """The primitive behind `jax.lax.<name>_p`, also where JAX keeps it elsewhere or renamed it."""
    for candidate in (name, _OLD_PRIMITIVE_NAMES.get(name, name)):
        for namespace in (jex.primitives, jax.lax):
            primitive = getattr(namespace, f"{candidate}_p", None)
            if isinstance(primitive, Primitive):
                return primitive
    raise ValueError(
        f"primitive_handler: no JAX primitive is called {name!r}. Names are those of jax.lax without the "
        f"trailing '_p', such as 'add' or 'dot_general'. Pass the primitive itself if it is not one of JAX's."
    )


def bind(primitive: Primitive, values: Sequence[Any], params: dict[str, Any]) -> Any:
    """Bind a primitive with parameters as they stand in a jaxpr."""
    bound = primitive.get_bind_params(params)
    if isinstance(bound, tuple):  # before JAX 0.9.2: (functions, parameters)
        functions, bound = bound
        return primitive.bind(*functions, *values, **bound)
    return primitive.bind(*values, **bound)


@contextmanager
def equation_context(eqn: Any) -> Iterator[None]:
    """Bind under the source location, name stack and context managers the equation was traced with."""
    info = eqn.source_info
    names = source_info_util.current_name_stack() + info.name_stack
    with source_info_util.user_context(info.traceback, name_stack=names), eqn.ctx.manager:
        yield


def source_line(eqn: Any) -> tuple[str, int] | None:
    """File and line of the user's code that an equation was traced from."""
    match = re.match(r"(.+?):(\d+)(?::\d+)?(?: |$)", source_info_util.summarize(eqn.source_info))
    return (match.group(1), int(match.group(2))) if match else None


def is_literal(atom: Any) -> bool:
    """Whether an operand of an equation is a constant written into the jaxpr."""
    return isinstance(atom, jex.Literal)


def jaxpr_and_consts(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """Open and closed jaxprs alike: JAX 0.11 merged the two classes, 0.10 has both."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def scan_counts(params: dict[str, Any], operands: int) -> tuple[int, int]:
    """How many of scan's operands are constants and carries."""
    if "num_consts" in params:  # up to JAX 0.10
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].update(range(operands)).unpack()
    return len(list(consts)), len(list(carry))


def without_consts(closed: Any) -> tuple[Any, list[Any]]:
    """An open jaxpr whose first inputs are what `closed` held as constants, and those constants."""
    jaxpr, consts = jaxpr_and_consts(closed)
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    info = jaxpr.debug_info
    if hasattr(info, "_replace") and info.arg_names is not None:
        info = info._replace(arg_names=(*("",) * len(jaxpr.constvars), *info.arg_names))
    opened = jex.Jaxpr([], inputs, jaxpr.outvars, jaxpr.eqns, jaxpr.effects, info)
    return opened, list(consts)


def inlines_while_tracing(params: dict[str, Any]) -> bool:
    """Whether a jit equation asks to disappear: a bool up to JAX 0.10, an enum after."""
    inline = params.get("inline", False)
    return inline is True or getattr(inline, "name", "") == "JAX_EARLY"


def placed(aval: Any) -> bool:
    """Whether an aval says more than shape and dtype: manual axes that vary, or an explicit sharding."""
    sharding = getattr(aval, "sharding", None)
    return bool(varying_axes(aval)) or not (sharding is None or sharding.mesh.empty)


def varying_axes(aval: Any) -> frozenset[Any]:
    """The manual mesh axes along which a value inside shard_map differs."""
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset(getattr(manual, "varying", ()) or ())


def make_varying(value: Any, axes: frozenset[Any]) -> Any:
    """Mark a value as varying along `axes`, those it already varies along excepted."""
    missing = tuple(sorted(axes - varying_axes(jax.typeof(value))))
    return jax.lax.pcast(value, missing, to="varying") if missing else value


def explicit_sharding(array: Any) -> Any:
    """The sharding of an array on a mesh with Explicit axes; None on any other, and on JAX without them."""
    sharding = getattr(jax.typeof(array), "sharding", None) if hasattr(jax, "typeof") else None
    if sharding is None or sharding.mesh.empty:
        return None
    explicit = any(kind == jax.sharding.AxisType.Explicit for kind in sharding.mesh.axis_types)
    return sharding if explicit else None


def partitioned() -> bool:
    """Whether the mesh of the program has axes of several devices that are left to the compiler."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return any(size > 1 and kind == jax.sharding.AxisType.Auto for size, kind in kinds)


def shaped_as(shape: Sequence[int], dtype: Any, operands: Any) -> Any:
    """What a kernel gives: this shape and dtype, varying along the manual axes that an operand does."""
    kind = jax.sharding.ManualAxisType(varying=_axes_of(operands))
    return jax.ShapeDtypeStruct(tuple(shape), dtype, manual_axis_type=kind)


def varying_as(values: Any, operands: Any) -> Any:
    """`values` as a loop over the operands carries them: varying along the manual axes that these do."""
    axes = _axes_of(operands) if hasattr(jax, "typeof") else frozenset()
    return jax.tree_util.tree_map(lambda value: make_varying(value, axes), values) if axes else values


def _axes_of(operands: Any) -> frozenset[Any]:
    axes = (varying_axes(jax.typeof(operand)) for operand in jax.tree_util.tree_leaves(operands))
    return frozenset().union(*axes)


def automatic(fun: Callable[..., Any], out_shardings: Any) -> Any:
    """`fun`, with Explicit mesh axes left to the compiler inside, and its outputs placed."""
    axes = jax.tree_util.tree_leaves(out_shardings)[0].mesh.axis_names
    return jax.sharding.auto_axes(fun, axes=axes, out_sharding=out_shardings)


def shard_map(fun: Callable[..., Any], params: dict[str, Any], in_specs: Any, out_specs: Any) -> Any:
    """`jax.shard_map` again, with the settings of a shard_map equation."""
    return jax.shard_map(
        fun,
        mesh=params["mesh"],
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )


def spec_axes(entry: Any) -> tuple[Any, ...]:
    """The mesh axes that one entry of a PartitionSpec names."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def operand_batching_dims(numbers: Any) -> tuple[int, ...]:
    """The operand axes that a gather or scatter batches over; none before JAX 0.4.31."""
    return tuple(getattr(numbers, "operand_batching_dims", ()))


def scatter_indices_batching_dims(numbers: Any) -> tuple[int, ...]:
    """The index axes that a scatter batches over, in the order of :func:`operand_batching_dims`."""
    return tuple(getattr(numbers, "scatter_indices_batching_dims", ()))


OLDEST_PALLAS_TPU = (0, 10)


def has_pallas_tpu() -> bool:
    """Whether this JAX has the Pallas for TPUs that our kernels are written for."""
    return version_tuple(jax.__version__) >= OLDEST_PALLAS_TPU


def existing_primitives(names: str | Sequence[str]) -> list[str]:
    """Those of the primitives that this JAX has: some came with later versions."""
    names = [names] if isinstance(names, str) else names
    return [name for name in names if hasattr(jax.lax, f"{name}_p")]
