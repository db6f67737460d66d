"""Attention programs over caches of many kinds, written for plain arrays."""

import dataclasses
import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from support.arrays import normal

BATCH = 2
LENGTH = 64
KV_HEADS = 2
HEAD_DIM = 32
GROUP = 2  # query heads per KV head
SIZES = {"b": BATCH, "s": LENGTH, "k": KV_HEADS, "d": HEAD_DIM}
NAMES = {"b": "batch", "s": "length", "k": "heads", "d": "head_dim"}

LAYOUTS = ("bskd", "bksd", "bkds", "sbkd", "kbsd")
UPDATES = ("slice", "vmapped slice", "indexed", "masked rows")
GROUPINGS = ("grouped", "repeated")
STACKINGS = ("apart", "unstacked", "indexed", "scanned", "pair")


@dataclass(frozen=True)
class Program:
    """A way to store a cache, to write to it and to attend to it.

    Attributes:
        layout: the order of a cache array's axes.
        update: how new rows are written.
        grouping: how query heads share KV heads.
        stacking: how the arrays of all layers are combined.
        layers: the number of layers.
    """

    layout: str = "bskd"
    update: str = "slice"
    grouping: str = "grouped"
    stacking: str = "apart"
    layers: int = 2

    def cache(self):
        """Return an empty cache."""
        shape = tuple(SIZES[axis] for axis in self.layout)
        if self.stacking == "apart":
            return [{"k": jnp.zeros(shape), "v": jnp.zeros(shape)} for _ in range(self.layers)]
        if self.stacking == "pair":
            return jnp.zeros((self.layers, 2, *shape))
        return {"k": jnp.zeros((self.layers, *shape)), "v": jnp.zeros((self.layers, *shape))}

    def step(self, x, position, cache):
        """Run all layers; return the outputs and the cache. ``x`` is [batch, tokens, heads, head_dim]."""
        if self.stacking == "scanned":

            def layer(x, kv):
                k = self.write(kv["k"], x, position)
                v = self.write(kv["v"], x, position)
                return self.read(x, k, v, position), {"k": k, "v": v}

            return lax.scan(layer, x, cache)
        if self.stacking == "indexed":
            for index in range(self.layers):
                k = self.write(cache["k"][index], x, position)
                v = self.write(cache["v"][index], x, position)
                cache = {"k": cache["k"].at[index].set(k), "v": cache["v"].at[index].set(v)}
                x = self.read(x, k, v, position)
            return x, cache
        layers = []
        for index in range(self.layers):
            k, v = self.layer_arrays(cache, index)
            k = self.write(k, x, position)
            v = self.write(v, x, position)
            layers.append((k, v))
            x = self.read(x, k, v, position)
        return x, self.combined(layers)

    def layer_arrays(self, cache, index):
        """Return the keys and values of one layer."""
        if self.stacking == "apart":
            return cache[index]["k"], cache[index]["v"]
        if self.stacking == "pair":
            return cache[index, 0], cache[index, 1]
        return cache["k"][index], cache["v"][index]

    def combined(self, layers):
        """Return the cache of these (keys, values)."""
        if self.stacking == "apart":
            return [{"k": k, "v": v} for k, v in layers]
        if self.stacking == "pair":
            return jnp.stack([jnp.stack(pair) for pair in layers])
        return {"k": jnp.stack([k for k, _ in layers]), "v": jnp.stack([v for _, v in layers])}

    def write(self, array, x, position):
        """Write the first KV heads of ``x`` [batch, tokens, heads, head_dim] at ``position``."""
        rows = jnp.einsum(f"bskd->{self.layout}", x[:, :, :KV_HEADS])
        length = self.layout.index("s")
        batch = self.layout.index("b")
        if self.update == "slice":
            return lax.dynamic_update_slice_in_dim(array, rows, position, length)
        if self.update == "vmapped slice":
            axis = length - (batch < length)  # vmap removes the batch axis

            def update(sequence, new, start):
                return lax.dynamic_update_slice_in_dim(sequence, new, start, axis)

            mapped = jax.vmap(update, (batch, batch, 0), batch)
            return mapped(array, rows, jnp.full(BATCH, position))
        positions = position + jnp.arange(x.shape[1])
        if self.update == "masked rows":  # rows past the end are dropped
            positions = jnp.where(positions < LENGTH, positions, LENGTH)
        index = tuple(positions if axis == length else slice(None) for axis in range(array.ndim))
        return array.at[index].set(rows)

    def read(self, x, k, v, position):
        """Return the attention of ``x`` to the rows up to its own positions."""
        q = x.reshape(*x.shape[:2], KV_HEADS, GROUP, HEAD_DIM)
        kv = self.layout
        heads = "kg"
        if self.grouping == "repeated":
            axis = self.layout.index("k")
            k = jnp.repeat(k, GROUP, axis)
            v = jnp.repeat(v, GROUP, axis)
            q = x
            heads = "k"
        scores = jnp.einsum(f"bt{heads}d,{kv}->b{heads}ts", q, k) / HEAD_DIM**0.5
        visible = jnp.arange(LENGTH) <= position + jnp.arange(x.shape[1])[:, None]
        weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
        return jnp.einsum(f"b{heads}ts,{kv}->bt{heads}d", weights, v).reshape(x.shape)

    def axes(self):
        """Return the names that qpaged should give to the axes of its arrays."""
        names = tuple(NAMES[axis] for axis in self.layout)
        names = tuple(self.order(names))
        front = {"apart": (), "pair": ("layers", "pair")}.get(self.stacking, ("layers",))
        return (*front, *names)

    @staticmethod
    def order(names):
        """Return the names with "batch" before "heads": the two are told apart by their order alone."""
        remaining = ["batch", "heads"]
        return [remaining.pop(0) if name in ("batch", "heads") else name for name in names]


def inputs(tokens, seed=0):
    """Return Gaussian inputs [batch, tokens, heads, head_dim]."""
    return normal(BATCH, tokens, KV_HEADS * GROUP, HEAD_DIM, seed=seed)


def every(layers):
    """Return all programs."""
    return [Program(*choice, layers) for choice in itertools.product(LAYOUTS, UPDATES, GROUPINGS, STACKINGS)]


def each():
    """Return programs in which each choice occurs at least once."""
    plain = Program()
    fields = {"layout": LAYOUTS, "update": UPDATES, "grouping": GROUPINGS, "stacking": STACKINGS}
    programs = []
    for name, choices in fields.items():
        programs += [dataclasses.replace(plain, **{name: choice}) for choice in choices]
    return list(dict.fromkeys(programs))
