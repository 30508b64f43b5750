"""A tokenizer's files in a Hugging Face folder; tests/parity loads them with `transformers`."""

from __future__ import annotations

import json
import pathlib

import pytest

from mesh_transformer.data import DataError, tokenizer, tokenizer_files

TEXT = "naïve  日本語 👩‍🚀\x00 it's <|endoftext|> 1234\n"


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_a_tokenizer_s_files_are_the_tokenizer(name: str, tmp_path: pathlib.Path) -> None:
    tokens = tokenizer.load(name)
    tokenizer_files.write(str(tmp_path), tokens, tokens.n_tokens)
    again = tokenizer.load(str(tmp_path))
    assert again.encode(TEXT) == tokens.encode(TEXT)
    assert again.decode(again.encode(TEXT)) == TEXT
    assert (again.n_tokens, again.eot_id) == (tokens.n_tokens, tokens.eot_id)
    assert again.token_bytes() == tokens.token_bytes()
    drawn = json.loads((tmp_path / "generation_config.json").read_text())
    assert drawn["bos_token_id"] == drawn["eos_token_id"] == tokens.eot_id
    assert "pad_token_id" not in drawn, "no token of theirs only pads"


def test_a_tokenizer_from_files_is_copied_with_what_lies_beside_it(tmp_path: pathlib.Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    tokenizer_files.write(str(first), tokenizer.load("gpt2"), 50400)
    beside = ("chat_template.jinja", "tokenizer.model", "spiece.model", "vocab.txt")
    for name in (*beside, "additional_chat_templates/tools.jinja"):
        (first / name).parent.mkdir(exist_ok=True)
        (first / name).write_bytes(name.encode())
    (first / "notes.md").write_text("none of a tokenizer's")
    tokenizer_files.write(str(second), tokenizer.load(str(first)), 50400)
    files = {path.relative_to(second) for path in second.rglob("*") if path.is_file()}
    there = {path.relative_to(first) for path in first.rglob("*") if path.is_file()}
    assert files == there - {pathlib.Path("notes.md")}
    for path in files:
        assert (first / path).read_bytes() == (second / path).read_bytes()


def test_a_lone_tokenizer_json_is_given_a_configuration(tmp_path: pathlib.Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    tokenizer_files.write(str(first), tokenizer.load("bytes"), 257)
    lone = tmp_path / "mine.json"
    (first / "tokenizer.json").rename(lone)
    tokenizer_files.write(str(second), tokenizer.load(str(lone)), 300)
    about = json.loads((second / "tokenizer_config.json").read_text())
    assert about["eos_token"] == "<|endoftext|>"
    assert tokenizer.load(str(second)).encode(TEXT) == list(TEXT.encode())


def test_a_tokenizer_that_does_not_fit_the_model_or_has_no_files_is_refused(
    tmp_path: pathlib.Path,
) -> None:
    gpt2 = tokenizer.load("gpt2")
    with pytest.raises(
        DataError, match=r"gpt2 has 50257 ids, the model's vocabulary 256 \(n_vocab\); name the"
    ):
        tokenizer_files.write(str(tmp_path), gpt2, 256)
    assert isinstance(gpt2, tokenizer.Subwords)
    bare = tokenizer.Subwords("bare", gpt2._backend, gpt2.eot_text)
    with pytest.raises(DataError, match="bare has no tokenizer.json that could be copied"):
        tokenizer_files.write(str(tmp_path), bare, 50257)
    assert not list(tmp_path.iterdir())
