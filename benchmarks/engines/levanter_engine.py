"""Runs levanter's inference engine on its own pages and on qpaged's, and compares what it says.

    pip install --pre levanter==1.2.dev1644
    python benchmarks/engines/levanter_engine.py CHECKPOINT --out benchmarks/results/engine_levanter.json

The engine's source is untouched; `docs/examples/levanter_pages.py` gives it other pages. It answers the same
prompts greedily on each. Every answer is then fed to the model at once, on each cache, for the KL divergence
to the engine's own pages.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path

import haliax as hax
import jax
import jax.numpy as jnp
import jmp
import numpy as np
import transformers
from levanter.compat.hf_checkpoints import HFCheckpointConverter
from levanter.inference.engine import InferenceEngine, InferenceEngineConfig, Request
from levanter.inference.jit_scheduler import SeqDecodingParams
from levanter.inference.page_table import PageBatchInfo, PageTableSpec
from levanter.models.llama import LlamaConfig

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "docs" / "examples")]
from levanter_pages import pages_of  # noqa: E402
from prompts import PROMPTS  # noqa: E402
from record import circumstances, save  # noqa: E402

FORMATS = "plain", "int8", "int8:token+rotate", "int4+rotate+exact128"
OWN = "levanter's own"
PAGE_SIZE, CONTEXT, GENERATED = 16, 512, 64
MEMORY = 2**30


def load(checkpoint: Path):
    """Return model and tokenizer of a Llama checkpoint, computing in float32."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"))
    converter = HFCheckpointConverter(
        LlamaConfig, str(checkpoint), tokenizer=tokenizer, HfConfigClass=transformers.LlamaConfig
    )
    config = converter.config_from_hf_config(converter.hf_config_from_hf_checkpoint(str(checkpoint)))
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))  # levanter does not load without one
    with jax.set_mesh(mesh):
        model = converter.load_pretrained(
            config.model_type, str(checkpoint), config, resize_vocab_to_match_tokenizer=False
        )
    model = jax.device_put(model, jax.devices()[0])
    return jmp.get_policy("f32").cast_to_compute(model), tokenizer


def engine_config(pages: int | None = None) -> InferenceEngineConfig:
    per_sequence = CONTEXT // PAGE_SIZE
    return InferenceEngineConfig(
        max_seq_len=CONTEXT,
        page_size=PAGE_SIZE,
        max_seqs=len(PROMPTS),
        max_pages=pages or len(PROMPTS) * per_sequence,
        max_seqs_in_prefill=len(PROMPTS),
        max_prefill_size=256,
        max_queued_tokens=64,
        compute_dtype=jnp.float32,
    )


def answers(model, tokenizer, config) -> tuple[list[list[int]], float]:
    """Return the tokens that the engine says after each prompt, prompt included, and the seconds it takes."""
    engine = InferenceEngine.from_model_with_config(model, tokenizer, config)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    requests = [
        Request(
            prompt_tokens=prompt,
            request_id=index,
            decode_params=SeqDecodingParams(
                max_num_tokens=jnp.asarray(len(prompt) + GENERATED, jnp.int32),
                stop_tokens=None,
                temperature=jnp.asarray(0.0),
                key=jax.random.PRNGKey(0),
            ),
            n_generations=1,
        )
        for index, prompt in enumerate(prompts)
    ]
    engine.generate(requests)  # compiles
    start = time.perf_counter()
    result = engine.generate(requests)
    return [list(map(int, tokens)) for tokens in result.tokens], time.perf_counter() - start


def log_probabilities(model, config, tokens: list[int]) -> np.ndarray:
    """Return the model's log-probabilities [tokens, vocabulary] of a whole sequence at once."""
    size = CONTEXT
    pages = size // PAGE_SIZE
    cache = hax.named_jit(model.initial_cache)(PageTableSpec(pages, PAGE_SIZE), dtype=config.compute_dtype)
    count = len(tokens)
    is_there = np.arange(size) < count
    batch = PageBatchInfo(
        slot_ids=hax.named(jnp.zeros(1, jnp.int32), "seq"),
        page_indices=hax.named(jnp.arange(pages, dtype=jnp.int32)[None], ("seq", "page")),
        seq_lens=hax.named(jnp.full(1, count, jnp.int32), "seq"),
        cu_q_lens=hax.named(jnp.asarray([0, count], jnp.int32), "seq"),
        num_seqs=jnp.asarray(1, jnp.int32),
        new_token_dests=hax.named(jnp.where(is_there, jnp.arange(size), -1).astype(jnp.int32), "position"),
        page_size=PAGE_SIZE,
    )
    padded = hax.named(jnp.asarray(np.pad(tokens, (0, size - count)), jnp.int32), "position")
    positions = hax.named(jnp.where(is_there, jnp.arange(size), -1).astype(jnp.int32), "position")
    logits, _ = hax.named_jit(type(model).decode)(model, padded, cache, batch, positions)
    return np.asarray(jax.nn.log_softmax(logits.array[:count], axis=-1))


def divergence(own: list[np.ndarray], other: list[np.ndarray]) -> tuple[float, float]:
    """Return the mean KL divergence in nats a token, and its standard error over sequences."""
    means = [float((np.exp(p) * (p - q)).sum(axis=-1).mean()) for p, q in zip(own, other, strict=True)]
    return float(np.mean(means)), float(np.std(means, ddof=1) / len(means) ** 0.5)


def cache_bytes(model, config) -> int:
    cache = hax.named_jit(model.initial_cache)(
        PageTableSpec(config.max_pages, config.page_size), dtype=config.compute_dtype
    )
    return sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(cache))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--formats", nargs="+", default=FORMATS, help="of the pages")
    parser.add_argument("--out", type=Path, help="where to save the table")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.checkpoint)
    config = engine_config()
    prompts = [len(tokenizer.encode(prompt)) for prompt in PROMPTS]
    runs, texts, reference = [], [], []
    adapter = (ROOT / "docs" / "examples" / "levanter_pages.py").read_text().splitlines()
    results = {
        **circumstances(["levanter", "haliax"]),
        "model": arguments.checkpoint.resolve().name,
        "adapter_lines": len(adapter),
        "generated": GENERATED,
        "runs": runs,
    }
    for name in (OWN, *arguments.formats):
        jax.clear_caches()  # of programs with other pages
        quantizer = None if name == "plain" else name
        given = contextlib.nullcontext() if name == OWN else pages_of(quantizer, config)
        with given:
            said, seconds = answers(model, tokenizer, config)
            total = cache_bytes(model, config)
            texts = texts or said
            logs = [log_probabilities(model, config, tokens) for tokens in texts]
        reference = reference or logs
        same = [
            np.mean(np.asarray(a[start:]) == np.asarray(b[start:]))
            for a, b, start in zip(texts, said, prompts, strict=True)
        ]
        kl, error = divergence(reference, logs)
        per_page = total / config.max_pages
        run = {
            "pages": name,
            "same_tokens": float(np.mean(same)),
            "kl": kl,
            "kl_error": error,
            "bytes": total,
            "sequences_in_a_gibibyte": int(MEMORY / per_page * PAGE_SIZE / CONTEXT),
            "seconds": seconds,
        }
        print(run, flush=True)
        runs.append(run)
        save(arguments.out, results)


if __name__ == "__main__":
    main()
