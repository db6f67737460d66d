"""Attention programs of many kinds for plain arrays, in two halves: writing the cache and reading it."""

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
        update: the way in which new rows are written.
        grouping: the way in which query heads share key heads.
        stacking: the way in which the layers' arrays are put together.
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
        """Run all layers: (outputs, cache). ``x`` is (batch, tokens, heads, head_dim)."""
        if self.stacking == "scanned":
            return self.scan_layers(x, position, cache)
        if self.stacking == "indexed":
            return self.update_layers_in_place(x, position, cache)
        layers = []
        for index in range(self.layers):
            k, v = self.layer_of(cache, index)
            x, k, v = self.layer_step(x, position, k, v)
            layers.append((k, v))
        return x, self.stack_layers(layers)

    def scan_layers(self, x, position, cache):
        def layer(x, kv):
            x, k, v = self.layer_step(x, position, kv["k"], kv["v"])
            return x, {"k": k, "v": v}

        return lax.scan(layer, x, cache)

    def update_layers_in_place(self, x, position, cache):
        for index in range(self.layers):
            x, k, v = self.layer_step(x, position, cache["k"][index], cache["v"][index])
            cache = {"k": cache["k"].at[index].set(k), "v": cache["v"].at[index].set(v)}
        return x, cache

    def layer_step(self, x, position, k, v):
        """Write to one layer's arrays and attend to them: (outputs, keys, values)."""
        k = self.write(k, x, position)
        v = self.write(v, x, position)
        return self.read(x, k, v, position), k, v

    def layer_of(self, cache, index):
        """Return keys and values of one layer."""
        if self.stacking == "apart":
            return cache[index]["k"], cache[index]["v"]
        if self.stacking == "pair":
            return cache[index, 0], cache[index, 1]
        return cache["k"][index], cache["v"][index]

    def stack_layers(self, layers):
        """Return the cache whose layers these are."""
        if self.stacking == "apart":
            return [{"k": k, "v": v} for k, v in layers]
        if self.stacking == "pair":
            return jnp.stack([jnp.stack(pair) for pair in layers])
        return {name: jnp.stack(parts) for name, parts in zip("kv", zip(*layers, strict=True), strict=True)}

    def write(self, array, x, position):
        """Write the first KV heads of ``x`` (batch, tokens, heads, head_dim) at ``position``."""
        rows = jnp.einsum(f"bskd->{self.layout}", x[:, :, :KV_HEADS])
        length_axis = self.layout.index("s")
        batch_axis = self.layout.index("b")
        if self.update == "slice":
            return lax.dynamic_update_slice_in_dim(array, rows, position, length_axis)
        if self.update == "vmapped slice":
            length_axis_in_vmap = length_axis - (batch_axis < length_axis)

            def update(array, rows, position):
                return lax.dynamic_update_slice_in_dim(array, rows, position, length_axis_in_vmap)

            vmapped = jax.vmap(update, (batch_axis, batch_axis, 0), batch_axis)
            return vmapped(array, rows, jnp.full(BATCH, position))
        positions = position + jnp.arange(x.shape[1])
        if self.update == "masked rows":  # rows past the end are dropped
            positions = jnp.where(positions < LENGTH, positions, LENGTH)
        index = tuple(positions if axis == length_axis else slice(None) for axis in range(array.ndim))
        return array.at[index].set(rows)

    def read(self, x, k, v, position):
        """Return the attention of ``x`` to the rows up to its own positions."""
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
        """Return the names that the axes of its arrays are expected to get."""
        front = {"apart": (), "pair": ("layers", "pair")}.get(self.stacking, ("layers",))
        # Batch and heads are told apart by their order alone: the first of the two is called batch.
        names = [NAMES[axis] for axis in self.layout]
        first, second = sorted([names.index("batch"), names.index("heads")])
        names[first] = "batch"
        names[second] = "heads"
        return (*front, *names)


def inputs(tokens, seed=0):
    """Return inputs of a step, (batch, tokens, heads, head_dim)."""
    return normal(BATCH, tokens, KV_HEADS * GROUP, HEAD_DIM, seed=seed)


def all_programs(layers):
    """Return programs with every combination of choices."""
    return [Program(*choice, layers) for choice in itertools.product(LAYOUTS, UPDATES, GROUPINGS, STACKINGS)]


def programs_with_each_choice():
    """Return programs in which each choice is made at least once."""
    plain = Program()
    options = {"layout": LAYOUTS, "update": UPDATES, "grouping": GROUPINGS, "stacking": STACKINGS}
    programs = []
    for name, choices in options.items():
        programs += [dataclasses.replace(plain, **{name: choice}) for choice in choices]
    return list(dict.fromkeys(programs))
