"""The configuration of a decoder: its sizes, and the features in which the families differ."""

from dataclasses import dataclass, field, replace
from typing import Literal

from qpaged._arguments import check_count
from qpaged._bad_argument import BadArgumentError
from qpaged.models.experts import Experts
from qpaged.models.rope import LongRopeScaling, Rope

LayerType = Literal["full_attention", "sliding_attention"]
Activation = Literal["silu", "gelu_pytorch_tanh"]

FULL: LayerType = "full_attention"
SLIDING: LayerType = "sliding_attention"

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class AttentionOptions:
    """The attention of one layer: keyword arguments of :func:`qpaged.paged_attention`.

    Attributes:
        softmax_scale: factor of the dot products of queries and keys.
        sliding_window: number of positions that a query attends to, its own included; all if None.
        logits_soft_cap: scores become cap · tanh(score / cap); not capped if None.
    """

    softmax_scale: float
    sliding_window: int | None = None
    logits_soft_cap: float | None = None


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and features of a decoder, named as by Hugging Face where possible. Defaults are a Llama's.

    Attributes:
        intermediate_size: inner channels of an MLP, which is one expert's where there are experts.
        head_dim: channels of a head.
        tie_word_embeddings: the embedding is the output matrix too.
        max_position_embeddings: the longest sequence that the model is made for, in tokens.
        rope: rotary positions.
        sliding_rope: rotary positions of the layers with a sliding window; as ``rope`` if None.
        layer_types: "full_attention" or "sliding_attention" for each layer; all full if empty.
        sliding_window: tokens that a "sliding_attention" layer attends to, the query's own included.
        attention_bias: the projections to query, key and value have a bias.
        output_bias: attention's output projection has a bias.
        mlp_bias: the projections of the MLP have a bias.
        query_key_norm: each head's query and key are normed before they are rotated (Qwen 3, Gemma 3).
        fused_projections: query, key and value are one matrix, gate and up another (Phi-3).
        sandwich_norms: the outputs of attention and MLP are normed as well as their inputs (Gemma 2).
        unit_offset: norms multiply by 1 + w rather than w (Gemma).
        scale_embeddings: embeddings are multiplied by sqrt(hidden_size) (Gemma).
        hidden_act: the activation of the MLP's gate.
        experts: MLPs of which each token goes through a few (Mixtral, Qwen 3 MoE); one MLP for all if None.
        query_pre_attn_scalar: attention's scores are divided by its square root; by that of head_dim if None.
        attn_logit_softcapping: the cap of attention's scores; not capped if None.
        final_logit_softcapping: the cap of the logits; not capped if None.
        model_type: the family that it was read as.

    Raises:
        ValueError: sizes that do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    rope: Rope = field(default_factory=Rope)
    sliding_rope: Rope | None = None
    layer_types: tuple[LayerType, ...] = ()
    sliding_window: int | None = None
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False
    fused_projections: bool = False
    sandwich_norms: bool = False
    unit_offset: bool = False
    scale_embeddings: bool = False
    hidden_act: Activation = "silu"
    experts: Experts | None = None
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    model_type: str = "llama"

    def __post_init__(self) -> None:
        for name in SIZES:
            check_size(name, getattr(self, name))
        check_count("num_hidden_layers", self.num_hidden_layers)
        if self.experts is not None:
            check_count("num_experts", self.experts.num_experts)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "num_attention_heads must be a multiple of num_key_value_heads, so that every KV head "
                f"serves as many query heads; got {self.num_attention_heads} and {self.num_key_value_heads}."
            )
        self._check_rope(self.rope)
        if self.sliding_rope is not None:
            self._check_rope(self.sliding_rope)
        self._check_layer_types()

    def _check_rope(self, rope: Rope) -> None:
        rotary_dim = rope.rotary_dim(self.head_dim)
        if rotary_dim % 2 or not 0 < rotary_dim <= self.head_dim:
            raise ValueError(
                f"partial_rotary_factor {rope.partial_rotary_factor:g} of head_dim {self.head_dim} gives "
                f"{rotary_dim} rotary channels; it must give an even number, from 2 to head_dim."
            )
        if isinstance(rope.scaling, LongRopeScaling):
            num_pairs = rotary_dim // 2
            num_short = len(rope.scaling.short_factor)
            num_long = len(rope.scaling.long_factor)
            if num_short != num_pairs or num_long != num_pairs:
                raise ValueError(
                    f"short_factor and long_factor must have one number for each of the {num_pairs} "
                    f"rotary pairs, but have {num_short} and {num_long}."
                )

    def _check_layer_types(self) -> None:
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types must have one for each of the {self.num_hidden_layers} layers, "
                f"but has {len(self.layer_types)}."
            )
        if SLIDING in self.layer_types:
            check_size("sliding_window", self.sliding_window)

    def attention(self, layer: int) -> AttentionOptions:
        """Return the attention options of a layer."""
        return AttentionOptions(
            softmax_scale=(self.query_pre_attn_scalar or self.head_dim) ** -0.5,
            sliding_window=self.sliding_window if self._has_sliding_window(layer) else None,
            logits_soft_cap=self.attn_logit_softcapping,
        )

    def layer_rope(self, layer: int) -> Rope:
        """Return the rotary positions of a layer."""
        if self.sliding_rope is not None and self._has_sliding_window(layer):
            return self.sliding_rope
        return self.rope

    def _has_sliding_window(self, layer: int) -> bool:
        return bool(self.layer_types) and self.layer_types[layer] == SLIDING

    def for_context(self, length: int) -> "DecoderConfig":
        """Return the configuration of the same model for sequences that grow to ``length`` tokens.

        It differs only with longrope (Phi-3), which rotates long sequences at other speeds from their first
        token on: as read from a file, such a model is that of its original context, which is its
        max_position_embeddings.

        Raises:
            ValueError: the model is not made for sequences so long.
        """
        scaling = self.rope.scaling
        longest = self.max_position_embeddings
        if isinstance(scaling, LongRopeScaling):
            longest = scaling.max_position_embeddings
        if length < 1:
            raise BadArgumentError("length", f"must be at least 1, but came as {length:,}.")
        if length > longest:
            raise BadArgumentError(
                "length",
                f"must be at most {longest:,}, the longest that the model is made for, but came as "
                f"{length:,}.",
            )
        if not isinstance(scaling, LongRopeScaling) or length <= self.max_position_embeddings:
            return self
        long_rope = replace(self.rope, scaling=replace(scaling, long=True))
        return replace(self, rope=long_rope, max_position_embeddings=longest)


def check_size(name: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, but came as {value!r}.")
