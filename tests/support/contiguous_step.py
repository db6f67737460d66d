"""A checkpoint over a contiguous cache, for ``--step support.contiguous_step:make_step``."""

import os

import jax
import jax.numpy as jnp
from jax import lax

from qpaged.models import final_hidden, load_checkpoint, output_logits


def make_step(sequences, length):
    """Return a step of the checkpoint that the environment's CHECKPOINT names, and its state."""
    config, params = load_checkpoint(os.environ["CHECKPOINT"])
    shape = sequences, length, config.num_key_value_heads, config.head_dim
    cache = [{"k": jnp.zeros(shape), "v": jnp.zeros(shape)} for _ in range(config.num_hidden_layers)]

    def step(state, tokens, positions):
        rows, new = tokens.shape, list(state["cache"])

        def attend(layer, query, key, value):
            query, key, value = (x.reshape(*rows, *x.shape[1:]) for x in (query, key, value))
            layer_cache = {
                name: lax.dynamic_update_slice_in_dim(new[layer][name], x, positions[0, 0], axis=1)
                for name, x in (("k", key), ("v", value))
            }
            new[layer] = layer_cache
            group = query.reshape(*rows, shape[2], -1, shape[3])
            scores = jnp.einsum("bnkgd,blkd->bkgnl", group, layer_cache["k"]) * shape[3] ** -0.5
            visible = jnp.arange(length) <= positions[:, None, None, :, None]
            weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
            return jnp.einsum("bkgnl,blkd->bnkgd", weights, layer_cache["v"]).reshape(
                -1, query.shape[2], shape[3]
            )

        flat = final_hidden(
            state["params"], config, tokens.reshape(-1), positions.reshape(-1), attend, dtype="float32"
        )
        logits = output_logits(state["params"], config, flat)
        return logits.reshape(*rows, -1), {"params": state["params"], "cache": new}

    return step, {"params": params, "cache": cache}


def no_cache(sequences, length):
    """Return a step without a cache."""
    return (lambda state, tokens, positions: (jax.nn.one_hot(tokens, 256), state)), {"weights": jnp.zeros(3)}


def lose_state(sequences, length):
    """Return a step whose state comes back in another structure."""
    step, state = make_step(sequences, length)

    def lost(state, tokens, positions):
        logits, state = step(state, tokens, positions)
        return logits, (state["params"], state["cache"])

    return lost, state


def last_only(sequences, length):
    """Return a step that gives only the last token's logits."""
    step, state = make_step(sequences, length)

    def last(state, tokens, positions):
        logits, state = step(state, tokens, positions)
        return logits[:, -1:], state

    return last, state


def short(sequences, length):
    """Return a step whose cache holds half of the length."""
    return make_step(sequences, length // 2)


def broken(sequences, length):
    """Raise an error in place of a step."""
    raise RuntimeError("no luck")


def closed_over(sequences, length):
    """Return a jitted step that closes over its weights, which the environment's FACTOR scales."""
    step, state = make_step(sequences, length)
    params = jax.tree_util.tree_map(lambda x: x * float(os.environ.get("FACTOR", 1)), state["params"])

    @jax.jit
    def closed(cache, tokens, positions):
        logits, state = step({"params": params, "cache": cache}, tokens, positions)
        return logits, state["cache"]

    return closed, state["cache"]
