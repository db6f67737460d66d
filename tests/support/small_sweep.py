"""The sizes of the decoder that the tests sweep, and a sweep's recorded results."""

from pathlib import Path

from qpaged.models import DecoderConfig

SAMPLE = Path(__file__).parents[1] / "sweep" / "sample_results.json"

SIZES = DecoderConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)
