"""Attention programs of many kinds, written for plain arrays, in two halves: what writes and what reads."""

import dataclasses
import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from support.arrays import normal

BATCH, LENGTH, KV_HEADS, HEAD_DIM = 2, 64, 2, 32
GROUP = 2
SIZES = {"b": BATCH, "s": LENGTH, "k": KV_HEADS, "d": HEAD_DIM}
NAMES = {"b": "batch", "s": "length", "k": "heads", "d": "head_dim"}

LAYOUTS = ("bskd", "bksd", "bkds", "sbkd", "kbsd")
UPDATES = ("slice", "vmapped slice", "indexed", "masked rows")
GROUPINGS = ("grouped", "repeated")
STACKINGS = ("apart", "unstacked", "indexed", "scanned", "pair")


@dataclass(frozen=True)
class Program:
    """One way to keep a cache and to attend to it.

    Attributes:
        layout: the order of a cache array's axes.
        update: how new rows come into it.
        grouping: how query heads share key heads.
        stacking: how the layers are held together.
        layers: of them.
    """

    layout: str = "bskd"
    update: str = "slice"
    grouping: str = "grouped"
    stacking: str = "apart"
    layers: int = 2

    def cache(self):
        shape = tuple(SIZES[axis] for axis in self.layout)
        if self.stacking == "apart":
            return [{"k": jnp.zeros(shape), "v": jnp.zeros(shape)} for _ in range(self.layers)]
        if self.stacking == "pair":
            return jnp.zeros((self.layers, 2, *shape))
        return {"k": jnp.zeros((self.layers, *shape)), "v": jnp.zeros((self.layers, *shape))}

    def step(self, x, position, cache):
        """One step of all layers: (outputs, cache). ``x`` is (batch, tokens, heads, head_dim)."""
        if self.stacking == "scanned":

            def layer(x, kv):
                k, v = (self.write(kv[name], x, position) for name in "kv")
                return self.read(x, k, v, position), {"k": k, "v": v}

            return lax.scan(layer, x, cache)
        if self.stacking == "indexed":
            for index in range(self.layers):
                k, v = (self.write(cache[name][index], x, position) for name in "kv")
                cache = {"k": cache["k"].at[index].set(k), "v": cache["v"].at[index].set(v)}
                x = self.read(x, k, v, position)
            return x, cache
        layers = []
        for index in range(self.layers):
            k, v = self.of_layer(cache, index)
            k, v = self.write(k, x, position), self.write(v, x, position)
            layers.append((k, v))
            x = self.read(x, k, v, position)
        return x, self.together(layers)

    def of_layer(self, cache, index):
        if self.stacking == "apart":
            return cache[index]["k"], cache[index]["v"]
        if self.stacking == "pair":
            return cache[index, 0], cache[index, 1]
        return cache["k"][index], cache["v"][index]

    def together(self, layers):
        if self.stacking == "apart":
            return [{"k": k, "v": v} for k, v in layers]
        if self.stacking == "pair":
            return jnp.stack([jnp.stack(pair) for pair in layers])
        return {name: jnp.stack(parts) for name, parts in zip("kv", zip(*layers, strict=True), strict=True)}

    def write(self, array, x, position):
        """The first KV heads of ``x`` (batch, tokens, heads, head_dim) written at ``position``."""
        rows = jnp.einsum(f"bskd->{self.layout}", x[:, :, :KV_HEADS])
        length, batch = self.layout.index("s"), self.layout.index("b")
        if self.update == "slice":
            return lax.dynamic_update_slice_in_dim(array, rows, position, length)
        if self.update == "vmapped slice":
            inside = length - (batch < length)
            update = jax.vmap(
                lambda a, r, at: lax.dynamic_update_slice_in_dim(a, r, at, inside), (batch, batch, 0), batch
            )
            return update(array, rows, jnp.full(BATCH, position))
        places = position + jnp.arange(x.shape[1])
        if self.update == "masked rows":  # rows past the end are dropped
            places = jnp.where(places < LENGTH, places, LENGTH)
        index = tuple(places if axis == length else slice(None) for axis in range(array.ndim))
        return array.at[index].set(rows)

    def read(self, x, k, v, position):
        """Attention of ``x`` to what was written up to its own positions."""
        q = x.reshape(*x.shape[:2], KV_HEADS, GROUP, HEAD_DIM)
        kv, heads = self.layout, "kg"
        if self.grouping == "repeated":
            axis = self.layout.index("k")
            k, v = jnp.repeat(k, GROUP, axis), jnp.repeat(v, GROUP, axis)
            q, heads = x, "k"
        scores = jnp.einsum(f"bt{heads}d,{kv}->b{heads}ts", q, k) / HEAD_DIM**0.5
        seen = jnp.arange(LENGTH) <= position + jnp.arange(x.shape[1])[:, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
        return jnp.einsum(f"b{heads}ts,{kv}->bt{heads}d", weights, v).reshape(x.shape)

    def axes(self):
        """The names that its arrays' axes are to be given."""
        names = tuple(NAMES[axis] for axis in self.layout)
        names = tuple(self.order(names))
        front = {"apart": (), "pair": ("layers", "pair")}.get(self.stacking, ("layers",))
        return (*front, *names)

    @staticmethod
    def order(names):
        """Batch and heads are told by their order alone."""
        rest = iter(("batch", "heads"))
        return (next(rest) if name in ("batch", "heads") else name for name in names)


def inputs(tokens, seed=0):
    return normal(BATCH, tokens, KV_HEADS * GROUP, HEAD_DIM, seed=seed)


def every(layers):
    """All programs."""
    return [Program(*choice, layers) for choice in itertools.product(LAYOUTS, UPDATES, GROUPINGS, STACKINGS)]


def each():
    """Programs in which each choice is made at least once."""
    plain = Program()
    fields = {"layout": LAYOUTS, "update": UPDATES, "grouping": GROUPINGS, "stacking": STACKINGS}
    changed = [
        dataclasses.replace(plain, **{name: choice}) for name, choices in fields.items() for choice in choices
    ]
    return list(dict.fromkeys(changed))
