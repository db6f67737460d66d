"""Times saving and loading a cache of a gigabyte, beside files of the same size.

    python benchmarks/save_load.py --out benchmarks/results/save_load.json

The plain files have the sizes of a save's own, and are brought to the disk one by one as they are, before
those of the turn before are removed, as a save does. A save and plain writes take turns, so that each finds
the memory that the other has left, and so do a load and plain reads; times are medians. What is read was just
written, and comes from the system's memory. Memory is what the process has at most while it saves or
loads, beyond what it had before: a load makes the cache.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from record import circumstances, save

import qpaged

FORMATS = "int8", "int4:token+rotate", "raw"
LAYERS, HEADS, HEAD_DIM, PAGE_SIZE, SEQUENCES = 16, 8, 128, 16, 8
ROUNDS = 9
BATCH = 2**24


def random_cache(spelling: str, size: int) -> qpaged.PagedAttentionCache:
    """Return a cache of about ``size`` bytes, all of whose codes and scales are random bits."""
    metadata = qpaged.PagedAttentionCacheMetaData.create(
        mesh=None,
        batch_size=SEQUENCES,
        num_hidden_layers=LAYERS,
        max_sequences=4096,
        page_size=PAGE_SIZE,
        num_kv_heads=HEADS,
        kv_head_dim_size=HEAD_DIM,
        hbm_utilization=0.999,
        quantizer=spelling,
        memory_bytes=size,
    )
    cache = qpaged.PagedAttentionCache.init_cache(None, "bfloat16", metadata, quantizer=spelling)
    rng = np.random.default_rng(0)

    def random_bits(leaf: jax.Array) -> jax.Array:
        bits = np.frombuffer(rng.bytes(leaf.nbytes), leaf.dtype)
        return jax.device_put(bits.reshape(leaf.shape))

    return jax.tree_util.tree_map(random_bits, cache)


def resident() -> int:
    """Return the bytes of memory that the process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def timed(call: Callable[[], object]) -> tuple[float, int]:
    """Return the seconds that a call takes, and how many bytes of memory more it has at most."""
    before, most, is_over = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not is_over.wait(0.002):
            most = max(most, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    kept = call()
    seconds = time.perf_counter() - start
    is_over.set()
    watcher.join()
    del kept
    return seconds, max(most - before, 0)


def write_plain(folder: Path, data: bytes, files: int) -> None:
    """Write files as a save does, without digests: new ones first, and then the old ones are removed."""
    old = list(folder.iterdir())
    for _ in range(files):
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    for path in old:
        path.unlink()


def read_plain(folder: Path) -> int:
    """Read them, and return their bytes."""
    return sum(len(path.read_bytes()) for path in folder.iterdir())


def measure(spelling: str, size: int, folder: Path) -> dict[str, object]:
    """Return times and memory of one format."""
    cache = random_cache(spelling, size)
    jax.block_until_ready(cache)
    saved, plain = folder / "saved", folder / "plain"
    plain.mkdir()
    files, data = -(-cache.nbytes // BATCH), np.random.default_rng(1).bytes(BATCH)
    times: dict[str, list[tuple[float, int]]] = {}
    calls = {
        "save": lambda: qpaged.save(saved, cache),
        "write": lambda: write_plain(plain, data, files),
        "load": lambda: jax.block_until_ready(qpaged.load(saved).cache),
        "read": lambda: read_plain(plain),
    }
    for call in calls.values():
        call()  # compiles
    for pair in ("save", "write"), ("load", "read"):
        for _ in range(ROUNDS):
            for name in pair:
                times.setdefault(name, []).append(timed(calls[name]))
    for path in (saved, plain):
        shutil.rmtree(path)
    return {
        "format": spelling,
        "bytes": cache.nbytes,
        "seconds": {name: statistics.median(seconds for seconds, _ in runs) for name, runs in times.items()},
        "memory": {name: max(more for _, more in runs) for name, runs in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=2**30)
    parser.add_argument("--folder", type=Path, help="on the disk that is measured")
    parser.add_argument("--out", type=Path, help="where to save the times")
    arguments = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for spelling in FORMATS:
            run = measure(spelling, arguments.bytes, Path(folder))
            print(run, flush=True)
            runs.append(run)
    save(arguments.out, {**circumstances(["safetensors", "xxhash"]), "runs": runs})


if __name__ == "__main__":
    main()
