"""Steps over a contiguous cache, as users write them, for ``--step support.contiguous_step:make_step``."""

import os
import sys

import jax
import jax.numpy as jnp
from jax import lax

from qpaged.models import final_hidden, load_checkpoint, output_logits


def make_step(sequences, length):
    """Return a step of the checkpoint that the environment variable CHECKPOINT names."""
    config, params = load_checkpoint(os.environ["CHECKPOINT"])
    shape = sequences, length, config.num_key_value_heads, config.head_dim
    cache = [{"k": jnp.zeros(shape), "v": jnp.zeros(shape)} for _ in range(config.num_hidden_layers)]

    def step(state, tokens, positions):
        rows, cache = tokens.shape, list(state["cache"])

        def attend(layer, query, key, value):
            start = positions[0, 0]
            key = key.reshape(*rows, *key.shape[1:])
            value = value.reshape(*rows, *value.shape[1:])
            keys = lax.dynamic_update_slice_in_dim(cache[layer]["k"], key, start, axis=1)
            values = lax.dynamic_update_slice_in_dim(cache[layer]["v"], value, start, axis=1)
            cache[layer] = {"k": keys, "v": values}
            group = query.reshape(*rows, shape[2], -1, shape[3])
            scores = jnp.einsum("bnkgd,blkd->bkgnl", group, keys) * shape[3] ** -0.5
            attended = jnp.arange(length) <= positions[:, None, None, :, None]
            weights = jax.nn.softmax(jnp.where(attended, scores, -jnp.inf), axis=-1)
            out = jnp.einsum("bkgnl,blkd->bnkgd", weights, values)
            return out.reshape(-1, query.shape[1], shape[3])

        flat = final_hidden(
            state["params"], config, tokens.reshape(-1), positions.reshape(-1), attend, dtype="float32"
        )
        logits = output_logits(state["params"], config, flat)
        return logits.reshape(*rows, -1), {"params": state["params"], "cache": cache}

    return step, {"params": params, "cache": cache}


def no_cache(sequences, length):
    """Return a step that has no cache."""
    return (lambda state, tokens, positions: (jax.nn.one_hot(tokens, 256), state)), {"weights": jnp.zeros(3)}


def lose_state(sequences, length):
    """Return a step whose state comes back in another structure."""
    step, state = make_step(sequences, length)

    def lost(state, tokens, positions):
        logits, state = step(state, tokens, positions)
        return logits, (state["params"], state["cache"])

    return lost, state


def last_only(sequences, length):
    """Return a step that returns the logits of the last token alone."""
    step, state = make_step(sequences, length)

    def last(state, tokens, positions):
        logits, state = step(state, tokens, positions)
        return logits[:, -1:], state

    return last, state


def short(sequences, length):
    """Return a step whose cache holds half of the tokens that it should."""
    return make_step(sequences, length // 2)


def broken(sequences, length):
    """Raise instead of returning a step."""
    raise RuntimeError("no luck")


def leave(sequences, length):
    """Leave as a script does, instead of returning a step."""
    sys.exit(0)


def closed_over(sequences, length):
    """Return a compiled step that closes over its weights, which the environment variable FACTOR scales."""
    step, state = make_step(sequences, length)
    params = jax.tree_util.tree_map(lambda x: x * float(os.environ.get("FACTOR", 1)), state["params"])

    @jax.jit
    def closed(cache, tokens, positions):
        logits, state = step({"params": params, "cache": cache}, tokens, positions)
        return logits, state["cache"]

    return closed, state["cache"]
