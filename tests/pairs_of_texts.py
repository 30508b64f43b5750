"""Pairs of texts, and a tokenizer made as T5's is, for tests of an encoder and its decoder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import tokenizers
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace

PAD_ID, EOS_ID, N_TOKENS = 0, 1, 30


def write_tokenizer(folder: Path) -> str:
    """Write a SentencePiece-like unigram tokenizer of small letters, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    special = [(name, 0.0) for name in ("<pad>", "</s>", "<unk>")]
    letters = [(letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    backend = tokenizers.Tokenizer(Unigram(special + letters, unk_id=2, byte_fallback=False))
    backend.pre_tokenizer = Metaspace()
    backend.decoder = MetaspaceDecoder()
    backend.add_special_tokens([name for name, _ in special])
    backend.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    about |= {"pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return str(folder)


def write(path: Path, pairs: Mapping[str, str] | Iterable[tuple[str, str]]) -> Path:
    """Write inputs and outputs as lines of JSON."""
    given = pairs.items() if isinstance(pairs, Mapping) else pairs
    lines = [json.dumps({"in_text": source, "out_text": target}) for source, target in given]
    path.write_text("\n".join(lines) + "\n")
    return path
