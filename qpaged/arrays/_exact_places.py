"""Where exact pages are held: the first ones of an array each at a place of its own, the others in a ring."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NO_PAGE = -1


class Places(NamedTuple):
    """The places of exact pages.

    Attributes:
        length: tokens of the array.
        page_size: tokens of a page.
        num_pages: how many pages are held.
        sinks: how many of them are the array's first.
    """

    length: int
    page_size: int
    num_pages: int
    sinks: int

    @classmethod
    def of(cls, length: int, page_size: int, window: int, sinks: int) -> "Places":
        """Return the places of the newest ``window`` pages and of the first; no more than there are pages."""
        pages = length // page_size
        window = min(window, pages)
        sinks = min(sinks, pages - window)
        return cls(length, page_size, window + sinks, sinks)

    @property
    def first_tokens(self) -> int:
        """How many tokens the pages before the ring have."""
        return self.sinks * self.page_size

    @property
    def ring_tokens(self) -> int:
        """How many tokens the pages of the ring have."""
        return (self.num_pages - self.sinks) * self.page_size

    def of_page(self, page: Any) -> Any:
        """Return the place of each page: of integers, NumPy's or JAX's."""
        where = jnp.where if isinstance(page, jax.Array) else np.where
        return where(
            page < self.sinks, page, self.sinks + (page - self.sinks) % (self.num_pages - self.sinks)
        )

    def of_token(self, token: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the page of each token, the place of that page, and the row that would hold the token."""
        page = token // self.page_size
        place = self.of_page(page)
        return page, place, place * self.page_size + token % self.page_size

    def newest(self, newest: jax.Array, axis: int) -> jax.Array:
        """Return which pages are held where ``newest`` (1 long along ``axis``) is the newest one, or none."""
        place = lax.broadcasted_iota(jnp.int32, (self.num_pages,), 0)
        place = lax.expand_dims(place, [other for other in range(newest.ndim) if other != axis])
        in_ring = newest - (newest - place) % (self.num_pages - self.sinks)
        page = jnp.where(place < self.sinks, place, in_ring)
        is_held = (page <= newest) & (page >= jnp.minimum(place, self.sinks))
        return jnp.where(is_held, page, NO_PAGE)

    def spread(self, rows: jax.Array, axis: int) -> jax.Array:
        """Return for each token the row that would hold it: exact pages, repeated along ``axis``."""
        first = lax.slice_in_dim(rows, 0, self.first_tokens, axis=axis)
        ring = lax.slice_in_dim(rows, self.first_tokens, rows.shape[axis], axis=axis)
        times = -(-max(self.length - self.first_tokens, 0) // self.ring_tokens)
        return lax.slice_in_dim(lax.concatenate([first, *[ring] * times], axis), 0, self.length, axis=axis)

    def collect(self, tokens: jax.Array, axis: int) -> jax.Array:
        """Return the sum of what each row would hold of ``tokens``: the transpose of :meth:`spread`."""
        times = max(1, -(-(self.length - self.first_tokens) // self.ring_tokens))
        missing = self.first_tokens + times * self.ring_tokens - self.length
        widths = [(0, missing if other == axis else 0) for other in range(tokens.ndim)]
        tokens = jnp.pad(tokens, widths)
        first = lax.slice_in_dim(tokens, 0, self.first_tokens, axis=axis)
        rest = lax.slice_in_dim(tokens, self.first_tokens, tokens.shape[axis], axis=axis)
        apart = rest.reshape(*rest.shape[:axis], times, self.ring_tokens, *rest.shape[axis + 1 :])
        return lax.concatenate([first, apart.sum(axis)], axis)
