"""Run by several processes at once: a cache over a mesh of all their devices, against one device of each.

python -m support.processes NUMBER OF PORT DIRECTORY

What they save together they load together, and what fails in one of them fails in all.
"""

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qpaged

PAGES, SEQUENCES, FORMATS = 12, 2, ("int8", "int4:token+rotate+exact9", None)


def step_of(groups, position):
    table = np.array([[1, 2, 7, PAGES], [3, 4, PAGES, PAGES]], np.int32)
    return qpaged.PagedAttentionMetadata.decode(
        position=np.tile(position, groups), page_table=np.tile(table, (groups, 1))
    )


@jax.jit
def write_and_attend(view, step, query, key, cleared):
    view = view.write_to_cache(key, key, step)
    out = qpaged.paged_attention(query, view, step)
    return view.reset_pages(cleared), out


def run(view, groups, here):
    """Return the view and the outputs after steps whose rows are those of the groups ``here``."""
    outs = []
    for number, position in enumerate(([3, 5], [8, -1], [16, 9])):
        rng = np.random.default_rng(number)
        query = rng.normal(size=(groups, SEQUENCES, 8, 32)).astype(np.float32)[here].reshape(-1, 8, 32)
        key = rng.normal(size=(groups, SEQUENCES, 4, 32)).astype(np.float32)[here].reshape(-1, 4, 32)
        cleared = np.tile(np.array([2 if number == 2 else PAGES], np.int32), len(here))
        view, out = write_and_attend(view, step_of(len(here), np.array(position)), query, key, cleared)
        outs.append(out)
    return view, outs


def check_same(pages, alone):
    """Raise AssertionError unless what this process has of pages is the same as those of its group alone."""
    for leaf, want in zip(*map(jax.tree_util.tree_leaves, (pages, alone)), strict=True):
        for shard in leaf.addressable_shards:
            heads = shard.index[0] if leaf.ndim > 1 else slice(None)
            assert np.asarray(shard.data).tobytes() == np.asarray(want)[heads].tobytes()


def check_files(directory, view, alone, mesh, number):
    """Raise AssertionError unless processes save and load together; what fails in one fails in all."""
    books = [qpaged.PageAllocator(view.metadata) for _ in range(jax.process_count())]
    for group, allocator in enumerate(books):
        allocator.allocate("a", 8 * group + 3)
        allocator.take_changes()
    cache = qpaged.PagedAttentionCache([view])
    qpaged.save(directory, cache)
    loaded, allocators = qpaged.load(directory, mesh)
    check_same(loaded.views[0], alone)
    assert allocators is None
    qpaged.save(directory, cache, books)
    loaded, allocators = qpaged.load(directory, mesh)
    assert [each.num_free for each in allocators] == [each.num_free for each in books]
    own = directory.with_name(f"{directory.name} of {number}")
    own.mkdir()
    with pytest.raises((ValueError, OSError), match="path must be one directory that all processes see"):
        qpaged.save(own, cache)
    with pytest.raises(ValueError, match="allocator must be the same in all processes"):
        qpaged.save(directory, cache, books[::-1] if number else books)
    with pytest.raises((TypeError, OSError), match=r"^(process 0 failed.*)?allocator must be a qpaged.Page"):
        qpaged.save(directory, cache, books if number else 3)
    with pytest.raises((FileNotFoundError, OSError), match=r"process 0 failed|nothing was saved here whole"):
        qpaged.load(directory if number else directory / "elsewhere", mesh)
    loaded, allocators = qpaged.load(directory, mesh)
    assert len(allocators) == len(books)


def main() -> None:
    number, count, port = map(int, sys.argv[1:4])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, number)
    mesh = jax.make_mesh((count, 2), ("dp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    config = qpaged.PagedAttentionCacheMetaData(SEQUENCES, 1, PAGES, 4, 32, 8, 4, 32, 0.5)
    for spelling in FORMATS:
        view = qpaged.PagedAttentionCacheView.init(mesh, jnp.float32, config, 0, None, spelling)
        view, outs = run(view, count, list(range(count)))
        alone = qpaged.PagedAttentionCacheView.init(None, jnp.float32, config, 0, None, spelling)
        alone, wanted = run(alone, count, [number])
        for out, want in zip(outs, wanted, strict=True):
            for shard in out.addressable_shards:
                heads = shard.index[1]
                np.testing.assert_allclose(shard.data, np.asarray(want)[:, heads], rtol=1e-5, atol=1e-6)
        check_same(view, alone)
        check_files(Path(sys.argv[4]) / str(spelling), view, alone, mesh, number)
    print("the same", flush=True)


if __name__ == "__main__":
    main()
