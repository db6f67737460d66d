"""A checkpoint divided over devices, over processes, or read layer by layer: the numbers stay the same."""

import json

import jax
import numpy as np
import pytest
from support.caches import make_mesh
from support.together import run_together

from qpaged.cli import main
from qpaged.sweep import load_model

if not hasattr(jax, "shard_map"):
    pytest.skip("this JAX has no jax.shard_map", allow_module_level=True)

SMALL = ("--tokens", 96, "--context", 48, "--page-size", 8, "--formats", "int8,int4:token+rotate+exact8")


def runs_of(directory):
    return {run["format"]: run for run in json.loads((directory / "results.json").read_text())["runs"]}


def check_alike(directory, other, tolerance):
    """Raise AssertionError unless two sweeps measured the same, to sums in another order over devices."""
    ours, theirs = runs_of(directory), runs_of(other)
    assert list(ours) == list(theirs)
    for name, run in ours.items():
        check_alike_run(run, theirs[name], tolerance)


def check_alike_run(run, other, tolerance):
    for metric, value in run.items():
        if "seconds" not in metric and isinstance(value, float):
            assert value == pytest.approx(other[metric], rel=tolerance, abs=1e-9), (run["format"], metric)


@pytest.fixture(scope="module")
def alone(checkpoint, text_file, tmp_path_factory):
    """Return the directory of a sweep on one device."""
    folder = tmp_path_factory.mktemp("alone")
    arguments = ("sweep", checkpoint, "--tokenizer", "bytes", "--text", text_file, "--out", folder, *SMALL)
    assert main(list(map(str, arguments))) == 0
    return folder


@pytest.mark.short(1)
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [(("--mesh", "tp=2"), 1e-3), (("--stream",), 0), (("--mesh", 4, "--stream"), 1e-3)],
    ids=["devices", "stream", "both"],
)
def test_a_sweep_over_devices_or_from_files_measures_the_same(sweep, alone, options, tolerance):
    done = sweep(*SMALL, *options)
    assert done.status == 0
    check_alike(done.directory, alone, tolerance)


@pytest.mark.long
def test_a_sweep_over_processes_measures_the_same(checkpoint, text_file, alone, tmp_path):
    def command(port, number):
        return (
            *("-m", "qpaged", "sweep", checkpoint, "--tokenizer", "bytes", "--text", text_file, *SMALL),
            *("--out", tmp_path, "--mesh", "tp=2", "--distributed", f"localhost:{port},2,{number}"),
        )

    for _ in range(2):  # and goes on from what is known
        said = run_together(2, command)
        check_alike(tmp_path, alone, 1e-3)
        assert "int8" in said[0] and "int8" not in said[1]


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 4])
def test_a_sweep_of_the_bundled_model_over_processes_measures_the_same(count, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    divided = ("sweep", *SMALL, "--mesh", f"tp={count}", "--out")

    def command(port, number):
        return "-m", "qpaged", *divided, together, "--distributed", f"localhost:{port},{count},{number}"

    assert main([*map(str, divided), str(alone)]) == 0  # over as many devices of one process
    for _ in range(2):  # and goes on from what is known
        said = run_together(count, command)
        ours, theirs = runs_of(together), runs_of(alone)
        check_alike_run(ours["plain"], theirs["plain"], 1e-6)  # float32, summed in another order
        for name, run in ours.items():
            # A value between two codes may then be rounded the other way, which changes a token's KL.
            assert run["kl_mean"] == pytest.approx(theirs[name]["kl_mean"], rel=1e-2, abs=1e-9)
            assert run["bytes_per_token"] == theirs[name]["bytes_per_token"]
        assert ["int8" in text for text in said] == [True] + [False] * (count - 1)


def test_each_device_holds_its_part_of_a_matrix(checkpoint):
    model = load_model(checkpoint, "bytes", mesh=make_mesh((4,), ("tp",)))
    whole = load_model(checkpoint, "bytes")
    divided = 0
    for name, weight in model.params.items():
        want = np.asarray(whole.params[name])
        for shard in weight.addressable_shards:
            assert np.asarray(shard.data).tobytes() == want[shard.index].tobytes()
        part = weight.addressable_shards[0].data.size
        divided += part * 4 == weight.size
        assert part in (weight.size, weight.size // 4)
    assert divided >= 2 * 7  # the matrices of both layers
    assert model.parameters == sum(weight.size for weight in whole.params.values())


def test_no_weight_of_a_streamed_model_is_kept(checkpoint):
    model = load_model(checkpoint, "bytes", streamed=True)
    name = next(iter(model.params))
    assert model.params[name] is not model.params[name]
    assert len(model.params) == len(list(model.params))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mesh", "dp=2,tp=2"), "must have no dp; tp=8 divides a model over 8 devices"),
        (("--mesh", "pp=2"), "'pp=2' is no mesh"),
        (("--mesh", "tp=64"), "--mesh must have at most the 8 devices that are here, but has 64"),
        (("--mesh", "tp=8"), "--mesh must have a number of devices that divides the 4 query heads"),
        (("--distributed", "here"), "'here' must be HOST:PORT,COUNT,NUMBER, as host:1234,4,0"),
    ],
)
def test_devices_that_are_not_there(sweep, options, message, capsys):
    try:
        error = sweep(*SMALL, *options).err
    except SystemExit:
        error = capsys.readouterr().err
    assert message in " ".join(error.split())


@pytest.mark.short(1)
@pytest.mark.parametrize("options", [("--mesh", "tp=2"), ("--stream",)])
def test_a_step_has_devices_and_weights_of_its_own(command, options):
    done = command("sweep", "--step", "a:b", *options, model=None)
    assert done.status == 2
    assert f"{options[0]} must be left out with --step" in done.err
