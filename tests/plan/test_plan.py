"""Tests of ``qpaged plan`` against caches that are allocated."""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import qpaged
from qpaged.cli import main
from qpaged.cli._arguments import token_count
from qpaged.cli.commands.plan import DEFAULT_FORMATS, memory_size, size
from qpaged.models import DecoderConfig
from qpaged.plan import plan

CONFIG = DecoderConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, head_dim=64, max_position_embeddings=512,
)  # fmt: skip
FORMATS = ("plain", "int8", "int8:channel/int4", "int4+offset+rotate", "nvfp4")
EXACT = "int4:channel+offset+exact128+sink16/int4:token+rotate+exact128+sink16"
MEMORY, WEIGHTS = 1_000_003, 100_001


@pytest.mark.short(8)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("devices", [1, 3, 4, 8])
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
    assert planned.shards == {1: 1, 3: 1, 4: 4, 8: 8}[devices]  # 4 heads are stored twice over 8 devices
    assert planned.weights + planned.cache + planned.reserve + planned.unused == MEMORY
    assert 0 <= planned.unused < planned.cache / planned.pages  # not one page more would fit


@pytest.mark.parametrize(("devices", "of_page"), [(1, 0), (2, 2 * 2), (4, 2 * 3)])
def test_padding_of_scales_on_tpus_is_planned(devices, of_page):
    # as libtpu compiles it: scales (1, pages, 1, 1) of a byte take 4 bytes a page, (2, pages, 1, 1) too
    planned = plan(CONFIG, "int8", memory_bytes=MEMORY, context=100, mesh_size=devices)
    assert planned.tpu_padding == CONFIG.num_hidden_layers * planned.pages * of_page
    by_token = plan(CONFIG, "int8:token", memory_bytes=MEMORY, context=100, mesh_size=devices)
    assert by_token.tpu_padding == 0


@pytest.mark.parametrize("format", ["int8", EXACT, "int4+rotate+exact128"])
def test_as_many_sequences_fit_as_planned_with_their_exact_pages(format):
    memory = 2**27
    planned = plan(CONFIG, format, memory_bytes=memory, context=2048, page_size=64)

    def create(sequences):
        return qpaged.PagedAttentionCacheMetaData.create(
            None, sequences, 2, 2048, 64, 4, 64, 0.9, jnp.bfloat16, quantizer=format, memory_bytes=memory
        )

    metadata = create(planned.sequences)
    assert metadata == planned.metadata
    assert metadata.num_pages_per_layer >= planned.sequences * metadata.num_pages_per_sequence > 0
    more = create(planned.sequences + 1)
    assert more.num_pages_per_layer < (planned.sequences + 1) * more.num_pages_per_sequence
    cache = qpaged.PagedAttentionCache.init_cache(None, jnp.bfloat16, metadata, quantizer=format)
    assert cache.nbytes == planned.cache


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
            "memory_bytes must be more than the weights, 1,000 B on each device, but came as 1,000 B",
        ),
        (
            {"memory_bytes": 1000},
            "memory_bytes must leave the cache room for a page of every layer, 16.02 KiB, but leaves it 900",
        ),
        ({"memory_bytes": MEMORY, "context": 0}, "context must be at least 1, but came as 0"),
        ({"memory_bytes": MEMORY, "mesh_size": 0}, "mesh_size must be at least 1, but came as 0"),
        ({"memory_bytes": MEMORY, "groups": 0}, "groups must be at least 1, but came as 0"),
        ({"memory_bytes": MEMORY, "hbm_utilization": 1.5}, "hbm_utilization must be between 0 and 1"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan(CONFIG, "int8", **{"context": 100} | options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mesh_size": 1.5}, TypeError, "mesh_size must be an integer, but came as 1.5"),
        ({"page_size": "16"}, TypeError, "page_size must be an integer, but came as '16'"),
        ({"hbm_utilization": "0.9"}, ValueError, "hbm_utilization must be between .* came as '0.9'"),
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
    assert [each["format"] for each in plans] == DEFAULT_FORMATS.split(",")
    assert plans[1]["memory"] == 1_000_000 and plans[1]["context"] == 512 and plans[1]["shards"] == 4
    assert plans[1]["cache"] == plan(CONFIG, "int8", memory_bytes=10**6, context=512, mesh_size=4).cache


def test_a_format_that_does_not_fit_is_left_out(command, model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"head_dim": 48}))
    status, out, err = command("--memory", "1MiB", "--formats", "int8,int4:group32")
    assert status == 1 and "\nint8 " in out and "int4:group32 is left out: " in err
    assert command("--memory", "1MiB")[0] == 0


def test_the_heads_on_each_device_of_a_mesh_are_shown(command):
    assert "On 4 devices, 1 KV head on each." in command("--memory", "1MiB", "--mesh", 4)[1]
    assert "On 8 devices, 1 KV head on each, stored 2 times." in command("--memory", "1MiB", "--mesh", 8)[1]
    in_groups = command("--memory", "1MiB", "--mesh", "dp=3,tp=2")[1]
    assert "On 6 devices in 3 groups, each with sequences of its own, 2 KV heads on each." in in_groups
    assert "More on TPUs, which pad scales of pages to four KV heads: int8 " in in_groups
    whole = command("--memory", "1MiB", "--mesh", 3)[1]
    assert "On 3 devices, all 4 KV heads on each, since these do not divide by 3." in whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--memory is needed, since the device here does not report its memory; give it, as 80GiB."),
        ("--memory 1MiB --page-size 0", "--page-size must be at least 1, but came as 0."),
        ("--memory 1MiB --page-size 3000000000", "--page-size must be at most 2,147,483,646, but came as 3,"),
        (
            "--memory 1MiB --page-size 1000000",
            "--memory must leave the cache room for a page of every layer,",
        ),
        ("--memory 1MiB --context 0", "--context must be at least 1, but came as 0."),
        ("--memory 1MiB --context 2147483646", "--context must be at most 2,147,483,632, but came as 2,"),
        ("--memory 1MiB --utilization 90", "--utilization must be between 0 and 1, as 0.9, but came as 90."),
        (
            "--memory 1KiB --weights 0",
            "--memory must leave the cache room for a page of every layer, 32.00 KiB",
        ),
        ("--memory 1MiB --weights 2mib --mesh 2", "--memory must be more than the weights, 1.00 MiB on each"),
        ("--memory 1MiB --formats int9", "--formats cannot be used: no format is named 'int9'"),
        ("--memory 1MiB --formats=", "--formats has an empty name in ''; part names by one comma."),
        ("--memory 1MiB --formats int8,", "--formats has an empty name in 'int8,'; part names by one comma."),
        (
            "--memory 1MiB --formats all",
            "--formats must list formats, as int8,int4; all stands alone, and for",
        ),
        (
            "--memory 1MiB --formats x.json",
            "--formats x.json cannot be read (No such file or directory); give",
        ),
    ],
)
def test_bad_arguments_are_refused_in_the_words_of_the_flags(command, arguments, message):
    status, out, err = command(*arguments.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"qpaged plan: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--memory 80xb", "--memory: '80xb' is no size; 80GiB, 141GB or the digits of its bytes are."),
        ("--memory 1.5", "--memory: '1.5' would be 1.5 bytes; write 1.5GiB."),
        ("--memory 0.5", "--memory: '0.5' would be 0.5 bytes; write 0.5GiB."),
        ("--context 4kk", "--context: '4kk' is no number of tokens; 32768 or 32k is."),
        ("--mesh 2x4", "--mesh: '2x4' is no mesh; 8, tp=8 and dp=32,tp=8 are."),
        ("--mesh tp=0", "--mesh: 'tp=0' is no mesh; 8, tp=8 and dp=32,tp=8 are."),
        ("--utilization 90%", "--utilization: '90%' is no number; 5 and 0.9 are."),
    ],
)
def test_what_cannot_be_parsed_is_refused_with_an_example(model, capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(["plan", str(model), *arguments.split()])
    assert f"error: argument {message}" in capsys.readouterr().err


def test_a_format_of_a_layer_that_the_model_lacks_is_refused(command, tmp_path):
    qpaged.CacheFormat.of("int8").with_layers({99: "raw"}).save(tmp_path / "deep.json")
    status, _, err = command("--memory", "1MiB", "--formats", tmp_path / "deep.json")
    assert status == 2 and "deep.json names layer 99, but the model has layers 0 to 1; give" in err


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("80GiB", 80 * 2**30),
        ("141gb", 141 * 10**9),
        ("0.5T", 2**39),
        ("12", 12),
        ("3 xb", None),
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
    for text in ("32kk", "1.5k", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="is no number of tokens; 32768 or 32k is"):
            token_count(text)
