"""Tests of KL and perplexity against transformers in torch, with keys and values rounded in attention."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import qpaged
from qpaged.cli import main

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402

FORMATS = ("int8:token", "int4:token", "plain/int4:token")  # a row's scale is its own: no order to keep
CONTEXT, SEQUENCES = 96, 6


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():  # far from uniform attention and predictions
            weight.mul_(12 if "q_proj" in name or "k_proj" in name else 4 if "norm" not in name else 1)
    return model


@pytest.fixture(scope="module")
def swept(model, tmp_path_factory):
    """Return the sequences of a sweep over random bytes, and its runs by format."""
    directory = tmp_path_factory.mktemp("torch")
    model.save_pretrained(directory)
    data = np.random.default_rng(0).integers(0, 256, SEQUENCES * CONTEXT + 1).astype(np.uint8)
    (directory / "text").write_bytes(data.tobytes())
    arguments = [
        "sweep", directory, "--tokenizer", "bytes", "--text", directory / "text", "--context", CONTEXT,
        "--tokens", SEQUENCES * CONTEXT, "--dtype", "float32", "--out", directory,
        "--formats", ",".join(FORMATS),
    ]  # fmt: skip
    assert main(list(map(str, arguments))) == 0
    runs = json.loads((directory / "results.json").read_text())["runs"]
    windows = data[np.arange(SEQUENCES)[:, None] * CONTEXT + np.arange(CONTEXT + 1)]
    return windows.astype(np.int64), {run["format"]: run for run in runs}


def rounded(quantizer, tensor):
    """Return a tensor [batch, heads, tokens, channels] with each row encoded and decoded."""
    if quantizer is None:
        return tensor
    return torch.tensor(np.array(quantizer.quantize(jnp.asarray(tensor.numpy())).dequantize()))


def log_p(model, tokens, spelling="plain"):
    """Return log p [sequences, tokens, vocabulary] float64 by transformers."""
    cache_format = qpaged.CacheFormat.of(spelling)

    def attention(module, query, key, value, *args, **kwargs):
        key, value = rounded(cache_format.key, key), rounded(cache_format.value, value)
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    transformers.AttentionInterface.register("rounded", attention)
    transformers.AttentionMaskInterface.register(
        "rounded", transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    )
    model.set_attn_implementation("rounded")
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor(tokens)).logits.double(), dim=-1).numpy()


@pytest.mark.parametrize("format", FORMATS)
def test_kl_and_perplexity_agree_to_1_percent(model, swept, format):
    windows, runs = swept
    plain = log_p(model, windows[:, :-1])
    found = log_p(model, windows[:, :-1], format)
    kl = (np.exp(plain) * (plain - found)).sum(axis=-1)
    true = np.take_along_axis(found, windows[:, 1:, None], axis=-1)
    assert runs[format]["kl_mean"] == pytest.approx(kl.mean(), rel=0.01)
    assert runs[format]["kl_p99"] == pytest.approx(np.percentile(kl, 99), rel=0.01)
    assert runs[format]["perplexity"] == pytest.approx(np.exp(-true.mean()), rel=0.01)
    assert kl.mean() > 1e-5  # far above what float32 leaves
