"""llama.cpp through the libraries of an npm package: its caches of several types, and their logits."""

import ctypes
import os
import platform
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from real_sources import CONVERTERS, PrepareError, say

PACKAGE = "@node-llama-cpp/linux-x64@3.22.1"
RELEASE = "v0.5.0"  # of llama.cpp, as the package's build metadata name it
UNROTATED = "LLAMA_ATTN_ROT_DISABLE"
"""The environment variable that keeps llama.cpp from rotating the keys and values of quantized caches."""

TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "q5_0": 6, "q4_0": 2}  # enum ggml_type
BITS = {"f32": 32.0, "f16": 16.0, "q8_0": 8.5, "q5_0": 5.5, "q4_0": 4.5}
"""Bits of a value, with the 16-bit scale of each 32 values."""

THREADS = 1
"""llama.cpp's threads spin while they wait for each other: on a busy machine, one is faster than several."""

FLASH_OFF, FLASH_ON = 0, 1  # enum llama_flash_attn_type; quantized values need it


class ModelParameters(ctypes.Structure):
    """``struct llama_model_params``; no field of it is changed, and it has less than these bytes."""

    _fields_ = (("data", ctypes.c_byte * 256),)


class ContextParameters(ctypes.Structure):
    """``struct llama_context_params`` up to its last field that is read or changed here."""

    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("n_rs_seq", ctypes.c_uint32),
        ("n_outputs_max", ctypes.c_uint32),
        ("n_outputs_max_per_seq", ctypes.c_uint32),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        ("enums", ctypes.c_int32 * 4),
        ("flash_attn_type", ctypes.c_int32),
        ("rope", ctypes.c_int32 * 8),
        ("cb_eval", ctypes.c_void_p * 2),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("rest", ctypes.c_byte * 256),  # more than there is, so that all of it is passed on
    )


class Batch(ctypes.Structure):
    """``struct llama_batch``."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def fetch_libraries(folder: Path) -> Path:
    """Return the folder of llama.cpp's libraries, downloaded if they are not in ``folder``.

    Raises:
        PrepareError: the machine has no such libraries, or the download failed.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise PrepareError(f"{PACKAGE} is for Linux on x86-64; peers are measured there alone.")
    libraries = folder / "package" / "bins" / "linux-x64"
    if not libraries.exists():
        say(f"llama.cpp {RELEASE}: downloading {PACKAGE}")
        folder.mkdir(parents=True, exist_ok=True)
        command = ("npm", "pack", "--silent", PACKAGE, "--pack-destination", str(folder))
        try:
            packed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]
        except (OSError, subprocess.CalledProcessError) as error:
            raise PrepareError(f"npm could not download {PACKAGE}: {error}") from error
        with tarfile.open(folder / packed) as archive:
            archive.extractall(folder, filter="data")
    return libraries


def write_float_gguf(source: Path, path: Path) -> None:
    """Write a GGUF again with the weights of its checkpoint, which are rounded to bfloat16, in float32.

    Raises:
        PrepareError: gguf is missing.
    """
    try:
        import gguf
        import ml_dtypes
    except ImportError as error:
        raise PrepareError(f"{error}; writing GGUF needs it: {CONVERTERS}") from error
    say(f"writing {path}")
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    partial = path.with_name(f"{path.name}.partial")
    writer = gguf.GGUFWriter(partial, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        # A checkpoint of Gemma holds the factors of its norms less 1, which is what is rounded.
        less = int(architecture == "gemma3" and tensor.name.endswith("norm.weight"))
        writer.add_tensor(tensor.name, np.float32((weight - less).astype(ml_dtypes.bfloat16)) + less)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


class Llama:
    """A model in llama.cpp."""

    def __init__(self, libraries: Path, gguf: Path):
        self._library = library = load_library(libraries)
        model = library.llama_model_load_from_file(os.fsencode(gguf), library.llama_model_default_params())
        if not model:
            raise PrepareError(f"llama.cpp cannot load {gguf}; remove it and try again.")
        self._model = ctypes.c_void_p(model)
        self.vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))

    @contextmanager
    def context(self, kind: str, rotated: bool, length: int, chunk: int) -> Iterator["Context"]:
        """Open a context whose cache holds ``length`` tokens of a type of :data:`TYPES`, fed in chunks."""
        library = self._library
        parameters = library.llama_context_default_params()
        if (parameters.n_ctx, parameters.n_batch, parameters.type_k, parameters.type_v) != (512, 2048, 1, 1):
            raise PrepareError(f"{PACKAGE} has another layout of its structures than llama.cpp {RELEASE}.")
        parameters.n_ctx = length
        parameters.n_batch = parameters.n_ubatch = chunk
        parameters.n_threads = parameters.n_threads_batch = THREADS
        parameters.flash_attn_type = FLASH_OFF if kind == "f32" else FLASH_ON
        parameters.type_k = parameters.type_v = TYPES[kind]
        os.environ[UNROTATED] = "01"[not rotated]
        pointer = library.llama_init_from_model(self._model, parameters)
        if not pointer:
            raise PrepareError(f"llama.cpp makes no cache of {kind}.")
        context = Context(library, ctypes.c_void_p(pointer), self.vocabulary, chunk)
        try:
            yield context
        finally:
            context.close()


class Context:
    """A cache of llama.cpp for one sequence."""

    def __init__(self, library: ctypes.CDLL, pointer: ctypes.c_void_p, vocabulary: int, chunk: int):
        self._library, self._pointer, self._vocabulary = library, pointer, vocabulary
        self._batch: Batch = library.llama_batch_init(chunk, 0, 1)

    def clear(self) -> None:
        """Forget the sequence."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._pointer), True)

    def logits(
        self,
        tokens: np.ndarray,  # [n] int32
        start: int,
    ) -> np.ndarray:  # [n, vocabulary] float32
        """Feed the tokens at the positions from ``start`` on; what is returned lives until the next call."""
        self._batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            self._batch.token[index] = int(token)
            self._batch.pos[index] = start + index
            self._batch.n_seq_id[index] = 1
            self._batch.seq_id[index][0] = 0
            self._batch.logits[index] = 1
        if self._library.llama_decode(self._pointer, self._batch):
            raise RuntimeError("llama.cpp could not decode")
        return np.ctypeslib.as_array(
            self._library.llama_get_logits(self._pointer), (len(tokens), self._vocabulary)
        )

    def close(self) -> None:
        """Free the cache."""
        self._library.llama_batch_free(self._batch)
        self._library.llama_free(self._pointer)


def load_library(libraries: Path) -> ctypes.CDLL:
    """Return llama.cpp's library with its functions' types declared, and the CPU's backend loaded."""
    ggml = ctypes.CDLL(str(libraries / f"libggml.{RELEASE}.so"), ctypes.RTLD_GLOBAL)
    ggml.ggml_backend_load_all_from_path(os.fsencode(libraries))
    library = ctypes.CDLL(str(libraries / f"libllama.{RELEASE}.so"))
    pointer, integer = ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in (
        ("llama_model_default_params", ModelParameters, []),
        ("llama_context_default_params", ContextParameters, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, ModelParameters]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", integer, [pointer]),
        ("llama_init_from_model", pointer, [pointer, ContextParameters]),
        ("llama_batch_init", Batch, [integer, integer, integer]),
        ("llama_batch_free", None, [Batch]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
        ("llama_decode", integer, [pointer, Batch]),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), [pointer]),
        ("llama_free", None, [pointer]),
    ):
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    library.llama_backend_init()
    library.llama_log_set(LOG, None)
    return library


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def LOG(level: int, text: bytes, data: object) -> None:
    """Print llama.cpp's errors alone."""
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        say(text.decode().rstrip())
