"""A tokenizer's files, beside a model's in a Hugging Face folder, as `transformers` loads them.

It cuts text into the ids that ours does. Only the names of special tokens, such as <|endoftext|>,
are those tokens there and ordinary text here; with `split_special_tokens=True` they are there too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from mesh_transformer import storage
from mesh_transformer.data import DataError, borders
from mesh_transformer.data.tokenizer import Bytes, Subwords, Tokenizer, byte_alphabet

TEMPERATURE, TOP_P = 0.75, 0.9
"""How `generate` draws unless told otherwise: as device_sample.py does."""

_GENERATION, _MODEL = "generation_config.json", "config.json"
_BOS, _EOS, _PAD = _IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_FAST = "PreTrainedTokenizerFast"
_COPIED = (
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json"),
)


def write(folder: str, tokenizer: Tokenizer, n_vocab: int, *, start_id: int | None = None) -> None:
    """Write a tokenizer's files, and generation_config.json, into a folder that is there.

    A generation_config.json beside the tokenizer's own files is kept as it is; only the ids that
    it lacks are added, and ids that the model has not are left out.

    Args:
        n_vocab: Rows of the model's vocabulary. As in the published GPT-J, gpt2's ids beyond those
            of its tokens are named <|extratoken_1|>, <|extratoken_2|>...
        start_id: What begins every answer, and pads, of a model with an encoder; None: without one.

    Raises:
        DataError: The tokenizer has more ids than the model, or no files of its own.
    """
    check(tokenizer, n_vocab)
    if isinstance(tokenizer, Bytes):
        _write_made(folder, _bytes(), tokenizer, _FAST)
    elif isinstance(tokenizer, Subwords) and tokenizer.name == "gpt2":
        _write_gpt2(folder, tokenizer, n_vocab)
    elif isinstance(tokenizer, Subwords) and tokenizer.files:
        _copy(folder, tokenizer)
    else:
        raise DataError(f"tokenizer {tokenizer.name} has no tokenizer.json that could be copied")
    ids = special_ids(tokenizer, n_vocab, start_id=start_id)
    start = {} if start_id is None else {"decoder_start_token_id": start_id}
    drawn = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P}
    drawn["top_k"] = 0  # off; left out it would be 50
    said = _beside(tokenizer, _GENERATION) or drawn
    lacking = {name for name in _IDS if said.get(name) is not None} - ids.keys()
    kept = {name: value for name, value in said.items() if name not in lacking}
    _write_json(folder, _GENERATION, {**kept, **ids, **start})


def special_ids(
    tokenizer: Tokenizer, n_vocab: int, *, start_id: int | None = None
) -> dict[str, Any]:
    """Say which tokens begin, end and pad texts, for config.json and generation_config.json alike.

    These files of a model, beside its tokenizer's, say it first; else, or where the vocabulary has
    none of what they say, the tokenizer does. Padding is named only where a model has some of its
    own: PyTorch learns nothing of a token that pads.

    Args:
        n_vocab, start_id: As for `write`.

    Returns:
        bos_token_id, eos_token_id (an id, or a list of them) and pad_token_id, as far as they are
        known and in the vocabulary.

    Raises:
        DataError: A file beside the tokenizer's is damaged.
    """
    ids: dict[str, Any] = {_EOS: tokenizer.eot_id}
    if start_id is None:
        ids[_BOS] = borders.first_id(tokenizer)
    for name in (_MODEL, _GENERATION):
        said = _beside(tokenizer, name)
        ids |= _held({key: said.get(key) for key in _IDS}, n_vocab)
    if start_id is not None:
        ids[_PAD] = start_id
    return _held(ids, n_vocab)


def _held(ids: Mapping[str, Any], n_vocab: int) -> dict[str, Any]:
    """Return the ids that the vocabulary has, of a list those of it, under keys that have any."""
    held: dict[str, Any] = {}
    for key, said in ids.items():
        listed = said if isinstance(said, list) else [said]
        if kept := [it for it in listed if type(it) is int and 0 <= it < n_vocab]:
            held[key] = kept if isinstance(said, list) else kept[0]
    return held


def _beside(tokenizer: Tokenizer, name: str) -> dict[str, Any]:
    """Read a file of the model that a tokenizer's files lie beside; empty if there is none."""
    files = tokenizer.files if isinstance(tokenizer, Subwords) else ()
    path = files[0].with_name(name) if files else None
    if path is None or not path.is_file():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not a JSON object: {error}") from error
    if not isinstance(said, dict):
        raise DataError(f"{path} is not a JSON object: it holds {said!r}")
    return said


def _bytes() -> tokenizers.Tokenizer:
    """Make a tokenizer whose ids are bytes: byte-level BPE that merges nothing."""
    model = BPE(vocab={name: byte for byte, name in byte_alphabet().items()}, merges=[])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevelDecoder()
    return backend


def _write_gpt2(folder: str, tokenizer: Subwords, n_vocab: int) -> None:
    """Write GPT-2's files, those that older releases of `transformers` read too."""
    vocabulary, merges = tokenizer.files
    model = BPE.from_file(str(vocabulary), str(merges))
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    n_more = n_vocab - tokenizer.n_tokens
    more = [f"<|extratoken_{i}|>" for i in range(1, n_more + 1)]
    _write_made(folder, backend, tokenizer, "GPT2Tokenizer", more)
    for name, file in (("vocab.json", vocabulary), ("merges.txt", merges)):
        storage.write_bytes_atomically(storage.join(folder, name), file.read_bytes())


def _write_made(
    folder: str,
    backend: tokenizers.Tokenizer,
    tokenizer: Tokenizer,
    tokenizer_class: str,
    more: list[str] | None = None,
) -> None:
    """Write a tokenizer that has no tokenizer.json yet, and more special tokens after its own."""
    special = [tokenizer.eot_text, *(more or [])]
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    about = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(backend.token_to_id(text)): {"content": text, **about, "special": True}
        for text in special
    }
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), tokenizer.eot_text)
    config = {
        "tokenizer_class": tokenizer_class,
        "added_tokens_decoder": added,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **ends,
    }
    storage.write_text_atomically(storage.join(folder, "tokenizer.json"), backend.to_str())
    _write_json(folder, "tokenizer_config.json", config)
    _write_json(folder, "special_tokens_map.json", ends)


def check(tokenizer: Tokenizer, n_vocab: int) -> None:
    """Refuse a tokenizer that cannot be this model's; known before anything is written.

    Raises:
        DataError: The tokenizer has more ids than the model.
    """
    if tokenizer.n_tokens > n_vocab:
        raise DataError(
            f"tokenizer {tokenizer.name} has {tokenizer.n_tokens} ids, the model's vocabulary "
            f"{n_vocab} (n_vocab); name the tokenizer that the model was trained with"
        )


def _copy(folder: str, tokenizer: Subwords) -> None:
    """Copy the files that a tokenizer was loaded from, and what `transformers` reads beside them.

    SentencePiece's own file, the words of older releases, and templates of chats.
    """
    file, config = tokenizer.files
    storage.write_bytes_atomically(storage.join(folder, "tokenizer.json"), file.read_bytes())
    if config.is_file():
        target = storage.join(folder, "tokenizer_config.json")
        storage.write_bytes_atomically(target, config.read_bytes())
    else:
        about = {"tokenizer_class": _FAST, "eos_token": tokenizer.eot_text}
        _write_json(folder, "tokenizer_config.json", about)
    templates = sorted(file.with_name(storage.TEMPLATES).glob("*.jinja"))
    for beside in (*map(file.with_name, _COPIED), *templates):
        if beside.is_file():
            target = storage.join(folder, beside.relative_to(file.parent).as_posix())
            storage.write_bytes_atomically(target, beside.read_bytes())


def _write_json(folder: str, name: str, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    storage.write_text_atomically(storage.join(folder, name), text)
