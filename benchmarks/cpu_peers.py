"""Other implementations of attention on CPU: jax.nn, torch's SDPA, transformers' QuantizedCache and ggml."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cpu_subjects import THREADS, Inputs, Subject, print_missing

Tensor = Any  # a torch.Tensor; torch is imported only where it is used


def jax_subjects(inputs: Inputs) -> Iterator[Subject]:
    """Yield ``jax.nn.dot_product_attention`` over a contiguous cache."""
    shape = inputs.shape
    query_shape = (len(shape.lengths), shape.chunk, shape.q_heads, shape.head_dim)
    query = jnp.asarray(inputs.query.reshape(query_shape), jnp.bfloat16)
    keys = jnp.asarray(padded(inputs.keys).swapaxes(1, 2), jnp.bfloat16)
    values = jnp.asarray(padded(inputs.values).swapaxes(1, 2), jnp.bfloat16)
    lengths = jnp.asarray(shape.lengths, jnp.int32)

    @jax.jit
    def attend(query, keys, values, lengths):
        if shape.chunk == 1:
            out = jax.nn.dot_product_attention(query, keys, values, key_value_seq_lengths=lengths)
        else:
            longest = keys.shape[1]
            causal = jnp.tril(jnp.ones((shape.chunk, longest), bool), longest - shape.chunk)
            out = jax.nn.dot_product_attention(query, keys, values, mask=causal[None, None])
        return out.reshape(inputs.query.shape)

    yield Subject(
        "jax.nn.dot_product_attention bfloat16",
        lambda: attend(query, keys, values, lengths).block_until_ready(),
        2.0 * shape.elements,
    )


def padded(rows: list[np.ndarray]) -> np.ndarray:
    """Return [sequences, kv_heads, longest, head_dim], with zeros past each length."""
    longest = max(row.shape[1] for row in rows)
    return np.stack([np.pad(row, ((0, 0), (0, longest - row.shape[1]), (0, 0))) for row in rows])


def torch_subjects(inputs: Inputs) -> Iterator[Subject]:
    """Yield torch's SDPA over contiguous caches, in float32 and in bfloat16.

    Where lengths differ, it runs sequence by sequence. For single tokens it is also measured with the query
    heads of a KV head as rows of one query, which is faster than ``enable_gqa``.
    """
    import torch

    torch.set_num_threads(THREADS)
    attention = torch.nn.functional.scaled_dot_product_attention
    shape = inputs.shape
    longest = max(shape.lengths)
    mask = None
    if shape.chunk > 1:
        mask = torch.ones(shape.chunk, longest, dtype=torch.bool).tril(longest - shape.chunk)
    for dtype in (torch.float32, torch.bfloat16):
        calls = torch_calls(inputs, dtype)

        def grouped(calls: list[tuple[Tensor, ...]] = calls) -> np.ndarray:
            outs = [
                attention(query, keys, values, attn_mask=mask, enable_gqa=True).transpose(1, 2)
                for query, keys, values in calls
            ]
            return torch.cat(outs).float().numpy().reshape(inputs.query.shape)

        def heads_as_rows(calls: list[tuple[Tensor, ...]] = calls) -> np.ndarray:
            outs = []
            for query, keys, values in calls:
                rows = query.reshape(len(query), shape.kv_heads, -1, shape.head_dim)
                outs.append(attention(rows, keys, values).reshape(query.shape))
            return torch.cat(outs).float().numpy().reshape(inputs.query.shape)

        name = f"torch SDPA {str(dtype).removeprefix('torch.')}"
        bytes_read = dtype.itemsize * shape.elements
        yield Subject(f"{name} enable_gqa", grouped, bytes_read)
        if shape.chunk == 1:
            yield Subject(f"{name} heads as rows", heads_as_rows, bytes_read)


def torch_calls(inputs: Inputs, dtype: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the (query, keys, values) of each call: one for all sequences, or one for each length."""
    import torch

    shape = inputs.shape
    sequences = list(range(len(shape.lengths)))
    uniform = len(set(shape.lengths)) == 1
    groups = [sequences] if uniform else [[sequence] for sequence in sequences]
    # [sequences, q_heads, chunk, head_dim]
    queries = inputs.query.reshape(len(sequences), shape.chunk, shape.q_heads, shape.head_dim).swapaxes(1, 2)
    calls = []
    for group in groups:
        keys = np.stack([inputs.keys[sequence] for sequence in group])
        values = np.stack([inputs.values[sequence] for sequence in group])
        calls.append(
            (
                torch.tensor(queries[group]).to(dtype),
                torch.tensor(keys).to(dtype),
                torch.tensor(values).to(dtype),
            )
        )
    return calls


def transformers_subjects(inputs: Inputs) -> Iterator[Subject]:
    """Yield ``QuantizedCache.update`` with one token and SDPA over what it returns, where lengths agree."""
    import torch
    from transformers import LlamaConfig
    from transformers.cache_utils import QuantizedCache

    shape = inputs.shape
    if len(set(shape.lengths)) > 1 or shape.chunk > 1:
        return
    config = LlamaConfig(
        num_hidden_layers=1,
        num_attention_heads=shape.q_heads,
        num_key_value_heads=shape.kv_heads,
        hidden_size=shape.q_heads * shape.head_dim,
        head_dim=shape.head_dim,
    )
    keys = torch.tensor(np.stack(inputs.keys)).bfloat16()
    values = torch.tensor(np.stack(inputs.values)).bfloat16()
    query = torch.tensor(inputs.query)[:, :, None].bfloat16()
    length = keys.shape[2]
    for backend, package, module, axis in (
        ("quanto", "optimum-quanto", "optimum", 0),
        ("hqq", "hqq", "hqq", 1),
    ):
        if find_spec(module) is None:
            print_missing(package)
            continue
        cache = QuantizedCache(
            backend, config, nbits=4, axis_key=axis, axis_value=axis, q_group_size=64, residual_length=128
        )
        cache.update(keys[:, :, :-1], values[:, :, :-1], 0)

        def step(cache: Any = cache) -> np.ndarray:
            k, v = cache.update(keys[:, :, -1:], values[:, :, -1:], 0)
            # Each step appends a token; attention is to the first ``length``, so that steps stay alike.
            out = torch.nn.functional.scaled_dot_product_attention(
                query, k[:, :, :length], v[:, :, :length], enable_gqa=True
            )
            return out[:, :, 0].float().numpy()

        yield Subject(f"transformers QuantizedCache {backend} 4 bits", step, 0.5 * shape.elements)


def ggml_subjects(inputs: Inputs) -> Iterator[Subject]:
    """Yield ggml's flash attention for single tokens, in 16 bits and in 8.5."""
    import ggml

    if inputs.shape.chunk > 1:
        return
    for kind, bits in (("f16", 16), ("q8_0", 8.5)):
        step = ggml.attention(inputs.query, inputs.keys, inputs.values, kind, THREADS)
        yield Subject(f"ggml flash_attn_ext {kind}", step, bits / 8 * inputs.shape.elements)


PEERS: dict[str, Callable[[Inputs], Iterator[Subject]]] = {
    "jax": jax_subjects,
    "torch": torch_subjects,
    "transformers": transformers_subjects,
    "llama_cpp": ggml_subjects,
}
"""Peers by the module that must be installed."""
