"""ggml's flash attention, called through the C library that llama-cpp-python bundles."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np

TYPES = {"f16": 1, "q8_0": 8}  # enum ggml_type
F32 = 0
OVERHEAD = 2**24  # bytes of ggml's own structures: tensors and the graph


class Parameters(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Plan(ctypes.Structure):
    """``struct ggml_cplan``."""

    _fields_ = (
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        ("threadpool", ctypes.c_void_p),
        ("abort_callback", ctypes.c_void_p),
        ("abort_callback_data", ctypes.c_void_p),
        ("use_ref", ctypes.c_bool),
    )


def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """Return the base and CPU libraries with their functions' types declared."""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    base = ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), ctypes.RTLD_GLOBAL)
    pointer = ctypes.c_void_p
    integer = ctypes.c_int64
    for name, result, arguments in (
        ("ggml_init", pointer, [Parameters]),
        ("ggml_new_tensor_4d", pointer, [pointer, ctypes.c_int, *[integer] * 4]),
        ("ggml_get_data", pointer, [pointer]),
        ("ggml_nbytes", ctypes.c_size_t, [pointer]),
        ("ggml_flash_attn_ext", pointer, [*[pointer] * 5, *[ctypes.c_float] * 3]),
        ("ggml_new_graph", pointer, [pointer]),
        ("ggml_build_forward_expand", None, [pointer, pointer]),
        ("ggml_quantize_chunk", ctypes.c_size_t, [ctypes.c_int, pointer, pointer, *[integer] * 3, pointer]),
    ):
        function = getattr(base, name)
        function.restype = result
        function.argtypes = arguments
    cpu.ggml_graph_plan.restype = Plan
    cpu.ggml_graph_plan.argtypes = [pointer, ctypes.c_int, pointer]
    cpu.ggml_graph_compute.argtypes = [pointer, ctypes.POINTER(Plan)]
    cpu.ggml_cpu_init()
    return base, cpu


def attention(
    query: np.ndarray, keys: list[np.ndarray], values: list[np.ndarray], kind: str, threads: int
) -> Callable[[], np.ndarray]:
    """Prepare a decode step over contiguous caches of one ggml type.

    Args:
        query: [sequences, q_heads, head_dim] float32.
        keys: for each sequence [kv_heads, length, head_dim] float32.
        values: as keys.
        kind: one of :data:`TYPES`.
        threads: the number of threads.

    Returns:
        A function that computes [sequences, q_heads, head_dim] float32.
    """
    base, cpu = _libraries()
    size = sum(part.nbytes for part in (*keys, *values)) + OVERHEAD + query.nbytes * 2**6
    context = base.ggml_init(Parameters(size, None, False))
    graph = base.ggml_new_graph(context)

    def tensor(array: np.ndarray, ggml_type: int) -> int:
        """Copy an array into a new tensor, quantized to its type, and return the tensor's address."""
        address = base.ggml_new_tensor_4d(context, ggml_type, *array.shape[::-1])
        array = np.ascontiguousarray(array, np.float32)
        data = base.ggml_get_data(address)
        if ggml_type == F32:
            ctypes.memmove(data, array.ctypes.data, array.nbytes)
        else:
            width = array.shape[-1]
            rows = array.size // width
            base.ggml_quantize_chunk(ggml_type, array.ctypes.data, data, 0, rows, width, None)
        return address

    outs = []
    # One call serves all sequences if their lengths agree; they lie along ggml's last axis.
    groups = [[row] for row in range(len(keys))]
    if len({key.shape for key in keys}) == 1:
        groups = [list(range(len(keys)))]
    for rows in groups:
        q = tensor(query[rows][:, :, None], F32)  # [sequences, q_heads, 1, head_dim]
        k = tensor(np.stack([keys[row] for row in rows]), TYPES[kind])
        v = tensor(np.stack([values[row] for row in rows]), TYPES[kind])
        out = base.ggml_flash_attn_ext(context, q, k, v, None, query.shape[-1] ** -0.5, 0.0, 0.0)
        base.ggml_build_forward_expand(graph, out)
        outs.append((out, (len(rows), query.shape[1], query.shape[2])))

    plan = cpu.ggml_graph_plan(graph, threads, None)
    work = ctypes.create_string_buffer(plan.work_size)
    plan.work_data = ctypes.addressof(work)

    def step(work=work) -> np.ndarray:  # keeps the buffer alive: the plan holds its address only
        if cpu.ggml_graph_compute(graph, ctypes.byref(plan)):
            raise RuntimeError("ggml could not compute the graph")
        parts = [
            np.ctypeslib.as_array(ctypes.cast(base.ggml_get_data(out), ctypes.POINTER(ctypes.c_float)), shape)
            for out, shape in outs
        ]
        return np.concatenate(parts)

    return step
