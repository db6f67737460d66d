"""Tokens cover the text, byte for byte, however long it is and wherever it is cut."""

import hashlib
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qpaged.models import load_tokenizer, tokenizer

SEEN = 'Ærø 日本 🙂🙂  two  spaces\n\n<s> def f(x):\n    return "é" + x\n' + "the cat sat on the mat " * 8
TEXT = SEEN + "ж 語語 🚀 ends"  # with characters that no tokenizer has been trained on


def byte_level():
    """Byte-level BPE across words, that begins and ends texts, with an id that no text has."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train(library, trainers.BpeTrainer, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    trimmed = processors.ByteLevel(trim_offsets=True)
    library.post_processor = processors.Sequence([trimmed, template])
    library.add_special_tokens(["<image>"])
    library.enable_truncation(5)
    library.enable_padding(length=9)
    return library


def byte_fallback():
    """BPE over a whole text with its spaces as "▁", characters it lacks as bytes, as Llama 2's."""
    library = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    train(library, trainers.BpeTrainer, special_tokens=tokens, limit_alphabet=20)
    return library


def metaspace():
    """Unigrams of words that begin with "▁", as SentencePiece's."""
    library = Tokenizer(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    train(library, trainers.UnigramTrainer, special_tokens=["<unk>"], unk_token="<unk>")
    return library


def train(library, trainer, **options):
    library.train_from_iterator(SEEN.split("\n"), trainer(vocab_size=400, show_progress=False, **options))


KINDS = {"byte-level": byte_level, "byte fallback": byte_fallback, "metaspace": metaspace}
EXACT = ("byte-level", "byte fallback")  # which give back the text; unigrams lose what they have not seen


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The directory of each kind of tokenizer."""
    made = {}
    for name, make in KINDS.items():
        made[name] = tmp_path_factory.mktemp(name.replace(" ", "_"))
        make().save(str(made[name] / "tokenizer.json"))
    return made


@pytest.mark.parametrize("name", KINDS)
def test_ends_cover_the_text(directories, name):
    tokens = load_tokenizer(directories[name]).encode(TEXT.encode())
    assert (tokens.ids.dtype, tokens.ends.dtype) == (np.int32, np.int64)
    assert tokens.ids.shape == tokens.ends.shape
    assert (np.diff(tokens.ends) >= 0).all() and tokens.ends[0] >= 1
    assert tokens.ends[-1] == len(TEXT.encode())


@pytest.mark.parametrize("name", EXACT)
def test_each_token_ends_where_what_it_decodes_to_does(directories, name):
    """At every token that ends a character: of several that share one, all end where it does."""
    found, data = load_tokenizer(directories[name]), TEXT.encode()
    tokens = found.encode(data)
    assert found.decode(tokens.ids) == TEXT
    last = np.flatnonzero(np.diff(tokens.ends, append=np.inf))
    assert len(last) < len(tokens.ids)  # some characters are several tokens
    for index in last:
        assert found.decode(tokens.ids[: index + 1]) == data[: tokens.ends[index]].decode()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [40, 64])
def test_pieces_are_as_the_whole(directories, name, size, monkeypatch):
    """A run of one character, longer than a piece, among them."""
    found = load_tokenizer(directories[name])
    data = (TEXT + " " * 150 + TEXT[::-1]).encode()
    whole = found.encode(data)
    monkeypatch.setattr(tokenizer, "PIECE", size)
    monkeypatch.setattr(tokenizer, "OVERLAP", 18)
    pieces = found.encode(data)
    np.testing.assert_array_equal(pieces.ids, whole.ids)
    np.testing.assert_array_equal(pieces.ends, whole.ends)


def test_prefix_is_what_comes_before_a_text(directories):
    assert load_tokenizer(directories["byte-level"]).prefix == (0,)
    assert load_tokenizer(directories["metaspace"]).prefix == ()


def test_what_reads_like_a_special_token_is_text(directories):
    found = load_tokenizer(directories["byte-level"])
    tokens = found.encode(b"<s><image>")
    assert found.decode(tokens.ids) == "<s><image>"
    assert tokens.ids.min() > 1 and tokens.ids.max() < found.vocab_size


def test_vocabulary_has_no_room_for_what_no_text_has(directories):
    library = load_tokenizer(directories["byte-level"]).library
    assert load_tokenizer(directories["byte-level"]).vocab_size == library.token_to_id("<image>")


def test_identity(directories):
    found, file = load_tokenizer(directories["metaspace"]), directories["metaspace"] / "tokenizer.json"
    assert found.name == directories["metaspace"].name
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert load_tokenizer(str(file)).sha256 == found.sha256


@pytest.mark.parametrize("name", [*KINDS, "bytes"])
def test_empty_text(directories, name):
    tokens = load_tokenizer(directories.get(name, "bytes")).encode(b"")
    assert tokens.ids.shape == tokens.ends.shape == (0,)


def test_bytes_are_their_own_ids():
    found, data = load_tokenizer("bytes"), bytes(range(256))
    tokens = found.encode(data)
    assert (found.name, found.sha256, found.vocab_size, found.prefix) == ("bytes", None, 256, ())
    np.testing.assert_array_equal(tokens.ids, np.arange(256))
    np.testing.assert_array_equal(tokens.ends, np.arange(1, 257))
    assert (tokens.ids.dtype, tokens.ends.dtype) == (np.int32, np.int64)
    assert found.decode(load_tokenizer("bytes").encode("né".encode()).ids[:2]) == "n\N{REPLACEMENT CHARACTER}"


def test_text_that_is_not_utf8(directories):
    with pytest.raises(ValueError, match=r"not at byte 3 \(0xff\); .* with --tokenizer bytes"):
        load_tokenizer(directories["metaspace"]).encode(b"abc\xffdef")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'There is no .*tokenizer.json. Give .* or "bytes"'):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", "\xff"])
def test_damaged_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer .* Copy the file again"):
        load_tokenizer(tmp_path)


def test_without_the_library(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'tokenizers is needed here: pip install "qpaged\[sweep\]"'):
        load_tokenizer(tmp_path)
