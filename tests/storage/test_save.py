"""Caches in files: bit for bit, whole or not at all, and whatever was changed is refused by its name."""

import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.caches import narrow_floats_allowed
from support.formats import EVERY_FORMAT
from support.long import first_short
from support.saved_caches import PAGES, filled, fresh, metadata, same_bits

import qpaged
from qpaged.storage import _directory, _shard_files

SOME = [None, "int8", "int4:token+rotate+exact8+sink4", "fp8_e4m3:tensor", "nvfp4", "int6/int8:channel"]
OTHERS = ["int8:token", "fp8_e4m3:tensor+exact1", "int3:channel+offset+exact20", *EVERY_FORMAT]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return the directory of a cache of few bytes."""
    path = tmp_path_factory.mktemp("small")
    cache, allocator = filled(
        "int4:token", layers=1, num_kv_heads=1, kv_head_dim_size=16, num_pages_per_layer=5
    )
    qpaged.save(path, cache, allocator)
    return path


@pytest.fixture
def directory(small, tmp_path):
    return shutil.copytree(small, tmp_path / "copy")


def data_files(directory):
    return sorted(file for file in directory.iterdir() if file.suffix == ".safetensors")


@pytest.mark.short(3)
@pytest.mark.parametrize("format", first_short(len(SOME), [*SOME, *OTHERS]))
def test_what_is_saved_is_loaded_bit_for_bit(format, tmp_path):
    quantizer = qpaged.CacheFormat.of(format)
    head_dim = 128 if format and "group" in format else 64
    cache, allocator = filled(format, quantizer=quantizer, dtype="float32", kv_head_dim_size=head_dim)
    qpaged.save(tmp_path, cache, allocator)
    loaded = qpaged.load(tmp_path)
    assert same_bits(loaded.cache, cache)
    assert (loaded.allocator.page_table(["a", ("b", 3)]) == allocator.page_table(["a", ("b", 3)])).all()
    assert loaded.allocator.counts() == allocator.counts()


@pytest.mark.short(2)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("format", [None, "int8"])
def test_a_cache_without_an_allocator_is_saved_whole(format, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(_shard_files, "BATCH_BYTES", 40_000)  # so that there are several files
    cache, _ = filled(format, dtype)
    qpaged.save(str(tmp_path), cache)
    assert len(data_files(tmp_path)) > 2
    with narrow_floats_allowed():
        loaded, allocator = qpaged.load(str(tmp_path))
    assert allocator is None
    assert same_bits(loaded, cache)


def test_layers_of_several_formats(tmp_path):
    formats = qpaged.CacheFormat.of("int8:token").with_layers({1: "int4:token/raw"})
    cache, _ = filled(formats)
    qpaged.save(tmp_path, cache)
    assert same_bits(qpaged.load(tmp_path).cache, cache)


def test_pages_that_are_not_in_use_are_not_saved(tmp_path):
    cache, allocator = filled("int8")
    stale = allocator.allocate("stale", 16)
    cache = cache.apply_changes(allocator.take_changes())
    step = qpaged.PagedAttentionMetadata.prefill(position=np.arange(16), page_table=stale)
    rows = np.ones((16, 2, 64), np.float32)
    cache = cache.replace(views=[view.write_prefill_to_cache(rows, rows, step) for view in cache.views])
    allocator.free("stale")
    cache = cache.apply_changes(allocator.take_changes())
    qpaged.save(tmp_path, cache, allocator)
    loaded, allocator = qpaged.load(tmp_path)
    assert same_bits(loaded, cache.reset_pages(np.asarray(stale)))


def test_an_allocator_goes_on_where_it_was(tmp_path):
    cache, allocator = filled("int8")
    allocator.fork("a", "c", 39)
    allocator.extend(["c"], [41])
    pages = allocator.swap_out("c")
    cache = cache.apply_changes(allocator.take_changes())
    qpaged.save(tmp_path, cache, allocator)
    cache, again = qpaged.load(tmp_path)
    for each in (allocator, again):
        each.release(pages)
        each.free("a")
        assert each.match_prefix("d", range(40)) == 32
        each.swap_in("c")
    assert again.counts() == allocator.counts()
    assert (again.page_table(["c", "d"]) == allocator.page_table(["c", "d"])).all()
    assert again.prefix_hashes(range(40)) == allocator.prefix_hashes(range(40))


def test_a_later_save_takes_the_place_of_an_earlier_one(tmp_path):
    first, second = filled("int8")[0], filled("int8", seed=5)[0]
    qpaged.save(tmp_path, first)
    before = data_files(tmp_path)
    qpaged.save(tmp_path, second)
    assert same_bits(qpaged.load(tmp_path).cache, second)
    assert not set(before) & set(data_files(tmp_path))
    assert len(before) == len(data_files(tmp_path))


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    cache, _ = filled("int8")
    qpaged.save(tmp_path, cache)
    before = sorted(tmp_path.iterdir())
    written = []

    def full_disk(path, data):
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device", str(path))
        path.write_bytes(data)

    monkeypatch.setattr(_directory, "_write_to_disk", full_disk)
    with pytest.raises(OSError, match="No space left"):
        qpaged.save(tmp_path, filled("int8", seed=5)[0])
    assert sorted(tmp_path.iterdir()) == before
    assert same_bits(qpaged.load(tmp_path).cache, cache)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_save_that_is_interrupted_as_it_replaces_the_manifest(tmp_path, monkeypatch, moment):
    old, new = filled("int8")[0], filled("int8", seed=5)[0]
    qpaged.save(tmp_path, old)
    replace = pathlib.Path.replace

    def interrupted(path, target):
        if moment == "after":
            replace(path, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(pathlib.Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qpaged.save(tmp_path, new)
    monkeypatch.undo()
    assert same_bits(qpaged.load(tmp_path).cache, new if moment == "after" else old)
    qpaged.save(tmp_path, new)  # which tidies up
    assert len(list(tmp_path.iterdir())) == 3


def test_a_load_beside_a_save_reads_the_old_cache_or_the_new(tmp_path, monkeypatch):
    old, new = filled("int8")[0], filled("int8", seed=5)[0]
    qpaged.save(tmp_path, old)
    read_file = _directory.read_file

    def saved_anew(path, entry):
        monkeypatch.setattr(_shard_files, "read_file", read_file)
        qpaged.save(tmp_path, new)
        return read_file(path, entry)

    monkeypatch.setattr(_shard_files, "read_file", saved_anew)
    assert same_bits(qpaged.load(tmp_path).cache, new)


def test_caches_that_are_not_whole_are_not_saved(tmp_path):
    cache, _ = filled("int8")
    qpaged.save(tmp_path, cache)
    with pytest.raises(ValueError, match=r"views must be those of all layers in order, but got layers \[0\]"):
        qpaged.save(tmp_path, cache.replace(views=cache.views[:1]))
    with pytest.raises(ValueError, match=r"but got layers \[1, 0\]"):
        qpaged.save(tmp_path, cache.replace(views=cache.views[::-1]))
    leaves = cache.with_layer_leaves()
    stacked = jax.tree_util.tree_map(lambda *layers: jnp.stack(layers), *leaves.views)
    with pytest.raises(ValueError, match="its layers are stacked for a scan; take them apart first"):
        qpaged.save(tmp_path, cache.replace(views=[stacked]))
    assert same_bits(qpaged.load(tmp_path).cache, cache)
    qpaged.save(tmp_path, leaves)
    assert same_bits(qpaged.load(tmp_path).cache, cache)


def test_a_format_that_its_configuration_does_not_name_is_not_saved(tmp_path):
    class Rounds(type(qpaged.get_quantizer("int8"))):
        pass

    with pytest.raises(TypeError, match="is another one than the int8 that its configuration names"):
        qpaged.save(tmp_path, fresh(Rounds()))


def test_what_is_beside_the_pages_of_a_pool_has_a_file_of_its_own(tmp_path):
    qpaged.save(tmp_path, filled("int8+exact40")[0])
    assert [file.name[:6] for file in data_files(tmp_path)] == ["beside"] * 4 + ["pages-"]


def flipped(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def check_refused(directory, file, data, match):
    """Raise AssertionError unless the directory is refused when a file has other bytes."""
    original = file.read_bytes()
    file.write_bytes(data)
    with pytest.raises(ValueError, match=match):
        qpaged.load(directory)
    file.write_bytes(original)


@pytest.mark.parametrize("share", [pytest.param(1, marks=pytest.mark.long), 1 / 200])
def test_every_bit_counts(directory, share):
    for file in (*data_files(directory), directory / "manifest.json"):
        data = file.read_bytes()
        bits = range(8 * len(data))
        for bit in random.Random(3).sample(bits, int(share * len(bits))):
            check_refused(directory, file, flipped(data, bit), re.escape(str(file)))
    assert qpaged.load(directory).allocator.num_free == 1


def test_files_that_are_cut_or_too_long(directory):
    for file in (*data_files(directory), directory / "manifest.json"):
        data = file.read_bytes()
        for length in (0, 1, len(data) // 2, len(data) - 1):
            check_refused(directory, file, data[:length], re.escape(str(file)))
        check_refused(directory, file, data + b"\0", re.escape(str(file)))


def test_files_that_are_exchanged(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(_shard_files, "BATCH_BYTES", 1)
    qpaged.save(directory, filled("int8")[0])
    first, second = data_files(directory)[1:3]
    check_refused(directory, first, second.read_bytes(), "exchanged")


def test_files_that_are_missing(directory, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing was saved here whole"):
        qpaged.load(tmp_path / "elsewhere")
    data_files(directory)[0].unlink()
    with pytest.raises(FileNotFoundError, match="names a file that is not there; copy the whole directory"):
        qpaged.load(directory)
    (directory / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="nothing was saved here whole"):
        qpaged.load(directory)


def rewrite_manifest(directory, **changes):
    """Write a manifest, sound as a file, with other fields."""
    record = json.loads((directory / "manifest.json").read_text())
    record = {name: value for name, value in (record | changes).items() if name != "digest"}
    text = _directory._manifest_text({**record, "digest": _directory.digest(record)})
    (directory / "manifest.json").write_text(text)


def test_foreign_manifests(directory):
    rewrite_manifest(directory, version=3)
    with pytest.raises(ValueError, match=r"must hold a cache in pages of version 2, but holds .* version 3"):
        qpaged.load(directory)
    rewrite_manifest(directory, version=2, qpaged="another thing")
    with pytest.raises(ValueError, match=r"but holds 'another thing'"):
        qpaged.load(directory)


def test_manifests_that_lack_something(directory):
    record = json.loads((directory / "manifest.json").read_text())
    del record["groups"], record["digest"]
    text = _directory._manifest_text({**record, "digest": _directory.digest(record)})
    (directory / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="must have a manifest with groups, but has one without"):
        qpaged.load(directory)


def test_files_of_older_versions_are_replaced(tmp_path):
    (tmp_path / "pages-0123456789abcdef-00000.safetensors").write_bytes(b"old")
    qpaged.save(tmp_path, fresh("int8"))
    assert not (tmp_path / "pages-0123456789abcdef-00000.safetensors").exists()


def test_a_format_that_is_not_installed(directory):
    record = json.loads((directory / "manifest.json").read_text())
    record["format"]["key"]["name"] = "int4711"
    rewrite_manifest(directory, format=record["format"])
    with pytest.raises(qpaged.RegistryError, match="int4711"):
        qpaged.load(directory)


def test_pages_of_other_sizes(directory):
    record = json.loads((directory / "manifest.json").read_text())
    rewrite_manifest(directory, metadata=record["metadata"] | {"page_size": 8})
    with pytest.raises(ValueError, match="saved from a cache of other sizes"):
        qpaged.load(directory)
    rewrite_manifest(directory, metadata=record["metadata"], format=qpaged.CacheFormat.of("raw").config)
    with pytest.raises(ValueError, match=r"\['scales'\] are missing or too many"):
        qpaged.load(directory)


def test_directories_with_other_files(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"path must be a new directory.* has other files, as 'thesis.tex'"):
        qpaged.save(tmp_path, fresh("int8"))
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_that_save_to_one_directory(tmp_path):
    filelock = pytest.importorskip("filelock")
    with (
        filelock.FileLock(tmp_path / ".lock"),
        pytest.raises(OSError, match="is being written to now"),
    ):
        qpaged.save(tmp_path, fresh("int8"))


def test_what_is_not_saved(tmp_path):
    cache, allocator = filled("int8")
    with pytest.raises(TypeError, match=r"cache must be a qpaged.PagedAttentionCache, but got"):
        qpaged.save(tmp_path, cache.views[0])
    with pytest.raises(TypeError, match=r"allocator must be a qpaged.PageAllocator, but got 3"):
        qpaged.save(tmp_path, cache, 3)
    with pytest.raises(ValueError, match="allocator must be that of the cache"):
        qpaged.save(tmp_path, cache, qpaged.PageAllocator(metadata(batch_size=3)))
    allocator.allocate("c", 1)
    with pytest.raises(ValueError, match="must have no changes that the cache lacks, but has some; apply"):
        qpaged.save(tmp_path, cache, allocator)
    allocator.take_changes()
    allocator.allocate(2.5, 1)
    allocator.take_changes()
    with pytest.raises(TypeError, match=r"named by strings, integers or tuples .* but one is 2.5"):
        qpaged.save(tmp_path, cache, allocator)
    assert not (tmp_path / "manifest.json").exists()


def test_pages_that_a_function_made_of_a_format_are_saved(tmp_path):
    cache = fresh(lambda zeros: qpaged.get_quantizer("int8").quantize(zeros))
    assert cache.views[0].key_pages.shape[1] == PAGES
    qpaged.save(tmp_path, cache)  # what the function made is a format's own
    assert same_bits(qpaged.load(tmp_path).cache, cache)


SAVING = """
import sys
import numpy as np
from pathlib import Path
from qpaged.storage._directory import write_directory

path, turn = Path(sys.argv[1]), 0
print("ready", flush=True)
while True:
    turn += 1
    arrays = {"values": np.full(200_000, turn, np.uint32)}
    write_directory(path, {"turn": turn}, [({"kind": kind}, arrays) for kind in ("pages", "pages", "beside")])
    print(turn, flush=True)
"""


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.long)])
def test_kill_at_any_moment(tmp_path, kills):
    """The directory holds what was saved last, or what was being saved, whole."""
    choose = random.Random(5)
    seen = set()
    for _ in range(kills):
        command = [sys.executable, "-c", SAVING, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "1\n"]
            time.sleep(choose.uniform(0, 0.2))
            process.kill()
            last = [int(line) for line in process.stdout.read().split()][-1:] or [1]
        record = _directory.read_manifest(tmp_path)
        assert record["turn"] in (last[0], last[0] + 1)
        for entry in record["files"]:
            assert (_directory.read_file(tmp_path, entry)["values"] == record["turn"]).all()
        seen.add(len(os.listdir(tmp_path)))
    assert len(seen) > 1 or kills < 100  # some were killed between the files


def test_arrays_lie_in_files_as_the_docs_say(small):
    safetensors = pytest.importorskip("safetensors.numpy")
    (file,) = data_files(small)
    pages = safetensors.load_file(file)
    assert {name: array.shape for name, array in pages.items()} == {
        "0/key_pages/codes": (1, 4, 128),
        "0/key_pages/scales": (1, 4, 16),
        "0/value_pages/codes": (1, 4, 128),
        "0/value_pages/scales": (1, 4, 16),
    }
    assert pages["0/key_pages/scales"].dtype == np.uint16
