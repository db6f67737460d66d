"""Some forty small programs with a cache, as people write them.

A step takes x (batch, tokens, 3, heads, head_dim), queries, keys and values, the position of the first token,
and a cache.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

BATCH, LENGTH, HEADS, HEAD_DIM, LAYERS = 2, 32, 2, 16, 2
CHUNK = 8


def attend(x, position, k, v, mask=None):
    """Return the attention of x to keys and values (batch, length, heads, head_dim)."""
    scores = jnp.einsum("bthd,bshd->bhts", x[:, :, 0], k) / HEAD_DIM**0.5
    slots = jnp.arange(k.shape[1])
    seen = slots <= position + jnp.arange(x.shape[1])[:, None] if mask is None else mask
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def write(array, rows, position):
    return lax.dynamic_update_slice_in_dim(array, rows, position, 1)


def float_cache():
    return {name: jnp.zeros((BATCH, LENGTH, HEADS, HEAD_DIM)) for name in "kv"}


def updating(update):
    """Return a step that writes with ``update(array, rows, position)``."""

    def step(x, position, cache):
        k, v = update(cache["k"], x[:, :, 1], position), update(cache["v"], x[:, :, 2], position)
        return attend(x, position, k, v), {"k": k, "v": v}

    return step


def reading(read):
    """Return a step that reads with ``read(x, position, k, v)``."""

    def step(x, position, cache):
        k, v = write(cache["k"], x[:, :, 1], position), write(cache["v"], x[:, :, 2], position)
        return read(x, position, k, v), {"k": k, "v": v}

    return step


def laid_out(layout):
    """Return a step and a cache whose arrays have other axes, as "bhsd"; letters in brackets are one axis."""
    letters = layout.replace("(", "").replace(")", "")
    order = ["bshd".index(letter) for letter in letters]
    sizes = dict(zip("bshd", (BATCH, LENGTH, HEADS, HEAD_DIM), strict=True))
    merged = "(hd)" in layout

    def flat(rows):
        return rows.reshape(*rows.shape[:2], HEADS * HEAD_DIM) if merged else jnp.transpose(rows, order)

    def step(x, position, cache):
        axis = letters.index("s")
        arrays = []
        for array, rows in zip(cache, (x[:, :, 1], x[:, :, 2]), strict=True):
            arrays.append(lax.dynamic_update_slice_in_dim(array, flat(rows), position, axis))
        if merged:
            k, v = (array.reshape(BATCH, LENGTH, HEADS, HEAD_DIM) for array in arrays)
        else:
            k, v = (jnp.transpose(array, [letters.index(letter) for letter in "bshd"]) for array in arrays)
        return attend(x, position, k, v), tuple(arrays)

    shape = (BATCH, LENGTH, HEADS * HEAD_DIM) if merged else tuple(sizes[letter] for letter in letters)
    return Program(step, lambda: (jnp.zeros(shape), jnp.zeros(shape)))


@dataclass(frozen=True)
class Program:
    """A step and its cache.

    Attributes:
        step: step(x, position, cache) -> (outputs, cache).
        cache: makes an empty cache.
        quantizer: a format that the program can have.
        tokens: of each step.
        keeps_exact: whether its reads tell exact pages from others.
    """

    step: Callable[..., Any]
    cache: Callable[[], Any] = float_cache
    quantizer: str = "int8"
    tokens: int = 1
    keeps_exact: bool = True


# Updates


def one_hot_of(position):
    return (jnp.arange(LENGTH) == position)[None, :, None, None]


def set_one_row_each(array, rows, position):
    positions = jnp.full(BATCH, position)
    return array.at[jnp.arange(BATCH), positions].set(rows[:, 0])


def set_with_vmap(array, rows, position):
    return jax.vmap(lambda a, r: lax.dynamic_update_slice(a, r, (position, 0, 0)))(array, rows)


def set_masked(array, rows, position):
    index = jnp.where(position < LENGTH, position, LENGTH)
    return array.at[:, index].set(rows[:, 0], mode="drop")


def set_if_active(array, rows, position):
    active = jnp.array([True, True]).reshape(BATCH, 1, 1, 1)
    return jnp.where(active, write(array, rows, position), array)


UPDATES = {
    "dynamic_update_slice": write,
    "at set": lambda array, rows, position: array.at[:, position].set(rows[:, 0]),
    "one row each": set_one_row_each,
    "vmap": set_with_vmap,
    "dropped past the end": set_masked,
    "ring": lambda array, rows, position: write(array, rows, position % LENGTH),
    "where active": set_if_active,
    "one-hot where": lambda array, rows, position: jnp.where(one_hot_of(position), rows, array),
    "by cond": lambda array, rows, position: lax.cond(
        position >= 0, lambda: write(array, rows, position), lambda: array
    ),
    "nested jit": lambda array, rows, position: jax.jit(write)(array, rows, position),
}
ADDITIONS = {
    "one-hot add": lambda array, rows, position: (
        array + jax.nn.one_hot(position, LENGTH)[None, :, None, None] * rows
    ),
    "one-hot mix": lambda array, rows, position: (
        array * (1 - one_hot_of(position).astype(jnp.float32))
        + rows * one_hot_of(position).astype(jnp.float32)
    ),
    "at add": lambda array, rows, position: array.at[:, position].add(rows[:, 0]),
}

# Reads


def read_repeated(x, position, k, v):
    """Attend with twice as many query heads as key heads."""
    twice = jnp.concatenate([x, x], axis=3)
    out = attend(twice, position, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2))
    return out[:, :, :HEADS]


def read_with_matmul(x, position, k, v):
    queries, keys, values = (jnp.swapaxes(array, 1, 2) for array in (x[:, :, 0], k, v))
    scores = queries @ jnp.swapaxes(keys, 2, 3) / HEAD_DIM**0.5
    weights = jax.nn.softmax(jnp.where(jnp.arange(LENGTH) <= position, scores, -1e30), axis=-1)
    return jnp.swapaxes(weights @ values, 1, 2)


def read_with_jax_nn(x, position, k, v):
    mask = jnp.broadcast_to(jnp.arange(LENGTH) <= position, (BATCH, 1, 1, LENGTH))
    return jax.nn.dot_product_attention(x[:, :, 0], k, v, mask=mask)


def online_softmax(x, position, keys, values, index, carry):
    """Attend to one chunk of keys and values, and merge the result into the carry."""
    largest, total, out = carry
    scores = jnp.einsum("bhd,bshd->bhs", x[:, 0, 0], keys) / HEAD_DIM**0.5
    scores = jnp.where(index * CHUNK + jnp.arange(CHUNK) <= position, scores, -1e30)
    new_largest = jnp.maximum(largest, scores.max(-1))
    weights = jnp.exp(scores - new_largest[..., None])
    scale = jnp.exp(largest - new_largest)
    out = out * scale[..., None] + jnp.einsum("bhs,bshd->bhd", weights, values)
    return new_largest, total * scale + weights.sum(-1), out


def empty_carry():
    return jnp.full((BATCH, HEADS), -1e30), jnp.zeros((BATCH, HEADS)), jnp.zeros((BATCH, HEADS, HEAD_DIM))


def read_by_scanning_chunks(x, position, k, v):
    chunks = [jnp.moveaxis(a.reshape(BATCH, LENGTH // CHUNK, CHUNK, HEADS, HEAD_DIM), 1, 0) for a in (k, v)]

    def body(carry, xs):
        index, keys, values = xs
        return online_softmax(x, position, keys, values, index, carry), None

    (_, total, out), _ = lax.scan(body, empty_carry(), (jnp.arange(LENGTH // CHUNK), *chunks))
    return (out / total[..., None])[:, None]


def read_by_slicing_chunks(x, position, k, v):
    def body(index, carry):
        keys, values = (lax.dynamic_slice_in_dim(a, index * CHUNK, CHUNK, 1) for a in (k, v))
        return online_softmax(x, position, keys, values, index, carry)

    _, total, out = lax.fori_loop(0, LENGTH // CHUNK, body, empty_carry())
    return (out / total[..., None])[:, None]


def read_a_window(x, position, k, v):
    begin = jnp.clip(position - CHUNK + 1, 0, LENGTH - CHUNK)
    keys, values = (lax.dynamic_slice_in_dim(array, begin, CHUNK, 1) for array in (k, v))
    return attend(x, position - begin, keys, values)


def read_zeroed(x, position, k, v):
    seen = (jnp.arange(LENGTH) <= position)[None, :, None, None]
    return attend(x, position, k, jnp.where(seen, v, 0))


def read_weighted(x, position, k, v):
    seen = (jnp.arange(LENGTH) <= position)[None, :, None, None].astype(jnp.float32)
    return attend(x, position, k * seen, v * seen)


def read_with_the_new_row(x, position, k, v):
    """Attend to the rows before, and to the new one as it is given, concatenated to them."""
    keys, values = jnp.concatenate([k, x[:, :, 1]], axis=1), jnp.concatenate([v, x[:, :, 2]], axis=1)
    slots = jnp.arange(LENGTH + 1)
    seen = (slots < position) | (slots == LENGTH)
    return attend(x, position, jnp.repeat(keys, 2, axis=2)[:, :, ::2], values, seen)


READS = {
    "repeated heads": read_repeated,
    "matmul": read_with_matmul,
    "jax.nn": read_with_jax_nn,
    "sliced chunks": read_by_slicing_chunks,
    "a window": read_a_window,
    "beside the new row": read_with_the_new_row,
    "zeroed values": read_zeroed,
    "weighted rows": read_weighted,
    "scaled keys": lambda x, position, k, v: attend(x, position, k * 2 / 2, v),
    "barrier": lambda x, position, k, v: attend(x, position, *lax.optimization_barrier((k, v))),
    "remat": lambda x, position, k, v: jax.checkpoint(attend)(x, position, k, v),
    "padded": lambda x, position, k, v: attend(
        x, position, *(jnp.pad(array, ((0, 0), (0, CHUNK), (0, 0), (0, 0))) for array in (k, v))
    ),
    "bfloat16": lambda x, position, k, v: attend(
        x.astype(jnp.bfloat16), position, k.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
    ),
    "vmap over the batch": lambda x, position, k, v: jax.vmap(
        lambda x, k, v: attend(x[None], position, k[None], v[None])[0]
    )(x, k, v),
}

# Structures


class Layer(NamedTuple):
    keys: jax.Array
    values: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    layers: list[Layer]
    position: jax.Array


def named_layers(x, position, state):
    """Keep layers in a list of tuples in a dataclass, beside a position of its own."""
    layers = []
    for layer in state.layers:
        k = write(layer.keys, x[:, :, 1], state.position)
        v = write(layer.values, x[:, :, 2], state.position)
        x = x + attend(x, position, k, v)[:, :, None]
        layers.append(Layer(k, v))
    return x[:, :, 0], State(layers, state.position + x.shape[1])


def empty_state():
    layers = [Layer(*float_cache().values()) for _ in range(LAYERS)]
    return State(layers, jnp.int32(0))


def stacked_cache():
    return {name: jnp.zeros((LAYERS, BATCH, LENGTH, HEADS, HEAD_DIM)) for name in "kv"}


def scanned_layers(x, position, cache):
    def layer(x, kv):
        k, v = write(kv["k"], x[:, :, 1], position), write(kv["v"], x[:, :, 2], position)
        return x + attend(x, position, k, v)[:, :, None], {"k": k, "v": v}

    x, cache = lax.scan(layer, x, cache)
    return x[:, :, 0], cache


def entropix_like(x, position, cache):
    """Write into a layer of stacked arrays in place, read it back, and repeat the heads."""
    k, v = cache["k"], cache["v"]
    for layer in range(LAYERS):
        k = lax.dynamic_update_slice(k, x[None, :, :, 1], (layer, 0, position, 0, 0))
        v = lax.dynamic_update_slice(v, x[None, :, :, 2], (layer, 0, position, 0, 0))
        x = x + read_repeated(x, position, k[layer], v[layer])[:, :, None]
    return x[:, :, 0], {"k": k, "v": v}


def sglang_like(x, position, cache):
    """Keep all sequences in one pool of slots, and gather each one's slots to read."""
    slots = jnp.arange(BATCH)[:, None] * LENGTH + jnp.arange(LENGTH)
    write_to = slots[:, position]
    k, v = cache["k"].at[write_to].set(x[:, 0, 1]), cache["v"].at[write_to].set(x[:, 0, 2])
    return attend(x, position, k[slots], v[slots]), {"k": k, "v": v}


def jax_llm_examples_like(x, position, cache):
    """Keep (batch, heads, length, head_dim) as a ring that begins at ``start``, with a mask of ages."""
    index = (cache["start"] + position) % LENGTH

    def put(array, rows):
        return lax.dynamic_update_slice_in_dim(array, jnp.swapaxes(rows, 1, 2), index, 2)

    k, v = put(cache["k"], x[:, :, 1]), put(cache["v"], x[:, :, 2])
    age = (jnp.arange(LENGTH) - cache["start"]) % LENGTH
    scores = jnp.einsum("bthd,bhsd->bhts", x[:, :, 0], k) / HEAD_DIM**0.5
    weights = jax.nn.softmax(jnp.where(age <= position, scores, -1e30), axis=-1)
    return jnp.einsum("bhts,bhsd->bthd", weights, v), {"k": k, "v": v, "start": cache["start"]}


def ring_cache():
    arrays = {name: jnp.zeros((BATCH, HEADS, LENGTH, HEAD_DIM)) for name in "kv"}
    return {**arrays, "start": jnp.int32(5)}


def t5_like(x, position, cache):
    """Keep (batch, heads, head_dim, length), add a row by a one-hot vector, and bias the scores."""
    one_hot = jax.nn.one_hot(position, LENGTH)
    k = cache["k"] + jnp.moveaxis(x[:, :, 1], 1, 3) * one_hot
    v = cache["v"] + jnp.moveaxis(x[:, :, 2], 1, 3) * one_hot
    scores = jnp.einsum("bthd,bhds->bhts", x[:, :, 0], k)
    bias = -0.1 * jnp.abs(jnp.arange(LENGTH) - position).astype(jnp.float32)
    weights = jax.nn.softmax(jnp.where(jnp.arange(LENGTH) <= position, scores + bias, -1e10), axis=-1)
    return jnp.einsum("bhts,bhds->bthd", weights, v), {"k": k, "v": v}


def t5_cache():
    return {name: jnp.zeros((BATCH, HEADS, HEAD_DIM, LENGTH)) for name in "kv"}


def pair_like(x, position, cache):
    """Keep keys and values in one array, (2, batch, length, heads, head_dim)."""
    cache = lax.dynamic_update_slice(cache, jnp.moveaxis(x[:, :, 1:], 2, 0), (0, 0, position, 0, 0))
    return attend(x, position, cache[0], cache[1]), cache


def decoded_at_once(x, position, cache):
    """Run several tokens one by one in a loop that carries the cache."""

    def body(carry, xs):
        token, offset = xs
        k = write(carry["k"], token[:, None, 1], position + offset)
        v = write(carry["v"], token[:, None, 2], position + offset)
        return {"k": k, "v": v}, attend(token[:, None], position + offset, k, v)[:, 0]

    count = x.shape[1]
    cache, outs = lax.scan(body, cache, (jnp.moveaxis(x, 1, 0), jnp.arange(count)))
    return jnp.moveaxis(outs, 0, 1), cache


PROGRAMS = {
    **{f"update: {name}": Program(updating(update)) for name, update in UPDATES.items()},
    **{
        f"update: {name}": Program(updating(update), quantizer="int8:token")
        for name, update in ADDITIONS.items()
    },
    **{f"read: {name}": Program(reading(read)) for name, read in READS.items()},
    "read: scanned chunks": Program(reading(read_by_scanning_chunks), keeps_exact=False),
    **{
        f"layout: {layout}": laid_out(layout) for layout in ("bshd", "bhsd", "bhds", "sbhd", "hbsd", "bs(hd)")
    },
    "a prompt": Program(updating(write), tokens=5),
    "layers in a dataclass": Program(named_layers, empty_state),
    "scanned layers": Program(scanned_layers, stacked_cache),
    "keys and values in one array": Program(pair_like, lambda: jnp.stack(list(float_cache().values()))),
    "a loop over tokens": Program(decoded_at_once, tokens=3),
    "entropix-like": Program(entropix_like, stacked_cache),
    "SGLang-like": Program(
        sglang_like, lambda: {name: jnp.zeros((BATCH * LENGTH, HEADS, HEAD_DIM)) for name in "kv"}
    ),
    "jax-llm-examples-like": Program(jax_llm_examples_like, ring_cache),
    "T5-like": Program(t5_like, t5_cache, quantizer="int8:token"),
}
