"""paged_attention: one function for decode and prefill, on whichever backend."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from qpaged import pools
from qpaged._arguments import as_array
from qpaged._compat import with_auto_axes
from qpaged._eager import compiled_if_eager
from qpaged.arrays import invert_output, transform_query, untransformed
from qpaged.attention import _backends, _exact_pages
from qpaged.attention._backends import BACKENDS, AttentionBackend, AttentionCall
from qpaged.attention._checks import (
    check_dimensions,
    checked_options,
    checked_sinks,
    scaled_query,
)
from qpaged.attention._merge import Partial, merge, merge_over, with_sinks
from qpaged.attention._new_tokens import attend_new, before_new
from qpaged.attention._options import Options, QueryTokens
from qpaged.attention._over_devices import divided_calls, over_devices
from qpaged.attention._own_pages import active_position, of_own_pages
from qpaged.attention._token_groups import (
    DividedGroup,
    StepCall,
    TokenGroup,
    checked_mask,
    step_calls,
    token_group,
)
from qpaged.cache import PagedAttentionCacheView, PagedAttentionMetadata
from qpaged.cache._view import here
from qpaged.implicit import use_implicit_args
from qpaged.pools import Pages, ValuesInKeys


def attention_backends(
    query: ArrayLike | jax.ShapeDtypeStruct | None = None,
    view: PagedAttentionCacheView | None = None,
    metadata: PagedAttentionMetadata | None = None,
    *,
    sliding_window: ArrayLike | None = None,
    visible_until: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
) -> tuple[AttentionBackend, ...]:
    """Return all backends, in the order in which :func:`paged_attention` prefers them.

    Args:
        query: with ``view`` and ``metadata``, as :func:`paged_attention` takes them: the backends that do not
            take this call say why. Shapes are enough (``jax.eval_shape``'s).
        view: likewise.
        metadata: likewise.
        sliding_window: as :func:`paged_attention` takes it; of the options, backends decline masks alone.
        visible_until: likewise.
        alibi_slopes: likewise.

    Raises:
        TypeError, ValueError: arguments that :func:`paged_attention` does not take, or not all three.
    """
    arguments = (query, view, metadata)
    if all(argument is None for argument in arguments):
        return _backends.list_backends([])
    if any(argument is None for argument in arguments):
        raise TypeError("attention_backends takes query, view and metadata together, or none of them.")
    found: list[tuple[AttentionBackend, ...]] = []  # of each step

    def list_traced(
        query: jax.Array, view: PagedAttentionCacheView, metadata: PagedAttentionMetadata
    ) -> None:
        query = as_array("query", query)
        check_dimensions(query)
        window, mask = checked_mask(query, sliding_window, visible_until, alibi_slopes)
        for call in divided_calls(step_calls(query, view, metadata, mask), view, window):
            over_devices(view, call, list_of_device)

    def list_of_device(local: PagedAttentionCacheView, call: StepCall, index: jax.Array | None) -> None:
        if index is not None:
            call = of_own_pages(call, local, index)
        keys, values = map(pools.packed, _pools_read(local))
        group = token_group(local, call)
        parts = () if group.is_empty else group.divided(local.metadata.page_size).parts
        calls = [AttentionCall(part, untransformed(keys), untransformed(values)) for part in parts]
        found.append(_backends.list_backends(calls))

    # Traced, since shapes are enough; what it finds are no arrays, and go out by the list.
    jax.eval_shape(list_traced, query, view, metadata)
    if not found:
        return _backends.list_backends([])
    first_reasons = [
        next((one for one in of_steps if one.reason), of_steps[0]) for of_steps in zip(*found, strict=True)
    ]
    return tuple(first_reasons)


@overload
def paged_attention(
    query: ArrayLike,
    view: PagedAttentionCacheView,
    metadata: PagedAttentionMetadata,
    *,
    softmax_scale: ArrayLike | None = None,
    sliding_window: ArrayLike | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    visible_until: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    backend: str | None = None,
    new: tuple[ArrayLike, ArrayLike | None] | None = None,
    return_lse: Literal[False] = False,
) -> jax.Array: ...


@overload
def paged_attention(
    query: ArrayLike,
    view: PagedAttentionCacheView,
    metadata: PagedAttentionMetadata,
    *,
    softmax_scale: ArrayLike | None = None,
    sliding_window: ArrayLike | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    visible_until: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    backend: str | None = None,
    new: tuple[ArrayLike, ArrayLike | None] | None = None,
    return_lse: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...


def paged_attention(
    query: ArrayLike,  # [tokens, q_heads, head_dim]
    view: PagedAttentionCacheView,
    metadata: PagedAttentionMetadata,
    *,
    softmax_scale: ArrayLike | None = None,
    sliding_window: ArrayLike | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,  # [q_heads]
    visible_until: ArrayLike | None = None,  # [tokens]
    alibi_slopes: ArrayLike | None = None,  # [q_heads]
    backend: str | None = None,
    new: tuple[ArrayLike, ArrayLike | None] | None = None,  # [tokens, kv_heads, head_dim] each
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Return the attention of queries over the pages of their sequences, causal, with grouped-query heads.

    A query at position p attends to the slots 0 to p of its sequence, p included, in float32
    accumulation: softmax(softmax_scale · q·k) · v. Write its keys and values first, or give them as ``new``.
    ``visible_until`` lets it see further.

    Args:
        query: (batch, q_heads, head_dim) in a decode, (padded_len, q_heads, head_dim) in a prefill, (tokens,
            q_heads, head_dim) in a ragged batch, and the prefill's tokens followed by the decode's rows where
            ``metadata`` carries both.
        view: the layer's pages.
        metadata: positions and page tables.
        softmax_scale: factor of the dot products, at most 65,536 in magnitude; 1 / sqrt(head_dim) if None. A
            traced one multiplies the query, in the query's dtype.
        sliding_window: attend to the last so many positions, the query's own included; to all if None. It may
            be traced, as in a scan over layers with windows and without, where one that is longer than every
            sequence is none, and one below 1 is 1; kernels take those alone that are known.
        logits_soft_cap: scores become cap · tanh(score / cap) (Gemma 2), cap being from 1.2e-38 to 1e30;
            untouched if None.
        sinks: (q_heads,) logits that join each head's softmax and carry no value (gpt-oss); none if None, and
            where -inf. Where they are traced, and cannot be refused, +inf takes all of the weight, which
            leaves zeros, and NaN makes the head's active rows NaN.
        visible_until: (tokens,) integers; the last position that each query sees, where it is beyond its own:
            the end of a prefix or of an image whose tokens see each other (PaliGemma, Gemma 3), or of the
            whole text that is attended across (encoder and decoder). -1 where queries see up to their own
            position; it is not beyond the page table. Every slot up to there must have been written; with
            ``new`` it ends with the last new token of the sequence. A sliding window goes back from the
            query's own position.
        alibi_slopes: (q_heads,) finite floats: each position between a slot and the query takes so much from
            the score, after the soft cap (Press et al., 2022); none if None.
        backend: the name of one of :func:`attention_backends`, which never falls back. None for the first of
            them that takes the call and is for the platform that the program is lowered for, be it there or
            not. Only ``reference`` can be differentiated in reverse.
        new: (key, value) of the call's own tokens, floats (tokens, kv_heads, head_dim): attend to these as
            they are given, and to older ones as ``view`` has them, and write them afterwards. The format then
            rounds nothing between a query and the tokens of its own call. The positions of a sequence must
            follow one another, padding last; where they are traced, and cannot be refused, others make its
            rows NaN. A decode row sees of the new tokens its own alone: give each sequence one row. The value
            is None where values lie in the keys. None if ``view`` holds the tokens already.
        return_lse: return the log-sum-exp of the scores too, for :func:`merge_attention`.

    Returns:
        (tokens, q_heads, head_dim of the values) in the query's dtype; zeros for padding and for inactive
        rows. With ``return_lse`` the same in float32, and (tokens, q_heads) float32: the natural logarithm of
        the sum of exp(score) over the slots that the query sees and the sink, after scale and soft cap; -inf
        where there are neither.

    Raises:
        TypeError, ValueError: a shape, dtype, option or position other than these, or a backend that declines
            the call.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, or None, but came as {backend!r}.")
    query = as_array("query", query)
    check_dimensions(query)
    if isinstance(softmax_scale, jax.core.Tracer):
        query, softmax_scale = scaled_query(query, softmax_scale), 1.0
    window, mask = checked_mask(query, sliding_window, visible_until, alibi_slopes)
    if sinks is not None:
        sinks = checked_sinks(sinks, query.shape[1])
    calls = step_calls(query, view, metadata, mask, sinks, new)
    calls = divided_calls(calls, view, window)
    if view.placement is not None and view.placement.open_context:
        window = None  # which the calls have
    options = checked_options(view.metadata, softmax_scale, window, logits_soft_cap)
    method = Method(backend, options, jnp.dtype(jnp.float32) if return_lse else query.dtype)
    channels = view.metadata.value_dim
    if not calls:
        out = jnp.zeros_like(query, method.dtype, shape=(*query.shape[:2], channels))
        return (out, jnp.full_like(query[..., 0], -jnp.inf, jnp.float32)) if return_lse else out
    try:
        if view.placement is not None and view.placement.is_open:
            partials = [_attend_divided(method, view, call) for call in calls]
            if len(partials) > 1:  # which lie otherwise: those of a prefill are everywhere
                partials = [Partial(*map(view.placement.whole_tokens, partial)) for partial in partials]
            out, lse = (jnp.concatenate(of_each) for of_each in zip(*partials, strict=True))
        else:
            out, lse = attend_here(method, here(view), calls)
    except ValueError as error:
        if "Only interpret mode is supported" not in str(error):  # JAX's words for a kernel on CPU
            raise
        raise ValueError(
            f"backend {backend!r} runs on no CPU; leave it None for the first backend that takes the call."
        ) from error
    out = out[..., :channels]  # of values that lie in the keys, which have others behind them
    return (out, lse) if return_lse else out


def _pools_read(view: PagedAttentionCacheView) -> tuple[Pages, Pages]:
    """Return the pools that attention reads as keys and as values: those of all layers, where they are one.

    Page tables name pages of the latter then; see :func:`token_group`.
    """
    values = view.value_pages
    if isinstance(values, ValuesInKeys):
        values = pools.values_within(view.key_pages)
    if pools.as_flat(view.key_pages) is None:
        return view.key_pages, values
    return view.key_pages.pages, values.pages


class Method(NamedTuple):
    """How attention is computed, apart from arrays.

    Attributes:
        backend: the backend asked for; None for the first that takes the call.
        options: checked.
        dtype: of the output.
    """

    backend: str | None
    options: Options
    dtype: np.dtype


def attend_here(
    method: Method, view: PagedAttentionCacheView, calls: list[StepCall], index: jax.Array | None = None
) -> Partial:
    """Return the attention of the calls, one after the other, by the device that this is.

    Args:
        index: which one it is of those that share the pages of a sequence; None if there are no others.
    """
    keys, values = _pools_read(view)
    method = method._replace(options=dataclasses.replace(method.options, num_pages=keys.shape[1]))
    if index is not None:
        calls = [of_own_pages(call, view, index) for call in calls]
    groups = [token_group(view, call) for call in calls]
    return _attend_pools(method, keys, values, groups, calls[0].sinks)


def _attend_divided(method: Method, view: PagedAttentionCacheView, call: StepCall) -> Partial:
    """Return :func:`attend_over_devices`, or what it gives where there is nothing to attend with, or to."""
    if call.query.size and call.step.table.size:
        return attend_over_devices(method, view, call)
    shape = call.query.shape[:2]
    out = jnp.zeros((*shape, _pools_read(view)[1].shape[3]), method.dtype)
    return Partial(out, jnp.full(shape, -jnp.inf, jnp.float32))


@compiled_if_eager(static_argnums=(0,))
def attend_over_devices(method: Method, view: PagedAttentionCacheView, call: StepCall) -> Partial:
    """Return the attention of a call, each device attending with its own heads to its own sequences."""
    placement = view.placement
    assert placement is not None  # or it would not be called
    groups, context, num_groups = placement.open_groups, placement.open_context, placement.num_groups

    def attend(local: PagedAttentionCacheView, own: StepCall, index: jax.Array | None) -> Partial:
        if context is None:
            partial = attend_here(method, local, [own])
        else:
            in_float32 = method._replace(dtype=np.dtype(np.float32))
            partial = merge_over(attend_here(in_float32, local, [own._replace(sinks=None)], index), context)
            if own.sinks is not None:
                partial = _with_sinks_of_active(partial, active_position(own.step, local), own.sinks)
            partial = Partial(partial.out.astype(method.dtype), partial.lse)
        if own.step.group is None or groups is None:
            return partial
        group = jax.lax.axis_index(groups)  # all others than that of the prefill have zeros
        out, lse = (jax.lax.psum(jnp.where(own.step.group == group, part, 0), groups) for part in partial)
        is_group = (own.step.group >= 0) & (own.step.group < num_groups)
        return Partial(out, jnp.where(is_group, lse, -jnp.inf))

    rows = placement.row_specs(call.step)
    return over_devices(view, call, attend, Partial(rows, rows))  # type: ignore[arg-type]


@compiled_if_eager(static_argnums=(0,))
def _attend_pools(
    method: Method,
    keys: Pages,  # [kv_heads, pages, page_size, head_dim]
    values: Pages,  # [kv_heads, pages, page_size, head_dim]
    groups: list[TokenGroup],
    sinks: jax.Array | None,  # [q_heads]
) -> Partial:
    """Return the attention over pools of any kind, wherever they lie."""
    attend: Callable[..., Partial] = functools.partial(_attend_all, method)
    sharding = pools.explicit_sharding_of(keys, values)
    if pools.needs_implicit_args(keys, values):
        attend = use_implicit_args(attend)
    elif sharding is not None:
        over_heads = sharding.update(spec=PartitionSpec(None, sharding.spec[0]))  # as the pools' heads are
        attend = with_auto_axes(attend, over_heads)
    return attend(keys, values, groups, sinks)


def _attend_all(
    method: Method, keys: Pages, values: Pages, groups: list[TokenGroup], sinks: jax.Array | None
) -> Partial:
    """Return the attention of all groups of tokens, one after the other."""
    partials = [_attend_group(method, keys, values, group, sinks) for group in groups]
    out, lse = (jnp.concatenate(of_each) for of_each in zip(*partials, strict=True))
    return Partial(out.astype(method.dtype), lse)


def _attend_group(
    method: Method, keys: Pages, values: Pages, group: TokenGroup, sinks: jax.Array | None
) -> Partial:
    """Return the attention of a group of queries to pages, to new tokens, and to the sinks."""
    if group.is_empty:
        shape = group.tokens.query.shape[:2]
        out = jnp.zeros((*shape, values.shape[3]), jnp.float32)
        return Partial(out, jnp.full(shape, -jnp.inf, jnp.float32))
    divided = group.divided(keys.shape[2])
    partials = _attend_pages(method, keys, values, group.tokens.query, divided)
    of_new = [
        attend_new(method.backend, part, new, method.options)
        for part, new in zip(divided.parts, divided.new, strict=True)
        if new is not None
    ]
    if of_new:
        partials.append(divided.join(of_new))
    partial = partials[0] if len(partials) == 1 else merge(partials)
    if sinks is None:
        return partial
    return _with_sinks_of_active(partial, divided.active_position(group.tokens.position), sinks)


def _attend_pages(
    method: Method,
    keys: Pages,
    values: Pages,
    query: jax.Array,  # [tokens, q_heads, head_dim]
    divided: DividedGroup,
) -> list[Partial]:
    """Return the attention to pages that are packed, and then to those that are exact, if any can be.

    Transforms are moved from the keys to the query, before it is divided, and from the values to the output,
    after it is joined: the parts of a ragged batch have more rows than it has tokens.
    """
    packed_keys, packed_values = pools.packed(keys), pools.packed(values)
    of_packed, of_exact = [], []
    transformed = divided.take(transform_query(query, packed_keys))
    for part, new, part_query in zip(divided.parts, divided.new, transformed, strict=True):
        tokens = part if new is None else before_new(part, new)
        exact = _exact_pages.is_exact(tokens.table, keys, values)
        table = tokens.table
        if exact is not None:
            of_exact.append(_exact_pages.attend(tokens, exact, keys, values, method.options))
            table = jnp.where(exact, method.options.num_pages, table)
        tokens = dataclasses.replace(tokens, query=part_query, table=table)
        of_packed.append(_attend_packed(method, packed_keys, packed_values, tokens))
    out, lse = divided.join(of_packed)
    partials = [Partial(invert_output(out, packed_values), lse)]
    if of_exact:
        partials.append(divided.join(of_exact))
    return partials


def _attend_packed(method: Method, keys: Pages, values: Pages, tokens: QueryTokens) -> Partial:
    """Return the attention of transformed queries to codes, on the backend asked for."""
    call = AttentionCall(tokens, untransformed(keys), untransformed(values))
    if method.backend is None:
        return _backends.attend(call, method.options)
    return _backends.attend_by_name(method.backend, call, method.options)


def _with_sinks_of_active(partial: Partial, position: jax.Array, sinks: jax.Array) -> Partial:
    """Return a partial with the sinks, which may be NaN, in the rows that are active alone."""
    out, lse = with_sinks(partial, sinks)
    is_active = (position >= 0)[:, None]
    return Partial(jnp.where(is_active[..., None], out, 0), jnp.where(is_active, lse, -jnp.inf))
