"""Other implementations of decode attention on a GPU: JAX's paged attention, torch's SDPA and FlexAttention,
and FlashInfer.

All attend to the same :class:`gpu_subjects.Inputs`. A candidate is built only when it is called, and raises
if this machine cannot run it. Steps of torch are captured into a CUDA graph, so that launching them from
Python costs nothing.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import gpu_subjects
import jax
import jax.numpy as jnp
import numpy as np
from gpu_subjects import Candidates, Inputs, Subject
from shapes import Shape

Tensor = Any  # a torch.Tensor; torch is imported only where it is used


def candidates(inputs: Inputs) -> Candidates:
    """Yield every peer."""
    for dtype in ("bfloat16", "int8"):
        yield f"jax paged_attention {dtype}", functools.partial(jax_subject, inputs, dtype)
    yield (
        "torch SDPA bfloat16, pages gathered",
        functools.partial(sdpa_subject, inputs, "torch SDPA bfloat16, pages gathered", gathered=True),
    )
    yield (
        "torch SDPA bfloat16, contiguous",
        functools.partial(sdpa_subject, inputs, "torch SDPA bfloat16, contiguous", gathered=False),
    )
    for page_size in dict.fromkeys((inputs.shape.page_size, 128)):
        name = f"torch FlexAttention bfloat16, pages of {page_size}"
        yield name, functools.partial(flex_subject, inputs, name, page_size)
    for dtype in ("bfloat16", "float8_e4m3fn"):
        yield f"flashinfer {dtype}", functools.partial(flashinfer_subject, inputs, dtype)


def paged(inputs: Inputs, page_size: int) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """Return pools of keys and values [kv_heads, pages, page_size, head_dim], and the table."""
    shape = Shape("pages", inputs.shape.lengths, head_dim=inputs.shape.head_dim, page_size=page_size)
    table, pages = shape.tables()
    # Rows of the table are concatenated below; this puts their pages where the table says.
    order = jnp.asarray(np.argsort(table[table < pages]), jnp.int32)

    def pool(rows: list[jax.Array]) -> jax.Array:
        padded = [jnp.pad(row, ((0, 0), (0, -row.shape[1] % page_size), (0, 0))) for row in rows]
        slots = jnp.concatenate(padded, axis=1)
        return slots.reshape(len(slots), pages, page_size, -1)[:, order]

    return pool(inputs.keys), pool(inputs.values), table


def jax_subject(inputs: Inputs, dtype: str, **options: Any) -> Subject:
    """Build JAX's own Pallas-Triton kernel; int8 has a scale for each slot and head."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    shape = inputs.shape
    keys, values, table = paged(inputs, shape.page_size)
    elements = keys.size + values.size
    pools: tuple[jax.Array, ...] = keys, values
    if dtype == "int8":
        key_codes, key_scales = _int8(keys)
        value_codes, value_scales = _int8(values)
        pools = key_codes, value_codes, key_scales, value_scales
    bytes_per_element = sum(pool.nbytes for pool in pools) / elements

    @jax.jit
    def attend(query, table, lengths, keys, values, key_scales=None, value_scales=None):
        query = query * jnp.asarray(shape.head_dim**-0.5, query.dtype)
        return paged_attention(
            query,
            keys,
            values,
            table,
            lengths,
            k_scales_pages=key_scales,
            v_scales_pages=value_scales,
            **options,
        )

    arguments = inputs.query, jnp.asarray(table), jnp.asarray(shape.lengths, jnp.int32), *pools
    return Subject(
        f"jax paged_attention {dtype}",
        lambda: attend(*arguments),
        jax.block_until_ready,
        bytes_per_element * shape.elements,
        int(8 * bytes_per_element),
    )


@jax.jit
def _int8(pool: jax.Array) -> tuple[jax.Array, jax.Array]:
    scales = jnp.abs(pool).max(axis=-1).astype(jnp.float32) / 127
    codes = jnp.round(pool.astype(jnp.float32) / scales[..., None])
    return codes.astype(jnp.int8), scales


def sdpa_subject(inputs: Inputs, name: str, gathered: bool) -> Subject:
    """Build torch's SDPA over contiguous caches, or over pages that each step gathers.

    The query heads of a KV head are rows of one query, which is faster than ``enable_gqa``.
    """
    import torch

    shape = inputs.shape
    if len(set(shape.lengths)) > 1:
        raise ValueError("lengths differ")
    attention = torch.nn.functional.scaled_dot_product_attention
    query = tensor(inputs.query).reshape(len(shape.lengths), shape.kv_heads, -1, shape.head_dim)
    if gathered:
        key_pool, value_pool, table = paged(inputs, shape.page_size)
        keys = tensor(key_pool)
        values = tensor(value_pool)
        pages = torch.from_numpy(table).to(query.device).long()

        def step() -> Tensor:
            key_slots = keys[:, pages].flatten(2, 3).transpose(0, 1)
            value_slots = values[:, pages].flatten(2, 3).transpose(0, 1)
            return attention(query, key_slots, value_slots).flatten(1, 2)
    else:
        keys = torch.stack([tensor(row) for row in inputs.keys])
        values = torch.stack([tensor(row) for row in inputs.values])

        def step() -> Tensor:
            return attention(query, keys, values).flatten(1, 2)

    return torch_subject(name, step, query, 2.0 * shape.elements, paged=gathered)


def flex_subject(inputs: Inputs, name: str, page_size: int) -> Subject:
    """Build torch's FlexAttention over pages, whose block mask lists the pages of each sequence."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    shape = inputs.shape
    key_pool, value_pool, table = paged(inputs, page_size)
    query = tensor(inputs.query)[:, :, None]
    # All pages are one sequence of keys to FlexAttention.
    keys = tensor(key_pool).flatten(1, 2)[None]
    values = tensor(value_pool).flatten(1, 2)[None]
    mask = flex_mask(shape.lengths, table, key_pool.shape[1], page_size, query.device)
    attend = torch.compile(flex_attention, dynamic=False) if query.is_cuda else flex_attention
    return torch_subject(
        name,
        lambda: attend(query, keys, values, block_mask=mask, enable_gqa=True)[:, :, 0],
        query,
        2.0 * shape.elements,
    )


def flex_mask(lengths: tuple[int, ...], table: np.ndarray, pages: int, page_size: int, device: Any) -> Any:
    """Return the block mask in which each sequence sees the tokens on its own pages."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    owner = np.full((pages, page_size), -1, np.int32)  # the sequence whose token a slot holds
    full_counts = np.zeros((len(lengths), 1, 1), np.int32)
    full_blocks = np.zeros((len(lengths), 1, 1, pages), np.int32)
    partial_counts = np.zeros_like(full_counts)
    partial_blocks = np.zeros_like(full_blocks)
    for row, length in enumerate(lengths):
        full, rest = divmod(length, page_size)
        owner[table[row, :full]] = row
        full_blocks[row, 0, 0, :full] = table[row, :full]
        full_counts[row] = full
        if rest:
            owner[table[row, full], :rest] = row
            partial_blocks[row, 0, 0, 0] = table[row, full]
            partial_counts[row] = 1
    owners = torch.from_numpy(owner.ravel()).to(device)
    return BlockMask.from_kv_blocks(
        torch.from_numpy(partial_counts).to(device),
        torch.from_numpy(partial_blocks).to(device),
        torch.from_numpy(full_counts).to(device),
        torch.from_numpy(full_blocks).to(device),
        (128, page_size),
        lambda batch, head, query, key: owners[key] == batch,
        seq_lengths=(1, pages * page_size),
    )


def flashinfer_subject(inputs: Inputs, dtype_name: str) -> Subject:
    """Build FlashInfer's ``BatchDecodeWithPagedKVCacheWrapper``; its 8-bit pages have no scales."""
    import flashinfer
    import torch

    shape = inputs.shape
    dtype = getattr(torch, dtype_name)
    key_pool, value_pool, table = paged(inputs, shape.page_size)
    query = tensor(inputs.query)
    pools = (
        tensor(key_pool).transpose(0, 1).contiguous().to(dtype),
        tensor(value_pool).transpose(0, 1).contiguous().to(dtype),
    )

    def indices(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(array, np.int32)).to(query.device)

    counts = np.array([-(-length // shape.page_size) for length in shape.lengths])
    workspace = torch.zeros(2**27, dtype=torch.uint8, device=query.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    wrapper.plan(
        indices(np.concatenate([[0], np.cumsum(counts)])),
        indices(table[table < key_pool.shape[1]]),
        indices(np.array(shape.lengths) - (counts - 1) * shape.page_size),  # tokens on each last page
        shape.q_heads,
        shape.kv_heads,
        shape.head_dim,
        shape.page_size,
        q_data_type=query.dtype,
        kv_data_type=dtype,
    )
    return torch_subject(
        f"flashinfer {dtype_name}",
        lambda: wrapper.run(query, pools),
        query,
        float(dtype.itemsize * shape.elements),
        bits=8 * dtype.itemsize,
    )


def tensor(array: jax.Array) -> Tensor:
    """Return the array's memory as a torch tensor, without a copy."""
    import torch

    return torch.from_dlpack(jax.block_until_ready(array))


def torch_subject(
    name: str,
    step: Callable[[], Tensor],
    query: Tensor,
    bytes_read: float,
    bits: int = 16,
    paged: bool = True,
) -> Subject:
    """Wrap a step of torch; on CUDA its rounds replay a captured graph."""
    import torch

    if not query.is_cuda:
        return Subject(name, step, lambda _: None, bytes_read, bits, paged)

    def wait(_: Any) -> None:
        torch.cuda.synchronize()

    step()  # torch.compile must have run before the capture
    wait(None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(gpu_subjects.CALLS):
            step()
    return Subject(name, step, wait, bytes_read, bits, paged, graph.replay)
