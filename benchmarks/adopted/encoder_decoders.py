"""Encoder-decoders of transformers 4 in Flax, small and random: their decoders' own caches are quantized."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import transformers

from adopted._case import Case

VOCABULARY = 97
LAYERS = 2
WIDTH = 128
ENCODED_LENGTH = 48
LONGEST = 4096
MEL_BINS = 16

SHAPE: dict[str, Any] = {
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 2 * WIDTH,
    "decoder_ffn_dim": 2 * WIDTH,
    "init_std": 0.15,  # so that attention tells tokens apart, as with trained weights
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
# T5 is missing, since its Flax model calls jnp.clip as current JAX does not have it.
MODELS: dict[str, dict[str, Any]] = {
    "Bart": SHAPE | {"max_position_embeddings": LONGEST, "forced_eos_token_id": None},
    "Pegasus": SHAPE | {"max_position_embeddings": LONGEST},
    "Whisper": SHAPE
    | {
        "max_source_positions": ENCODED_LENGTH,
        "max_target_positions": LONGEST,
        "num_mel_bins": MEL_BINS,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    },
}


def cases() -> list[Case]:
    """Return a random model of each family."""
    return [case(name) for name in MODELS]


def model(name: str) -> Any:
    """Return a random model of a family."""
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, **MODELS[name])
    options = {"input_shape": (1, MEL_BINS, 2 * ENCODED_LENGTH)} if name == "Whisper" else {}
    return getattr(transformers, f"Flax{name}ForConditionalGeneration")(config, seed=0, **options)


def encoder_input(name: str, batch: int) -> np.ndarray:
    """Return random input of a model's encoder: mel spectra (batch, bins, frames), or tokens."""
    generator = np.random.default_rng(0)
    if name == "Whisper":
        return generator.normal(size=(batch, MEL_BINS, 2 * ENCODED_LENGTH)).astype(np.float32)
    return generator.integers(3, VOCABULARY, (batch, ENCODED_LENGTH)).astype(np.int32)


def case(name: str) -> Case:
    """Describe a model by its decoder, which keeps what was encoded beside its cache."""
    whole = model(name)

    def step(params, tokens, position, cache):
        batch, count = tokens.shape
        out = whole.decode(
            tokens,
            (cache["encoded"],),
            decoder_attention_mask=cache["mask"],
            decoder_position_ids=jnp.broadcast_to(position + jnp.arange(count), (batch, count)),
            past_key_values=cache["past"],
            params=params,
        )
        return out.logits, {**cache, "past": out.past_key_values}

    def cache(batch: int, length: int):
        encoded = whole.encode(encoder_input(name, batch)).last_hidden_state
        past = whole.init_cache(batch, length, (encoded,))
        return {"encoded": encoded, "past": past, "mask": jnp.ones((batch, length), jnp.int32)}

    packages = ("transformers", "flax")
    return Case(f"transformers {name}", packages, step, whole.params, cache, VOCABULARY)
