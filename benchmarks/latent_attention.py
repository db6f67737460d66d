"""Runs transformers' DeepSeek-V2 on latent pages of qpaged, and compares its logits and its bytes.

    pip install -e ".[models]"
    python benchmarks/latent_attention.py --out benchmarks/results/latent_attention.json

A random model of DeepSeek-V2's form. Its attention is replaced: the query is multiplied with the keys' part
of ``kv_b_proj``, so that it meets the latent and its rotary part as they lie in the cache, and what comes out
is multiplied with the values' part. KL is of the next token's distribution, from the model's own attention.
"""

import argparse
import functools
from pathlib import Path

import jax
import numpy as np
import torch
from record import circumstances, save
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention

import qpaged

FORMATS = "plain", "int8", "int8:token", "int8:token+rotate", "int4:token+rotate+exact128", "fp8_e4m3"
PAGE_SIZE = 16


def random_model(q_lora_rank: int | None = 96, layers: int = 4) -> DeepseekV2ForCausalLM:
    """Return a small model with DeepSeek-V2's latent: 512 channels, and 64 of the rotary part."""
    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        first_k_dense_replace=layers,  # no experts: the subject is attention
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        max_position_embeddings=1024,
        initializer_range=0.08,
        attn_implementation="eager",
    )
    return DeepseekV2ForCausalLM(config).eval()


def as_jax(tensor: torch.Tensor) -> jax.Array:
    return jax.numpy.asarray(tensor.detach().numpy())


@functools.partial(jax.jit, static_argnames="scale")
def attend(view, query, latent, step, scale):
    view = view.write_prefill_to_cache(latent, None, step)
    return qpaged.paged_attention(query, view, step, softmax_scale=scale)


def forward(quantizer: str | None, attention, hidden_states, position_embeddings, **kwargs):
    """Do what DeepseekV2Attention.forward does, for one sequence, by latent pages of a format."""
    _, tokens, _ = hidden_states.shape
    nope, rotary, rank = attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.kv_lora_rank
    if attention.q_lora_rank is None:
        query = attention.q_proj(hidden_states)
    else:
        query = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(hidden_states)))
    query = query.view(tokens, -1, nope + rotary)
    latent, rotary_key = torch.split(attention.kv_a_proj_with_mqa(hidden_states)[0], [rank, rotary], dim=-1)

    def rotated(rows: torch.Tensor) -> torch.Tensor:  # [tokens, heads, rotary]
        pairs = torch.view_as_complex(rows.float().reshape(*rows.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * position_embeddings[0][:, None]).flatten(-2)

    of_keys, of_values = torch.split(
        attention.kv_b_proj.weight.view(-1, nope + attention.v_head_dim, rank),
        [nope, attention.v_head_dim],
        dim=1,
    )
    absorbed = torch.einsum("thn,hnr->thr", query[..., :nope], of_keys)
    query = torch.cat([absorbed, rotated(query[..., nope:])], dim=-1)
    row = torch.cat([attention.kv_a_layernorm(latent)[:, None], rotated(rotary_key[:, None])], dim=-1)
    pages = -(-tokens // PAGE_SIZE)
    step = qpaged.PagedAttentionMetadata.prefill(position=np.arange(tokens), page_table=np.arange(pages))
    out = attend(
        latent_view(quantizer, pages, rank, rotary), as_jax(query), as_jax(row), step, attention.scaling
    )
    values = torch.einsum("thr,hvr->thv", torch.from_numpy(np.array(out)), of_values)
    return attention.o_proj(values.reshape(1, tokens, -1)), None


def latent_view(quantizer: str | None, pages: int, rank: int, rotary: int) -> qpaged.PagedAttentionCacheView:
    metadata = qpaged.PagedAttentionCacheMetaData(
        batch_size=1,
        num_hidden_layers=1,
        num_pages_per_layer=pages,
        num_pages_per_sequence=pages,
        max_sequences=pages * PAGE_SIZE,
        page_size=PAGE_SIZE,
        num_kv_heads=1,
        kv_head_dim_size=rank + rotary,
        hbm_utilization=0.9,
        value_head_dim_size=rank,
        values_in_keys=True,
    )
    return qpaged.PagedAttentionCacheView.init(None, "float32", metadata, 0, None, quantizer)


def log_probabilities(model, tokens: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return torch.log_softmax(model(tokens[None], use_cache=False).logits[0], dim=-1).numpy()


def on_pages(model, tokens: torch.Tensor, quantizer: str | None) -> np.ndarray:
    """Return the log-probabilities [tokens, vocabulary] of the model on latent pages of a format."""
    own = DeepseekV2Attention.forward
    DeepseekV2Attention.forward = lambda self, *args, **kwargs: forward(quantizer, self, *args, **kwargs)
    try:
        return log_probabilities(model, tokens)
    finally:
        DeepseekV2Attention.forward = own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--out", type=Path, help="where to save the table")
    arguments = parser.parse_args()
    model = random_model()
    tokens = torch.randint(0, 1024, (arguments.tokens,), generator=torch.Generator().manual_seed(1))
    own = log_probabilities(model, tokens)
    runs = []
    for name in FORMATS:
        quantizer = None if name == "plain" else name
        other = on_pages(model, tokens, quantizer)
        by_token = (np.exp(own) * (own - other)).sum(axis=-1)
        view = latent_view(quantizer, 64, 512, 64)
        run = {
            "format": name,
            "largest_difference": float(np.abs(own - other).max()),
            "kl": float(by_token.mean()),
            "kl_error": float(by_token.std(ddof=1) / len(by_token) ** 0.5),
            "bytes_per_token": qpaged.pools.count_bytes(view.key_pages).total / (64 * PAGE_SIZE),
        }
        print(run, flush=True)
        runs.append(run)
    save(
        arguments.out, {**circumstances(["transformers", "torch"]), "tokens": arguments.tokens, "runs": runs}
    )


if __name__ == "__main__":
    main()
