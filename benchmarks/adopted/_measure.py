"""What is measured on an adopted model."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adopted._case import PADDING, Case
from qpaged import QuantizedArray, adopt

BATCH, PROMPT, STEPS = 2, 64, 64
SHORT = 20  # tokens of the second prompt, where the model masks padding
LONG = 2048  # length of the cache for what grows with it
ROUNDS = 15


@dataclass
class Result:
    """One model in one format, against its own float cache. ``asdict`` is the row of the results file.

    Attributes:
        same_tokens: the fraction of greedy tokens that are the float cache's, and
        first_other: the first step at which a sequence parts, None where none does.
        kl_mean: of the next token's distribution to the float cache's, nats, over the float cache's tokens,
        kl_max: and its largest.
        kl_padded: its mean over a row whose prompt begins with padding; None where nothing is masked.
        bytes_float: of the cache's arrays, batch 2 and length 128, in the model's own dtype, and
        bytes_quantized: quantized.
        ratio: of the two; and
        ratio_bfloat16: to what the same arrays take in bfloat16.
        full_size_floats: floats of an array's full size in the jaxpr of a step, length 2048.
        materialized: places that decode an array whole.
        compilations: of the single-token step, over all steps.
        same_type: whether the cache came back as the type that it went in.
        buffers_reused: whether a donated step returned the buffers it was given.
        ms_float: median milliseconds of a donated single-token step at length 2048, with the float cache,
        ms_quantized: with the quantized cache,
        ms_materialized: and with a quantized cache that each step decodes whole and quantizes anew.
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

    row = asdict


@dataclass
class Run:
    """Steps over a prompt and after it."""

    tokens: np.ndarray  # (batch, steps)
    logits: np.ndarray  # (batch, steps, vocabulary)
    cache: Any
    compilations: int


def measure(case: Case, formats: list[str], rounds: int = ROUNDS) -> Iterator[Result]:
    """The results of a model, format by format; with no rounds, nothing is timed."""
    prompt = _prompt(case)
    plain = _run(case.step, case, prompt, case.cache(BATCH, PROMPT + STEPS))
    long = case.cache(BATCH, LONG)
    example = (case.params, prompt[:, :1], jnp.int32(0), long)
    steps = {format: adopt.quantize_cache(case.step, format, example=example) for format in formats}
    for format, step in steps.items():
        empty = step.init(case.cache(BATCH, PROMPT + STEPS))
        free = _run(step, case, prompt, empty)
        forced = _run(step, case, prompt, step.init(case.cache(BATCH, PROMPT + STEPS)), plain.tokens)
        kl = _kl(plain.logits, forced.logits)
        other = (free.tokens != plain.tokens).any(axis=0)
        floats, quantized = _bytes(step, case)
        times = _times(case, step, long, rounds) if rounds else [math.nan] * 3
        yield Result(
            model=case.name,
            format=format,
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
    """Greedy steps after the prompt, or steps over forced tokens."""
    jitted, first = jax.jit(step, donate_argnums=3), jax.jit(step)
    logits, cache = first(case.params, prompt, jnp.int32(0), cache)
    tokens, seen = [], [logits[:, -1]]
    for index in range(STEPS):
        token = jnp.argmax(seen[-1], axis=-1).astype(jnp.int32) if forced is None else forced[:, index]
        tokens.append(token)
        logits, cache = jitted(case.params, jnp.asarray(token)[:, None], jnp.int32(PROMPT + index), cache)
        seen.append(logits[:, -1])
    stacked = np.stack(seen[:-1], axis=1)
    return Run(np.stack(tokens, axis=1), stacked, cache, jitted._cache_size())


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    p, q = (jax.nn.log_softmax(jnp.asarray(x, jnp.float32), axis=-1) for x in (p, q))
    return np.asarray(jnp.sum(jnp.exp(p) * (p - q), axis=-1))


def _leaves(step: adopt.QuantizedStep, cache: Any) -> list[Any]:
    """The arrays of a cache that the step quantizes."""
    (name,) = step.found.arguments
    keyed = jax.tree_util.tree_leaves_with_path(cache, is_leaf=lambda x: isinstance(x, QuantizedArray))
    wanted = {leaf.path.removeprefix(name).lstrip("/") for leaf in step.found.leaves}
    return [leaf for path, leaf in keyed if jax.tree_util.keystr(path, simple=True, separator="/") in wanted]


def _bytes(step: adopt.QuantizedStep, case: Case) -> tuple[int, int]:
    cache = case.cache(BATCH, PROMPT + STEPS)
    return tuple(sum(leaf.nbytes for leaf in _leaves(step, tree)) for tree in (cache, step.init(cache)))


def _itemsize(step: adopt.QuantizedStep) -> int:
    return jnp.dtype(step.found.leaves[0].dtype).itemsize


def _full_size_floats(case: Case, step: adopt.QuantizedStep, cache: Any) -> int:
    """Floats as large as an array of the cache, among all that the step's equations make."""
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
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree_util.tree_leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def _pointers(leaves: list[Any]) -> set[int]:
    return {part.unsafe_buffer_pointer() for part in jax.tree_util.tree_leaves(leaves)}


def _reuses(case: Case, step: adopt.QuantizedStep, cache: Any) -> bool:
    jitted = jax.jit(step, donate_argnums=3)
    token = jnp.zeros((BATCH, 1), jnp.int32)
    quantized = jax.tree_util.tree_map(lambda x: x + 0, step.init(cache))  # buffers of their own
    given = _pointers(_leaves(step, quantized))
    _, out = jitted(case.params, token, jnp.int32(0), quantized)
    return _pointers(_leaves(step, out)) <= given


def _times(case: Case, step: adopt.QuantizedStep, cache: Any, rounds: int) -> list[float]:
    """Milliseconds of a step: the float cache, the quantized one, and one decoded and quantized each time."""

    def materializing(params: Any, token: jax.Array, position: jax.Array, cache: Any) -> Any:
        decoded = jax.tree_util.tree_map(_dense, cache, is_leaf=lambda x: isinstance(x, QuantizedArray))
        logits, decoded = case.step(params, token, position, decoded)
        return logits, step.init(decoded)

    fresh: Callable[[Any], Any] = lambda tree: jax.tree_util.tree_map(lambda x: x + 0, tree)  # noqa: E731
    subjects = [(case.step, fresh(cache))] + [(f, fresh(step.init(cache))) for f in (step, materializing)]
    jitted = [[jax.jit(f, donate_argnums=3), state, []] for f, state in subjects]
    token = jnp.ones((BATCH, 1), jnp.int32)
    for turn in range(rounds + 2):
        for subject in jitted:
            function, state, times = subject
            start = time.perf_counter()
            _, subject[1] = jax.block_until_ready(function(case.params, token, jnp.int32(turn), state))
            times.append(time.perf_counter() - start)
    return [1e3 * statistics.median(times[2:]) for _, _, times in jitted]


def _dense(leaf: Any) -> Any:
    return leaf.materialize() if isinstance(leaf, QuantizedArray) else leaf
