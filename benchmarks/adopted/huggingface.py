"""Flax models of transformers 4, small and random, and Llama with the bundled model's trained weights."""

import json
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax.numpy as jnp
import numpy as np
import transformers
from jax import lax
from safetensors.flax import load_file, save_file

from adopted._case import PADDING, Case

VOCABULARY = 97
LAYERS, HEADS, WIDTH, LONGEST = 2, 4, 256, 4096

LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONGEST,
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": LLAMA,
    "Mistral": LLAMA,
    "Gemma": LLAMA | {"num_key_value_heads": 1, "head_dim": 64, "hidden_activation": "gelu_pytorch_tanh"},
    "GPT2": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": LONGEST},
    "GPTJ": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": LONGEST, "rotary_dim": 32},
    "Bloom": {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
    "OPT": {
        "hidden_size": WIDTH,
        "word_embed_proj_dim": WIDTH,
        "ffn_dim": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": LONGEST,
    },
}


def cases() -> list[Case]:
    return [*(case(f"transformers {name}", model(name)) for name in MODELS), trained()]


def model(name: str) -> Any:
    """A random model of a family."""
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, **MODELS[name])
    made = getattr(transformers, f"Flax{name}ForCausalLM", None) or getattr(
        transformers, f"Flax{name}LMHeadModel"
    )
    return made(config, seed=0)


def trained() -> Case:
    """Llama with the weights that qpaged brings, written as a checkpoint, on text of the kind they know."""
    tiny = Path(str(files("qpaged.models") / "tiny"))
    with TemporaryDirectory() as folder:
        config = json.loads((tiny / "config.json").read_text()) | {
            "tie_word_embeddings": False,
            "max_position_embeddings": LONGEST,
        }
        (Path(folder) / "config.json").write_text(json.dumps(config))
        weights = {name: w.astype(jnp.float32) for name, w in load_file(tiny / "model.safetensors").items()}
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # Flax's Llama does not tie them
        save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        llama = transformers.FlaxLlamaForCausalLM.from_pretrained(folder)
    text = np.frombuffer(Path(transformers.__file__).read_bytes(), np.uint8)
    return case("transformers Llama, trained", llama, prompt=text)


def case(name: str, model: Any, prompt: Any = None) -> Case:
    positions = not isinstance(model, transformers.FlaxBloomForCausalLM)

    def step(params, tokens, position, cache):
        batch, count = tokens.shape
        mask = lax.dynamic_update_slice(cache["mask"], (tokens != PADDING).astype(jnp.int32), (0, position))
        places = jnp.broadcast_to(position + jnp.arange(count), (batch, count))
        known = {"position_ids": places} if positions else {}
        out = model(tokens, attention_mask=mask, params=params, past_key_values=cache["past"], **known)
        return out.logits, {"past": out.past_key_values, "mask": mask}

    def cache(batch: int, length: int):
        # What comes after the present is masked by the model; the mask is of padding.
        return {"past": model.init_cache(batch, length), "mask": jnp.ones((batch, length), jnp.int32)}

    vocabulary = model.config.vocab_size
    return Case(
        name, ("transformers", "flax"), step, model.params, cache, vocabulary, pads=True, prompt=prompt
    )
