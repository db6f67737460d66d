"""Measures llama.cpp's caches beside those of ``real_models.py``: the same weights, tokens and measure."""

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from real_llama import BITS, PACKAGE, RELEASE, Context, Llama, fetch_libraries, write_float_gguf
from real_measure import CONTEXTS, Measured, read, write
from real_results import Record, summarize
from real_sources import Source, say
from record import circumstances

from qpaged.sweep.measure import Predictions
from qpaged.sweep.measure._metrics import compare

CHUNK = 128
"""Tokens that are fed at once; each attends to what the cache holds after the write."""

ROTATED = "+rotate"
PEERS = ("f16", *(f"{kind}{suffix}" for kind in ("q8_0", "q5_0", "q4_0") for suffix in (ROTATED, "")))
"""llama.cpp's types; it rotates the quantized ones unless it is told not to."""


def measure_peers(
    source: Source,
    folder: Path,
    tokens: np.ndarray,  # [sequences, context + 1] int32
    peers: Sequence[str],
    again: bool,
) -> dict[str, Measured]:
    """Return the measurement of each of ``peers``, beside llama.cpp's own float32 cache.

    All are fed in turn, chunk by chunk, so that the float cache's logits are computed once and never stored.
    """
    paths = {peer: folder / "measured" / f"{_key(source, peer, tokens)}.npz" for peer in peers}
    missing = [peer for peer, path in paths.items() if again or not path.exists()]
    if missing:
        gguf = folder / f"{source.name}.float32.gguf"
        if not gguf.exists():
            write_float_gguf(folder / f"{source.name}.gguf", gguf)
        llama = Llama(fetch_libraries(folder / "llama.cpp"), gguf)
        for peer, measured in measure_in_step(llama, source, tokens, missing).items():
            write(paths[peer], measured)
    return {peer: read(path) for peer, path in paths.items()}


def record_of(
    peer: str, measured: Measured, source: Source, tokens: np.ndarray, text_sha256: str, skip_first: int
) -> Record:
    """Return the record of a peer."""
    bits = BITS[peer.removesuffix(ROTATED)]
    return {
        "engine": f"llama.cpp {RELEASE}",
        "model": source.title,
        "format": peer,
        "context": tokens.shape[1] - 1,
        "sequences": tokens.shape[0],
        "page_size": 1,
        "skip_first": skip_first,
        "text": text_sha256,
        "code": PACKAGE,
        **summarize(measured.predictions, skip_first),
        "bits_packed": bits,
        "bits": {str(context): bits for context in CONTEXTS},
        "seconds": round(measured.seconds, 1),
        "date": circumstances()["date"],
        "versions": {"llama.cpp": RELEASE},
    }


def measure_in_step(
    llama: Llama,
    source: Source,
    tokens: np.ndarray,  # [sequences, context + 1] int32
    peers: Sequence[str],
) -> dict[str, Measured]:
    """Measure peers while all of them go through the tokens together."""
    inputs, truth = tokens[:, :-1], tokens[:, 1:]
    sequences, length = inputs.shape
    predictions = {
        peer: Predictions(*(np.empty(inputs.shape) for _ in Predictions._fields)) for peer in peers
    }
    seconds = dict.fromkeys(peers, 0.0)
    with ExitStack() as stack:
        reference = stack.enter_context(llama.context("f32", False, length, CHUNK))
        contexts: dict[str, Context] = {}
        for peer in peers:
            kind, rotated = peer.removesuffix(ROTATED), peer.endswith(ROTATED)
            contexts[peer] = stack.enter_context(llama.context(kind, rotated, length, CHUNK))
        for row in range(sequences):
            for context in (reference, *contexts.values()):
                context.clear()
            for start in range(0, length, CHUNK):
                index = row, slice(start, start + CHUNK)
                say(f"{source.title}, llama.cpp: sequence {row + 1} of {sequences}, token {start:,}")
                expected = jnp.asarray(reference.logits(inputs[index], start))
                for peer, context in contexts.items():
                    began = time.perf_counter()
                    logits = jnp.asarray(context.logits(inputs[index], start))
                    seconds[peer] += time.perf_counter() - began
                    compared: Predictions[jax.Array] = compare(expected, logits, truth[index])
                    for array, values in zip(predictions[peer], compared, strict=True):
                        array[index] = values
    return {peer: Measured(predictions[peer], seconds[peer]) for peer in peers}


def _key(source: Source, peer: str, tokens: np.ndarray) -> str:
    """Return the name of the file of a peer's predictions."""
    identity = json.dumps([PACKAGE, CHUNK, source.sha256, peer, hashlib.sha256(tokens.tobytes()).hexdigest()])
    return hashlib.sha256(identity.encode()).hexdigest()[:16]
