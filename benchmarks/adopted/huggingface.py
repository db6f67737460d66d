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
LAYERS = 2
HEADS = 4
WIDTH = 256
LONGEST = 4096

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
    """Return a random model of each family, and Llama with trained weights."""
    return [*(case(f"transformers {name}", model(name)) for name in MODELS), trained()]


def model(name: str) -> Any:
    """Return a random model of a family."""
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, **MODELS[name])
    class_name = f"Flax{name}ForCausalLM"
    if not hasattr(transformers, class_name):
        class_name = f"Flax{name}LMHeadModel"
    return getattr(transformers, class_name)(config, seed=0)


def trained() -> Case:
    """Return Llama with qpaged's bundled weights, on Python source, which is what they were trained on."""
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


def case(name: str, model: Any, prompt: np.ndarray | None = None) -> Case:
    """Describe a causal language model."""
    takes_positions = not isinstance(model, transformers.FlaxBloomForCausalLM)

    def step(params, tokens, position, cache):
        batch, count = tokens.shape
        mask = lax.dynamic_update_slice(cache["mask"], (tokens != PADDING).astype(jnp.int32), (0, position))
        options = {}
        if takes_positions:
            options["position_ids"] = jnp.broadcast_to(position + jnp.arange(count), (batch, count))
        out = model(tokens, attention_mask=mask, params=params, past_key_values=cache["past"], **options)
        return out.logits, {"past": out.past_key_values, "mask": mask}

    def cache(batch: int, length: int):
        # The mask is for padding; the model itself masks the future.
        return {"past": model.init_cache(batch, length), "mask": jnp.ones((batch, length), jnp.int32)}

    vocabulary = model.config.vocab_size
    return Case(
        name, ("transformers", "flax"), step, model.params, cache, vocabulary, pads=True, prompt=prompt
    )
