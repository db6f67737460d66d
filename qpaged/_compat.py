"""The only module that knows how versions of JAX differ: a new JAX is a change to this file alone.

Other modules use the public names that all supported versions have, and ask this one about the rest. Only
public names are used here, too, but for what jitted functions know of themselves (`jit_options_of`); nothing
is imported from `jax._src`. This module also imports on JAX 0.4.35, which qax needs; most of its functions
are never called there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import jax
import jax.core
import jax.extend.core as jex
import jax.extend.source_info_util as source_info_util
import numpy as np
from jax.interpreters import mlir
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

# ------------------------------------------------------------------------------------------------
# Types
# ------------------------------------------------------------------------------------------------

Tracer = jax.core.Tracer
Primitive = jex.Primitive
ShapedArray = jax.core.ShapedArray
Equation = jex.JaxprEqn
OpenJaxpr: TypeAlias = Any  # jex.Jaxpr, which for type checkers says neither shapes nor dtypes
# JAX 0.11 merged the two classes; up to 0.10 equations hold some jaxprs of either.
Jaxpr: TypeAlias = jex.Jaxpr | jex.ClosedJaxpr
Params: TypeAlias = dict[str, Any]
Aval: TypeAlias = Any  # a ShapedArray, a ShapeDtypeStruct, or the abstract value of a reference
Operand: TypeAlias = Any  # an array, traced or not, an implicit array, a literal, or a reference
Pytree: TypeAlias = Any
Atom: TypeAlias = jex.Var | jex.Literal
DType: TypeAlias = Any  # a NumPy dtype, or an extended dtype of JAX, as random keys have


class Location(NamedTuple):
    """A line of source code."""

    file: str
    line: int


# ------------------------------------------------------------------------------------------------
# Versions and what they can do
# ------------------------------------------------------------------------------------------------

QAX_JAX = (0, 4, 35)  # the only version that qax 0.4.1 works on
IMPLICIT_JAX = (0, 10, 2)  # the oldest that qpaged.implicit's own interpreter is tested on
PALLAS_TPU_JAX = (0, 10)  # the oldest whose Pallas lowers our TPU kernels
MOSAIC_GPU_JAX = (0, 11)  # the oldest with a public interpreter of Mosaic GPU, which tests our kernel


def version_tuple(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version string, at most three of them."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    if match is None:
        return ()
    return tuple(int(number) for number in match.group().split(".")[:3])


def dotted(version: tuple[int, ...]) -> str:
    """Return a version as it is usually written: "0.10.2"."""
    return ".".join(str(number) for number in version)


def newer_jax_needed(oldest: tuple[int, ...]) -> str | None:
    """Return "needs JAX 0.10 or newer, but this is 0.9.2" if JAX is older than `oldest`, else None."""
    if version_tuple(jax.__version__) >= oldest:
        return None
    return f"needs JAX {dotted(oldest)} or newer, but this is {jax.__version__}"


def has_pallas_tpu() -> bool:
    """Return True if this JAX can lower our Pallas kernels for TPUs."""
    return newer_jax_needed(PALLAS_TPU_JAX) is None


def has_mosaic_gpu_interpreter() -> bool:
    """Return True if this JAX can interpret Mosaic GPU kernels on a CPU."""
    return newer_jax_needed(MOSAIC_GPU_JAX) is None


def has_explicit_meshes() -> bool:
    """Return True if this JAX has meshes with Explicit axes, `jax.set_mesh` and `jax.shard_map`."""
    return hasattr(jax.sharding, "AxisType") and hasattr(jax, "shard_map")


def primitive_exists(name: str) -> bool:
    """Return True if `jax.lax.<name>_p` is a primitive of this JAX."""
    # qax looks nowhere else, so neither does this: handlers are registered by these names on both lanes.
    return hasattr(jax.lax, f"{name}_p")


# ------------------------------------------------------------------------------------------------
# Primitives and equations
# ------------------------------------------------------------------------------------------------

# The names that programs written for other JAX versions use for today's primitives.
_OLD_PRIMITIVE_NAMES = {"pjit": "jit", "checkpoint": "remat", "remat2": "remat", "add_any": "add_jaxvals"}

# Primitives that JAX had once; their functions are programs of others today.
_REMOVED_PRIMITIVES = {"random_gamma_grad"}


def was_removed(name: str) -> bool:
    """Return True if `name` was a primitive of older versions, and is none of this JAX."""
    return name in _REMOVED_PRIMITIVES and not hasattr(jax.lax, f"{name}_p")


def primitive_named(name: str) -> Primitive:
    """Return the primitive behind `jax.lax.<name>_p`, even if JAX keeps it elsewhere or renamed it."""
    for candidate in (name, _OLD_PRIMITIVE_NAMES.get(name, name)):
        for namespace in (jex.primitives, jax.lax):
            primitive = getattr(namespace, f"{candidate}_p", None)
            if isinstance(primitive, Primitive):
                return primitive
    raise ValueError(
        f"primitive_handler: no JAX primitive is called {name!r}. Names are those of jax.lax without the "
        f"trailing '_p', such as 'add' or 'dot_general'. Pass the primitive itself if it is not one of JAX's."
    )


def bind(primitive: Primitive, operands: Sequence[Operand], params: Params) -> Any:
    """Apply a primitive to operands, with parameters as an equation holds them."""
    bound = primitive.get_bind_params(params)
    if isinstance(bound, tuple):  # before JAX 0.9.2: (functions, parameters)
        functions, bound = bound
        return primitive.bind(*functions, *operands, **bound)
    return primitive.bind(*operands, **bound)


def jit_options_of(function: Callable[..., Any]) -> dict[str, Any] | None:
    """Return the static and the donated arguments with which a function was jitted; None if it was not."""
    # Methods of objects and functions made by functools.wraps have the attributes of what they call.
    if type(function) is not type(jax.jit(lambda: None)):
        return None
    info = function._jit_info  # type: ignore[attr-defined]
    names = ("static_argnums", "static_argnames", "donate_argnums", "donate_argnames")
    return {name: getattr(info, name) for name in names}


@contextmanager
def equation_context(eqn: Equation) -> Iterator[None]:
    """Bind under the source location, name stack and context managers that the equation was traced with."""
    info = eqn.source_info
    names = source_info_util.current_name_stack() + info.name_stack
    with source_info_util.user_context(info.traceback, name_stack=names), eqn.ctx.manager:
        yield


def source_line(eqn: Equation) -> Location | None:
    """Return the line of the user's code that an equation was traced from, if JAX knows it."""
    # The summary reads "file:line:column (function)"; JAX exposes the parts in no other public way.
    match = re.match(r"(.+?):(\d+)(?::\d+)?(?: |$)", source_info_util.summarize(eqn.source_info))
    if match is None:
        return None
    return Location(match.group(1), int(match.group(2)))


def is_literal(atom: Atom) -> TypeGuard[jex.Literal]:
    """Return True if an operand of an equation is a constant written into the jaxpr."""
    return isinstance(atom, jex.Literal)


# ------------------------------------------------------------------------------------------------
# Jaxprs, and the parameters of equations that hold them
# ------------------------------------------------------------------------------------------------


def is_jaxpr(value: object) -> TypeGuard[Jaxpr]:
    """Return True if a value is a jaxpr, open or closed."""
    return isinstance(value, jex.Jaxpr | jex.ClosedJaxpr)


def jaxpr_and_consts(jaxpr: Jaxpr) -> tuple[OpenJaxpr, Sequence[Any]]:
    """Return an open or closed jaxpr as its open jaxpr and the values of its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def inner_jaxprs(eqn: Equation) -> list[Jaxpr]:
    """Return the jaxprs among an equation's parameters, those in tuples and dictionaries included."""
    parameters = list(eqn.params.values())
    return [leaf for leaf in jax.tree_util.tree_leaves(parameters, is_leaf=is_jaxpr) if is_jaxpr(leaf)]


def consts_as_inputs(closed: Jaxpr) -> tuple[OpenJaxpr, list[Any]]:
    """Return an open jaxpr that takes the constants of `closed` as its first inputs, and the constants."""
    jaxpr, consts = jaxpr_and_consts(closed)
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    info = jaxpr.debug_info
    if hasattr(info, "_replace") and info.arg_names is not None:
        # JAX checks that there is a name for every input.
        info = info._replace(arg_names=(*("",) * len(jaxpr.constvars), *info.arg_names))
    return jex.Jaxpr([], inputs, jaxpr.outvars, jaxpr.eqns, jaxpr.effects, info), list(consts)


def called_jaxpr(params: Params) -> Jaxpr:
    """Return the jaxpr of an equation that only calls it."""
    if "call_jaxpr" in params:
        return params["call_jaxpr"]
    return params["jaxpr"]


def scan_counts(params: Params, operands: int) -> tuple[int, int]:
    """Return how many of scan's operands are constants, and how many are carries."""
    if "num_consts" in params:  # up to JAX 0.10
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].update(range(operands)).unpack()
    return len(list(consts)), len(list(carry))


def inlines_while_tracing(params: Params) -> bool:
    """Return True if a jit equation asks to be inlined: with a bool up to JAX 0.10, with an enum since."""
    inline = params.get("inline", False)
    return inline is True or getattr(inline, "name", "") == "JAX_EARLY"


def operand_batching_dims(numbers: Any) -> tuple[int, ...]:
    """Return the operand axes that a gather or scatter batches over."""
    return tuple(getattr(numbers, "operand_batching_dims", ()))


def scatter_indices_batching_dims(numbers: Any) -> tuple[int, ...]:
    """Return the index axes that a scatter batches over, in the order of :func:`operand_batching_dims`."""
    return tuple(getattr(numbers, "scatter_indices_batching_dims", ()))


# ------------------------------------------------------------------------------------------------
# Manual mesh axes (inside shard_map)
# ------------------------------------------------------------------------------------------------


def varying_axes(aval: Aval) -> frozenset[str]:
    """Return the manual mesh axes along which a value inside shard_map differs from device to device."""
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset(getattr(manual, "varying", ()) or ())


def make_varying(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Mark an array as varying along `axes` as well as along those that it varies along already."""
    missing = tuple(sorted(axes - varying_axes(jax.typeof(array))))
    if not missing:  # pcast refuses an axis that the array varies along already
        return array
    return jax.lax.pcast(array, missing, to="varying")


def vary_like(tree: Pytree, operands: Pytree) -> Pytree:
    """Mark arrays as varying along the axes that any operand varies along, as the carries of a loop must."""
    if not hasattr(jax, "typeof"):
        return tree
    axes = _union_of_varying_axes(operands)
    if not axes:
        return tree
    return jax.tree_util.tree_map(lambda array: make_varying(array, axes), tree)


def kernel_output(shape: Sequence[int], dtype: DTypeLike, operands: Pytree) -> jax.ShapeDtypeStruct:
    """Return the type of a kernel's output, varying along the axes that any of its operands varies along."""
    varying = jax.sharding.ManualAxisType(varying=_union_of_varying_axes(operands))
    return jax.ShapeDtypeStruct(tuple(shape), dtype, manual_axis_type=varying)


def _union_of_varying_axes(operands: Pytree) -> frozenset[str]:
    axes: frozenset[str] = frozenset()
    for operand in jax.tree_util.tree_leaves(operands):
        axes |= varying_axes(jax.typeof(operand))
    return axes


def shard_map(body: Callable[..., Any], params: Params, in_specs: Pytree, out_specs: Pytree) -> Any:
    """Return `body` under `jax.shard_map` with the settings of a shard_map equation."""
    return jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )


def spec_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the mesh axes that one entry of a PartitionSpec names."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    if isinstance(entry, tuple):
        return entry
    return (entry,)


# ------------------------------------------------------------------------------------------------
# Auto and Explicit mesh axes
# ------------------------------------------------------------------------------------------------


def has_placement(aval: Aval) -> bool:
    """Return True if an aval has more than shape and dtype: varying axes, or an explicit sharding."""
    if varying_axes(aval):
        return True
    sharding = getattr(aval, "sharding", None)
    return sharding is not None and jax.sharding.AxisType.Explicit in sharding.mesh.axis_types


def explicit_sharding(array: jax.Array | np.ndarray | jax.ShapeDtypeStruct) -> Any:
    """Return the sharding of an array on a mesh with Explicit axes; None on any other mesh or device."""
    if not hasattr(jax, "typeof"):
        return None
    aval = array if isinstance(array, jax.ShapeDtypeStruct) else jax.typeof(array)
    sharding = getattr(aval, "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding) or sharding.mesh.empty:
        return None
    if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return sharding


def with_auto_axes(fun: Callable[..., Any], out_shardings: Pytree) -> Callable[..., Any]:
    """Return `fun` with the mesh's Explicit axes as Auto axes inside, and its outputs sharded as given."""
    mesh = jax.tree_util.tree_leaves(out_shardings)[0].mesh
    explicit = jax.sharding.AxisType.Explicit
    axes = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == explicit]
    return jax.sharding.auto_axes(fun, axes=tuple(axes), out_sharding=out_shardings)


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """Return the mesh that programs are in, by `jax.set_mesh` or within shard_map; None if there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def manual_axes() -> frozenset[str]:
    """Return the mesh axes that a shard_map around this divides already."""
    mesh = current_mesh()
    return frozenset() if mesh is None else frozenset(mesh.manual_axes)


def is_explicit(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> bool:
    """Return True if any axis of a mesh is Explicit."""
    return jax.sharding.AxisType.Explicit in mesh.axis_types


def auto_mesh(sizes: dict[str, int]) -> Mesh:
    """Return a mesh of Auto axes over the first devices, of all processes."""
    if not has_explicit_meshes():
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes))
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


@contextmanager
def outside_of_meshes() -> Iterator[None]:
    """Compute constants as if no mesh were there: within shard_map they would be of its kind."""
    with jax.ensure_compile_time_eval():
        if has_explicit_meshes():
            with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
                yield
        else:
            yield


@contextmanager
def without_mesh() -> Iterator[None]:
    """Leave the mesh of `jax.set_mesh`, in which programs take no arrays of a single device."""
    if not has_explicit_meshes() or current_mesh() is None:
        yield
        return
    with jax.set_mesh(Mesh(np.empty((), object), ())):
        yield


def reshard_primitives() -> list[Primitive]:
    """Return the primitive of `jax.sharding.reshard`, which JAX exports nowhere; none where it has none."""
    if not has_explicit_meshes() or not hasattr(jax.sharding, "reshard"):
        return []
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (jax.sharding.AxisType.Explicit,))
    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.make_jaxpr(lambda array: jax.sharding.reshard(array, PartitionSpec("x")))
        equations = program(jax.ShapeDtypeStruct((1,), "float32")).eqns
    return [equation.primitive for equation in equations if equation.primitive.name == "reshard"]


def compiler_partitions_mesh() -> bool:
    """Return True if the current mesh has an Auto axis of several devices, for the compiler to partition."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes_and_types = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return any(size > 1 and kind == jax.sharding.AxisType.Auto for size, kind in sizes_and_types)


def compiler_partitions_module(ctx: mlir.LoweringRuleContext) -> bool:
    """Return True if the compiler will partition what is being lowered over several devices."""
    axis_context = ctx.module_context.axis_context
    if isinstance(axis_context, mlir.SPMDAxisContext):
        # Inside shard_map: the compiler partitions along the axes that are not manual.
        manual_axes = axis_context.manual_axes | set(axis_context.mesh.manual_axes)
        return manual_axes != set(axis_context.mesh.axis_names)
    return getattr(axis_context, "num_devices", 1) != 1


# ------------------------------------------------------------------------------------------------
# Pallas, which is imported only where a kernel runs
# ------------------------------------------------------------------------------------------------


def mosaic_gpu_load(ref: Any, layout: Any) -> jax.Array:
    """Load a whole reference in shared memory, in a given layout."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu.load(ref, layout=layout, optimized=False)  # type: ignore[call-arg]  # 0.10 has an index


def mosaic_gpu_store(ref: Any, value: jax.Array) -> None:
    """Store into a whole reference in shared memory, whatever its width."""
    from jax.experimental.pallas import mosaic_gpu

    if hasattr(mosaic_gpu, "store"):  # since JAX 0.12, whose assignment takes only whole lines of 128 bytes
        mosaic_gpu.store(ref, value, optimized=False)
    else:
        ref[...] = value
