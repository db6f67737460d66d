"""penzai's llama-like transformer, with separate and with stacked layers. Its caches end in the sequence."""

import functools

import jax
import jax.numpy as jnp
from penzai import pz
from penzai.models.transformer.sampling_mode import KVCachingTransformerLM
from penzai.models.transformer.variants import llamalike_common

from adopted._case import Case

VOCABULARY = 97


def cases() -> list[Case]:
    """Return the transformer with separate and with stacked layers."""
    return [_case("penzai llama-like", False), _case("penzai llama-like, stacked", True)]


def _case(name: str, stacked: bool) -> Case:
    config = llamalike_common.LlamalikeTransformerConfig(
        num_kv_heads=2,
        query_head_multiplier=2,
        embedding_dim=256,
        projection_dim=64,
        mlp_hidden_dim=512,
        num_decoder_blocks=2,
        vocab_size=VOCABULARY,
        mlp_variant="swiglu",
        tie_embedder_and_logits=False,
        use_layer_stack=stacked,
    )
    model = llamalike_common.build_llamalike_transformer(config, init_base_rng=jax.random.key(0))
    uncached, weights = pz.unbind_params(model, freeze=True)

    @functools.cache
    def bound(batch: int, length: int):
        """Return the sampling model without its state, and the state."""
        # Called while a step is traced, but the initial state must not become part of its program.
        with jax.ensure_compile_time_eval():
            return unbound(batch, length)

    def unbound(batch: int, length: int):
        sampling = KVCachingTransformerLM.from_uncached(uncached, length, {"batch": batch}, pad_id=-1)
        return pz.unbind_state_vars(sampling, freeze=True)

    def step(params, tokens, position, cache):
        (previous,) = [variable for variable in cache if variable.label.endswith("previous_tokens")]
        length = previous.value.named_shape["seq"]
        sampling, _ = bound(tokens.shape[0], length)
        state = [variable.unfreeze_as_copy() for variable in cache]
        model = pz.bind_variables(sampling, [*params, *state])
        logits = model(pz.nx.wrap(tokens).tag("batch", "seq"))
        return logits.unwrap("batch", "seq", "vocabulary"), tuple(variable.freeze() for variable in state)

    def cache(batch: int, length: int):
        _, state = bound(batch, length)
        ordered = jax.tree_util.tree_map(_layers_first, tuple(state), is_leaf=_is_named)
        return jax.tree_util.tree_map(jnp.asarray, ordered)

    return Case(name, ("penzai",), step, tuple(weights), cache, VOCABULARY)


def _is_named(value) -> bool:
    return isinstance(value, pz.nx.NamedArray)


def _layers_first(value):
    """Put the layers' axis first, where a step over stacked layers returns it."""
    if not (_is_named(value) and "blocks" in value.named_shape):
        return value
    return value.order_as("blocks", *(name for name in value.named_shape if name != "blocks"))
