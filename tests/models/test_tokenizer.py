"""Tokens cover the text byte for byte, also when it is encoded in pieces."""

import hashlib
import json
import shutil
import sys
import warnings

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qpaged.models import load_tokenizer, tokenizer

SEEN = 'Ærø 日本 🙂🙂  two  spaces\n\n<s> def f(x):\n    return "é" + x\n' + "the cat sat on the mat " * 8
TEXT = SEEN + "ж 語語 🚀 ends"  # with characters that no tokenizer has been trained on


def byte_level():
    """Return byte-level BPE that merges across words, marks both ends of a text, and has an unused id."""
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
    """Return BPE without pre-tokenizer, with spaces as "▁" and unknown characters as bytes, as Llama 2's."""
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
    """Return a unigram model of words that begin with "▁", as SentencePiece's."""
    library = Tokenizer(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    train(library, trainers.UnigramTrainer, special_tokens=["<unk>"], unk_token="<unk>")
    return library


def train(library, trainer, **options):
    library.train_from_iterator(SEEN.split("\n"), trainer(vocab_size=400, show_progress=False, **options))


def word():
    """Return a tokenizer of one word, which is that of Python's for nothing."""
    return Tokenizer(models.WordLevel({"None": 0}, unk_token="None"))


KINDS = {"byte-level": byte_level, "byte fallback": byte_fallback, "metaspace": metaspace}
EXACT = ("byte-level", "byte fallback")  # these decode to the text; the unigram model loses unseen characters


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Return the directory of each kind of tokenizer."""
    paths = {}
    for name, make in {**KINDS, "a word None": word}.items():
        paths[name] = tmp_path_factory.mktemp(name.replace(" ", "_"))
        make().save(str(paths[name] / "tokenizer.json"))
    return paths


@pytest.mark.parametrize("name", KINDS)
def test_ends_cover_the_text(directories, name):
    tokens = load_tokenizer(directories[name]).encode(TEXT.encode())
    assert (tokens.ids.dtype, tokens.ends.dtype) == (np.int32, np.int64)
    assert tokens.ids.shape == tokens.ends.shape
    assert (np.diff(tokens.ends) >= 0).all() and tokens.ends[0] >= 1
    assert tokens.ends[-1] == len(TEXT.encode())


@pytest.mark.parametrize("name", EXACT)
def test_each_token_ends_where_its_text_ends(directories, name):
    """This is checked at every token that ends a character: tokens that share one all end where it does."""
    loaded = load_tokenizer(directories[name])
    data = TEXT.encode()
    tokens = loaded.encode(data)
    assert loaded.decode(tokens.ids) == TEXT
    last = np.flatnonzero(np.diff(tokens.ends, append=np.inf))
    assert len(last) < len(tokens.ids)  # some characters are several tokens
    for index in last:
        assert loaded.decode(tokens.ids[: index + 1]) == data[: tokens.ends[index]].decode()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [40, 64])
def test_a_text_in_pieces_has_the_tokens_of_the_whole_text(directories, name, size, monkeypatch):
    """The text has a run of one character that is longer than a piece."""
    loaded = load_tokenizer(directories[name])
    data = (TEXT + " " * 150 + TEXT[::-1]).encode()
    at_once = loaded.encode(data)
    monkeypatch.setattr(tokenizer, "PIECE", size)
    monkeypatch.setattr(tokenizer, "OVERLAP", 18)
    pieces = loaded.encode(data)
    np.testing.assert_array_equal(pieces.ids, at_once.ids)
    np.testing.assert_array_equal(pieces.ends, at_once.ends)


def test_the_prefix_is_of_the_special_tokens_before_a_text(directories):
    assert load_tokenizer(directories["byte-level"]).prefix == (0,)
    assert load_tokenizer(directories["metaspace"]).prefix == ()


@pytest.mark.parametrize(
    ("name", "settings", "prefix"),
    [
        ("byte-level", {"add_bos_token": False, "bos_token": "<s>"}, ()),
        ("byte-level", {"add_bos_token": True, "bos_token": {"content": "<s>"}}, (0,)),
        ("byte-level", {"add_bos_token": None, "bos_token": "<s>"}, (0,)),
        ("byte-level", {"bos_token": "<s>"}, (0,)),
        ("metaspace", {"add_bos_token": True, "bos_token": "<unk>"}, (0,)),
        ("metaspace", {"add_bos_token": True, "bos_token": "of another"}, ()),
        ("metaspace", [], ()),
        ("a word None", {"add_bos_token": True}, ()),
        ("a word None", {"add_bos_token": True, "bos_token": None}, ()),
        ("a word None", {"add_bos_token": True, "bos_token": {"content": None}}, ()),
        ("a word None", {"add_bos_token": True, "bos_token": ["None"]}, ()),
    ],
)
def test_add_bos_token_of_the_configuration_decides(directories, tmp_path, name, settings, prefix):
    shutil.copy(directories[name] / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert load_tokenizer(tmp_path).prefix == prefix
    disagree = prefix != load_tokenizer(directories[name]).prefix
    assert ["add_bos_token of tokenizer_config.json says" in str(w.message) for w in seen] == [
        True
    ] * disagree


def test_text_that_looks_like_a_special_token_is_plain_text(directories):
    loaded = load_tokenizer(directories["byte-level"])
    tokens = loaded.encode(b"<s><image>")
    assert loaded.decode(tokens.ids) == "<s><image>"
    assert tokens.ids.min() > 1 and tokens.ids.max() < loaded.vocab_size


def test_the_vocabulary_ends_before_special_tokens_that_no_text_has(directories):
    library = load_tokenizer(directories["byte-level"]).library
    assert load_tokenizer(directories["byte-level"]).vocab_size == library.token_to_id("<image>")


def test_a_tokenizer_has_its_directorys_name_and_its_files_hash(directories):
    directory = directories["metaspace"]
    file = directory / "tokenizer.json"
    loaded = load_tokenizer(directory)
    assert loaded.name == directory.name
    assert loaded.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert load_tokenizer(str(file)).sha256 == loaded.sha256


@pytest.mark.parametrize("name", [*KINDS, "bytes"])
def test_an_empty_text_has_no_tokens(directories, name):
    tokens = load_tokenizer(directories.get(name, "bytes")).encode(b"")
    assert tokens.ids.shape == tokens.ends.shape == (0,)


def test_bytes_are_their_own_ids():
    loaded = load_tokenizer("bytes")
    tokens = loaded.encode(bytes(range(256)))
    assert (loaded.name, loaded.sha256, loaded.vocab_size, loaded.prefix) == ("bytes", None, 256, ())
    np.testing.assert_array_equal(tokens.ids, np.arange(256))
    np.testing.assert_array_equal(tokens.ends, np.arange(1, 257))
    assert (tokens.ids.dtype, tokens.ends.dtype) == (np.int32, np.int64)
    half_character = loaded.encode("né".encode()).ids[:2]
    assert loaded.decode(half_character) == "n\N{REPLACEMENT CHARACTER}"


def test_text_that_is_not_utf8_is_refused(directories):
    with pytest.raises(ValueError, match=r"not at byte 3 \(0xff\); .* with --tokenizer bytes"):
        load_tokenizer(directories["metaspace"]).encode(b"abc\xffdef")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'There is no .*tokenizer.json. Give .* or "bytes"'):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", "\xff"])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer .* Copy the file again"):
        load_tokenizer(tmp_path)


def with_pattern(pattern, directory):
    library = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    library.save(str(directory / "tokenizer.json"))
    return directory


def test_a_regular_expression_that_takes_too_many_steps_is_an_error(tmp_path):
    slow = load_tokenizer(with_pattern("(a+)+$", tmp_path))
    message = (
        r"tokenizer.json cannot encode the text between characters 0 and 65: .*retry-limit.*--tokenizer bytes"
    )
    with pytest.raises(ValueError, match=message):
        slow.encode(b"a" * 64 + b"b")


def test_a_regular_expression_that_cannot_be_read_is_an_error(tmp_path):
    file = with_pattern("REPLACED", tmp_path) / "tokenizer.json"
    file.write_text(file.read_text().replace("REPLACED", "(a"))
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer .* Copy the file again"):
        load_tokenizer(tmp_path)


def test_the_error_without_the_library_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'tokenizers is needed here: pip install -e "\.\[sweep\]" in'):
        load_tokenizer(tmp_path)


def test_an_id_that_no_array_of_tokens_can_hold_is_refused(directories, tmp_path):
    text = (directories["byte-level"] / "tokenizer.json").read_text()
    fields = json.loads(text)
    fields["model"]["vocab"]["of another world"] = 2**32 - 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"tokens must have ids of 32 bits, but one has 4,294,967,295"):
        load_tokenizer(tmp_path)
