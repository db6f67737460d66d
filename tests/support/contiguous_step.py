"""A checkpoint over a contiguous cache, for ``--step support.contiguous_step:make_step``."""

import os

import jax
import jax.numpy as jnp
from jax import lax

from qpaged.models import final_hidden, load_checkpoint, output_logits


def make_step(sequences, length):
    """The checkpoint that the environment's variable CHECKPOINT names."""
    config, params = load_checkpoint(os.environ["CHECKPOINT"])
    shape = sequences, length, config.num_key_value_heads, config.head_dim
    cache = [{"k": jnp.zeros(shape), "v": jnp.zeros(shape)} for _ in range(config.num_hidden_layers)]

    def step(state, tokens, positions):
        rows, new = tokens.shape, list(state["cache"])

        def attend(layer, query, key, value):
            query, key, value = (x.reshape(*rows, *x.shape[1:]) for x in (query, key, value))
            held = {
                name: lax.dynamic_update_slice_in_dim(new[layer][name], x, positions[0, 0], axis=1)
                for name, x in (("k", key), ("v", value))
            }
            new[layer] = held
            group = query.reshape(*rows, shape[2], -1, shape[3])
            scores = jnp.einsum("bnkgd,blkd->bkgnl", group, held["k"]) * shape[3] ** -0.5
            seen = jnp.arange(length) <= positions[:, None, None, :, None]
            weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
            return jnp.einsum("bkgnl,blkd->bnkgd", weights, held["v"]).reshape(-1, query.shape[2], shape[3])

        flat = final_hidden(
            state["params"], config, tokens.reshape(-1), positions.reshape(-1), attend, dtype="float32"
        )
        logits = output_logits(state["params"], config, flat)
        return logits.reshape(*rows, -1), {"params": state["params"], "cache": new}

    return step, {"params": params, "cache": cache}


def no_cache(sequences, length):
    """A step that keeps nothing."""
    return (lambda state, tokens, positions: (jax.nn.one_hot(tokens, 256), state)), {"weights": jnp.zeros(3)}


def lose_state(sequences, length):
    """A step whose state comes back in another structure."""
    step, state = make_step(sequences, length)

    def lost(state, tokens, positions):
        logits, state = step(state, tokens, positions)
        return logits, (state["params"], state["cache"])

    return lost, state


def last_only(sequences, length):
    """A step that gives the logits of the last token alone."""
    step, state = make_step(sequences, length)

    def last(state, tokens, positions):
        logits, state = step(state, tokens, positions)
        return logits[:, -1:], state

    return last, state


def short(sequences, length):
    """A step whose cache holds half of what it should."""
    return make_step(sequences, length // 2)


def broken(sequences, length):
    raise RuntimeError("no luck")


def closed_over(sequences, length):
    """A step that is compiled, and closes over its weights, which the variable FACTOR scales."""
    step, state = make_step(sequences, length)
    params = jax.tree_util.tree_map(lambda x: x * float(os.environ.get("FACTOR", 1)), state["params"])

    @jax.jit
    def closed(cache, tokens, positions):
        logits, state = step({"params": params, "cache": cache}, tokens, positions)
        return logits, state["cache"]

    return closed, state["cache"]
