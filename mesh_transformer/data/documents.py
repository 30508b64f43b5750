"""Reading text: files of every layout that people keep corpora in, as a stream of documents.

The layers of a file (xz, gzip, zstandard, tar) are recognised by their first bytes; what is inside
is JSON lines if its name says so, and else plain text. No more than a piece of a document, or one
line of JSON, is in memory at a time.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import io
import itertools
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from mesh_transformer.data import DataError

SUFFIXES = (".txt", ".jsonl", ".jsonl.zst", ".xz", ".tar.gz")

# What is read from a file at once, in bytes: small, since a block may unpack to a thousandfold.
_BLOCK = 1 << 18

_TRUNCATED = "its compressed data ends too early: the file is truncated; copy or download it again"

# The last place where GPT-2's tokenizer always begins a new token: before a single white space
# between two words, at best a line's end.
_BORDERS = (re.compile(r".*\S(?=\n\S)", re.DOTALL), re.compile(r".*\S(?= \S)", re.DOTALL))


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of a long one.

    Attributes:
        text: The text, never empty.
        place: The file and the line where it begins, for messages.
        ends: Whether the document ends here.
        begins: Whether it begins here.
    """

    text: str
    place: str
    ends: bool
    begins: bool = True


def find_files(path: Path) -> list[Path]:
    """List the input files that `path` means: itself, or the folder's files of known types, sorted.

    Raises:
        DataError: There is nothing to read.
    """
    known = ", ".join(SUFFIXES)
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.name.endswith(SUFFIXES) and f.is_file())
        if not files:
            raise DataError(
                f"{path}: this folder holds no file of a known type ({known}); "
                "files in folders inside it are not looked at"
            )
        return files
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: not a known type of file ({known}); end a text's name in .txt")
    return [path]


def read(
    path: Path,
    separator: str | None,
    longest: int = 1 << 20,
    advance: Callable[[int], object] = lambda n_bytes: None,
) -> Iterator[Piece]:
    """Yield the documents of a file in order, empty ones left out.

    Args:
        path: The file.
        separator: The string that ends a document inside a text (None: there is none).
        longest: A document of more characters comes in several pieces, cut at a white space.
        advance: Is told the number of bytes of each block read from the file.

    Raises:
        DataError: The file is damaged; the message names the file and the line.
    """

    begins = True
    for texts, place, line in _texts(_blocks(path, advance), str(path), path.name):
        for piece in _pieces(texts, separator, longest, place, line):
            yield dataclasses.replace(piece, begins=begins)
            begins = piece.ends


def read_pairs(
    path: Path, advance: Callable[[int], object] = lambda n_bytes: None
) -> Iterator[Piece]:
    """Yield the inputs and outputs of a file of JSON lines: one of each in turn, empty ones too.

    Args:
        path: Its lines are objects with a string "in_text" and a string "out_text".
        advance: As for `read`.

    Raises:
        DataError: The file is damaged, or holds something else; the message names the line.
    """
    for blocks, inside, name in _unpacked(_blocks(path, advance), str(path), path.name):
        if not name.endswith(".jsonl"):
            raise DataError(
                f"{inside}: pairs are lines of JSON with in_text and out_text; needed is a .jsonl"
            )
        for value, number, line in _json_values(blocks, inside):
            place = f"{inside}:{number}"
            for key in ("in_text", "out_text"):
                text = value.get(key) if isinstance(value, dict) else None
                if not isinstance(text, str):
                    raise DataError(
                        f'{place}: needed an object with the strings "in_text" and "out_text", '
                        f"found {_shown(line)}"
                    )
                _check_encodable(text, place)
                # What a decoder is fed begins with padding, not as a document does.
                yield Piece(text, place, ends=True, begins=key == "in_text")


def _blocks(path: Path, advance: Callable[[int], object]) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            advance(len(block))
            yield block


_Texts = Iterator[tuple[Iterable[str], str, int]]


def _texts(blocks: Iterator[bytes], place: str, name: str) -> _Texts:
    """Unpack every layer; yield each text inside as its parts, its place and its first line."""
    for inner, inside, inner_name in _unpacked(blocks, place, name):
        if inner_name.endswith(".jsonl"):
            yield from _json_lines(inner, inside)
        else:
            yield _decoded(inner, inside), inside, 1


_Files = Iterator[tuple[Iterator[bytes], str, str]]


def _unpacked(blocks: Iterator[bytes], place: str, name: str) -> _Files:
    """Unpack every layer; yield blocks, place and name of each file, to be read before the next."""
    head = b""
    while len(head) < 512 and (block := next(blocks, b"")):
        head += block
    blocks = itertools.chain([head], blocks)
    if decompressor := _decompressor(head):
        inner = _decompressed(blocks, decompressor, place)
        yield from _unpacked(inner, place, re.sub(r"\.(xz|gz|zst)$", "", name))
    elif head[257:262] == b"ustar" or name.endswith(".tar"):
        yield from _tar(blocks, place)
    elif name.endswith((".xz", ".gz", ".zst")):
        raise DataError(f"{place}: its content is not what its name says: no compressed data")
    else:
        yield blocks, place, name


def _decompressor(head: bytes) -> Callable[[], Any] | None:
    if head.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMADecompressor
    if head.startswith(b"\x1f\x8b"):
        return lambda: zlib.decompressobj(wbits=31)
    if head.startswith(b"\x28\xb5\x2f\xfd") or re.match(rb"[\x50-\x5f]\x2a\x4d\x18", head):
        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
    return None


def _decompressed(blocks: Iterator[bytes], new: Callable[[], Any], place: str) -> Iterator[bytes]:
    """Unpack streams that follow one another, as parallel compressors write them."""
    stream = None
    try:
        for block in blocks:
            while block := block if stream else block.lstrip(b"\0"):
                stream = stream or new()
                if unpacked := stream.decompress(block):
                    yield unpacked
                block = b""
                if stream.eof:
                    block, stream = stream.unused_data, None
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise DataError(f"{place}: its compressed data is damaged: {error}") from error
    if stream is not None:
        raise DataError(f"{place}: {_TRUNCATED}")


class _File(io.RawIOBase):
    """Blocks of bytes as a file that can be read from."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        n = min(len(buffer), len(self._rest))
        buffer[:n] = self._rest[:n]
        self._rest = self._rest[n:]
        return n


def _tar(blocks: Iterator[bytes], place: str) -> _Files:
    file = io.BufferedReader(_File(blocks))
    try:
        with tarfile.open(fileobj=file, mode="r|") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None:
                    parts = iter(functools.partial(content.read, _BLOCK), b"")
                    yield from _unpacked(parts, f"{place}: {member.name}", member.name)
        while file.read(_BLOCK):  # to the end, where compressed data has its checksum
            pass
    except tarfile.TarError as error:
        raise DataError(f"{place}: the tar archive is damaged: {error}") from error


def _json_lines(blocks: Iterator[bytes], place: str) -> _Texts:
    """Read lines that are a string, or an object whose "text" is a string or its paragraphs."""
    for value, number, line in _json_values(blocks, place):
        text = value.get("text") if isinstance(value, dict) else value
        if isinstance(text, list) and all(isinstance(part, str) for part in text):
            text = "\n\n".join(text)
        if not isinstance(text, str):
            raise DataError(
                f'{place}:{number}: needed a JSON string or an object with a string "text", '
                f"found {_shown(line)}"
            )
        _check_encodable(text, f"{place}:{number}")
        yield [text], place, number


def _json_values(blocks: Iterator[bytes], place: str) -> Iterator[tuple[Any, int, bytes]]:
    """Yield the value of each line that is not empty, its number, and the line."""
    for number, line in enumerate(io.BufferedReader(_File(blocks)), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}:{number}: not a line of JSON: {error}") from error
        yield value, number, line


def _check_encodable(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: half a surrogate pair: {error}") from error


def _shown(line: bytes) -> str:
    return repr(line[:60].decode(errors="replace"))


def _decoded(blocks: Iterator[bytes], place: str) -> Iterator[str]:
    """Decode UTF-8, without byte order mark, and make every line end a newline."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    line = 1
    for block in itertools.chain(blocks, [b""]):
        try:
            text = utf8.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            raise DataError(
                f"{place}:{line}: not UTF-8 text: byte 0x{error.object[error.start]:02x} "
                f"({error.reason}); convert the file, for example with iconv"
            ) from error
        line += text.count("\n")
        yield newlines.decode(text, final=not block)


def _pieces(
    parts: Iterable[str], separator: str | None, longest: int, place: str, line: int
) -> Iterator[Piece]:
    """Cut a text that comes in parts at each separator, and documents that are too long."""
    rest = ""
    for part in parts:
        *documents, rest = (rest + part).split(separator) if separator else [rest + part]
        for document in documents:
            yield from _cut(document, longest, place, line)
            line += f"{document}{separator}".count("\n")
        pieces = list(_cut(rest, longest, place, line))
        yield from pieces[:-1]
        for piece in pieces[:-1]:
            line += piece.text.count("\n")
            rest = rest[len(piece.text) :]
    if rest:
        yield Piece(rest, f"{place}:{line}", ends=True)


def _cut(document: str, longest: int, place: str, line: int) -> Iterator[Piece]:
    begin = 0
    while len(document) - begin > longest:
        # Not all of the piece is searched; and a separator of which only the beginning is in the
        # text so far stays whole.
        window = begin + longest // 2, begin + longest - longest // 8
        border = next(filter(None, (b.match(document, *window) for b in _BORDERS)), None)
        end = border.end() if border else window[1]
        yield Piece(document[begin:end], f"{place}:{line}", ends=False)
        line += document.count("\n", begin, end)
        begin = end
    if document:
        yield Piece(document[begin:], f"{place}:{line}", ends=True)
