"""What else decodes on a GPU: JAX's own paged attention, torch's SDPA and FlexAttention, FlashInfer.

All attend to the numbers of a :class:`gpu_attention.Numbers`. A candidate is made only when it is called,
and says by an exception why it cannot be. Steps of torch are captured into a CUDA graph, so that launching
them from Python costs them nothing.
"""

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from shapes import Shape

if TYPE_CHECKING:
    from gpu_attention import Candidates, Numbers, Subject


def candidates(numbers: "Numbers") -> "Candidates":
    for format in ("bfloat16", "int8"):
        yield f"jax paged_attention {format}", functools.partial(of_jax, numbers, format)
    for pages in (True, False):
        name = "torch SDPA bfloat16" + (", pages gathered" if pages else ", contiguous")
        yield name, functools.partial(of_sdpa, numbers, name, pages)
    for page_size in dict.fromkeys((numbers.shape.page_size, 128)):
        name = f"torch FlexAttention bfloat16, pages of {page_size}"
        yield name, functools.partial(of_flex, numbers, name, page_size)
    for format in ("bfloat16", "float8_e4m3fn"):
        yield f"flashinfer {format}", functools.partial(of_flashinfer, numbers, format)


def paged(numbers: "Numbers", page_size: int) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """Keys and values (kv_heads, pages, page_size, head_dim), and the table (sequences, pages)."""
    shape = Shape("pages", numbers.shape.lengths, head_dim=numbers.shape.head_dim, page_size=page_size)
    table, pages = shape.tables()
    order = jnp.asarray(np.argsort(table[table < pages]), jnp.int32)  # the table's rows lie one after another

    def pool(rows: list[jax.Array]) -> jax.Array:
        whole = [jnp.pad(row, ((0, 0), (0, -row.shape[1] % page_size), (0, 0))) for row in rows]
        slots = jnp.concatenate(whole, axis=1)
        return slots.reshape(len(slots), pages, page_size, -1)[:, order]

    return pool(numbers.keys), pool(numbers.values), table


def of_jax(numbers: "Numbers", format: str, **options: Any) -> "Subject":
    """JAX's own Pallas-Triton kernel; int8 with a scale for each slot and head."""
    from gpu_attention import Subject

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    shape = numbers.shape
    keys, values, table = paged(numbers, shape.page_size)
    pools: tuple[Any, ...] = (keys, values)
    if format == "int8":
        (keys, k_scales), (values, v_scales) = _int8(keys), _int8(values)
        pools = keys, values, k_scales, v_scales
    read = sum(pool.nbytes for pool in pools) / (keys.size + values.size)

    @jax.jit
    def attend(query, table, lengths, keys, values, *scales):
        named = dict(zip(("k_scales_pages", "v_scales_pages"), scales, strict=False))
        query = query * jnp.asarray(shape.head_dim**-0.5, query.dtype)
        return paged_attention(query, keys, values, table, lengths, **named, **options)

    given = numbers.query, jnp.asarray(table), jnp.asarray(shape.lengths, jnp.int32), *pools
    return Subject(
        f"jax paged_attention {format}",
        lambda: attend(*given),
        jax.block_until_ready,
        read * shape.elements,
        int(8 * read),
    )


@jax.jit
def _int8(pool: jax.Array) -> tuple[jax.Array, jax.Array]:
    scales = jnp.abs(pool).max(axis=-1).astype(jnp.float32) / 127
    codes = jnp.round(pool.astype(jnp.float32) / scales[..., None])
    return codes.astype(jnp.int8), scales


def of_sdpa(numbers: "Numbers", name: str, gathered: bool) -> "Subject":
    """Heads that share keys as rows of queries; contiguous caches, or pages gathered at each step."""
    import torch

    shape, attend = numbers.shape, torch.nn.functional.scaled_dot_product_attention
    if len(set(shape.lengths)) > 1:
        raise ValueError("lengths differ")
    rows = len(shape.lengths), shape.kv_heads, -1, shape.head_dim
    query = tensor(numbers.query).reshape(rows)
    if gathered:
        *pools, table = paged(numbers, shape.page_size)
        keys, values = (tensor(pool) for pool in pools)
        pages = torch.from_numpy(table).to(query.device).long()

        def slots(pool: Any) -> Any:
            return pool[:, pages].flatten(2, 3).transpose(0, 1)
    else:
        keys, values = (torch.stack([tensor(row) for row in part]) for part in (numbers.keys, numbers.values))

        def slots(pool: Any) -> Any:
            return pool

    return of_torch(
        name,
        lambda: attend(query, slots(keys), slots(values)).flatten(1, 2),
        query,
        2.0 * shape.elements,
        paged=gathered,
    )


def of_flex(numbers: "Numbers", name: str, page_size: int) -> "Subject":
    """FlexAttention over the pool, with the pages of each sequence as the blocks that it sees."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    shape = numbers.shape
    keys, values, table = paged(numbers, page_size)
    pages, query = keys.shape[1], tensor(numbers.query)[:, :, None]
    owner = np.full((pages, page_size), -1, np.int32)  # the sequence whose token a slot holds
    counts = np.zeros((2, len(shape.lengths), 1, 1), np.int32)  # blocks that are seen in part, and whole
    blocks = np.zeros((2, len(shape.lengths), 1, 1, pages), np.int32)
    for row, length in enumerate(shape.lengths):
        whole, rest = divmod(length, page_size)
        owner[table[row, :whole]] = row
        blocks[1, row, 0, 0, :whole], counts[1, row] = table[row, :whole], whole
        if rest:
            owner[table[row, whole], :rest] = row
            blocks[0, row, 0, 0, 0], counts[0, row] = table[row, whole], 1
    owners, counts, blocks = (torch.from_numpy(x).to(query.device) for x in (owner.ravel(), counts, blocks))
    mask = BlockMask.from_kv_blocks(
        counts[0], blocks[0], counts[1], blocks[1], (128, page_size), lambda b, h, q, kv: owners[kv] == b,
        seq_lengths=(1, pages * page_size),
    )  # fmt: skip
    pools = [tensor(pool).flatten(1, 2)[None] for pool in (keys, values)]
    attend = torch.compile(flex_attention, dynamic=False) if query.is_cuda else flex_attention
    return of_torch(
        name,
        lambda: attend(query, *pools, block_mask=mask, enable_gqa=True)[:, :, 0],
        query,
        2.0 * shape.elements,
    )


def of_flashinfer(numbers: "Numbers", format: str) -> "Subject":
    """``BatchDecodeWithPagedKVCacheWrapper``; in 8 bits without scales."""
    import flashinfer
    import torch

    shape, dtype = numbers.shape, getattr(torch, format)
    keys, values, table = paged(numbers, shape.page_size)
    query = tensor(numbers.query)
    pools = tuple(tensor(pool).transpose(0, 1).contiguous().to(dtype) for pool in (keys, values))
    counts = np.array([-(-length // shape.page_size) for length in shape.lengths])
    indices = [torch.from_numpy(np.asarray(part, np.int32)).to(query.device) for part in (
        np.concatenate([[0], np.cumsum(counts)]),
        table[table < keys.shape[1]],
        np.array(shape.lengths) - (counts - 1) * shape.page_size,
    )]  # fmt: skip
    space = torch.zeros(2**27, dtype=torch.uint8, device=query.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "HND", use_tensor_cores=True)
    wrapper.plan(
        *indices, shape.q_heads, shape.kv_heads, shape.head_dim, shape.page_size,
        q_data_type=query.dtype, kv_data_type=dtype,
    )  # fmt: skip
    return of_torch(
        f"flashinfer {format}",
        lambda: wrapper.run(query, pools),
        query,
        float(dtype.itemsize * shape.elements),
        bits=8 * dtype.itemsize,
    )


def tensor(array: jax.Array) -> Any:
    """The same memory, to torch."""
    import torch

    return torch.from_dlpack(jax.block_until_ready(array))


def of_torch(
    name: str, step: Callable[[], Any], query: Any, bytes_read: float, bits: int = 16, paged: bool = True
) -> "Subject":
    import torch
    from gpu_attention import CALLS, Subject

    if not query.is_cuda:
        return Subject(name, step, lambda _: None, bytes_read, bits, paged)

    def wait(_: Any) -> None:
        torch.cuda.synchronize()

    step()  # compiled before it is captured
    wait(None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            step()
    return Subject(name, step, wait, bytes_read, bits, paged, graph.replay)
