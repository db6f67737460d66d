"""Tests of ``qpaged plan`` against caches that are allocated."""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import qpaged
from qpaged.cli.commands.plan import memory_size, size, token_count
from qpaged.models import DecoderConfig
from qpaged.plan import plan

CONFIG = DecoderConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, head_dim=64, max_position_embeddings=512,
)  # fmt: skip
FORMATS = ("plain", "int8", "int8:channel/int4", "int4+offset+rotate", "nvfp4")
MEMORY, WEIGHTS = 1_000_003, 100_001


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("devices", [1, 4, 8])
def test_planned_bytes_equal_allocated_bytes(format, devices):
    planned = plan(
        CONFIG,
        format,
        memory_bytes=MEMORY,
        context=100,
        weights_bytes=WEIGHTS,
        mesh_size=devices,
        dtype="float32",
    )
    mesh = Mesh(np.array(jax.devices()[:devices]), ("tp",))
    metadata = qpaged.PagedAttentionCacheMetaData.create(
        mesh, 1, 2, 100, 16, 4, 64, 0.9, jnp.float32, quantizer=format, memory_bytes=MEMORY - planned.weights
    )
    cache = qpaged.PagedAttentionCache.init_cache(mesh, jnp.float32, metadata, quantizer=format)
    leaves = jax.tree_util.tree_leaves(cache)
    allocated = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    assert planned.cache == allocated
    assert planned.pages == metadata.num_pages_per_layer
    assert planned.weights == -(-WEIGHTS // devices)
    assert planned.shards == {1: 1, 4: 4, 8: 1}[devices]  # 4 heads do not divide over 8 devices
    assert planned.weights + planned.cache + planned.reserve + planned.unused == MEMORY
    assert 0 <= planned.unused < planned.cache / planned.pages  # not one page more would fit


def test_only_whole_sequences_are_counted():
    planned = plan(CONFIG, "int8", memory_bytes=MEMORY, context=100)
    assert planned.tokens == planned.pages * 16
    assert planned.sequences == planned.pages // 7  # pages that 100 tokens need
    assert planned.bytes_per_token == pytest.approx(2 * 2 * 4 * (64 + 1 / 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"memory_bytes": 1000, "weights_bytes": 1000},
            "memory_bytes must be more than the weights, 1,000 bytes",
        ),
        ({"memory_bytes": 1000}, "one page of 2 layers takes"),
        ({"memory_bytes": MEMORY, "context": 0}, "context must be positive"),
        ({"memory_bytes": MEMORY, "hbm_utilization": 1.5}, "hbm_utilization must lie between 0 and 1"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan(CONFIG, "int8", **{"context": 100} | options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mesh_size": 0}, ValueError, "mesh_size must be positive, but came as 0"),
        (
            {"memory_bytes": "1GB"},
            TypeError,
            "memory_bytes must be a number of bytes, but got '1GB'; 80 GiB are",
        ),
        ({"weights_bytes": "x"}, TypeError, "weights_bytes must be a number of bytes, but got 'x'"),
        ({"config": "/x"}, TypeError, "config must be a .*, but got '/x'; .*read_cache_sizes"),
        (
            {"quantizer": jnp.int8},
            TypeError,
            "quantizer must be .*, but got the class int8; .* such as 'int8'",
        ),
    ],
)
def test_arguments_of_another_kind_are_refused(options, error, message):
    arguments = {"config": CONFIG, "quantizer": "int8", "memory_bytes": MEMORY, "context": 100} | options
    with pytest.raises(error, match=message):
        plan(**arguments)


def test_the_argument_format_is_called_quantizer_now():
    with pytest.warns(DeprecationWarning, match=r"format= of plan is now quantizer="):
        planned = plan(CONFIG, format="int8", memory_bytes=MEMORY, context=100)
    assert planned == plan(CONFIG, quantizer="int8", memory_bytes=MEMORY, context=100)


def test_the_command_prints_the_plans(command):
    status, out, err = command(
        "--memory", "1MiB", "--formats", "int8,int8/int4", "--context", 100, "--weights", "48KiB"
    )
    assert (status, err) == (0, "")
    assert "2 layers of 4 KV heads of 64, pages of 16 tokens." in out
    assert "the weights take 48.00 KiB" in out
    expected = plan(CONFIG, "int8/int4", memory_bytes=2**20, context=100, weights_bytes=48 * 1024)
    row = next(line for line in out.splitlines() if line.startswith("int8/int4")).split()
    assert row[1:5] == [
        f"{expected.bytes_per_token:,.1f}",
        *(f"{n:,}" for n in (expected.pages, expected.tokens, expected.sequences)),
    ]


def test_json_alone_is_printed_if_asked_for(command, model):
    status, out, _ = command(
        "--memory", "1MB", "--json", "--mesh", 4, "--weights", 0, of=model / "config.json"
    )
    plans = json.loads(out)["plans"]
    assert status == 0
    assert [each["format"] for each in plans] == ["plain", "int8", "int8:token", "int8/int4", "int4+rotate"]
    assert plans[1]["memory"] == 1_000_000 and plans[1]["context"] == 512 and plans[1]["shards"] == 4
    assert plans[1]["cache"] == plan(CONFIG, "int8", memory_bytes=10**6, context=512, mesh_size=4).cache


def test_a_format_that_does_not_fit_is_left_out(command, model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"head_dim": 48}))
    status, out, err = command("--memory", "1MiB", "--formats", "int8,int4:group32")
    assert status == 1 and "\nint8 " in out and "int4:group32 is left out: " in err
    assert command("--memory", "1MiB")[0] == 0


def test_the_heads_on_each_device_of_a_mesh_are_shown(command):
    assert "On 4 devices, 1 KV heads on each" in command("--memory", "1MiB", "--mesh", 4)[1]
    assert (
        "4 KV heads do not divide by that, so each holds all" in command("--memory", "1MiB", "--mesh", 8)[1]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the device found does not tell its memory"),
        (("--memory", "1MiB", "--mesh", 0), "--mesh must be at least 1, but came as 0"),
        (("--memory", "1MiB", "--formats", "int9"), "int9"),
        (("--memory", "1KiB", "--weights", "0"), "one page of 2 layers takes"),
    ],
)
def test_bad_arguments_are_refused(command, arguments, message):
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("80GiB", 80 * 2**30),
        ("141GB", 141 * 10**9),
        ("0.5T", 2**39),
        ("12", 12),
        ("3 kb", None),
        ("x", None),
        ("9" * 400, None),
    ],
)
def test_sizes(text, count):
    if count is None:
        with pytest.raises(argparse.ArgumentTypeError, match="is no size; 80GiB"):
            size(text)
    else:
        assert size(text) == count


def test_memory_without_a_unit_is_asked_about():
    with pytest.raises(argparse.ArgumentTypeError, match="'80' would be 80 bytes; write 80GiB"):
        memory_size("80")
    assert memory_size("85899345920") == memory_size("80GiB") == 80 * 2**30


def test_a_context_may_be_said_in_thousands():
    assert token_count("32k") == token_count("32768") == 32768
    for text in ("32kk", "-5", "1.5k", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="is no number of tokens; 32768 or 32k is"):
            token_count(text)
