"""The measurement of a model whose cache is quantized, against its own float cache."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adopted._case import PADDING, Case
from qpaged import QuantizedArray, adopt

BATCH, PROMPT, STEPS = 2, 64, 64
SHORT = 20  # tokens of the second prompt, where the model masks padding
LONG = 2048  # length of the cache where times and array sizes are measured
ROUNDS = 15


@dataclass
class Result:
    """One model in one format, against its own float cache.

    Attributes:
        model: the name of the case.
        format: the spelling of the format.
        same_tokens: the fraction of greedy tokens that are the float cache's.
        first_other: the first step at which a sequence chooses another token; None if none does.
        kl_mean: mean KL of the next token's distribution to the float cache's in nats, over its tokens.
        kl_max: the largest of these KLs.
        kl_padded: their mean over a row whose prompt begins with padding; None if nothing is masked.
        bytes_float: bytes of the float cache's arrays in the model's own dtype, at batch 2 and length 128.
        bytes_quantized: bytes of the same arrays, quantized.
        ratio: bytes_quantized over bytes_float.
        ratio_bfloat16: bytes_quantized over the bytes of the same arrays in bfloat16.
        full_size_floats: float arrays of a cache array's size in the jaxpr of a step, at length 2048.
        materialized: how many places decode a whole array.
        compilations: programs that all single-token steps compile.
        same_type: True if the cache came back with the structure that it had.
        buffers_reused: True if a donated step returned the buffers it was given.
        ms_float: median milliseconds of a donated single-token step at length 2048, with the float cache.
        ms_quantized: the same with the quantized cache.
        ms_materialized: the same with a quantized cache that each step decodes and quantizes as a whole.
    """

    model: str
    format: str
    same_tokens: float
    first_other: int | None
    kl_mean: float
    kl_max: float
    kl_padded: float | None
    bytes_float: int
    bytes_quantized: int
    ratio: float
    ratio_bfloat16: float
    full_size_floats: int
    materialized: int
    compilations: int
    same_type: bool
    buffers_reused: bool
    ms_float: float
    ms_quantized: float
    ms_materialized: float

    def row(self) -> dict[str, Any]:
        """Return the result as a row of the results file."""
        return asdict(self)


@dataclass
class Run:
    """The outputs of the steps after a prompt."""

    tokens: np.ndarray  # [batch, steps]
    logits: np.ndarray  # [batch, steps, vocabulary]
    cache: Any
    compilations: int


def measure(case: Case, formats: list[str], rounds: int = ROUNDS) -> Iterator[Result]:
    """Yield the results of a model for each format; with no rounds, nothing is timed."""
    with _mesh_of(case):
        prompt = _prompt(case)
        plain = _run(case.step, case, prompt, case.cache(BATCH, PROMPT + STEPS))
        long = case.cache(BATCH, LONG)
        example = (case.params, prompt[:, :1], jnp.int32(0), long)
        steps = {spelling: adopt.quantize_cache(case.step, spelling, example=example) for spelling in formats}
    for spelling, step in steps.items():
        with _mesh_of(case):  # not around the yield: what the caller does meanwhile is not on the mesh
            result = _result(case, spelling, step, prompt, plain, long, rounds)
        yield result


def _mesh_of(case: Case) -> AbstractContextManager[object]:
    """Return the context in which the case's mesh is set."""
    return nullcontext() if case.mesh is None else jax.set_mesh(case.mesh)


def _result(
    case: Case,
    spelling: str,
    step: adopt.QuantizedStep,
    prompt: jax.Array,
    plain: Run,
    long: Any,
    rounds: int,
) -> Result:
    """Measure a model in one format against its run with the float cache."""
    empty = step.init(case.cache(BATCH, PROMPT + STEPS))
    free = _run(step, case, prompt, empty)
    forced = _run(step, case, prompt, step.init(case.cache(BATCH, PROMPT + STEPS)), plain.tokens)
    kl = _kl(plain.logits, forced.logits)
    other = (free.tokens != plain.tokens).any(axis=0)
    floats, quantized = _bytes(step, case)
    times = [math.nan] * 3
    if rounds:
        times = _times(case, step, long, rounds)
    return Result(
        model=case.name,
        format=spelling,
        same_tokens=float((free.tokens == plain.tokens).mean()),
        first_other=int(other.argmax()) if other.any() else None,
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        kl_padded=float(kl[1].mean()) if case.pads else None,
        bytes_float=floats,
        bytes_quantized=quantized,
        ratio=quantized / floats,
        ratio_bfloat16=quantized / (floats * 2 // _itemsize(step)),
        full_size_floats=_full_size_floats(case, step, long),
        materialized=len(step.report()),
        compilations=free.compilations,
        same_type=jax.tree_util.tree_structure(empty) == jax.tree_util.tree_structure(free.cache),
        buffers_reused=_reuses(case, step, long),
        ms_float=times[0],
        ms_quantized=times[1],
        ms_materialized=times[2],
    )


def _prompt(case: Case) -> jax.Array:
    """Return prompts [batch, PROMPT]; the second begins with padding if the model masks it."""
    rng = np.random.default_rng(0)
    if case.prompt is None:
        tokens = rng.integers(1, case.vocabulary, (BATCH, PROMPT))
    else:
        starts = rng.integers(0, len(case.prompt) - PROMPT, BATCH)
        tokens = np.stack([case.prompt[start : start + PROMPT] for start in starts])
    if case.pads:
        tokens[1, : PROMPT - SHORT] = PADDING
    return jnp.asarray(tokens, jnp.int32)


def _run(step: Any, case: Case, prompt: jax.Array, cache: Any, forced: np.ndarray | None = None) -> Run:
    """Run greedy steps after the prompt, or steps over forced tokens."""
    jitted = jax.jit(step, donate_argnums=3)  # single tokens alone, so that its programs can be counted
    logits, cache = jax.jit(step)(case.params, prompt, jnp.int32(0), cache)
    tokens = []
    last_logits = [logits[:, -1]]
    for index in range(STEPS):
        token = jnp.argmax(last_logits[-1], axis=-1).astype(jnp.int32)
        if forced is not None:
            token = forced[:, index]
        tokens.append(token)
        logits, cache = jitted(case.params, jnp.asarray(token)[:, None], jnp.int32(PROMPT + index), cache)
        last_logits.append(logits[:, -1])
    return Run(
        tokens=np.stack(tokens, axis=1),
        logits=np.stack(last_logits[:-1], axis=1),
        cache=cache,
        compilations=jitted._cache_size(),
    )


def _kl(logits: np.ndarray, other_logits: np.ndarray) -> np.ndarray:
    """Return KL(p || q) in nats over the last axis."""
    log_p = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32), axis=-1)
    log_q = jax.nn.log_softmax(jnp.asarray(other_logits, jnp.float32), axis=-1)
    return np.asarray(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def _leaves(step: adopt.QuantizedStep, cache: Any) -> list[Any]:
    """Return the arrays of a cache that the step quantizes."""
    (name,) = step.found.arguments
    keyed = jax.tree_util.tree_leaves_with_path(cache, is_leaf=lambda x: isinstance(x, QuantizedArray))
    wanted = {leaf.path.removeprefix(name).lstrip("/") for leaf in step.found.leaves}
    return [leaf for path, leaf in keyed if jax.tree_util.keystr(path, simple=True, separator="/") in wanted]


def _bytes(step: adopt.QuantizedStep, case: Case) -> tuple[int, int]:
    """Return the bytes of the float cache's arrays, and of the same arrays quantized."""
    cache = case.cache(BATCH, PROMPT + STEPS)
    float_bytes = sum(leaf.nbytes for leaf in _leaves(step, cache))
    quantized_bytes = sum(leaf.nbytes for leaf in _leaves(step, step.init(cache)))
    return float_bytes, quantized_bytes


def _itemsize(step: adopt.QuantizedStep) -> int:
    return jnp.dtype(step.found.leaves[0].dtype).itemsize


def _full_size_floats(case: Case, step: adopt.QuantizedStep, cache: Any) -> int:
    """Count the float arrays in the step's jaxpr that are as large as an array of the cache."""
    full = min(leaf.size for leaf in _leaves(step, cache))
    token = jnp.zeros((BATCH, 1), jnp.int32)
    jaxpr = jax.make_jaxpr(step)(case.params, token, jnp.int32(LONG // 2), step.init(cache))
    return sum(
        jnp.issubdtype(var.aval.dtype, jnp.floating) and var.aval.size >= full
        for equation in _equations(jaxpr.jaxpr)
        for var in equation.outvars
        if hasattr(var.aval, "dtype")
    )


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Yield the equations of a jaxpr and of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree_util.tree_leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def _pointers(leaves: list[Any]) -> set[int]:
    """Return the addresses of the buffers."""
    return {part.unsafe_buffer_pointer() for part in jax.tree_util.tree_leaves(leaves)}


def _reuses(case: Case, step: adopt.QuantizedStep, cache: Any) -> bool:
    """Return True if a donated step returns the buffers that it was given."""
    jitted = jax.jit(step, donate_argnums=3)
    token = jnp.zeros((BATCH, 1), jnp.int32)
    quantized = _copied(step.init(cache))
    given = _pointers(_leaves(step, quantized))
    _, out = jitted(case.params, token, jnp.int32(0), quantized)
    return _pointers(_leaves(step, out)) <= given


def _times(case: Case, step: adopt.QuantizedStep, cache: Any, rounds: int) -> list[float]:
    """Time a step with the float cache, the quantized one, and one that is decoded whole; milliseconds."""

    def materializing(params: Any, token: jax.Array, position: jax.Array, cache: Any) -> Any:
        decoded = jax.tree_util.tree_map(_dense, cache, is_leaf=lambda x: isinstance(x, QuantizedArray))
        logits, decoded = case.step(params, token, position, decoded)
        return logits, step.init(decoded)

    functions = [
        jax.jit(case.step, donate_argnums=3),
        jax.jit(step, donate_argnums=3),
        jax.jit(materializing, donate_argnums=3),
    ]
    caches = [_copied(cache), _copied(step.init(cache)), _copied(step.init(cache))]
    times: list[list[float]] = [[], [], []]
    token = jnp.ones((BATCH, 1), jnp.int32)
    for turn in range(rounds + 2):  # the first two compile and warm up
        for index, function in enumerate(functions):
            start = time.perf_counter()
            out = jax.block_until_ready(function(case.params, token, jnp.int32(turn), caches[index]))
            times[index].append(time.perf_counter() - start)
            caches[index] = out[1]
    return [1e3 * statistics.median(seconds[2:]) for seconds in times]


def _copied(cache: Any) -> Any:
    """Copy every buffer, so that a donated step cannot delete those of others."""
    return jax.tree_util.tree_map(lambda x: x + 0, cache)


def _dense(leaf: Any) -> Any:
    return leaf.materialize() if isinstance(leaf, QuantizedArray) else leaf
