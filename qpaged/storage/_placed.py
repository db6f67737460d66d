"""Where the pages of a cache must lie to be in files."""

import jax

from qpaged.cache import PagedAttentionCache


def check_placed(name: str, cache: PagedAttentionCache) -> None:
    """Raise ValueError for pages that lie in several groups or processes, or are stored several times."""
    view = cache.views[0]
    placement, stored_heads = view.placement, view.key_pages.shape[0]
    is_divided = placement is not None and bool(placement.groups or placement.context)
    leaves = jax.tree_util.tree_leaves(view)
    is_here = all(getattr(leaf, "is_fully_addressable", True) for leaf in leaves)
    if is_divided or not is_here or stored_heads != view.metadata.num_kv_heads:
        raise ValueError(
            f"{name} must have all its pages in one group and in this process, and each KV head once, to be "
            f"in files; divide KV heads alone, over as many devices as there are heads at most."
        )
