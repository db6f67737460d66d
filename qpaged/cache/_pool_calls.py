"""What a view does to its two pools: at once, or each device to what it holds of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qpaged import pools
from qpaged._eager import compiled_if_eager
from qpaged.cache._placement import (
    Placement,
    axis_index,
    change_over_devices,
    num_groups,
    own_pages,
    take_over_devices,
)
from qpaged.cache._slot_mapping import slot_mapping
from qpaged.cache._step_tokens import StepTokens
from qpaged.pools import Pages, ValuesInKeys


class PoolPair(NamedTuple):
    """The pools of a layer."""

    keys: Pages
    values: Pages


class Rows(NamedTuple):
    """Keys and values of tokens, [tokens, kv_heads, head_dim]; no values where they lie in the keys."""

    keys: jax.Array
    values: jax.Array | None


def write(pair: PoolPair, placement: Placement | None, step: StepTokens, rows: Rows) -> PoolPair:
    """Return the pools with rows written that were checked."""
    step = step.divided(num_groups(placement))
    if placement is not None and placement.is_open:
        return _write_over_devices(placement, pair, step, rows)
    return _write_here(pair, step, rows)


def _write_here(pair: PoolPair, step: StepTokens, rows: Rows) -> PoolPair:
    """Return the pools with rows written by the device that this is."""
    _, num_pages, page_size, _ = pair.keys.shape
    mapping = slot_mapping(step, page_size, num_pages)
    if isinstance(pair.values, ValuesInKeys):
        return pair._replace(keys=pools.write_both(pair.keys, mapping, *rows))
    keys = pools.write_slots(pair.keys, mapping, rows.keys)
    if rows.values is None:
        return pair._replace(keys=keys)
    return PoolPair(keys, pools.write_slots(pair.values, mapping, rows.values))


@compiled_if_eager(static_argnums=(0,))
def _write_over_devices(placement: Placement, pair: PoolPair, step: StepTokens, rows: Rows) -> PoolPair:
    """Return the pools with rows written, each device writing what it holds."""
    stored = pair.keys.shape[0]
    rows = jax.tree_util.tree_map(lambda part: placement.repeat_heads(part, stored), rows)
    groups, context = placement.open_groups, placement.open_context

    def write(pair: PoolPair, step: StepTokens, rows: Rows) -> PoolPair:
        step = step.of_group(axis_index(groups))
        table = own_pages(step.table, pair.keys.shape[1], axis_index(context))
        return _write_here(pair, step._replace(table=table), rows)

    of_rows = jax.tree_util.tree_map(lambda _: placement.row_specs(step), rows)
    return placement.change(write, pair, (step, rows), (step.specs(groups), of_rows))


def apply(change: Callable[..., Pages], pages: Pages, placement: Placement | None, *operands: Any) -> Pages:
    """Return a pool after ``change(pages, *operands)``.

    Args:
        change: one of :mod:`qpaged.pools`, or :func:`put`.
        pages: the pool.
        placement: how it lies over devices.
        operands: pages (n,), those of one group after those of another; or pools.

    Raises:
        ValueError: not as many pages of each group.
    """
    if placement is None or not placement.is_open:
        return change(pages, *operands)
    _check_of_each_group(placement, operands[0])
    if placement.open_context and change is pools.copy_pages:
        source, target = operands
        taken = take_over_devices(placement, 1, pages, source)
        no_page = pages.shape[1] // placement.num_groups
        is_page = (source >= 0) & (source < no_page)
        return change_over_devices(placement, put, pages, (jnp.where(is_page, target, no_page), taken))
    return change_over_devices(placement, change, pages, operands)


def take(pages: Pages, placement: Placement | None, indices: jax.Array, sequences: int) -> Pages:
    """Return the pages ``indices`` (n,) of so many sequences as a pool of their own.

    Raises:
        ValueError: not as many pages of each group.
    """
    if placement is None or not placement.is_open:
        return pools.take_pages(pages, indices, sequences)
    _check_of_each_group(placement, indices)
    return take_over_devices(placement, sequences, pages, indices)


def put(pages: Pages, target: jax.Array, taken: Pages) -> Pages:
    """Return a pool with others at ``target`` (n,)."""
    return pools.put_pages(pages, taken, target)


def _check_of_each_group(placement: Placement, indices: jax.Array) -> None:
    groups = placement.num_groups
    if len(indices) % groups:
        raise ValueError(
            f"pages must be as many for each of the {groups} groups of devices, but are {len(indices)}; fill "
            f"them up with num_pages_per_layer, which is no page."
        )
