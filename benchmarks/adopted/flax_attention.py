"""Decoders around flax's own attention, in nnx and in linen."""

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax import lax

from adopted._case import Case

VOCABULARY = 97
WIDTH = 256
HEADS = 4
LAYERS = 2


def cases() -> list[Case]:
    """Return a decoder in nnx and one in linen."""
    return [nnx_case(), linen_case()]


class Decoder(nnx.Module):
    """An embedding, attention layers with a cache, and logits."""

    def __init__(self, batch: int, length: int):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.layers = nnx.List(
            nnx.MultiHeadAttention(num_heads=HEADS, in_features=WIDTH, decode=True, rngs=rngs)
            for _ in range(LAYERS)
        )
        for layer in self.layers:
            layer.init_cache((batch, length, WIDTH))

    def __call__(self, token: jax.Array) -> jax.Array:
        x = self.embed(token)
        for layer in self.layers:
            x = x + layer(x)
        return self.embed.attend(x)


def nnx_case() -> Case:
    def split(batch: int, length: int):
        return nnx.split(Decoder(batch, length), nnx.Cache, ...)

    graph, _, weights = split(1, 16)

    def step(params, tokens, position, cache):
        def one(cache, token):
            decoder = nnx.merge(graph, cache, params)
            return nnx.state(decoder, nnx.Cache), decoder(token[:, None])[:, 0]

        return _token_by_token(one, tokens, cache)

    return Case(
        "flax nnx MultiHeadAttention", ("flax",), step, weights, lambda b, n: split(b, n)[1], VOCABULARY
    )


class LinenDecoder(linen.Module):
    """The same decoder in linen."""

    @linen.compact
    def __call__(self, token):
        embed = linen.Embed(VOCABULARY, WIDTH)
        x = embed(token)
        for _ in range(LAYERS):
            x = x + linen.MultiHeadDotProductAttention(num_heads=HEADS, decode=True)(x)
        return embed.attend(x)


def linen_case() -> Case:
    decoder = LinenDecoder()

    def variables(batch: int, length: int):
        return decoder.init(jax.random.key(0), jnp.zeros((batch, length), jnp.int32))

    def step(params, tokens, position, cache):
        def one(cache, token):
            logits, updates = decoder.apply(
                {"params": params, "cache": cache}, token[:, None], mutable=["cache"]
            )
            return updates["cache"], logits[:, 0]

        return _token_by_token(one, tokens, cache)

    weights = variables(1, 16)["params"]
    return Case(
        "flax linen MultiHeadDotProductAttention",
        ("flax",),
        step,
        weights,
        lambda batch, length: variables(batch, length)["cache"],
        VOCABULARY,
    )


def _token_by_token(one, tokens, cache):
    """Feed a prompt token by token in a scan that carries the cache, as flax's attention requires."""
    if tokens.shape[1] == 1:
        cache, logits = one(cache, tokens[:, 0])
        return logits[:, None], cache
    cache, logits = lax.scan(one, cache, tokens.T)
    return jnp.moveaxis(logits, 0, 1), cache
