"""Tests of bad arguments: each is reported in one line, before any work, with status 2."""

import sys

import jax
import pytest
from support.small_sweep import SIZES

import qpaged
from qpaged.cli import main
from qpaged.models import DecoderConfig, init_params, save_checkpoint
from qpaged.sweep import Sweep


def one_line(result):
    assert (result.status, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert result.err.startswith("qpaged sweep: ")
    return result.err


def test_unknown_format(sweep):
    message = one_line(sweep("--formats", "int8,int9"))
    assert "no format is named 'int9'" in message
    names = ", ".join(qpaged.available_quantizers())
    assert f"there are {names}, and plain. Did you mean int8?" in message


def test_unknown_granularity(sweep):
    assert "granularity must be one of page, token, channel" in one_line(sweep("--formats", "int8:row"))


def test_empty_list_of_formats(sweep):
    assert "--formats has an empty name in ''; part names by one comma." in one_line(sweep("--formats", ""))


def test_missing_text(sweep, tmp_path):
    assert "nowhere.txt" in one_line(sweep(text=tmp_path / "nowhere.txt"))


def test_short_text(sweep, tmp_path):
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * 64)
    assert "holds 64 bytes, but a sequence of 64 needs 65" in one_line(sweep(text=path))


def test_missing_checkpoint(sweep, tmp_path):
    assert "There is no" in one_line(sweep(model=tmp_path / "nowhere"))


@pytest.mark.parametrize("config", ["[]", "{", '{"model_type": "llama", "num_attention_heads": 0}', "\xff"])
def test_malformed_checkpoint(sweep, tmp_path, config):
    (tmp_path / "config.json").write_text(config, encoding="latin-1")
    assert one_line(sweep(model=tmp_path))


def test_a_tokenizer_with_tokens_that_the_model_lacks(sweep, tmp_path):
    config = DecoderConfig(**vars(SIZES) | {"vocab_size": 200})
    save_checkpoint(tmp_path, config, init_params(config, jax.random.key(0)))
    message = one_line(sweep(model=tmp_path))
    assert "--tokenizer must have at most the 200 tokens of the model, but bytes has 256" in message


def test_a_tokenizer_without_the_checkpoint_that_it_belongs_to(sweep, tmp_path):
    message = one_line(sweep("--tokenizer", tmp_path, model=None))
    assert '--tokenizer must be "bytes" or left out for the bundled model' in message
    assert f"but came as '{tmp_path}'; give the checkpoint that it belongs to" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tokens 63", "--tokens must be at least the context, 64, but came as 63; give more tokens, or"),
        ("--tokens 0", "--tokens must be at least 1, but came as 0."),
        ("--context 0", "--context must be at least 2, but came as 0."),
        ("--context 4k --tokens 1k", "--tokens must be at least the context, 4,096, but came as 1,024; give"),
        (
            "--context 65",
            "--context must be at most 64, the longest that the model is made for, but came as 65.",
        ),
        ("--batch -1", "--batch must be at least 1, but came as -1."),
        ("--page-size 0", "--page-size must be at least 1, but came as 0."),
        ("--page-size 99999999999", "--page-size must be at most 2,147,483,646, but came as 99,999,999,999."),
        ("--max-kl 0", "--max-kl must be above 0 nats a token, and finite, but came as 0; 0.01 is usual."),
        ("--max-kl inf", "--max-kl must be above 0 nats a token, and finite, but came as inf; 0.01 is"),
        ("--seed -1", "--seed must be at least 0, but came as -1."),
        ("--formats int8,,int4", "--formats has an empty name in 'int8,,int4'; part names by one comma."),
        ("--formats all,int8", "--formats must list formats, as int8,int4; all stands alone, and for qpaged"),
        (
            "--formats int8/",
            "--formats cannot be used: 'int8/' must have a format on both sides of its slash",
        ),
        (
            "--formats gone.json",
            "--formats gone.json cannot be read (No such file or directory); give a file",
        ),
        ("--text .", "--text '.' cannot be read (Is a directory); give a text file."),
        (
            "--text gone.txt",
            "--text 'gone.txt' cannot be read (No such file or directory); give a text file.",
        ),
        ("--text=", "--text '' cannot be read (Is a directory); give a text file."),
    ],
)
def test_bad_arguments_are_refused_in_the_words_of_the_flags(sweep, arguments, message):
    assert one_line(sweep(*arguments.split())).startswith(f"qpaged sweep: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tokens 16x", "--tokens: '16x' is no number of tokens; 32768 or 32k is."),
        ("--batch 1.5", "--batch: '1.5' is no whole number; 16 is."),
        ("--bits 5bits", "--bits: '5bits' is no number; 5 and 0.9 are."),
    ],
)
def test_what_cannot_be_parsed_is_refused_with_an_example(capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(["tune", *arguments.split()])
    assert f"error: argument {message}" in capsys.readouterr().err


def test_a_format_of_a_layer_that_the_model_lacks_is_refused(sweep, tmp_path):
    qpaged.CacheFormat.of("int8").with_layers({99: "raw"}).save(tmp_path / "deep.json")
    message = one_line(sweep("--formats", tmp_path / "deep.json"))
    assert "deep.json names layer 99, but the model has layers 0 to 1; give" in message


def test_the_config_file_in_place_of_the_directory(sweep, checkpoint):
    message = one_line(sweep(model=checkpoint / "config.json"))
    assert f"The model must be a directory: give {checkpoint}, not its config.json." in message


def test_a_model_whose_logits_are_not_finite(sweep, tmp_path):
    params = init_params(SIZES, jax.random.key(0))
    params["lm_head.weight"] *= float("nan")
    save_checkpoint(tmp_path / "nan", SIZES, params)
    result = sweep("--tokens", 64, "--formats", "int8", model=tmp_path / "nan")
    assert result.status == 2
    assert "nan gives NaN or infinite logits on the plain cache; check its weights." in result.err


def test_output_that_is_no_directory(sweep, text_file):
    message = f"--out {text_file} cannot be written: {text_file} is a file, not a directory."
    assert message in one_line(sweep("--out", text_file))


@pytest.mark.parametrize("package", ["rich", "matplotlib", "safetensors", "jinja2"])
def test_missing_extra(sweep, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = f'{package} is needed here: pip install -e ".[sweep]" in qpaged\'s checkout installs it.'
    assert message in one_line(sweep())


@pytest.mark.parametrize(
    "arguments", [[], ["sweeep"], ["sweep", "--dtype", "int8"], ["sweep", "--tokens", "x"]]
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "usage: qpaged" in capsys.readouterr().err


def test_a_text_with_too_few_tokens_is_reported(sweep, monkeypatch):
    monkeypatch.setattr(Sweep, "run", lambda self, progress, known: iter(()))
    result = sweep("--tokens", 6400, "--formats", "int8")
    assert "is enough for 960 tokens only" in result.err


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert (exit.value.code, capsys.readouterr().out) == (0, "qpaged 0.1.0\n")


def test_nothing_is_written_where_nothing_was_run(sweep):
    result = sweep("--formats", "int9")
    assert not result.directory.exists()


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "sweep",
            "MODEL_DIR --step --text --tokenizer --tokens --context --seed --formats --out --fresh --json",
        ),
        (
            "tune",
            "MODEL_DIR --step --text --tokenizer --bits --max-kl --formats --out --report --fresh --json",
        ),
        ("plan", "MODEL --memory --context --formats --weights --mesh --page-size --utilization --json"),
        ("formats", "--help"),
    ],
)
def test_help_lists_every_option_and_its_default(command, options, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    message = capsys.readouterr().out
    assert exit.value.code == 0 and max(map(len, message.splitlines())) <= 80
    usage, _, options_help = message.partition("\n\n")
    assert usage.startswith(f"usage: qpaged {command} ")
    for option in options.split():
        assert option in usage.replace("[-h]", "--help") and f"  {option}" in options_help.replace(
            "-h, ", "  "
        )
    for default in {"sweep": ["16384", "bfloat16"], "tune": ["format.json"], "plan": ["0.9"]}.get(
        command, []
    ):
        assert f"({default})" in options_help


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    message = capsys.readouterr().out
    assert all(f"\n    {command} " in message for command in ("sweep", "tune", "plan", "formats"))
