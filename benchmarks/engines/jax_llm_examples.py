"""Runs the serving loop of jax-llm-examples on its own cache and on qpaged's pages, and compares both.

    git clone https://github.com/jax-ml/jax-llm-examples
    python benchmarks/engines/jax_llm_examples.py CHECKPOINT --source jax-llm-examples --out RESULTS.json

Its Llama 3 and its serving loop are untouched; `docs/examples/jax_llm_examples_pages.py` gives the loop other
pages to decode on. It answers the same prompts greedily on each. Its own pages have a kernel for GPUs alone:
on CPU, what it is compared with is its contiguous cache. The model's norms round to bfloat16, so that the
last bit of a sum may change a token; they are replaced by norms that do not, but for the last pair of runs.

KL is of the model's next-token distributions on pages of a format, to those on plain pages, whose tokens are
its own: over the answers of the first run, token by token, on empty pages at first.
"""

import argparse
import contextlib
import sys
import types
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "docs" / "examples")]
from prompts import PROMPTS  # noqa: E402
from record import circumstances, save  # noqa: E402

from qpaged import models  # noqa: E402

FORMATS = "plain", "int8", "int8:token+rotate", "int4:token+rotate+exact32"
OWN = "its own, contiguous"
PAGE_SIZE, CONTEXT, GENERATED, ROWS = 16, 256, 64, 8
MEMORY = 2**30


def import_source(source: Path):
    """Import the model and the serving loop from a checkout, without its server."""
    sys.path[:0] = [str(source / "llama3"), str(source / "serving")]
    sys.modules["serving_jax.http_server"] = types.SimpleNamespace(
        run_http_server=None
    )  # it needs more packages
    global jax_llm_examples_pages, model, serving
    import jax_llm_examples_pages
    import serving_jax as serving
    from llama3_jax import model


def load(checkpoint: Path):
    """Return configuration and weights of a Llama checkpoint, as the model has them, in float32."""
    ours, params = models.load_checkpoint(checkpoint, "float32")
    mesh = jax.make_mesh((1, 1, 1), ("x", "y", "z"), axis_types=(AxisType.Explicit,) * 3)
    config = model.Config(
        embed=ours.hidden_size,
        ffw_size=ours.intermediate_size,
        q_heads=ours.num_attention_heads,
        kv_heads=ours.num_key_value_heads,
        num_layers=ours.num_hidden_layers,
        head_dim=ours.head_dim,
        vocab_size=ours.vocab_size,
        max_seq_len=CONTEXT,
        causal=True,
        use_prefill_attn_kernel=False,
        use_decode_attn_kernel=False,
        dtype=jnp.float32,
        mesh=mesh,
        rope_theta=ours.layer_rope(0).theta,
        rope_scaling_factor=1.0,
        quant_layer=False,
        quant_cache=False,
    )

    def layer(index: int):
        def of(name: str, *shape: int):
            weight = params[f"model.layers.{index}.{name}.weight"]
            return (weight.T if weight.ndim == 2 else weight).reshape(shape or weight.T.shape)

        heads = {"q": ours.num_attention_heads, "k": ours.num_key_value_heads, "v": ours.num_key_value_heads}
        projections = {
            name: of(f"self_attn.{name}_proj", ours.hidden_size, count, ours.head_dim)
            for name, count in heads.items()
        }
        return model.Layer(
            **projections,
            o=of("self_attn.o_proj", ours.num_attention_heads, ours.head_dim, ours.hidden_size),
            w_gate=of("mlp.gate_proj"),
            w_up=of("mlp.up_proj"),
            w_down=of("mlp.down_proj"),
            attn_pre_gamma=of("input_layernorm"),
            attn_post_gamma=of("post_attention_layernorm"),
        )

    embedding = params["model.embed_tokens.weight"]
    weights = model.Weights(
        layers=[layer(index) for index in range(ours.num_hidden_layers)],
        embedding=embedding,
        gamma_final=params["model.norm.weight"],
        lm_head=params.get("lm_head.weight", embedding).T,
    )
    return config, jax.device_put(weights, model.Weights.shardings(config))


def exact_norm(x: jax.Array, gamma: jax.Array) -> jax.Array:
    """Do what the model's rms_norm does, without rounding to bfloat16."""
    return gamma * x / jnp.sqrt(jnp.mean(x.astype(jnp.float32) ** 2, axis=-1, keepdims=True) + 1e-6)


def make_pages(config, quantizer: str):
    """Return the loop's paged cache with pages of a format."""
    paged = model.PagedKVCache.init(jax.random.key(0), config, ROWS, ROWS * CONTEXT // PAGE_SIZE, PAGE_SIZE)
    return jax_llm_examples_pages.pages_of(None if quantizer == "plain" else quantizer, paged, config)


def predictions(config, weights, texts: np.ndarray, quantizer: str) -> np.ndarray:
    """Return the log-probabilities [rows, tokens, vocabulary] of what follows each token of texts."""

    @partial(jax.jit, donate_argnames=("cache",))
    def forward(inputs, weights, cache):
        logits, cache = model.forward(inputs, jnp.ones_like(inputs), weights, config, cache)
        return jax.nn.log_softmax(logits[:, 0].astype(jnp.float32)), cache

    rows = []
    with jax.sharding.set_mesh(config.mesh):
        cache = make_pages(config, quantizer)
        for tokens in texts.T:
            log_probabilities, cache = forward(jnp.asarray(tokens[:, None]), weights, cache)
            rows.append(np.asarray(log_probabilities))
    return np.stack(rows, axis=1)


def mean_kl(reference: np.ndarray, other: np.ndarray, is_answer: np.ndarray) -> tuple[float, float]:
    """Return the mean KL over tokens of answers, and the standard error of the means of rows."""
    of_tokens = (np.exp(reference) * (reference - other)).sum(axis=-1)
    of_rows = [of_row[mask].mean() for of_row, mask in zip(of_tokens, is_answer, strict=True)]
    return float(of_tokens[is_answer].mean()), float(np.std(of_rows, ddof=1) / len(of_rows) ** 0.5)


def answers(config, weights, tokenizer, quantizer: str | None) -> tuple[list[list[int]], int]:
    """Return what the loop says after each prompt, and the bytes of the cache that it decodes on.

    Args:
        quantizer: a format's spelling, "plain", or None for the loop's own cache.
    """
    utils = serving.serving_loop  # whose wrapper the loop takes
    attention = jax_llm_examples_pages.attention_cache_utils
    key = jax.random.key(0)
    own = (attention.kvcache_get_sequence, attention.kvcache_insert_sequences)
    with jax.sharding.set_mesh(config.mesh):
        prefill_cache = utils.AttentionWrapper(model.KVCache.init(key, config, ROWS), *own)
        if quantizer is None:
            decode_cache = utils.AttentionWrapper(model.KVCache.init(key, config, ROWS), *own)
        else:
            decode_cache = utils.AttentionWrapper(
                make_pages(config, quantizer),
                jax_llm_examples_pages.get_sequence,
                jax_llm_examples_pages.insert_sequences,
            )
    total = sum(leaf.nbytes for leaf in jax.tree.leaves((decode_cache.cache.k, decode_cache.cache.v)))

    @partial(jax.jit, donate_argnames=("cache",))
    def forward(inputs, weights, cache, config):
        logits, cache = model.forward(inputs, (inputs != 0).astype(jnp.int32), weights, config, cache)
        return jnp.argmax(logits, axis=-1), cache

    settings = serving.ServingConfig(
        decode_steps=16,
        decode_batch_size=ROWS,
        prefill_batch_size=ROWS,
        max_decode_length=GENERATED,
        use_prefix_cache=False,
    )
    loop = serving.ServingLoop(settings, config, forward, weights, prefill_cache, weights, decode_cache, True)
    prompts = [tokenizer.encode(prompt.encode()).ids.tolist() for prompt in PROMPTS]
    for index, prompt in enumerate(prompts):
        loop.add_request(serving.UserRequestPrompt(index + 1, prompt))
    while len(loop.results) < len(prompts) or not all(result.done for result in loop.results.values()):
        loop.serving_step()
    said = [loop.results[index + 1].token_list for index in range(len(prompts))]
    return [tokens[len(prompt) :][:GENERATED] for tokens, prompt in zip(said, prompts, strict=True)], total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--source", type=Path, required=True, help="a checkout of jax-llm-examples")
    parser.add_argument("--formats", nargs="+", default=FORMATS, help="of the pages")
    parser.add_argument("--out", type=Path, help="where to save the table")
    arguments = parser.parse_args()
    import_source(arguments.source)
    config, weights = load(arguments.checkpoint)
    tokenizer = models.load_tokenizer(arguments.checkpoint)
    adapter = Path(jax_llm_examples_pages.__file__).read_text().splitlines()
    runs: list[dict[str, object]] = []
    results = {
        **circumstances(),
        "model": arguments.checkpoint.resolve().name,
        "adapter_lines": len(adapter),
        "generated": GENERATED,
        "runs": runs,
    }
    reference: list[list[int]] = []
    prompts = [tokenizer.encode(prompt.encode()).ids.tolist() for prompt in PROMPTS]
    texts = is_answer = plain = np.zeros(0)
    for name, rounds in [
        *((name, False) for name in (OWN, *arguments.formats)),
        (OWN, True),
        ("plain", True),
    ]:
        jax.clear_caches()  # of programs with other pages
        norms = contextlib.nullcontext() if rounds else mock.patch.object(model, "rms_norm", exact_norm)
        with jax_llm_examples_pages.qpaged_attention(), norms:
            said, total = answers(config, weights, tokenizer, None if name == OWN else name)
            if name == OWN:
                reference = said
                whole = [prompt + answer for prompt, answer in zip(prompts, said, strict=True)]
                texts = np.asarray([text[: min(map(len, whole))] for text in whole], np.int32)
                is_answer = np.arange(texts.shape[1]) >= np.asarray([[len(prompt) - 1] for prompt in prompts])
            kl = None
            if name != OWN and not rounds:
                predicted = predictions(config, weights, texts, name)
                plain = predicted if name == "plain" else plain
                kl = mean_kl(plain, predicted, is_answer)
        same = [np.mean(np.asarray(a) == np.asarray(b)) for a, b in zip(reference, said, strict=True)]
        run = {
            "pages": name,
            "norms_round": rounds,
            "same_tokens": float(np.mean(same)),
            "kl": kl,
            "bytes": total,
            "sequences_in_a_gibibyte": int(MEMORY * ROWS / total),
        }
        print(run, flush=True)
        runs.append(run)
        save(arguments.out, results)


if __name__ == "__main__":
    main()
