"""What a decoder computes, as data: sizes, and the features in which the families differ."""

from dataclasses import dataclass, field, replace
from typing import Literal

from qpaged.models.rope import LongRopeScaling, Rope

LayerType = Literal["full_attention", "sliding_attention"]
Activation = Literal["silu", "gelu_pytorch_tanh"]

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
    """How one layer attends: the keyword arguments of :func:`qpaged.paged_attention`.

    Attributes:
        softmax_scale: factor of the dot products.
        sliding_window: the last so many positions, the query's own included; all if None.
        logits_soft_cap: scores become cap · tanh(score / cap); untouched if None.
    """

    softmax_scale: float
    sliding_window: int | None = None
    logits_soft_cap: float | None = None


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and features of a decoder, under Hugging Face's names where it has some, by default a Llama's.

    Attributes:
        head_dim: channels of a head.
        tie_word_embeddings: the embedding is the output matrix too.
        max_position_embeddings: the longest sequence that the model is made for, in tokens.
        rope: rotary positions.
        sliding_rope: those of the layers with a sliding window, where they have their own.
        layer_types: "full_attention" or "sliding_attention" for each layer; none has a window where empty.
        sliding_window: tokens that a "sliding_attention" layer attends to, the query's own included.
        attention_bias: query, key and value are projected with a bias.
        output_bias: attention's output, too.
        mlp_bias: the linear maps of the MLP, too.
        query_key_norm: each head's query and key are normed before they turn (Qwen 3, Gemma 3).
        fused_projections: query, key and value are one matrix, gate and up another (Phi-3).
        sandwich_norms: attention and MLP are normed after as well as before (Gemma 2).
        unit_offset: norms multiply by 1 + w rather than w (Gemma).
        scale_embeddings: embeddings are multiplied by sqrt(hidden_size) (Gemma).
        hidden_act: what the MLP's gate goes through.
        query_pre_attn_scalar: attention's scores are scaled by its -1/2 power; by head_dim's if None.
        attn_logit_softcapping, final_logit_softcapping: the cap of attention's scores and of the logits.
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
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    model_type: str = "llama"

    def __post_init__(self) -> None:
        for name in SIZES:
            check_size(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "num_attention_heads must be a multiple of num_key_value_heads, so that every KV head "
                f"serves as many query heads; got {self.num_attention_heads} and {self.num_key_value_heads}."
            )
        for rope in {self.rope, self.sliding_rope or self.rope}:
            self._check_rope(rope)
        self._check_layer_types()

    def _check_rope(self, rope: Rope) -> None:
        dim = rope.rotary_dim(self.head_dim)
        if dim % 2 or not 0 < dim <= self.head_dim:
            raise ValueError(
                "the channels of a head that turn, in pairs, must be even in number, from 2 to head_dim; "
                f"got {dim} of head_dim {self.head_dim}."
            )
        if isinstance(rope.scaling, LongRopeScaling):
            found = len(rope.scaling.short_factor), len(rope.scaling.long_factor)
            if found != (dim // 2, dim // 2):
                raise ValueError(
                    f"short_factor and long_factor must have one number for each of the {dim // 2} pairs "
                    f"that turn, but have {found[0]} and {found[1]}."
                )

    def _check_layer_types(self) -> None:
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types must have one for each of the {self.num_hidden_layers} layers, "
                f"but has {len(self.layer_types)}."
            )
        if "sliding_attention" in self.layer_types:
            check_size("sliding_window", self.sliding_window)

    def attention(self, layer: int) -> AttentionOptions:
        """How a layer attends."""
        return AttentionOptions(
            softmax_scale=(self.query_pre_attn_scalar or self.head_dim) ** -0.5,
            sliding_window=self.sliding_window if self._slides(layer) else None,
            logits_soft_cap=self.attn_logit_softcapping,
        )

    def layer_rope(self, layer: int) -> Rope:
        """The rotary positions of a layer."""
        return self.sliding_rope if self.sliding_rope and self._slides(layer) else self.rope

    def _slides(self, layer: int) -> bool:
        return bool(self.layer_types) and self.layer_types[layer] == "sliding_attention"

    def for_context(self, length: int) -> "DecoderConfig":
        """The same model for sequences that grow to ``length`` tokens.

        Differs only with longrope (Phi-3), whose long sequences turn at other speeds from their first token
        on: as read, such a model is that of its original context, which is its max_position_embeddings.

        Raises:
            ValueError: the model is not made for sequences so long.
        """
        scaling = self.rope.scaling
        extended = scaling if isinstance(scaling, LongRopeScaling) else None
        longest = extended.max_position_embeddings if extended else self.max_position_embeddings
        if not 1 <= length <= longest:
            raise ValueError(
                f"length must be from 1 to {longest:,}, the longest that the model is made for, "
                f"but came as {length:,}."
            )
        if extended is None or length <= self.max_position_embeddings:
            return self
        rope = replace(self.rope, scaling=replace(extended, long=True))
        return replace(self, rope=rope, max_position_embeddings=longest)


def check_size(name: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, but came as {value!r}.")
