"""Flax models of Hugging Face transformers with a quantized cache: ``generate`` runs as it is."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qpaged._deprecated import renamed_argument
from qpaged.adopt._arguments import Pytree
from qpaged.adopt._step import PAGE_SIZE, QuantizedStep
from qpaged.adopt._step import quantize_cache as quantize_step
from qpaged.arrays import is_cache_array
from qpaged.formats import CacheFormat, Quantizer

EXAMPLE_LENGTH = 2 * PAGE_SIZE  # of the cache in the example; caches of any other length do as well


@renamed_argument("format", "quantizer")
def quantize_cache(
    model: Any,
    quantizer: str | Path | Quantizer | CacheFormat | None,
    *,
    page_size: int = PAGE_SIZE,
    strict: bool = False,
) -> Any:
    """Return a copy of a Flax model whose caches are quantized; the model itself stays as it is.

        model = quantize_cache(FlaxLlamaForCausalLM.from_pretrained(path), "int8")
        tokens = model.generate(prompt, max_length=256).sequences

    The weights are shared. ``model.init_cache`` returns a quantized cache, and calling the model, by itself
    or through ``generate``, takes one and returns one; of encoder-decoders it is ``model.decode`` that does,
    and cross attention, which has no cache there, stays as it is. ``model.quantized_step`` is the step, with
    its report.

    Args:
        model: an instance of a Flax model that generates (transformers 4): for causal language modeling, or
            an encoder-decoder, as Bart, T5 and Whisper.
        quantizer: as :func:`qpaged.adopt.quantize_cache` takes it.
        page_size: as :func:`qpaged.adopt.quantize_cache` takes it.
        strict: as :func:`qpaged.adopt.quantize_cache` takes it.

    Raises:
        TypeError: not a Flax model with a cache of its own.
        CacheNotFoundError: as :func:`qpaged.adopt.quantize_cache`.
    """
    if isinstance(model, _WithQuantizedCache):
        raise TypeError("model has a quantized cache already; give the model that it was made of.")
    if isinstance(model, type):
        raise TypeError(f"model must be an instance, but is the class {model.__name__}; load or make one.")
    if not (hasattr(model, "init_cache") and hasattr(model, "generate") and hasattr(model, "params")):
        raise TypeError(
            f"model must be a Flax model of transformers with init_cache, generate and weights, but came as "
            f"{type(model).__name__}; for other models take qpaged.adopt.quantize_cache."
        )
    quantized = copy.copy(model)  # a shallow copy, which shares the weights
    quantized.quantized_step = _quantized_step(model, quantizer, page_size, strict)
    # A derived class: isinstance still holds, and generate, which calls self(...), finds the new method.
    decodes = {_decoding_method(model): _decode_quantized}
    quantized.__class__ = type(type(model).__name__, (_WithQuantizedCache, type(model)), decodes)
    return quantized


def _decoding_method(model: Any) -> str:
    """Return the name of the method that takes a cache and returns it."""
    return "decode" if model.config.is_encoder_decoder else "__call__"


def _decode_quantized(self: _WithQuantizedCache, *args: Any, **kwargs: Any) -> Any:
    """Do what the model's own method does, with a quantized cache."""
    out = self.quantized_step(*args, **kwargs)
    if isinstance(out, _Output):
        return out.restore()
    return out


class _WithQuantizedCache:
    """The methods of all models with quantized caches that differ from those of the model's own class."""

    quantized_step: QuantizedStep

    def init_cache(self, *args: Any, **kwargs: Any) -> Pytree:
        init_float_cache = super().init_cache  # type: ignore[misc]
        # Shapes alone: the float cache may be too large to exist even for a moment.
        shapes = jax.eval_shape(lambda: init_float_cache(*args, **kwargs))
        cache = self.quantized_step.init(shapes)
        return jax.tree_util.tree_map(_zeros_for_shape, cache, is_leaf=is_cache_array)


def _zeros_for_shape(leaf: Any) -> Any:
    """Return zeros for the shapes that are left in a new cache beside its keys and values."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.zeros(leaf.shape, leaf.dtype)
    return leaf


@functools.partial(jax.tree_util.register_dataclass, data_fields=["items"], meta_fields=["output_class"])
@dataclass
class _Output:
    """The items of a model's output as a pytree.

    The models add ``past_key_values`` to their output as an item that is no field of its class, and pytree
    functions would drop it.
    """

    items: dict[str, Any]
    output_class: type[Any]

    @classmethod
    def wrap(cls, out: Any) -> Any:
        """Return the output of a model as one of these; outputs that are no mapping stay as they are."""
        if isinstance(out, Mapping):
            return cls(dict(out.items()), type(out))
        return out

    def restore(self) -> Any:
        """Return the output of the model's own class."""
        field_names = {field.name for field in dataclasses.fields(self.output_class)}
        out = self.output_class(**{name: item for name, item in self.items.items() if name in field_names})
        for name in self.items.keys() - field_names:
            out[name] = self.items[name]
        return out


def _quantized_step(
    model: Any, quantizer: str | Path | Quantizer | CacheFormat | None, page_size: int, strict: bool
) -> QuantizedStep:
    """Return the model's own method as a step with a quantized cache, which is found with one token."""
    decode = getattr(model, _decoding_method(model))

    @functools.wraps(decode)
    def step(*args: Any, **kwargs: Any) -> Any:
        return _Output.wrap(decode(*args, **kwargs))

    return quantize_step(
        step,
        quantizer,
        example=_example_arguments(model),
        where="^past_key_values/",
        page_size=page_size,
        strict=strict,
    )


def _example_arguments(model: Any) -> tuple[Any, ...]:
    """Return positional arguments for a decoding step of the model with one token, as shapes."""
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, EXAMPLE_LENGTH), jnp.int32)
    params = jax.eval_shape(lambda: model.params)
    if model.config.is_encoder_decoder:
        encoded = (jax.ShapeDtypeStruct((1, EXAMPLE_LENGTH, model.config.hidden_size), model.dtype),)
        inputs = {
            "decoder_input_ids": token,
            "encoder_outputs": encoded,
            "past_key_values": jax.eval_shape(lambda out: model.init_cache(1, EXAMPLE_LENGTH, out), encoded),
            "decoder_attention_mask": mask,
            "decoder_position_ids": token,
            "params": params,
        }
    else:
        inputs = {
            "input_ids": token,
            "past_key_values": jax.eval_shape(lambda: model.init_cache(1, EXAMPLE_LENGTH)),
            "attention_mask": mask,
            "position_ids": token,
            "params": params,
        }
    signature = inspect.signature(getattr(model, _decoding_method(model)))
    # Not every model takes all of these: some have no position_ids.
    accepted = {name: value for name, value in inputs.items() if name in signature.parameters}
    call = signature.bind(**accepted)
    call.apply_defaults()
    return call.args
