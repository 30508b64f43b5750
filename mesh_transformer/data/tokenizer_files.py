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
from mesh_transformer.data import DataError
from mesh_transformer.data.tokenizer import Bytes, Subwords, Tokenizer, byte_alphabet

TEMPERATURE, TOP_P = 0.75, 0.9
"""How `generate` draws unless told otherwise: as device_sample.py does."""

_GENERATION = "generation_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_FAST = "PreTrainedTokenizerFast"
_COPIED = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")


def write(folder: str, tokenizer: Tokenizer, n_vocab: int, *, start_id: int | None = None) -> None:
    """Write a tokenizer's files, and generation_config.json, into a folder that is there.

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
    _write_json(folder, _GENERATION, _generation(tokenizer, start_id))


def _generation(tokenizer: Tokenizer, start_id: int | None) -> dict[str, Any]:
    """Say how a model generates: by the ids that its own folder names, if it is the tokenizer's."""
    begin_id = tokenizer.eot_id if tokenizer.bos_id is None else tokenizer.bos_id
    ids = {"eos_token_id": tokenizer.eot_id, "pad_token_id": tokenizer.eot_id}
    if start_id is None:
        ids |= {"bos_token_id": begin_id, **_own_ids(tokenizer)}
    else:
        ids |= _own_ids(tokenizer) | {"decoder_start_token_id": start_id, "pad_token_id": start_id}
    return {
        **ids,
        "do_sample": True,
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "top_k": 0,  # off; left out it would be 50
    }


def _own_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    files = tokenizer.files if isinstance(tokenizer, Subwords) else ()
    beside = [file.with_name(_GENERATION) for file in files]
    if not beside or not beside[0].is_file():
        return {}
    try:
        said = json.loads(beside[0].read_text(encoding="utf-8"))
        return {name: said[name] for name in _IDS if said.get(name) is not None}
    except (ValueError, AttributeError) as error:
        raise DataError(f"{beside[0]} is not a JSON object: {error}") from error


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
    """Copy the files that a tokenizer was loaded from."""
    file, config = tokenizer.files
    storage.write_bytes_atomically(storage.join(folder, "tokenizer.json"), file.read_bytes())
    if config.is_file():
        target = storage.join(folder, "tokenizer_config.json")
        storage.write_bytes_atomically(target, config.read_bytes())
    else:
        about = {"tokenizer_class": _FAST, "eos_token": tokenizer.eot_text}
        _write_json(folder, "tokenizer_config.json", about)
    for name in _COPIED:
        beside = file.with_name(name)
        if beside.is_file():
            storage.write_bytes_atomically(storage.join(folder, name), beside.read_bytes())


def _write_json(folder: str, name: str, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    storage.write_text_atomically(storage.join(folder, name), text)
