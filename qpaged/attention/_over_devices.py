"""Calls of attention that are divided over devices, as the view's pools are."""

from collections.abc import Callable
from typing import TypeVar

import jax

from qpaged.attention._token_groups import StepCall, check_shared_pages
from qpaged.cache import PagedAttentionCacheView
from qpaged.cache._placement import Specs, axis_index
from qpaged.cache._view import here

R = TypeVar("R")


def over_devices(
    view: PagedAttentionCacheView, call: StepCall, body: Callable[..., R], out_specs: Specs = None
) -> R:
    """Return ``body(view, call, index)`` of what each device has of a view and of a call.

    The index is that of the device among those that share the pages of a sequence; None if there are none.
    On one device, the body is called with the arguments as they are.
    """
    placement = view.placement
    if placement is None or not placement.is_open:
        return body(here(view), call, None)
    pair, tree = jax.tree_util.tree_flatten((view.key_pages, view.value_pages))
    groups, context = placement.open_groups, placement.open_context

    def of_device(pair: list[jax.Array], call: StepCall) -> R:
        keys, values = jax.tree_util.tree_unflatten(tree, pair)
        local = here(view.replace(key_pages=keys, value_pages=values, placement=None))
        own = call._replace(step=call.step.of_group(axis_index(groups)))
        return body(local, own, axis_index(context))

    specs = (placement.pool_specs(pair), call.specs(placement))
    result: R = placement.run(of_device, (pair, call), specs, out_specs)
    return result


def divided_calls(calls: list[StepCall], view: PagedAttentionCacheView, window: int | None) -> list[StepCall]:
    """Return calls with a known window among their masks, where devices share the pages of a sequence.

    Positions are counted among a device's own slots there, over which a window is another one.
    """
    if view.placement is None or not view.placement.open_context:
        return calls
    check_shared_pages(calls)
    return [call._replace(mask=call.mask.with_window(window)) for call in calls]
