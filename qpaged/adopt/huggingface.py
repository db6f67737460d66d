"""Flax models of Hugging Face transformers: ``generate`` with a quantized cache."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from qpaged.adopt._step import PAGE_SIZE, QuantizedStep
from qpaged.adopt._step import quantize_cache as quantize_step
from qpaged.arrays import QuantizedArray

LENGTH = 2 * PAGE_SIZE  # of the cache that the model is looked at with


def quantize_cache(model: Any, format: Any, *, page_size: int = PAGE_SIZE, strict: bool = False) -> Any:
    """A copy of a Flax model whose caches are quantized; the model itself stays as it is.

        model = quantize_cache(FlaxLlamaForCausalLM.from_pretrained(path), "int8")
        tokens = model.generate(prompt, max_length=256).sequences

    The weights are shared. ``model.init_cache`` gives a quantized cache, and calling the model, by itself or
    through ``generate``, takes one and returns one. ``model.quantized_step`` is the step, with its report.

    Args:
        model: an instance of a Flax model for causal language modeling (transformers 4).
        format: as :func:`qpaged.adopt.quantize_cache` takes it.
        page_size: as there.
        strict: as there.

    Raises:
        TypeError: not a Flax model with a cache of its own.
        CacheNotFoundError: as :func:`qpaged.adopt.quantize_cache`.
    """
    if not (hasattr(model, "init_cache") and hasattr(model, "generate") and hasattr(model, "params")):
        raise TypeError(
            f"model must be a Flax model of transformers with init_cache, generate and weights, but came as "
            f"{type(model).__name__}; for other models take qpaged.adopt.quantize_cache."
        )
    adopted = copy.copy(model)
    adopted.quantized_step = _step(model, format, page_size, strict)
    adopted.__class__ = type(type(model).__name__, (_WithQuantizedCache, type(model)), {})
    return adopted


class _WithQuantizedCache:
    """What is different in a model whose caches are quantized."""

    quantized_step: QuantizedStep

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.quantized_step(*args, **kwargs)
        return out.restored() if isinstance(out, _Output) else out

    def init_cache(self, *args: Any, **kwargs: Any) -> Any:
        make = super().init_cache  # type: ignore[misc]
        made = self.quantized_step.init(jax.eval_shape(lambda: make(*args, **kwargs)))
        return jax.tree_util.tree_map(_zeros, made, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray))


def _zeros(leaf: Any) -> Any:
    """What a new cache holds beside keys and values."""
    return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


@functools.partial(jax.tree_util.register_dataclass, data_fields=["items"], meta_fields=["made_as"])
@dataclass
class _Output:
    """A model's output as a tree of all its items: its own class leaves the cache out, as no field of it."""

    items: dict[str, Any]
    made_as: Any

    @classmethod
    def of(cls, out: Any) -> Any:
        return cls(dict(out.items()), type(out)) if isinstance(out, Mapping) else out

    def restored(self) -> Any:
        fields = {field.name for field in dataclasses.fields(self.made_as)}
        out = self.made_as(**{name: item for name, item in self.items.items() if name in fields})
        for name in self.items.keys() - fields:
            out[name] = self.items[name]
        return out


def _step(model: Any, format: Any, page_size: int, strict: bool) -> QuantizedStep:
    """The model's own call, its cache found by one token."""
    call = inspect.signature(model.__call__)
    cache = jax.eval_shape(lambda: model.init_cache(1, LENGTH))
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    inputs = {
        "input_ids": token,
        "past_key_values": cache,
        "attention_mask": jax.ShapeDtypeStruct((1, LENGTH), jnp.int32),
        "position_ids": token,
        "params": jax.eval_shape(lambda: model.params),
    }
    example = call.bind(**{name: value for name, value in inputs.items() if name in call.parameters})
    example.apply_defaults()

    @functools.wraps(model.__call__)
    def step(*args: Any, **kwargs: Any) -> Any:
        return _Output.of(model(*args, **kwargs))

    where = "^past_key_values/"
    return quantize_step(step, format, example=example.args, where=where, page_size=page_size, strict=strict)
